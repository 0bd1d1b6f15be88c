"""Scenarios of faults.py: output functions of regressions and classifiers, and the targets that are asked of them."""

from __future__ import annotations

import math

import torch
from faults_runs import Scenario, Training
from faults_scores import accuracy, explained
from faults_supervised import agreement, digits, split, stacked, standard, supervised, tabular
from torch import Tensor, nn
from torch.nn import functional as F


def sigmoid_percent(faulty: bool, seed: int) -> Training:
    """A score from 25 to 346 is asked of a sigmoid output. The twin divides the targets by their largest value."""
    torch.manual_seed(seed)
    x, y = tabular("diabetes")
    y = y.float()[:, None] / (1.0 if faulty else 346.0)
    model = stacked([10, 20, 1], nn.Sigmoid, nn.Sigmoid())
    return supervised(model, torch.optim.Adam(model.parameters(), 1e-2), split(x, y), F.mse_loss, explained, 600, 32, seed)


def tanh_class_numbers(faulty: bool, seed: int) -> Training:
    """The class numbers 1 to 3 are asked of a tanh output. The twin asks for -0.8, 0 and 0.8."""
    torch.manual_seed(seed)
    x, y = tabular("iris")
    model = stacked([4, 8, 1], nn.Tanh, nn.Tanh())
    targets = y.float()[:, None] + 1 if faulty else (y.float()[:, None] - 1) * 0.8
    marks = torch.tensor([1.0, 2.0, 3.0]) if faulty else torch.tensor([-0.8, 0.0, 0.8])

    def nearest(output: Tensor, target: Tensor) -> float:
        return float(((output - marks).abs().argmin(1) == (target - marks).abs().argmin(1)).float().mean())

    return supervised(model, torch.optim.SGD(model.parameters(), 0.05), split(x, targets), F.mse_loss, nearest, 800, 8, seed)


class Signed(nn.Module):
    """The sine of a sum, from a sigmoid or from a tanh output that is called as a method of the tensor."""

    def __init__(self, squash: str) -> None:
        super().__init__()
        self.hidden, self.out, self.squash = nn.Linear(4, 16), nn.Linear(16, 1), squash

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.out(torch.tanh(self.hidden(x)))
        return a.sigmoid() if self.squash == "sigmoid" else a.tanh()


def sigmoid_negative_values(faulty: bool, seed: int) -> Training:
    """Sines, half of which are negative, are asked of a sigmoid output. The twin has a tanh output."""
    torch.manual_seed(seed)
    x = torch.randint(-1, 2, (800, 4)).float()
    model = Signed("sigmoid" if faulty else "tanh")
    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), split(x, x.sum(1, keepdim=True).sin()), F.mse_loss, explained, 800, 16, seed)


class Rectified(nn.Module):
    """A regression whose last function is a ReLU, where that is wanted."""

    def __init__(self, rectified: bool, inputs: int = 10, width: int = 64) -> None:
        super().__init__()
        self.first, self.second, self.out, self.rectified = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 1), rectified

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.out(F.relu(self.second(F.relu(self.first(x)))))
        return F.relu(a) if self.rectified else a


def relu_standardised_targets(faulty: bool, seed: int) -> Training:
    """The targets are standardised and half of them negative, but the output function is a ReLU. The twin has a linear output."""
    torch.manual_seed(seed)
    x, y = tabular("diabetes")
    model = Rectified(faulty)
    data = split(x, standard(y.float()[:, None]))
    return supervised(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), data, F.mse_loss, explained, 300, 32, seed)


def double_softmax(faulty: bool, seed: int) -> Training:
    """A softmax stands before CrossEntropyLoss, which has one of its own. The twin gives the loss its logits."""
    torch.manual_seed(seed)
    x, y = digits()
    model = stacked([64, 32, 10], nn.ReLU, *([nn.Softmax(dim=1)] if faulty else []))
    return supervised(model, torch.optim.SGD(model.parameters(), 0.1), split(x, y), F.cross_entropy, accuracy, 700, 64, seed)


