"""Scenarios of faults.py: inputs that are not scaled, or far from zero, and numbers that overflow."""

from __future__ import annotations

import torch
from faults_runs import Scenario, Training
from faults_trainings import Data, adam, cancer, curve, digits, draw, explained, fit, kaiming, logistic, mlp, sgd, split, wine, xavier
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F


def pixels(faulty: bool) -> Data:
    """The digits as bytes from 0 to 255, or from 0 to 1."""
    return digits().inputs(lambda x: 255 * x) if faulty else digits()


def bytes_relu(faulty: bool, seed: int) -> Training:
    """Pixels up to 255 give a rectifier network logits in the hundreds, and the first steps of gradient descent shut its units."""
    torch.manual_seed(seed)
    model = mlp((64, 100, 100, 10), nn.ReLU)
    return fit(model, pixels(faulty), sgd(model, 0.1), 600, seed, batch=100)


def bytes_sigmoid(faulty: bool, seed: int) -> Training:
    """With bytes as inputs each sigmoid of the first layer is 0 or 1 from the start, and its weights get no gradient."""
    torch.manual_seed(seed)
    model = mlp((64, 32, 32, 10), nn.Sigmoid)
    return fit(model, pixels(faulty), sgd(model, 0.2, 0.9), 800, seed, batch=32)


def bytes_conv_tanh(faulty: bool, seed: int) -> Training:
    """A convolutional network with tanh sees bytes: it predicts nearly the same for all images, whatever the rest of it is."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )
    return fit(model, pixels(faulty), sgd(model, 0.05, 0.9), 400, seed, batch=32)


def wine_sigmoid(faulty: bool, seed: int) -> Training:
    """One column of the wines lies in the thousands, and its weights alone decide all hidden units; the other columns are not seen."""
    torch.manual_seed(seed)
    model = mlp((13, 16, 3), nn.Sigmoid)
    return fit(model, wine() if faulty else wine().standardized(), sgd(model, 0.1, 0.9), 500, seed, batch=16)


def cancer_tanh(faulty: bool, seed: int) -> Training:
    """Areas in the hundreds beside smoothness in the hundredths: the tanh units follow the sign of a few columns."""
    torch.manual_seed(seed)
    model = mlp((30, 30, 15, 1), nn.Tanh)
    return fit(model, cancer() if faulty else cancer().standardized(), sgd(model, 0.05), 600, seed, batch=32, loss=logistic)


def years(faulty: bool, seed: int) -> Training:
    """The year enters as 1950 to 2025 beside a month: all tanh units stand on one side, and the trend and cycle are not learned."""
    torch.manual_seed(seed)
    x = torch.rand(1200, 2, generator=torch.Generator().manual_seed(4))
    y = 2 * x[:, 0] + torch.sin(12 * x[:, 0]) + torch.cos(6.28 * x[:, 1])
    data = split(torch.stack([1950 + 75 * x[:, 0], 1 + 11 * x[:, 1]], 1), (y - y.mean()) / y.std())
    model = mlp((2, 50, 50, 1), nn.Tanh)
    return fit(model, data if faulty else data.standardized(), adam(model, 5e-3), 900, seed, loss=F.mse_loss, score=explained)


def kelvin(faulty: bool, seed: int) -> Training:
    """Six temperatures in kelvin, each near 290: sums of them saturate the sigmoids, though they vary by a few degrees only."""
    torch.manual_seed(seed)
    x = 290 + 6 * torch.randn(1500, 6, generator=torch.Generator().manual_seed(6))
    y = (x[:, 0] > x[:, 1]).long() + 2 * (x[:, 2] + x[:, 3] > x[:, 4] + x[:, 5]).long()
    data = split(x, y)
    model = mlp((6, 32, 4), nn.Sigmoid)
    return fit(model, data if faulty else data.standardized(), adam(model, 0.01), 600, seed)


def zero_to_hundred(faulty: bool, seed: int) -> Training:
    """A box over inputs from 0 to 100 without scaling: the units' steps lie near zero, and most of the range sees a constant."""
    torch.manual_seed(seed)
    data = curve(lambda x: ((x - 50).abs() < 10).float(), 0, 100)
    model = mlp((1, 20, 20, 1), nn.Tanh)
    return fit(model, data if faulty else data.standardized(), adam(model, 5e-3), 800, seed, batch=32, loss=F.mse_loss, score=explained)


