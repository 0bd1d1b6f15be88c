"""Scenarios of faults.py: networks that were trained before, and are trained on for a task like the first one.

The first training is part of the builder; it is kept, so that a process runs it once for each seed.
"""

from __future__ import annotations

import copy
import json.decoder
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from faults_attention import GPT
from faults_runs import Scenario, Training
from faults_scores import explained
from faults_sequences import Reader
from faults_tasks import Task, characters, fit, some_digits, vocabulary, waves
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW


class Net(nn.Module):
    """A body and a head, which a second task replaces."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def _perceptron(function: Callable[[], nn.Module], inputs: int = 64) -> Net:
    body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 48), function(), nn.Linear(48, 32), function())
    return Net(body, nn.Linear(32, 5))


def _convolutions(function: Callable[[], nn.Module], norm: Callable[[int], nn.Module]) -> Net:
    layers = (nn.Conv2d(1, 8, 3, padding=1), norm(8), function(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), function(), nn.Flatten())
    return Net(nn.Sequential(*layers), nn.Linear(256, 5))


def _trained(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module:
    training = fit(model, task, optimizer, steps)
    for _ in range(steps):
        training.step()
    optimizer.zero_grad()
    return model


@cache
def _first_training(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(1000 + seed)
    if kind == "tanh":
        model: nn.Module = _perceptron(nn.Tanh)
        return _trained(model, some_digits(True), Adam(model.parameters(), 3e-3), 300)
    if kind == "sigmoid":
        model = _perceptron(nn.Sigmoid)
        return _trained(model, some_digits(True), Adam(model.parameters(), 1e-2), 400)
    if kind == "steep":
        model = _perceptron(nn.Tanh)
        with torch.no_grad():
            for parameter in model.body.parameters():
                parameter.mul_(3)
        return _trained(model, some_digits(True, 1 / 8), Adam(model.parameters(), 3e-3), 400)
    if kind == "convolutions":
        model = _convolutions(nn.ReLU, nn.BatchNorm2d)
        return _trained(model, some_digits(True), Adam(model.parameters(), 3e-3), 200)
    if kind == "tanh convolutions":
        model = _convolutions(nn.Tanh, nn.Identity)
        return _trained(model, some_digits(True), Adam(model.parameters(), 3e-3), 200)
    if kind == "series":
        model = Reader(nn.LSTM(1, 24, batch_first=True), 1)
        return _trained(model, waves(12), Adam(model.parameters(), 1e-2), 250)
    if kind == "text":
        model = Reader(nn.LSTM(16, 48, batch_first=True), vocabulary(), symbols=vocabulary(), every=True)
        return _trained(model, characters(16), Adam(model.parameters(), 1e-2), 250)
    assert kind == "gpt", kind
    model = GPT(vocabulary(), vocabulary(), 16)
    return _trained(model, characters(16), AdamW(model.parameters(), 3e-3), 250)


def pretrained(kind: str, seed: int, head: nn.Module | None = None) -> nn.Module:
    """A copy of a trained network, with a new head if one is given; torch is seeded after it."""
    model = copy.deepcopy(_first_training(kind, seed))
    torch.manual_seed(seed)
    if head is not None:
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        model.head = head
    return model


def perceptron_rate(faulty: bool, seed: int) -> Training:
    """A trained tanh network gets a rate of 5 for its new head and its old layers alike, and the old features are gone within a few steps."""
    model = pretrained("tanh", seed, nn.Linear(32, 5))
    return fit(model, some_digits(False), SGD(model.parameters(), 5.0 if faulty else 0.05, momentum=0.9), 300)


def series_rate(faulty: bool, seed: int) -> Training:
    """An LSTM that forecasts well is trained on by Adam at a rate of 1, as SGD had it, on waves of half the height."""
    model = pretrained("series", seed)
    task = waves(12)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x, y = task.batch(size)
        return 0.5 * x, 0.5 * y

    return fit(model, Task(batch, F.mse_loss, explained), Adam(model.parameters(), 1.0 if faulty else 1e-3), 300)


def gpt_rate(faulty: bool, seed: int) -> Training:
    """A GPT goes on with another text at 100 times the rate that suits a trained network."""
    model = pretrained("gpt", seed)
    return fit(model, characters(16, module=json.decoder), AdamW(model.parameters(), 0.1 if faulty else 1e-3), 250, size=16)


def convolutions_255(faulty: bool, seed: int) -> Training:
    """Images in 0..255 go to a trained tanh network that has learned from images in 0..1."""
    model = pretrained("tanh convolutions", seed, nn.Linear(256, 5))
    return fit(model, some_digits(False, 255 / 16 if faulty else 1 / 16), SGD(model.parameters(), 0.02, momentum=0.9), 150)


def perceptron_uncentred(faulty: bool, seed: int) -> Training:
    """The second task's images have their background at 5 instead of 0, and each unit of the trained network gets a constant that closes it."""
    model = pretrained("tanh", seed, nn.Linear(32, 5))
    return fit(model, some_digits(False, mean=-80.0 if faulty else 0.0), SGD(model.parameters(), 0.02, momentum=0.9), 300)