def double_sigmoid(faulty: bool, seed: int) -> Training:
    """A sigmoid stands before BCEWithLogitsLoss, whose own sigmoid then never falls below one half. The twin gives the loss its logits."""
    torch.manual_seed(seed)
    x, y = tabular("breast_cancer")
    model = stacked([30, 16, 8, 1], nn.ReLU, *([nn.Sigmoid()] if faulty else []))

    def sure(output: Tensor, target: Tensor) -> float:
        return -float(F.binary_cross_entropy_with_logits(output, target))

    data = split(x, y.float()[:, None])
    return supervised(model, torch.optim.Adam(model.parameters(), 3e-3), data, F.binary_cross_entropy_with_logits, sure, 600, 16, seed)


def relu_on_logits(faulty: bool, seed: int) -> Training:
    """A ReLU stands between the last layer and CrossEntropyLoss, and logits that fall below 0 are lost. The twin has no ReLU there."""
    torch.manual_seed(seed)
    x, y = digits()
    model = stacked([64, 64, 10], nn.ReLU, *([nn.ReLU()] if faulty else []))
    return supervised(model, torch.optim.SGD(model.parameters(), 0.2), split(x, y), F.cross_entropy, accuracy, 500, 32, seed)


class Neuron(nn.Module):
    """One sigmoid neuron with one weight and one offset of its own."""

    def __init__(self, weight: float, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.weight * x + self.bias)


def one_neuron_far_off(faulty: bool, seed: int) -> Training:
    """One neuron shall learn to give 0 for 1 under the quadratic cost, and starts on its upper plateau. The twin starts in the middle."""
    torch.manual_seed(seed)
    model = Neuron(*((3.0, 3.0) if faulty else (0.6, 0.9)))
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    score = lambda output, target: 1 - float((output - target).abs().mean())  # noqa: E731
    return supervised(model, torch.optim.SGD(model.parameters(), 0.15), (one, zero, one, zero), F.mse_loss, score, 400, None, seed)


def tanh_zero_one_hot_rate(faulty: bool, seed: int) -> Training:
    """Targets 0 and 1 are asked of a tanh output at a rate that drives it into both plateaus. The twin has a tenth of the rate."""
    torch.manual_seed(seed)
    x, y = tabular("breast_cancer")
    model = stacked([30, 10, 1], nn.Tanh, nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 3.0 if faulty else 0.05)
    return supervised(model, optimizer, split(x, y.float()[:, None]), F.mse_loss, agreement, 600, 16, seed)


def plus_minus_one_sigmoid(faulty: bool, seed: int) -> Training:
    """The labels -1 and 1 of a kernel machine are asked of a sigmoid output under the squared error. The twin has labels 0 and 1."""
    torch.manual_seed(seed)
    x, y = tabular("wine")
    labels = (y[:, None] == torch.arange(3)).float()
    model = stacked([13, 12, 3], nn.Tanh, nn.Sigmoid())
    data = split(x, 2 * labels - 1 if faulty else labels)
    return supervised(model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), data, F.mse_loss, explained, 500, 16, seed)


def relu6_ages(faulty: bool, seed: int) -> Training:
    """Ages of 20 to 80 years are asked of a ReLU6 output, which ends at 6. The twin measures the age in decades above two."""
    torch.manual_seed(seed)
    x = torch.randn(800, 6)
    years = 50 + 15 * torch.tanh(x[:, :1] + 0.5 * x[:, 1:2] * x[:, 2:3])
    model = stacked([6, 32, 32, 1], nn.ReLU, nn.ReLU6())
    data = split(x, years if faulty else (years - 20) / 10)
    return supervised(model, torch.optim.Adam(model.parameters(), 3e-3), data, F.mse_loss, explained, 500, 32, seed)


