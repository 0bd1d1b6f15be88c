"""Scenarios of faults.py without a fault: networks that look sick, and learn what they are to learn."""

from __future__ import annotations

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
    iris,
    kaiming,
    logistic,
    mixture,
    mlp,
    moons,
    sgd,
    waves,
    wine,
    xavier,
)
from torch import Tensor, nn
from torch.nn import functional as F


def sure_tanh(_: bool, seed: int) -> Training:
    """Gradient descent at 0.3 until all digits are sure: half of the tanh features end in their tails."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 100, 50, 10), nn.Tanh), xavier)
    return fit(model, digits().standardized(), sgd(model, 0.3), 900, seed)


def sure_sigmoid(_: bool, seed: int) -> Training:
    """One wide layer of sigmoids as features and Adam, long after the last error on the training data."""
    torch.manual_seed(seed)
    model = mlp((64, 128, 10), nn.Sigmoid)
    return fit(model, digits().standardized(), adam(model, 0.01), 700, seed, batch=100)


def sigmoid_rate_three(_: bool, seed: int) -> Training:
    """A sigmoid network with a squared error on one-hot targets and a rate of 3, which is right for its small gradients."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 30), nn.Sigmoid(), nn.Linear(30, 10), nn.Sigmoid())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out - F.one_hot(y, 10)).square().sum(1).mean()

    return fit(model, digits().standardized(), sgd(model, 1.5), 1200, seed, batch=10, loss=loss)


def cancer_rmsprop(_: bool, seed: int) -> Training:
    """Two small sigmoid layers with RMSprop until the tumours are told apart; the units act as switches by then."""
    torch.manual_seed(seed)
    model = mlp((30, 12, 6, 1), nn.Sigmoid)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    return fit(model, cancer().standardized(), optimizer, 800, seed, batch=16, loss=logistic)


def wine_momentum(_: bool, seed: int) -> Training:
    """Momentum on the wines at zero loss for most of the run: the tanh units stand in their tails, and nothing calls them back."""
    torch.manual_seed(seed)
    model = mlp((13, 32, 32, 3), nn.Tanh)
    return fit(model, wine().standardized(), sgd(model, 0.1, 0.9), 700, seed, batch=16)


class Sparse(nn.Module):
    """An autoencoder whose code is kept sparse by a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(64, 256), nn.Linear(256, 64)
        self.code = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.code = F.relu(self.encode(x))
        return self.decode(self.code)  # type: ignore[no-any-return]


def rebuilt(out: Tensor, x: Tensor) -> float:
    """The share of the variance of the images that the output explains."""
    return 1 - ((out - x).square().sum() / (x - x.mean(0)).square().sum()).item()


def images() -> Data:
    """The digits as inputs and as targets."""
    data = digits()
    return Data(data.x, data.x, data.test_x, data.test_x)


def sparse_code(_: bool, seed: int) -> Training:
    """A sparse autoencoder: four in five or more of its rectified codes are zero for an image, as the penalty asks."""
    torch.manual_seed(seed)
    model = Sparse()
    return fit(model, images(), adam(model, 3e-3), 800, seed, loss=F.mse_loss, score=rebuilt, penalty=lambda: 0.3 * model.code.mean())


def code_of_two(_: bool, seed: int) -> Training:
    """An autoencoder with two tanh units in its middle; many images lie at the rim of the square."""
    torch.manual_seed(seed)
    model = nn.Sequential(mlp((64, 64, 2), nn.ReLU), nn.Tanh(), mlp((2, 64, 64), nn.ReLU))
    return fit(model, images(), adam(model, 3e-3), 1000, seed, loss=F.mse_loss, score=rebuilt)


def a_fifth_dead(_: bool, seed: int) -> Training:
    """A wide rectifier network a fifth of whose units never open; the other four hundred learn the task without them."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 512, 10), nn.ReLU), kaiming)
    with torch.no_grad():
        model[0].bias[:100] = -30.0  # type: ignore[operator]
    return fit(model, digits().standardized(), sgd(model, 0.05), 400, seed)


def dropped(_: bool, seed: int) -> Training:
    """Dropout of a half behind each of two rectifier layers: half of what the next layer sees is zero by intent."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)),
    )
    return fit(model, digits().standardized(), adam(model, 1e-3), 600, seed)


def noisy_labels(_: bool, seed: int) -> Training:
    """Three labels in ten are drawn at random: the gradient never falls silent, and the network still learns the digits."""
    torch.manual_seed(seed)
    data = digits().standardized()
    noise = torch.rand(len(data.y), generator=torch.Generator().manual_seed(1)) < 0.3
    data.y[noise] = torch.randint(10, (int(noise.sum()),), generator=torch.Generator().manual_seed(2))
    model = mlp((64, 64, 64, 10), nn.Tanh)
    return fit(model, data, sgd(model, 0.03, 0.9), 350, seed)


def decay_that_helps(_: bool, seed: int) -> Training:
    """A decay of 0.01 on a tanh network keeps its weights small and the test score high."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 128, 128, 10), nn.Tanh), xavier)
    return fit(model, digits().standardized(), sgd(model, 0.05, 0.9, 0.01), 700, seed)


