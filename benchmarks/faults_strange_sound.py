"""The healthy networks of unusual kinds that no limit was tuned on: they look sick, and learn what they are to learn. See faults_strange.py."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from faults_runs import Scenario, Training
from faults_strange import Last
from faults_tasks import Batch, Task
from faults_tasks import fit as fit_task
from faults_trainings import adam, digits, draw, fit, mlp, sgd, split, xavier
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two normalised convolutions and what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(self.two(F.relu(self.norm(self.one(x))))))


def residual_digits(_: bool, seed: int) -> Training:
    """A residual network whose blocks begin as nothing is trained until it is sure; most of its rectified maps are zero by then."""
    torch.manual_seed(seed)
    blocks = (Block(12), nn.MaxPool2d(2), Block(12), Block(12))
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(192, 10))
    return fit(model, digits(), sgd(model, 0.05, 0.9), 200, seed, batch=32)


class UNet(nn.Module):
    """A small U-Net that says of each pixel whether it belongs to a disc."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.down(x))
        coarse = F.relu(self.middle(F.max_pool2d(fine, 2)))
        return torch.sigmoid(self.out(torch.cat((fine, F.relu(self.up(coarse))), 1)))


def discs_segmented(_: bool, seed: int) -> Training:
    """A U-Net finds discs in noise until nearly every pixel's sigmoid is sure; most of an image is background."""
    torch.manual_seed(seed)
    model = UNet()

    def batch(size: int) -> Batch:
        place, radius = 3 + 10 * torch.rand(size, 2, 1, 1), 2 + 2 * torch.rand(size, 1, 1)
        grid = torch.arange(16.0)
        inside = ((grid[:, None] - place[:, 0]) ** 2 + (grid - place[:, 1]) ** 2 < radius**2).float()[:, None]
        return inside + 0.3 * torch.randn_like(inside), inside

    def overlap(out: Tensor, y: Tensor) -> float:
        found = out > 0.5
        return ((found & (y > 0.5)).sum() / (found | (y > 0.5)).sum()).item()

    return fit_task(model, Task(batch, F.binary_cross_entropy, overlap), adam(model, 5e-3), 250, size=16)


def _flip_flops(size: int, length: int = 16) -> Batch:
    """Rare pulses of plus or minus one in three channels, and the last pulse of each channel."""
    pulses = (torch.rand(size, length, 3) < 0.2) * (torch.randint(2, (size, length, 3)) * 2.0 - 1)
    pulses[:, 0] = torch.randint(2, (size, 3)) * 2.0 - 1
    state, states = pulses[:, 0], []
    for now in pulses.unbind(1):
        state = torch.where(now != 0, now, state)
        states.append(state)
    return pulses, torch.stack(states, 1)


def flip_flops(_: bool, seed: int) -> Training:
    """A recurrent tanh network remembers three bits: its units stand near the rims, since that is how they hold a bit."""
    torch.manual_seed(seed)
    model = Last(nn.RNN(3, 48, batch_first=True), 48, 3, each=True)

    def score(out: Tensor, y: Tensor) -> float:
        return ((out > 0) == (y > 0)).float().mean().item()

    return fit_task(model, Task(_flip_flops, F.mse_loss, score), adam(model, 5e-3), 500, size=32, clip=1.0)


class Spike(torch.autograd.Function):
    """One where a membrane is above its threshold; the slope that is told to what lies before is that of a fast sigmoid."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope / (1 + 5 * x.abs()) ** 2  # type: ignore[no-any-return]


class Spiking(nn.Module):
    """Leaky neurons that fire or do not, for ten moments."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        drive, membrane, total = self.enter(x), torch.zeros(len(x), 100), torch.zeros(len(x), 10)
        for _ in range(10):
            membrane = 0.8 * membrane + drive
            fired = cast(Tensor, Spike.apply(membrane - 1))  # type: ignore[no-untyped-call]
            membrane = membrane - fired
            total = total + self.leave(fired)
        return total / 10


def spiking(_: bool, seed: int) -> Training:
    """Spiking neurons with a surrogate slope learn the digits: each output is zero or one, and many never change for an image."""
    torch.manual_seed(seed)
    model = Spiking()
    return fit(model, digits().standardized(), adam(model, 3e-3), 250, seed, batch=32)


def stream_of_one(_: bool, seed: int) -> Training:
    """Samples come one at a time and never again; a small tanh network follows them with a small rate."""
    torch.manual_seed(seed)
    model = draw(mlp((10, 24, 12, 1), nn.Tanh), xavier)
    direction = torch.randn(10, generator=torch.Generator().manual_seed(2))

    def batch(size: int) -> Batch:
        x = torch.randn(size, 10)
        return x, (x @ direction > 0.3).float()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out.flatten(), y)

    def score(out: Tensor, y: Tensor) -> float:
        return ((out.flatten() > 0) == (y > 0.5)).float().mean().item()

    return fit_task(model, Task(batch, loss, score), sgd(model, 0.05), 600, size=1)