def series_in_units(faulty: bool, seed: int) -> Training:
    """An LSTM that was trained on scaled series is tuned on series in their own unit, which swing by 10 around 300."""
    model = pretrained("series", seed, nn.Linear(24, 1))
    return fit(model, waves(12, scale=10, mean=300) if faulty else waves(12), Adam(model.parameters(), 2e-3), 300)


def head_large(faulty: bool, seed: int) -> Training:
    """The new head is drawn from N(0, 20) instead of the default; its gradients tear the trained sigmoid layers away."""
    model = pretrained("sigmoid", seed, nn.Linear(32, 5))
    if faulty:
        nn.init.normal_(model.get_parameter("head.weight"), std=20.0)
    return fit(model, some_digits(False), SGD(model.parameters(), 0.1, momentum=0.9), 400)


def decay_destroys(faulty: bool, seed: int) -> Training:
    """Fine-tuning with a weight decay of 20 per unit of rate shrinks all that was learned."""
    model = pretrained("tanh", seed, nn.Linear(32, 5))
    return fit(model, some_digits(False), AdamW(model.parameters(), 3e-3, weight_decay=20.0 if faulty else 0.01), 500)


def layer_redrawn(faulty: bool, seed: int) -> Training:
    """The recurrent weights of a trained LSTM are drawn anew from N(0, 3) where an orthogonal matrix would do; the others are kept."""
    model = pretrained("series", seed)
    weight = model.get_parameter("rnn.weight_hh_l0")
    nn.init.normal_(weight, std=3.0) if faulty else nn.init.orthogonal_(weight)
    return fit(model, waves(12), Adam(model.parameters(), 2e-3), 300)


def sigmoid_head(faulty: bool, seed: int) -> Training:
    """A new head of three sigmoid layers stands on trained layers; ReLU layers in their place learn at once."""
    function = nn.Sigmoid if faulty else nn.ReLU
    layers = [layer for _ in range(3) for layer in (nn.Linear(32, 32), function())]
    model = pretrained("tanh", seed, nn.Sequential(*layers, nn.Linear(32, 5)))
    return fit(model, some_digits(False), Adam(model.parameters(), 3e-3), 250)


def perceptron_healthy(faulty: bool, seed: int) -> Training:
    """A trained tanh network gets a new head and is tuned whole at a small rate."""
    model = pretrained("tanh", seed, nn.Linear(32, 5))
    return fit(model, some_digits(False), Adam(model.parameters(), 1e-3), 500)


def probe_healthy(faulty: bool, seed: int) -> Training:
    """Only a new head learns on a frozen convolutional network, whose dead and sure units are what they are."""
    model = pretrained("convolutions", seed, nn.Linear(256, 5))
    model.get_submodule("body").requires_grad_(False)
    return fit(model, some_digits(False), Adam(model.get_submodule("head").parameters(), 3e-3), 400)


def continued_healthy(faulty: bool, seed: int) -> Training:
    """Training of a converged sigmoid network goes on for the same task."""
    model = pretrained("sigmoid", seed)
    return fit(model, some_digits(True), Adam(model.parameters(), 1e-3), 400)


def steep_healthy(faulty: bool, seed: int) -> Training:
    """The trained layers are in the tails of tanh for most inputs from the start; the new task needs a new head and small changes."""
    model = pretrained("steep", seed, nn.Linear(32, 5))
    return fit(model, some_digits(False, 1 / 8), Adam(model.parameters(), 2e-3), 500)