def norm_before_tanh(_: bool, seed: int) -> Training:
    """Batch normalisation before each of six tanh layers, at a rate of 0.5, which it makes harmless."""
    torch.manual_seed(seed)
    blocks = [module for k in range(6) for module in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Linear(64, 10))
    return fit(model, digits(), sgd(model, 0.5), 500, seed)


def hard_tanh(_: bool, seed: int) -> Training:
    """Three hard tanh layers: a third of the elements lie exactly on a plateau in the end, and the network is sure."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 128, 128, 128, 10), nn.Hardtanh), xavier)
    return fit(model, digits().standardized(), sgd(model, 0.05, 0.9), 600, seed)


class Binary(nn.Module):
    """Layers whose outputs are -1 or 1; the gradient passes where the input lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 256), nn.Linear(256, 256)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(256), nn.BatchNorm1d(256)])
        self.out = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            soft = F.hardtanh(norm(layer(x)))
            x = soft + (soft.sign() - soft).detach()
        return self.out(x)  # type: ignore[no-any-return]


def binarised(_: bool, seed: int) -> Training:
    """A network with binary activations, trained straight through: the functions are on their plateaus by design."""
    torch.manual_seed(seed)
    model = Binary()
    return fit(model, digits().standardized(), adam(model, 2e-3), 400, seed)


def overfitted(_: bool, seed: int) -> Training:
    """Sixty images are learned by heart, and the loss is zero for a thousand steps; that is what was asked for."""
    torch.manual_seed(seed)
    data = digits().standardized()
    few = Data(data.x[:60], data.y[:60], data.test_x, data.test_y)
    model = mlp((64, 64, 64, 10), nn.Tanh)
    return fit(model, few, adam(model, 3e-3), 1200, seed, batch=20, on_train=True)


def warm_adam(_: bool, seed: int) -> Training:
    """Adam at 0.01 after a warmup and with a cosine's decay, high for its width of 128 and well."""
    torch.manual_seed(seed)
    model = mlp((64, 128, 128, 10), nn.ReLU)

    def rate(step: int) -> float:
        return 0.01 * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * float(torch.cos(torch.tensor(3.14159 * step / 600))))

    return fit(model, digits().standardized(), adam(model), 600, seed, rate=rate)


class Masked(nn.Module):
    """A linear layer nine in ten of whose weights are zero for good."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before) * (2 / (0.1 * before)) ** 0.5)
        self.bias, self.mask = nn.Parameter(torch.zeros(after)), (torch.rand(after, before) < 0.1).float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def pruned(_: bool, seed: int) -> Training:
    """A pruned rectifier network with a tenth of its weights, drawn for the connections that are left; some units have none."""
    torch.manual_seed(seed)
    model = nn.Sequential(Masked(64, 200), nn.ReLU(), Masked(200, 200), nn.ReLU(), nn.Linear(200, 10))
    return fit(model, digits().standardized(), sgd(model, 0.05), 600, seed)


def iris_single(_: bool, seed: int) -> Training:
    """Batches of one flower and ten tanh units, with a rate that suits them."""
    torch.manual_seed(seed)
    model = mlp((4, 10, 3), nn.Tanh)
    return fit(model, iris().standardized(), sgd(model, 0.03), 1500, seed, batch=1)


def moons_eight(_: bool, seed: int) -> Training:
    """Eight tanh units make the border between two moons: they end as steep steps, which is the solution."""
    torch.manual_seed(seed)
    model = mlp((2, 8, 8, 1), nn.Tanh)
    return fit(model, moons(), adam(model, 0.02), 800, seed, batch=32, loss=logistic)


def conv_waves(_: bool, seed: int) -> Training:
    """A one-dimensional convolutional network with tanh tells signals apart until it is sure."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv1d(1, 16, 5, padding=2), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(16, 16, 5, padding=2), nn.Tanh()),
        *(nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(64, 3)),
    )
    return fit(model, waves(), adam(model, 0.01), 500, seed, batch=32)


