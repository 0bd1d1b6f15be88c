"""Scenarios of faults.py: depth and initialisation."""

from __future__ import annotations

from itertools import pairwise

import torch
from faults_runs import Scenario, Training
from faults_trainings import (
    Data,
    adam,
    cancer,
    curve,
    digits,
    draw,
    explained,
    fit,
    kaiming,
    logistic,
    mixture,
    mlp,
    moons,
    sgd,
    waves,
    xavier,
)
from torch import Tensor, nn
from torch.nn import functional as F


def binary_vectors() -> Data:
    """Vectors of 20 bits, and the number that the first eight of them write."""
    bits = (torch.rand(3000, 20, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    value = bits[:, :8] @ torch.tensor([2.0 ** -(k + 1) for k in range(8)])
    return Data(bits[:2400], 3.5 * (value[:2400, None] - 0.5), bits[2400:], 3.5 * (value[2400:, None] - 0.5))


def sigmoid_four(faulty: bool, seed: int) -> Training:
    """Four sigmoid layers pass a 256th of the gradient at best, so that plain gradient descent stays at the mean of the targets."""
    torch.manual_seed(seed)
    model = mlp((20, 100, 100, 100, 100, 1), nn.Sigmoid if faulty else nn.ReLU)
    return fit(model, binary_vectors(), sgd(model, 0.1), 800, seed, loss=F.mse_loss, score=explained)


class Thirty(nn.Module):
    """Three hidden layers of 30, with the activation called as a function."""

    def __init__(self, sigmoid: bool) -> None:
        super().__init__()
        self.one, self.two, self.three, self.out = nn.Linear(64, 30), nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 10)
        self.sigmoid = sigmoid

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two, self.three):
            x = torch.sigmoid(layer(x)) if self.sigmoid else layer(x).tanh()
        return self.out(x)  # type: ignore[no-any-return]


def sigmoid_three(faulty: bool, seed: int) -> Training:
    """With three sigmoid layers the first learns a hundred times slower than the last; the same network with tanh learns at once."""
    torch.manual_seed(seed)
    model = Thirty(faulty)
    return fit(model, digits().standardized(), sgd(model, 0.1), 1200, seed, batch=10)


def sigmoid_eight(faulty: bool, seed: int) -> Training:
    """Eight small sigmoid layers lose the input before the output: momentum finds only the frequencies of the classes."""
    torch.manual_seed(seed)
    model = mlp((30, *8 * (16,), 1), nn.Sigmoid if faulty else nn.ELU)
    return fit(model, cancer().standardized(), sgd(model, 0.02, 0.9), 700, seed, batch=16, loss=logistic)


def hardsigmoid_five(faulty: bool, seed: int) -> Training:
    """The hard sigmoid has a slope of a sixth: five of them in a row pass less than a thousandth of the gradient."""
    torch.manual_seed(seed)
    model = mlp((64, *5 * (48,), 10), nn.Hardsigmoid if faulty else nn.ReLU6)
    return fit(model, digits().standardized(), sgd(model, 0.03, 0.9), 400, seed, batch=32)


def lenet_sigmoid(faulty: bool, seed: int) -> Training:
    """LeNet with sigmoids as in 1998, on the framework's default initialisation and a modest rate, does not leave the chance level."""
    torch.manual_seed(seed)
    act = nn.Sigmoid if faulty else nn.ReLU
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3, padding=1), act(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 3, padding=1), act()),
        *(nn.Flatten(), nn.Linear(256, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10)),
    )
    return fit(model, digits(), sgd(model, 0.1), 900, seed, batch=32)


def tanh_twenty(faulty: bool, seed: int) -> Training:
    """The default initialisation is 1.7 times too small for tanh; after twenty layers nothing of the input is left."""
    torch.manual_seed(seed)
    model = mlp((64, *20 * (64,), 10), nn.Tanh)
    draw(model, None if faulty else lambda weight: nn.init.orthogonal_(weight, 1.1), None if faulty else 0.0)
    return fit(model, digits().standardized(), sgd(model, 0.02, 0.9), 400, seed)


def tanh_thirty_narrow(faulty: bool, seed: int) -> Training:
    """Thirty layers of ten tanh units on the defaults: Adam moves the last layers, and the first see no gradient."""
    torch.manual_seed(seed)
    model = mlp((2, *30 * (10,), 2), nn.Tanh)
    draw(model, None if faulty else lambda weight: nn.init.orthogonal_(weight, 1.1), None if faulty else 0.0)
    return fit(model, moons(), adam(model, 1e-3), 400, seed, batch=128)


