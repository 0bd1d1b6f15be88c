"""Scenarios of faults.py: rates, optimizers, units that die, and weight decay."""

from __future__ import annotations

import torch
from faults_runs import Scenario, Training
from faults_trainings import (
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
    wine,
    xavier,
)
from torch import Tensor, nn
from torch.nn import functional as F


def sgd_five(faulty: bool, seed: int) -> Training:
    """Gradient descent at a rate of 5 throws the weights of a tanh network up in the first steps, and its units stay on their plateaus."""
    torch.manual_seed(seed)
    model = draw(mlp((64, *4 * (64,), 10), nn.Tanh), xavier)
    return fit(model, digits().standardized(), sgd(model, 5.0 if faulty else 0.1), 500, seed)


def momentum_99(faulty: bool, seed: int) -> Training:
    """A momentum of 0.99 makes a rate of 0.1 act like 10; the network swings through the good weights and saturates."""
    torch.manual_seed(seed)
    model = mlp((20, 48, 48, 4), nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.99 if faulty else 0.5, nesterov=True)
    return fit(model, mixture().standardized(), optimizer, 600, seed, batch=32)


def adam_tenth_relu(faulty: bool, seed: int) -> Training:
    """Adam at 0.1 moves every weight by its own size in one step: the small rectifier network shuts down and says one class."""
    torch.manual_seed(seed)
    model = mlp((64, 32, 32, 32, 10), nn.ReLU)
    return fit(model, digits().standardized(), adam(model, 0.1 if faulty else 1e-3), 600, seed, batch=16)


class Curve(nn.Module):
    """A regression network with two hidden layers, whose tanh is a method of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(2, 50), nn.Linear(50, 50), nn.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).tanh()).tanh())  # type: ignore[no-any-return]


def adam_hot_tanh(faulty: bool, seed: int) -> Training:
    """A surface is fitted at Adam's rate of 0.3; the tanh units turn into switches, and the surface into steps."""
    torch.manual_seed(seed)
    model = Curve()
    data = curve(lambda x: torch.sin(3 * x[:, 0]) * torch.cos(3 * x[:, 1]), -1, 1, columns=2)
    return fit(model, data, adam(model, 0.3 if faulty else 3e-3), 800, seed, loss=F.mse_loss, score=explained)


def rmsprop_hot(faulty: bool, seed: int) -> Training:
    """RMSprop divides even the smallest gradients by their size; at 0.5 the sigmoid units are driven to their ends within an epoch."""
    torch.manual_seed(seed)
    model = mlp((64, 40, 40, 10), nn.Sigmoid)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.5 if faulty else 3e-3, eps=1e-10)
    return fit(model, digits().standardized(), optimizer, 700, seed, batch=32)


def adagrad_two(faulty: bool, seed: int) -> Training:
    """AdaGrad's first steps are as long as its rate: at 2 all weights are near plus or minus two after them, and later steps are short."""
    torch.manual_seed(seed)
    model = mlp((30, *4 * (64,), 1), nn.Tanh)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=2.0 if faulty else 0.02)
    return fit(model, cancer().standardized(), optimizer, 400, seed, batch=8, loss=logistic)


def no_warmup(faulty: bool, seed: int) -> Training:
    """The linear decay of Adam's rate starts at 0.1 without a warmup: eight tanh layers are broken in the first steps, before it is low."""
    torch.manual_seed(seed)
    model = mlp((64, *8 * (64,), 10), nn.Tanh)

    def rate(step: int) -> float:
        peak = 0.1 if faulty else 2e-3
        return peak * (1.0 if faulty else min(1.0, (step + 1) / 150)) * (1 - step / 700)

    return fit(draw(model, xavier), digits().standardized(), adam(model), 600, seed, rate=rate)


def schedule_jump(faulty: bool, seed: int) -> Training:
    """The schedule multiplies the rate by 40 at step 400 instead of dividing it: what was learned by then is lost in saturation."""
    torch.manual_seed(seed)
    model = mlp((64, 64, 64, 10), nn.Tanh)
    factor = 40.0 if faulty else 0.1
    return fit(model, digits().standardized(), sgd(model, 0.1, 0.9), 800, seed, rate=lambda step: 0.1 * (1.0 if step < 400 else factor))