class Chosen(nn.Module):
    """An autoencoder whose code is four choices of one in eight, made at random and hard in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp((64, 64, 32), nn.ReLU), mlp((32, 64, 64), nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.encode(x).unflatten(1, (4, 8))
        code = F.gumbel_softmax(logits, 0.7, hard=True) if self.training else F.one_hot(logits.argmax(2), 8).float()
        return cast(Tensor, self.decode(code.flatten(1)))


def discrete_codes(_: bool, seed: int) -> Training:
    """The code of an autoencoder is one-hot by intent, and the softmax before it becomes sure of its choices."""
    torch.manual_seed(seed)
    model = Chosen()
    images = digits().inputs(lambda x: 2 * x)

    def score(out: Tensor, x: Tensor) -> float:
        return 1 - ((out - x).square().sum() / (x - x.mean(0)).square().sum()).item()

    def batch(size: int) -> Batch:
        x = images.test_x if size == 512 else images.x[torch.randint(len(images.x), (size,))]
        return x, x

    return fit_task(model, Task(batch, F.mse_loss, score), adam(model, 4e-3), 600, size=64)


class Tree(nn.Module):
    """A tree of eight leaves whose inner nodes are sigmoids of the inputs, and whose leaves hold logits."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.nodes, self.leaves = nn.Linear(inputs, 7), nn.Parameter(torch.randn(8, classes))

    def forward(self, x: Tensor) -> Tensor:
        right = torch.sigmoid(3 * self.nodes(x))
        shares = []
        for path in itertools.product((0, 1), repeat=3):
            node, share = 0, x.new_ones(len(x))
            for turn in path:
                share = share * (right[:, node] if turn else 1 - right[:, node])
                node = 2 * node + 1 + turn
            shares.append(share)
        return torch.stack(shares, 1) @ self.leaves


def soft_tree(_: bool, seed: int) -> Training:
    """The nodes of a soft decision tree become sure of where they send a flower, and its training leaves them there."""
    torch.manual_seed(seed)
    data = split(*datasets.load_iris(return_X_y=True)).standardized()
    model = Tree(4, 3)
    return fit(model, data, adam(model, 3e-2), 400, seed, batch=16)


def parity_of_four(_: bool, seed: int) -> Training:
    """Eight sigmoid units find the parity of four bits; each ends as a switch, and the sixteen patterns are all there is."""
    torch.manual_seed(seed)
    model = mlp((4, 8, 1), nn.Tanh)
    bits = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))

    def batch(size: int) -> Batch:
        x = bits if size == 512 else bits[torch.randint(16, (size,))]
        return x, (x.prod(1) > 0).float()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out.flatten(), y)

    def score(out: Tensor, y: Tensor) -> float:
        return ((out.flatten() > 0) == (y > 0.5)).float().mean().item()

    return fit_task(model, Task(batch, loss, score), adam(model, 3e-2), 500, size=16)


class Gated(nn.Module):
    """A convolution whose channels are weighed by a hard sigmoid of their means, with hard swish before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(1, 16, 3), nn.Linear(16, 8), nn.Linear(8, 16)
        self.out = nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.hardswish(self.conv(x.unflatten(1, (1, 8, 8)))), 2)
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return cast(Tensor, self.out((x * gate[:, :, None, None]).flatten(1)))


def mobile_gates(_: bool, seed: int) -> Training:
    """The hard gates of a MobileNet's channels are trained well past the point where all digits are right."""
    torch.manual_seed(seed)
    model = Gated()
    return fit(model, digits().standardized(), adam(model, 5e-3), 350, seed, batch=64)


def winners_only(_: bool, seed: int) -> Training:
    """Of 128 units behind a threshold of one half, only those that are well above it speak: nine in ten are silent for an image."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.Softshrink(1.0), nn.Linear(256, 10))
    return fit(model, digits().standardized(), adam(model, 3e-3), 300, seed, batch=32)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("residual_digits", "healthy", "Goyal et al., Accurate, Large Minibatch SGD, 2017 (last gain zero)", residual_digits, 0.95),
    Scenario("discs_segmented", "healthy", "Ronneberger, Fischer and Brox, U-Net, 2015", discs_segmented, 0.8),
    Scenario("flip_flops", "healthy", "Sussillo and Barak, Opening the Black Box, 2013", flip_flops, 0.95),
    Scenario("spiking", "healthy", "Zenke and Ganguli, SuperSpike, 2018", spiking, 0.9),
    Scenario("stream_of_one", "healthy", "https://scikit-learn.org/stable/computing/scaling_strategies.html", stream_of_one, 0.85),
    Scenario("discrete_codes", "healthy", "Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, 2017", discrete_codes, 0.35),
    Scenario("soft_tree", "healthy", "Frosst and Hinton, Distilling a Neural Network Into a Soft Decision Tree, 2017", soft_tree, 0.85),
    Scenario("parity_of_four", "healthy", "Minsky and Papert, Perceptrons, 1969", parity_of_four, 0.9),
    Scenario("mobile_gates", "healthy", "Howard et al., Searching for MobileNetV3, 2019", mobile_gates, 0.93),
    Scenario("winners_only", "healthy", "Gregor and LeCun, Learning Fast Approximations of Sparse Coding, 2010", winners_only, 0.93),
)