def softsign_fifteen(faulty: bool, seed: int) -> Training:
    """Softsign shrinks even small values a little, and the default weights shrink the rest."""
    torch.manual_seed(seed)
    model = draw(mlp((20, *15 * (64,), 4), nn.Softsign), None if faulty else lambda weight: nn.init.orthogonal_(weight, 1.4), None if faulty else 0.0)
    return fit(model, mixture().standardized(), sgd(model, 0.05, 0.9), 500, seed)


def relu_thirty_xavier(faulty: bool, seed: int) -> Training:
    """Thirty rectifier layers with Xavier's weights halve the variance thirty times, and the network stalls at the start."""
    torch.manual_seed(seed)
    model = draw(mlp((64, *30 * (64,), 10), nn.ReLU), xavier if faulty else kaiming)
    return fit(model, digits().standardized(), sgd(model, 0.003, 0.9), 600, seed)


def relu_hundredth(faulty: bool, seed: int) -> Training:
    """Weights of deviation 0.01 are fine for one layer; six of them leave a signal of 1e-7 and a loss of ln 10."""
    torch.manual_seed(seed)
    model = draw(mlp((64, *6 * (100,), 10), nn.ReLU), (lambda weight: nn.init.normal_(weight, std=0.01)) if faulty else kaiming)
    return fit(model, digits(), sgd(model, 0.05, 0.9), 400, seed)


def conv_small(faulty: bool, seed: int) -> Training:
    """A convolutional network of five layers with weights of deviation 0.01 as in AlexNet, without its normalisation, learns nothing."""
    torch.manual_seed(seed)
    blocks = [module for k in range(5) for module in (nn.Conv2d(1 if k == 0 else 12, 12, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10))
    draw(model, (lambda weight: nn.init.normal_(weight, std=0.01)) if faulty else kaiming)
    return fit(model, digits(), sgd(model, 0.02, 0.9), 300, seed, batch=32)


class Own(nn.Module):
    """A network of plain parameters, which no module holds: drawn from the normal distribution, divided by a scale."""

    def __init__(self, sizes: tuple[int, ...], scaled: bool, einsum: bool = False) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(a, b) / (a**0.5 if scaled else 1.0) for a, b in pairs])
        self.biases = nn.ParameterList([torch.zeros(b) for _, b in pairs])
        self.einsum = einsum

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.hardtanh(torch.einsum("bi,io->bo", x, weight) + bias) if self.einsum else torch.tanh(x @ weight + bias)
        return x @ self.weights[-1] + self.biases[-1]  # type: ignore[no-any-return]


def randn_tanh(faulty: bool, seed: int) -> Training:
    """torch.randn for every weight gives pre-activations of deviation 8 to 10: the tanh layers start on their plateaus."""
    torch.manual_seed(seed)
    model = Own((64, 100, 100, 10), not faulty)
    return fit(model, digits().standardized(), sgd(model, 0.1), 500, seed, batch=32)


def einsum_hardtanh(faulty: bool, seed: int) -> Training:
    """The same with einsum and the hard tanh, whose plateaus give no gradient at all."""
    torch.manual_seed(seed)
    model = Own((20, 128, 128, 128, 4), not faulty, einsum=True)
    return fit(model, mixture().standardized(), adam(model, 1e-3), 400, seed)


def randn_sigmoid(faulty: bool, seed: int) -> Training:
    """Weights and biases of deviation 1 in a wide sigmoid network, as in many first programs with numpy, against 1 / sqrt(inputs)."""
    torch.manual_seed(seed)
    model = mlp((64, 256, 256, 10), nn.Sigmoid)
    draw(model, (lambda weight: nn.init.normal_(weight, std=1.0)) if faulty else lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5))
    return fit(model, digits().standardized(), sgd(model, 0.3), 1000, seed, batch=16)


def uniform_one(faulty: bool, seed: int) -> Training:
    """Weights from -1 to 1 suit the three inputs of a first example; with 256 inputs they saturate every layer after the first."""
    torch.manual_seed(seed)
    model = mlp((30, 256, 256, 256, 1), nn.Tanh)
    draw(model, (lambda weight: nn.init.uniform_(weight, -1, 1)) if faulty else lambda weight: nn.init.xavier_uniform_(weight), None)
    return fit(model, cancer().standardized(), sgd(model, 0.02), 400, seed, batch=32, loss=logistic)