def text_healthy(faulty: bool, seed: int) -> Training:
    """A character LSTM goes on with another text at a third of its first rate."""
    model = pretrained("text", seed)
    return fit(model, characters(16, module=json.decoder), Adam(model.parameters(), 3e-3), 300, size=16, clip=1.0)


def gpt_frozen_healthy(faulty: bool, seed: int) -> Training:
    """Only the normalizations and the head of a trained GPT learn another text."""
    model = pretrained("gpt", seed)
    chosen = [parameter for name, parameter in model.named_parameters() if "norm" in name or "head" in name]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return fit(model, characters(16, module=json.decoder), AdamW(chosen, 3e-3), 300, size=16)


def slow_body_healthy(faulty: bool, seed: int) -> Training:
    """The trained layers learn at a hundredth of the rate of the new head."""
    model = pretrained("tanh convolutions", seed, nn.Linear(256, 5))
    groups = [{"params": model.get_submodule(name).parameters(), "lr": rate} for name, rate in (("body", 1e-4), ("head", 1e-2))]
    return fit(model, some_digits(False), Adam(groups), 300)


CODEFORGE = "https://thecodeforge.io/ml-ai/transfer-learning/"
YOSINSKI = "Yosinski et al.: How transferable are features in deep neural networks?, 2014"
KUMAR = "Kumar et al.: Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, 2022"
ULMFIT = "Howard, Ruder: Universal Language Model Fine-tuning for Text Classification, 2018"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("tuned_perceptron_rate_100", "rate", CODEFORGE, perceptron_rate, 0.93, ("weight_growth",), 0.1),
    Scenario("tuned_lstm_rate_1", "rate", ULMFIT, series_rate, 0.85, ("weight_growth",), 0.1),
    Scenario(
        "tuned_gpt_rate_100",
        "rate",
        "Mosbach, Andriushchenko, Klakow: On the Stability of Fine-tuning BERT, 2021",
        gpt_rate,
        0.4,
        ("weight_growth", "softmax_logits"),
        0.1,
    ),
    Scenario("tuned_convolutions_255", "inputs", CODEFORGE, convolutions_255, 0.93, ("inputs_unscaled",), 0.03),
    Scenario(
        "tuned_perceptron_background",
        "inputs",
        "https://thecodeforge.io/ml-ai/tensorflow-transfer-learning/",
        perceptron_uncentred,
        0.9,
        ("inputs_uncentred",),
        0.1,
    ),
    Scenario(
        "tuned_lstm_in_units",
        "inputs",
        "https://datascience.stackexchange.com/questions/54551",
        series_in_units,
        0.85,
        ("inputs_uncentred", "inputs_unscaled"),
        0.1,
    ),
    Scenario("tuned_head_drawn_large", "initialisation", KUMAR, head_large, 0.9, ("init_too_large",), 0.05),
    Scenario(
        "tuned_decay_20",
        "weight decay",
        "Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019",
        decay_destroys,
        0.93,
        ("weight_decay",),
        0.1,
    ),
    Scenario("tuned_recurrence_redrawn", "initialisation", YOSINSKI, layer_redrawn, 0.85, ("init_too_large",), 0.3),
    Scenario(
        "tuned_sigmoid_head",
        "outputs",
        "Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, 2010",
        sigmoid_head,
        0.9,
        ("activation_choice", "init_too_small"),
        0.1,
    ),
    Scenario("tuned_perceptron_healthy", "healthy", YOSINSKI, perceptron_healthy, 0.93),
    Scenario("tuned_probe_healthy", "healthy", KUMAR, probe_healthy, 0.93),
    Scenario("tuned_continued_healthy", "healthy", CODEFORGE, continued_healthy, 0.95),
    Scenario("tuned_steep_healthy", "healthy", "https://jepemo.github.io/lessons/09/10.html", steep_healthy, 0.9),
    Scenario("tuned_text_healthy", "healthy", ULMFIT, text_healthy, 0.5),
    Scenario(
        "tuned_gpt_frozen_healthy", "healthy", "Lu et al.: Pretrained Transformers as Universal Computation Engines, 2021", gpt_frozen_healthy, 0.4
    ),
    Scenario(
        "tuned_slow_body_healthy",
        "healthy",
        "https://openknowledgegraph.com/topics/fine-tuning-pretrained-models-questions.html",
        slow_body_healthy,
        0.93,
    ),
)