def accumulated(faulty: bool, seed: int) -> Training:
    """The losses of 24 small batches are summed and not divided by their number: the rate is 24 times what was meant."""
    torch.manual_seed(seed)
    model = mlp((64, 48, 48, 10), nn.Tanh)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) / (1 if faulty else 24)

    return fit(model, digits().standardized(), sgd(model, 0.1, 0.9), 150, seed, batch=8, loss=loss, passes=24)


def summed(faulty: bool, seed: int) -> Training:
    """The loss is a sum over the batch. With 256 rows the rate that was found with few explodes the rectifier network."""
    torch.manual_seed(seed)
    model = mlp((64, 64, 64, 10), nn.ReLU)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="sum" if faulty else "mean")

    return fit(model, digits().standardized(), sgd(model, 0.05, 0.9), 250, seed, batch=256, loss=loss)


def slow_drift(faulty: bool, seed: int) -> Training:
    """Labels have noise and the weights no decay: RMSprop at 0.03 drives the tanh layers slowly into their plateaus over the whole run."""
    torch.manual_seed(seed)
    data = digits().standardized()
    noise = torch.rand(len(data.y), generator=torch.Generator().manual_seed(1)) < 0.2
    data.y[noise] = torch.randint(10, (int(noise.sum()),), generator=torch.Generator().manual_seed(2))
    model = mlp((64, 32, 32, 32, 10), nn.Tanh)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.03 if faulty else 1e-3)
    return fit(model, data, optimizer, 1200 if faulty else 800, seed, batch=32)


def cyclic(faulty: bool, seed: int) -> Training:
    """A triangular cycle of the rate whose top is 20 instead of 1: each cycle's middle throws the network onto its plateaus again."""
    torch.manual_seed(seed)
    model = mlp((64, 64, 64, 10), nn.Sigmoid)
    top = 20.0 if faulty else 1.0
    return fit(
        model, digits().standardized(), sgd(model, 0.1, 0.9), 900, seed, rate=lambda step: 0.1 + (top - 0.1) * (1 - abs(step % 300 - 150) / 150)
    )


def single_rows(faulty: bool, seed: int) -> Training:
    """Batches of one row at a rate for batches of many: single rows shut the eight rectifiers of a small network for good."""
    torch.manual_seed(seed)
    model = draw(mlp((4, 8, 8, 3), nn.ReLU), kaiming)
    return fit(model, iris().standardized(), sgd(model, 0.6 if faulty else 0.03), 1000, seed, batch=1)


def bottleneck_conv(faulty: bool, seed: int) -> Training:
    """A bottleneck of four channels, 1 x 1, loses its few rectifiers to a high momentum rate, and nothing passes it any more."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.ReLU()),
        *(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )
    return fit(draw(model, kaiming), digits(), sgd(model, 0.5 if faulty else 0.02, 0.9), 400, seed, batch=4 if faulty else 16)


class Positive(nn.Module):
    """Predicts a quantity that is never negative, with a rectifier at the end, or without."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.body, self.rectified = mlp((2, 32, 32, 1), nn.Tanh), rectified

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return F.relu(out) if self.rectified else out


def rectified_output(faulty: bool, seed: int) -> Training:
    """A rectifier as the output function and a momentum of 0.99 at a rate of 0.5: one large step makes all predictions zero, and they stay so."""
    torch.manual_seed(seed)
    data = curve(lambda x: x[:, 0] ** 2 * x[:, 1].abs(), -1, 1, columns=2)
    data.y[:], data.test_y[:] = data.y - data.y.min(), data.test_y - data.y.min()
    model = Positive(faulty)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 if faulty else 0.05, momentum=0.99 if faulty else 0.9, nesterov=True)
    return fit(model, data, optimizer, 600, seed, batch=32, loss=F.mse_loss, score=explained)