def zero_weights(faulty: bool, seed: int) -> Training:
    """All weights are zero: the rectifiers give zero, nothing reaches them backwards, and only the last bias learns."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 64, 32, 10), nn.ReLU), nn.init.zeros_ if faulty else kaiming)
    return fit(model, digits(), adam(model, 3e-3), 400, seed)


def one_wild_layer(faulty: bool, seed: int) -> Training:
    """One layer of five is drawn with a deviation of 8, the others with Xavier's: its tanh takes the gradient from all before it."""
    torch.manual_seed(seed)
    model = mlp((64, *5 * (80,), 10), nn.Tanh)
    draw(model, xavier)
    if faulty:
        nn.init.normal_(model[4].weight, std=8.0)  # type: ignore[arg-type]
    return fit(model, digits().standardized(), sgd(model, 0.03), 500, seed)


def bias_minus_six(faulty: bool, seed: int) -> Training:
    """A bias of -6 in each rectifier of the second layer keeps all of its units shut for every input."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 64, 64, 10), nn.ReLU), kaiming)
    if faulty:
        nn.init.constant_(model[2].bias, -6.0)  # type: ignore[arg-type]
    return fit(model, digits(), sgd(model, 0.1), 400, seed)


def bias_plus_five(faulty: bool, seed: int) -> Training:
    """All biases are 5 by a mistaken constant: every tanh starts at 0.9999, and the layers after it see a constant."""
    torch.manual_seed(seed)
    model = draw(mlp((30, 40, 40, 1), nn.Tanh), xavier, 5.0 if faulty else 0.0)
    return fit(model, cancer().standardized(), sgd(model, 0.05), 500, seed, batch=16, loss=logistic)


def weight_norm_gain(faulty: bool, seed: int) -> Training:
    """The lengths of weight_norm are set to 40 instead of 1: the direction is right, the scale is not."""
    torch.manual_seed(seed)
    model = mlp((64, 96, 96, 96, 10), nn.Tanh)
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)
            nn.init.constant_(layer.parametrizations.weight.original0, 40.0 if faulty else 1.0)  # type: ignore[union-attr, arg-type]
    return fit(model, digits().standardized(), sgd(model, 0.05), 500, seed, batch=32)


def relu_gain_two(faulty: bool, seed: int) -> Training:
    """A gain of 2 over Kaiming's in twelve layers makes logits and gradients of many thousands; gradient descent jumps and dies."""
    torch.manual_seed(seed)
    model = mlp((64, *12 * (64,), 10), nn.ReLU)
    draw(model, lambda weight: nn.init.normal_(weight, std=(2 if faulty else 1) * (2 / weight.shape[1]) ** 0.5))
    return fit(model, digits().standardized(), sgd(model, 0.02), 500, seed)