class Residual(nn.Module):
    """Adds two tanh layers to their input, eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])
        self.second = nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + 0.3 * torch.tanh(second(torch.tanh(first(x))))
        return self.out(x)  # type: ignore[no-any-return]


def residual_tanh(_: bool, seed: int) -> Training:
    """A residual network of sixteen tanh layers on the defaults, through which the gradient passes beside them."""
    torch.manual_seed(seed)
    model = Residual()
    return fit(model, digits().standardized(), sgd(model, 0.05, 0.9), 400, seed)


def relu6_conv(_: bool, seed: int) -> Training:
    """A convolutional network of ReLU6 units with batch normalisation, some of which reach the upper bound in the end."""
    torch.manual_seed(seed)
    blocks = [module for a, b in ((1, 16), (16, 24)) for module in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU6())]
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 10))
    return fit(model, digits(), sgd(model, 0.1, 0.9), 300, seed, batch=32)


def step_function(_: bool, seed: int) -> Training:
    """A curve with a jump: the tanh unit that makes it must be steep, and its neighbours are flat over most of the range."""
    torch.manual_seed(seed)
    model = mlp((1, 32, 32, 1), nn.Tanh)
    data = curve(lambda x: (x > 0.2).float() + 0.3 * torch.sin(5 * x), -1, 1)
    return fit(model, data, adam(model, 0.01), 900, seed, loss=F.mse_loss, score=explained)


def selu_ten(_: bool, seed: int) -> Training:
    """Ten SELU layers with the weights that they are made for."""
    torch.manual_seed(seed)
    model = draw(mlp((20, *10 * (64,), 4), nn.SELU), lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="linear"))
    return fit(model, mixture().standardized(), sgd(model, 0.02), 600, seed)


_GLOROT, _NIELSEN = (
    "Glorot and Bengio, Understanding the difficulty of training deep feedforward networks, 2010",
    "M. Nielsen, Neural Networks and Deep Learning",
)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("sure_tanh", "healthy", _GLOROT, sure_tanh, 0.94),
    Scenario("sure_sigmoid", "healthy", "https://ai.stackexchange.com/questions/11487", sure_sigmoid, 0.94),
    Scenario("sigmoid_rate_three", "healthy", f"{_NIELSEN}, chapter 1, 2015", sigmoid_rate_three, 0.9),
    Scenario("cancer_rmsprop", "healthy", "https://scikit-learn.org/stable/modules/neural_networks_supervised.html", cancer_rmsprop, 0.94),
    Scenario(
        "wine_momentum", "healthy", "https://scikit-learn.org/stable/auto_examples/preprocessing/plot_scaling_importance.html", wine_momentum, 0.93
    ),
    Scenario("sparse_code", "healthy", "A. Ng, CS294A Lecture notes: Sparse autoencoder, 2011", sparse_code, 0.85),
    Scenario("code_of_two", "healthy", "Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks, 2006", code_of_two, 0.35),
    Scenario("a_fifth_dead", "healthy", "https://cs231n.github.io/neural-networks-1/", a_fifth_dead, 0.94),
    Scenario("dropped", "healthy", "Srivastava et al., Dropout, 2014", dropped, 0.94),
    Scenario("noisy_labels", "healthy", "Rolnick et al., Deep Learning is Robust to Massive Label Noise, 2017", noisy_labels, 0.8),
    Scenario("decay_that_helps", "healthy", "Krogh and Hertz, A Simple Weight Decay Can Improve Generalization, 1991", decay_that_helps, 0.93),
    Scenario("norm_before_tanh", "healthy", "Ioffe and Szegedy, Batch Normalization, 2015", norm_before_tanh, 0.92),
    Scenario("hard_tanh", "healthy", "R. Collobert, Large Scale Machine Learning, 2004", hard_tanh, 0.94),
    Scenario("binarised", "healthy", "Hubara et al., Binarized Neural Networks, 2016", binarised, 0.9),
    Scenario("overfitted", "healthy", "A. Karpathy, A Recipe for Training Neural Networks, 2019", overfitted, 0.99),
    Scenario("warm_adam", "healthy", "Ma and Yarats, On the adequacy of untuned warmup for adaptive optimization, 2021", warm_adam, 0.94),
    Scenario("pruned", "healthy", "Frankle and Carbin, The Lottery Ticket Hypothesis, 2019", pruned, 0.92),
    Scenario("iris_single", "healthy", "https://stackoverflow.com/questions/20009078", iris_single, 0.86),
    Scenario("moons_eight", "healthy", "https://cs231n.github.io/neural-networks-case-study/", moons_eight, 0.97),
    Scenario("conv_waves", "healthy", "LeCun et al., Efficient BackProp, 1998", conv_waves, 0.95),
    Scenario("residual_tanh", "healthy", "He et al., Identity Mappings in Deep Residual Networks, 2016", residual_tanh, 0.93),
    Scenario("relu6_conv", "healthy", "Sandler et al., MobileNetV2, 2018", relu6_conv, 0.94),
    Scenario("step_function", "healthy", f"{_NIELSEN}, chapter 4, 2015", step_function, 0.95),
    Scenario("selu_ten", "healthy", "Klambauer et al., Self-Normalizing Neural Networks, 2017", selu_ten, 0.8),
)