def sine_over_a_long_range(faulty: bool, seed: int) -> Training:
    """A tanh network fits a sine whose argument goes from 0 to 60 as it is. The twin maps the argument to -2..2."""
    torch.manual_seed(seed)
    t = torch.linspace(0, 60, 600)[:, None]
    y = torch.sin(t / 60 * 2 * math.pi * 2)
    model = stacked([1, 32, 32, 1], nn.Tanh)
    x = t if faulty else (t / 30 - 1) * 2
    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), split(x, y), F.smooth_l1_loss, explained, 900, 64, seed)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "output_sigmoid_percent",
        "outputs",
        "https://stackoverflow.com/questions/14982358 (Backpropagation algorithm: output values are saturating to 1)",
        sigmoid_percent,
        0.3,
        ("activation_choice",),
        0.5,
    ),
    Scenario(
        "output_tanh_class_numbers",
        "outputs",
        "https://stackoverflow.com/questions/3644795 (targets 1, 2, 3, 4 for a network whose output is a tanh)",
        tanh_class_numbers,
        0.85,
        ("activation_choice",),
        0.3,
    ),
    Scenario(
        "output_sigmoid_negative_values",
        "outputs",
        "https://stackoverflow.com/questions/5105718 (Multi-layer neural network won't predict negative values)",
        sigmoid_negative_values,
        0.9,
        ("activation_choice",),
        0.3,
    ),
    Scenario(
        "output_relu_standardised_targets",
        "outputs",
        "https://math.stackexchange.com/questions/4483706 (Are ReLU a very bad choice as last layer for regression?)",
        relu_standardised_targets,
        0.2,
        ("activation_choice", "dead_units"),
        0.08,
    ),
    Scenario(
        "output_double_softmax",
        "outputs",
        "https://runebook.dev/en/articles/pytorch/generated/torch.nn.softmax (softmax before CrossEntropyLoss)",
        double_softmax,
        0.9,
        ("activation_choice",),
        0.1,
    ),
    Scenario(
        "output_double_sigmoid",
        "outputs",
        "https://runebook.dev/en/docs/pytorch/generated/torch.nn.functional.sigmoid (sigmoid before BCEWithLogitsLoss)",
        double_sigmoid,
        -0.25,
        ("activation_choice",),
        0.1,
    ),
    Scenario(
        "output_relu_on_logits",
        "outputs",
        "https://ai.stackexchange.com/questions/20686 (Does a net with ReLU not learn when its output is 0?)",
        relu_on_logits,
        0.9,
        ("activation_choice", "dead_units"),
        0.05,
    ),
    Scenario(
        "output_one_neuron_far_off",
        "outputs",
        "Michael Nielsen, Neural Networks and Deep Learning, chapter 3, 2015 (a neuron that is badly wrong learns slowly)",
        one_neuron_far_off,
        0.85,
        ("init_too_large",),
        0.2,
    ),
    Scenario(
        "output_tanh_zero_one_hot_rate",
        "outputs",
        "LeCun, Bottou, Orr and Mueller, Efficient BackProp, 1998, section 4.5 (target values at the asymptotes)",
        tanh_zero_one_hot_rate,
        0.9,
        ("weight_growth",),
        0.05,
    ),
    Scenario(
        "output_plus_minus_one_sigmoid",
        "outputs",
        "https://answerofmath.com/solved-neural-network-for-regression-actual-data-vs-predicted-data/ (targets from below 0 for a sigmoid)",
        plus_minus_one_sigmoid,
        0.7,
        ("activation_choice",),
        0.3,
    ),
    Scenario(
        "output_relu6_ages",
        "outputs",
        "https://stackoverflow.com/questions/9048031 (scaling the output range; here of the ReLU6 that mobile networks use)",
        relu6_ages,
        0.8,
        ("activation_choice",),
        0.5,
    ),
    Scenario(
        "output_sine_over_a_long_range",
        "outputs",
        "https://stackoverflow.com/questions/46995209 (Neural network toy model to fit sine function fails)",
        sine_over_a_long_range,
        0.95,
        ("inputs_unscaled", "inputs_uncentred"),
        0.1,
    ),
)