def conv1d_normal(faulty: bool, seed: int) -> Training:
    """A one-dimensional convolutional network for signals with standard normal weights and tanh: 80 inputs to each unit saturate it."""
    torch.manual_seed(seed)
    channels = ((1, 16), (16, 16), (16, 16))
    blocks = [module for before, after in channels for module in (nn.Conv1d(before, after, 5, padding=2), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.AvgPool1d(4), nn.Flatten(), nn.Linear(128, 3))
    draw(model, (lambda weight: nn.init.normal_(weight)) if faulty else xavier)
    return fit(model, waves(0.4), sgd(model, 0.02, 0.9), 400, seed, batch=32)


def regression_tanh_wide(faulty: bool, seed: int) -> Training:
    """A curve is fitted by tanh units whose weights are drawn fifty times too large: they are steps where slopes are needed."""
    torch.manual_seed(seed)
    model = mlp((1, 64, 64, 1), nn.Tanh)
    draw(model, (lambda weight: nn.init.normal_(weight, std=5.0)) if faulty else lambda weight: nn.init.xavier_normal_(weight, 1.5), None)
    return fit(model, curve(lambda x: torch.sin(3 * x), -1, 1), adam(model, 3e-3), 600, seed, batch=50, loss=F.mse_loss, score=explained)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("sigmoid_four", "depth", "https://ai.stackexchange.com/questions/16557", sigmoid_four, 0.9, ("activation_choice",), 0.5),
    Scenario(
        "sigmoid_three", "depth", "M. Nielsen, Neural Networks and Deep Learning, chapter 5, 2015", sigmoid_three, 0.9, ("activation_choice",), 0.2
    ),
    Scenario("sigmoid_eight", "depth", "https://stackoverflow.com/questions/20009078", sigmoid_eight, 0.9, ("activation_choice",), 0.2),
    Scenario("hardsigmoid_five", "depth", "Howard et al., Searching for MobileNetV3, 2019", hardsigmoid_five, 0.9, ("activation_choice",), 0.3),
    Scenario(
        "lenet_sigmoid", "depth", "https://d2l.ai/chapter_convolutional-neural-networks/lenet.html", lenet_sigmoid, 0.9, ("activation_choice",), 0.4
    ),
    Scenario(
        "tanh_twenty",
        "depth",
        "Lee et al., Robust Weight Initialization for Tanh Neural Networks, arXiv 2410.02242",
        tanh_twenty,
        0.9,
        ("init_too_small",),
        0.3,
    ),
    Scenario(
        "tanh_thirty_narrow",
        "depth",
        "Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010",
        tanh_thirty_narrow,
        0.95,
        ("init_too_small",),
        0.05,
    ),
    Scenario(
        "softsign_fifteen",
        "depth",
        "Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010",
        softsign_fifteen,
        0.8,
        ("init_too_small",),
        0.2,
    ),
    Scenario(
        "relu_thirty_xavier", "depth", "He et al., Delving Deep into Rectifiers, figure 3, 2015", relu_thirty_xavier, 0.8, ("init_too_small",), 0.3
    ),
    Scenario("relu_hundredth", "initialisation", "https://cs231n.github.io/neural-networks-2/", relu_hundredth, 0.9, ("init_too_small",), 0.4),
    Scenario("conv_small", "initialisation", "Mishkin and Matas, All you need is a good init, 2015", conv_small, 0.9, ("init_too_small",), 0.4),
    Scenario(
        "randn_tanh",
        "initialisation",
        "https://breno.bearblog.dev/the-weights-in-a-study-on-fixing-the-saturated-function",
        randn_tanh,
        0.9,
        ("init_too_large",),
        0.05,
    ),
    Scenario(
        "einsum_hardtanh",
        "initialisation",
        "https://d2l.ai/chapter_multilayer-perceptrons/numerical-stability-and-init.html",
        einsum_hardtanh,
        0.78,
        ("init_too_large",),
        0.1,
    ),
    Scenario(
        "randn_sigmoid",
        "initialisation",
        "M. Nielsen, Neural Networks and Deep Learning, chapter 3, 2015",
        randn_sigmoid,
        0.9,
        ("init_too_large",),
        0.05,
    ),
    Scenario("uniform_one", "initialisation", "A. Trask, A Neural Network in 11 lines of Python, 2015", uniform_one, 0.95, ("init_too_large",), 0.02),
    Scenario("zero_weights", "initialisation", "https://forums.fast.ai/t/why-apply-weight-decay/8557", zero_weights, 0.9, ("init_too_small",), 0.5),
    Scenario("one_wild_layer", "initialisation", "https://cs231n.github.io/neural-networks-3/", one_wild_layer, 0.93, ("init_too_large",), 0.02),
    Scenario("bias_minus_six", "dead units", "https://github.com/keras-team/keras/issues/7057", bias_minus_six, 0.9, ("dead_units",), 0.4),
    Scenario("bias_plus_five", "initialisation", "https://stats.stackexchange.com/questions/265453", bias_plus_five, 0.93, ("init_too_large",), 0.03),
    Scenario(
        "weight_norm_gain", "initialisation", "Salimans and Kingma, Weight Normalization, 2016", weight_norm_gain, 0.9, ("init_too_large",), 0.05
    ),
    Scenario(
        "relu_gain_two", "initialisation", "https://blog.csdn.net/qq_24739717/article/details/102896678", relu_gain_two, 0.9, ("init_too_large",), 0.1
    ),
    Scenario("conv1d_normal", "initialisation", "https://code456.com/article/2832297.html", conv1d_normal, 0.85, ("init_too_large",), 0.04),
    Scenario(
        "regression_tanh_wide",
        "initialisation",
        "https://www.sciencestack.ai/paper/2410.02242",
        regression_tanh_wide,
        0.97,
        ("init_too_large",),
        0.02,
    ),
)