def large_targets(faulty: bool, seed: int) -> Training:
    """House prices as targets, in hundreds of thousands: the first gradients are as large, and shut every rectifier."""
    torch.manual_seed(seed)
    data = curve(lambda x: x[:, 0] * x[:, 1] + x[:, 2], -1, 1, columns=5)
    if faulty:
        data.y[:], data.test_y[:] = 2e3 * (data.y + 3), 2e3 * (data.test_y + 3)
    model = mlp((5, 64, 64, 1), nn.ReLU)
    return fit(model, data, sgd(model, 0.02), 600, seed, loss=F.mse_loss, score=explained)


def decay_each_step(faulty: bool, seed: int) -> Training:
    """The decay is taken off the weights in each step without being multiplied by the rate: 0.04 of every weight is lost for each row."""
    torch.manual_seed(seed)
    model = mlp((30, 5, 1), nn.Sigmoid)
    return fit(model, cancer().standardized(), sgd(model, 0.2, decay=0.2 if faulty else 0.0), 600, seed, batch=1, loss=logistic)


def decay_tanh(faulty: bool, seed: int) -> Training:
    """A weight decay of 0.1, a hundred times the usual, lets four tanh layers shrink until their output is a constant."""
    torch.manual_seed(seed)
    model = draw(mlp((64, *4 * (64,), 10), nn.Tanh), xavier)
    return fit(model, digits().standardized(), sgd(model, 0.1, 0.9, 0.1 if faulty else 1e-4), 500, seed)


def decay_adamw(faulty: bool, seed: int) -> Training:
    """AdamW with a decay of 20 takes 6 % off every weight in each step, which the gradient does not bring back."""
    torch.manual_seed(seed)
    model = mlp((20, 64, 64, 64, 4), nn.ReLU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=20.0 if faulty else 0.01)
    return fit(model, mixture().standardized(), optimizer, 500, seed)


def decay_adam(faulty: bool, seed: int) -> Training:
    """Adam with an L2 decay of 0.3 inside the gradient: Adam scales it up with the gradient, and the convolutions fade out."""
    torch.manual_seed(seed)
    blocks = [module for a, b in ((1, 12), (12, 12), (12, 12)) for module in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10))
    return fit(model, digits(), adam(model, 2e-3, 0.3 if faulty else 0.0), 400, seed, batch=32)


def stack_and_init(faulty: bool, seed: int) -> Training:
    """Two faults: a stack of four sigmoid layers whose weights are also drawn with a deviation of 2; fixed with tanh and Xavier's."""
    torch.manual_seed(seed)
    model = mlp((64, *4 * (64,), 10), nn.Sigmoid if faulty else nn.Tanh)
    draw(model, (lambda weight: nn.init.normal_(weight, std=2.0)) if faulty else xavier)
    return fit(model, digits().standardized(), sgd(model, 0.1), 600, seed, batch=32)


def raw_wine_hot(faulty: bool, seed: int) -> Training:
    """Two faults: raw columns of the wines and Adam at 0.1. Every tanh is at an end from the first step, whatever comes after."""
    torch.manual_seed(seed)
    model = mlp((13, 24, 24, 3), nn.Tanh)
    return fit(model, wine() if faulty else wine().standardized(), adam(model, 0.1 if faulty else 3e-3), 400, seed, batch=16)


def wild_and_hot(faulty: bool, seed: int) -> Training:
    """Two faults: weights of deviation 1 in a rectifier network of width 128, and momentum at 0.1; it diverges and dies at once."""
    torch.manual_seed(seed)
    model = draw(mlp((20, 128, 128, 4), nn.ReLU), (lambda weight: nn.init.normal_(weight)) if faulty else kaiming)
    return fit(model, mixture().standardized(), sgd(model, 0.1 if faulty else 0.01, 0.9), 500, seed)


def shut_by_width(faulty: bool, seed: int) -> Training:
    """Ten rectifier layers of two units each: most draws have a layer whose units are all shut, as theory says; wide layers have none."""
    torch.manual_seed(seed)
    width = 2 if faulty else 16
    model = draw(mlp((2, *10 * (width,), 2), nn.ReLU), kaiming)
    return fit(model, moons(), adam(model, 2e-3), 700, seed, batch=32)