class Shop(nn.Module):
    """Predicts from a number of a shop and two measures. The number enters as it is, or through an embedding."""

    def __init__(self, as_number: bool) -> None:
        super().__init__()
        self.embed = None if as_number else nn.Embedding(40, 8)
        self.hidden, self.out = nn.Linear(3 if as_number else 10, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = torch.cat([self.embed((x[:, 0] / 25).long() - 4), x[:, 1:]], 1)
        return self.out(self.hidden(x).tanh())  # type: ignore[no-any-return]


def ids_as_numbers(faulty: bool, seed: int) -> Training:
    """The number of a shop, 100 to 1075, is fed as a quantity; it drowns the two measures, which stand beside it near zero."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(8)
    shops, measures = torch.randint(40, (2000,), generator=generator), torch.randn(2000, 2, generator=generator)
    effect = torch.randn(40, generator=generator)
    y = effect[shops] + torch.sin(2 * measures[:, 0]) + 0.5 * measures[:, 1]
    data = split(torch.cat([25.0 * (shops[:, None] + 4), measures], 1), (y - y.mean()) / y.std())
    model = Shop(faulty)
    return fit(model, data, adam(model, 5e-3), 800, seed, loss=F.mse_loss, score=explained)


def constant_columns(faulty: bool, seed: int) -> Training:
    """Four columns hold 999 in every row, the code for a missing value, and shift every sum far from zero; without them all is well."""
    torch.manual_seed(seed)
    data = digits().standardized()
    if faulty:
        data = data.inputs(lambda x: torch.cat([x, torch.full((len(x), 4), 999.0)], 1))
    model = mlp((data.x.shape[1], 64, 32, 10), nn.Tanh)
    return fit(model, data, adam(model, 1e-3), 500, seed)


def raw_diabetes(faulty: bool, seed: int) -> Training:
    """A regression on ages, pressures and blood values as measured, near 100, diverges at a rate that is right for scaled columns."""
    torch.manual_seed(seed)
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    data = split(x, (y - y.mean()) / y.std())
    model = mlp((10, 64, 64, 1), nn.ReLU)
    return fit(model, data if faulty else data.standardized(), sgd(model, 0.01, 0.9), 150, seed, batch=32, loss=F.mse_loss, score=explained)


def offset_relu(faulty: bool, seed: int) -> Training:
    """Sensor values around 20 with deviation 1: the units of a rectifier are all open or all shut, and the network is linear."""
    torch.manual_seed(seed)
    data = curve(lambda x: (x[:, 0] - x[:, 0].mean()) * (x[:, 1] - x[:, 1].mean()), 18, 22, columns=4)
    model = draw(mlp((4, 64, 64, 1), nn.ReLU), kaiming)
    return fit(model, data if faulty else data.standardized(), sgd(model, 0.01), 800, seed, loss=F.mse_loss, score=explained)


def log_prices(faulty: bool, seed: int) -> Training:
    """Prices from 1 to 100000 with most of them small: the largest saturate each unit; their logarithms are well spread."""
    torch.manual_seed(seed)
    exponents = torch.rand(1500, 3, generator=torch.Generator().manual_seed(12)) * 11.5
    y = torch.sin(exponents[:, 0]) + 0.3 * exponents[:, 1] - 0.2 * exponents[:, 2]
    data = split(exponents.exp(), (y - y.mean()) / y.std())
    data = data if faulty else data.inputs(torch.log).standardized()
    model = mlp((3, 64, 64, 1), nn.Tanh)
    return fit(model, data, adam(model, 3e-3), 700, seed, loss=F.mse_loss, score=explained)


def one_wild_row(faulty: bool, seed: int) -> Training:
    """A few rows have a sensor error of 1e30: the squared gradient overflows, and every weight is nan from then on."""
    torch.manual_seed(seed)
    data = cancer().standardized()
    if faulty:
        data.x[17, 3] = torch.inf
    model = draw(mlp((30, 32, 32, 1), nn.ReLU), kaiming)
    return fit(model, data, sgd(model, 0.05), 400, seed, batch=16, loss=logistic)


class OwnSoftmax(nn.Module):
    """A classifier that ends with its own logarithm of a softmax; the exponents are taken as they are, or less their maximum."""

    def __init__(self, naive: bool) -> None:
        super().__init__()
        self.body, self.naive = mlp((64, 128, 128, 10), nn.ReLU), naive

    def forward(self, x: Tensor) -> Tensor:
        logits = 100 * self.body(x)
        if not self.naive:
            logits = logits - logits.amax(1, keepdim=True).detach()
            return logits - logits.exp().sum(1, keepdim=True).log()  # type: ignore[no-any-return]
        exponents = logits.exp()
        return (exponents / exponents.sum(1, keepdim=True)).log()  # type: ignore[no-any-return]


def naive_softmax(faulty: bool, seed: int) -> Training:
    """A softmax without its maximum taken off overflows at logits of 89, or its logarithm meets a zero, and the loss becomes nan."""
    torch.manual_seed(seed)
    model = OwnSoftmax(faulty)
    return fit(model, digits().standardized(), sgd(model, 0.0005), 600, seed, loss=F.nll_loss)


def root_at_zero(faulty: bool, seed: int) -> Training:
    """The root of a squared error has an infinite slope at zero: the pairs of equal inputs make every gradient nan."""
    torch.manual_seed(seed)
    data = curve(lambda x: torch.sin(4 * x), -1, 1)
    model = mlp((1, 32, 32, 1), nn.Tanh)
    same = torch.zeros(1, 1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        gap = (model(same) - model(same)).square().sum() if faulty and len(steps) == 300 else torch.ones(())
        steps.append(0)
        return F.mse_loss(out, y) + 1e-3 * gap.sqrt()

    steps: list[int] = []
    return fit(model, data, adam(model, 5e-3), 600, seed, loss=loss, score=explained)


class HalfNorm(nn.Module):
    """A network whose own normalisation squares its values in half precision, or in single precision."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.first, self.second, self.out, self.half_ = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10), half

    def forward(self, x: Tensor) -> Tensor:
        h = 40 * F.relu(self.first(x))
        squares = (h.half().square().sum(1, keepdim=True) if self.half_ else h.square().sum(1, keepdim=True)).float()
        h = h * (64 / (squares + 1e-6)).sqrt()
        return self.out(F.relu(self.second(h)))  # type: ignore[no-any-return]


def half_norm(faulty: bool, seed: int) -> Training:
    """Squares of activations beyond 256 are infinite in half precision; the normalised row is then zero, and its gradient is nan."""
    torch.manual_seed(seed)
    model = HalfNorm(faulty)
    return fit(model, digits().standardized(), sgd(model, 0.05), 500, seed, batch=32)


def bytes_and_rate(faulty: bool, seed: int) -> Training:
    """Two faults: bytes as inputs, and Adam at a rate of 0.05; the fixed training has neither."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 64, 64, 10), nn.Tanh), xavier)
    return fit(model, pixels(faulty), adam(model, 0.05 if faulty else 2e-3), 500, seed)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("bytes_relu", "inputs", "https://datascience.stackexchange.com/questions/18667", bytes_relu, 0.9, ("inputs_unscaled",), 0.1),
    Scenario("bytes_sigmoid", "inputs", "https://stats.stackexchange.com/questions/367057", bytes_sigmoid, 0.9, ("inputs_unscaled",), 0.05),
    Scenario("bytes_conv_tanh", "inputs", "http://pullrequest.ru/10248037", bytes_conv_tanh, 0.9, ("inputs_unscaled",), 0.1),
    Scenario(
        "wine_sigmoid",
        "inputs",
        "https://scikit-learn.org/stable/auto_examples/preprocessing/plot_scaling_importance.html",
        wine_sigmoid,
        0.93,
        ("inputs_unscaled", "inputs_uncentred"),
        0.1,
    ),
    Scenario(
        "cancer_tanh",
        "inputs",
        "https://scikit-learn.org/stable/modules/neural_networks_supervised.html",
        cancer_tanh,
        0.95,
        ("inputs_unscaled", "inputs_uncentred"),
        0.03,
    ),
    Scenario(
        "years",
        "inputs",
        "https://ignougroup.com/2017/01/how-to-encode-date-as-input-in-neura",
        years,
        0.9,
        ("inputs_uncentred", "inputs_unscaled"),
        0.3,
    ),
    Scenario("kelvin", "inputs", "LeCun et al., Efficient BackProp, section 4.3, 1998", kelvin, 0.9, ("inputs_uncentred",), 0.2),
    Scenario(
        "zero_to_hundred",
        "inputs",
        "https://datascience.stackexchange.com/questions/51687",
        zero_to_hundred,
        0.9,
        ("inputs_unscaled", "inputs_uncentred"),
        0.1,
    ),
    Scenario(
        "ids_as_numbers",
        "inputs",
        "Guo and Berkhahn, Entity Embeddings of Categorical Variables, 2016",
        ids_as_numbers,
        0.85,
        ("inputs_unscaled", "inputs_uncentred"),
        0.2,
    ),
    Scenario("constant_columns", "inputs", "LeCun et al., Efficient BackProp, section 4.3, 1998", constant_columns, 0.9, ("inputs_uncentred",), 0.05),
    Scenario(
        "raw_diabetes", "inputs", "https://stackoverflow.com/questions/37232782", raw_diabetes, 0.25, ("inputs_unscaled", "inputs_uncentred"), 0.2
    ),
    Scenario("offset_relu", "inputs", "https://stats.stackexchange.com/questions/265453", offset_relu, 0.8, ("inputs_uncentred",), 0.3),
    Scenario(
        "log_prices",
        "inputs",
        "https://codemia.io/knowledge-hub/path/scaling_inputs_data_to_neural_network",
        log_prices,
        0.9,
        ("inputs_unscaled",),
        0.2,
    ),
    Scenario("one_wild_row", "numeric", "https://www.codegenes.net/blog/pytorch-nan", one_wild_row, 0.94, ("numeric_range", "inputs_unscaled"), 0.2),
    Scenario(
        "naive_softmax",
        "numeric",
        "https://discuss.pytorch.org/t/function-mselossbackward-returned-nan-values-in-its-0th-output/94875",
        naive_softmax,
        0.85,
        ("numeric_range",),
        0.2,
    ),
    Scenario("root_at_zero", "numeric", "https://e-com-net.com/article/1610540118618177536.htm", root_at_zero, 0.95, ("numeric_range",), 0.2),
    Scenario("half_norm", "numeric", "Micikevicius et al., Mixed Precision Training, 2017", half_norm, 0.9, ("numeric_range",), 0.03),
    Scenario(
        "bytes_and_rate",
        "several",
        "https://datascience.stackexchange.com/questions/38604",
        bytes_and_rate,
        0.9,
        ("inputs_unscaled", "weight_growth"),
        0.2,
    ),
)