_GROWTH, _DEAD, _DECAY = ("weight_growth",), ("weight_growth", "dead_units"), ("weight_decay",)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("sgd_five", "rate", "https://taourl.com/read-2034078.html", sgd_five, 0.9, _GROWTH, 0.05),
    Scenario("momentum_99", "rate", "Sutskever et al., On the importance of initialization and momentum, 2013", momentum_99, 0.8, _GROWTH, 0.1),
    Scenario("adam_tenth_relu", "rate", "https://sanaat.mintlify.app/docs/experiments/learning-rate", adam_tenth_relu, 0.9, _DEAD, 0.2),
    Scenario(
        "adam_hot_tanh",
        "rate",
        "https://theneuralbase.com/keras/learn/beginner/loss-not-decreasing-learning-rate/",
        adam_hot_tanh,
        0.95,
        _GROWTH,
        0.08,
    ),
    Scenario("rmsprop_hot", "rate", "https://stats.stackexchange.com/questions/265453", rmsprop_hot, 0.9, _GROWTH, 0.1),
    Scenario("adagrad_two", "rate", "Duchi et al., Adaptive Subgradient Methods, 2011", adagrad_two, 0.94, _GROWTH, 0.02),
    Scenario("no_warmup", "rate", "Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020", no_warmup, 0.9, _GROWTH, 0.1),
    Scenario("schedule_jump", "rate", "https://github.com/keras-team/keras/issues/3425", schedule_jump, 0.93, _GROWTH, 0.05),
    Scenario("accumulated", "rate", "https://discuss.pytorch.org/t/pytorch-gradient-accumulation/55955", accumulated, 0.9, _GROWTH, 0.05),
    Scenario("summed", "rate", "https://github.com/jax-ml/jax/pull/3113", summed, 0.93, _DEAD, 0.1),
    Scenario("slow_drift", "rate", "https://ai.stackexchange.com/questions/11487", slow_drift, 0.85, _GROWTH, 0.04),
    Scenario("cyclic", "rate", "L. Smith, Cyclical Learning Rates for Training Neural Networks, 2017", cyclic, 0.9, _GROWTH, 0.1),
    Scenario("single_rows", "dead units", "http://lamda.nju.edu.cn/weixs/project/CNNTricks/CNNTricks.html", single_rows, 0.85, _DEAD, 0.1),
    Scenario("bottleneck_conv", "dead units", "https://github.com/guevara/read-it-later/issues/5625", bottleneck_conv, 0.9, _DEAD, 0.2),
    Scenario(
        "rectified_output", "dead units", "https://github.com/keras-team/keras/issues/3687", rectified_output, 0.9, (*_DEAD, "activation_choice"), 0.2
    ),
    Scenario("large_targets", "dead units", "J. Brownlee, How to use Data Scaling Improve Deep Learning, 2019", large_targets, 0.9, _DEAD, 0.3),
    Scenario(
        "shut_by_width",
        "dead units",
        "Lu et al., Dying ReLU and Initialization: Theory and Numerical Examples, 2019",
        shut_by_width,
        0.95,
        ("dead_units",),
        0.05,
    ),
    Scenario("decay_each_step", "weight decay", "https://stats.stackexchange.com/questions/117622", decay_each_step, 0.93, _DECAY, 0.03),
    Scenario("decay_tanh", "weight decay", "https://forums.fast.ai/t/why-apply-weight-decay/8557", decay_tanh, 0.93, _DECAY, 0.15),
    Scenario("decay_adamw", "weight decay", "Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019", decay_adamw, 0.83, _DECAY, 0.2),
    Scenario("decay_adam", "weight decay", "https://datascience.stackexchange.com/questions/10547", decay_adam, 0.93, _DECAY, 0.2),
    Scenario(
        "stack_and_init", "several", "https://ai.stackexchange.com/questions/16557", stack_and_init, 0.9, ("activation_choice", "init_too_large"), 0.1
    ),
    Scenario(
        "raw_wine_hot",
        "several",
        "https://www.aiproblog.com/index.php/2019/02/03/",
        raw_wine_hot,
        0.93,
        ("inputs_unscaled", "inputs_uncentred", "weight_growth"),
        0.1,
    ),
    Scenario(
        "wild_and_hot", "several", "https://forums.fast.ai/t/why-apply-weight-decay/8557/7", wild_and_hot, 0.82, ("init_too_large", *_DEAD), 0.1
    ),
)
