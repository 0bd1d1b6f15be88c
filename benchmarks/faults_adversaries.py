"""Scenarios of faults.py: generators and the discriminators that judge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from faults_runs import Scenario, Training
from faults_supervised import digits, stacked
from torch import Tensor, nn


def spiral(count: int) -> Tensor:
    """Points of one arm of a spiral within the unit square."""
    t = torch.rand(count, 1)
    return 0.9 * t * torch.cat([(5 * t).cos(), (5 * t).sin()], 1) + 0.02 * torch.randn(count, 2)


def distance(one: Tensor, other: Tensor) -> float:
    """The energy distance of two samples: 0 where they are drawn alike."""
    across, within = torch.cdist(one, other).mean(), torch.cdist(one, one).mean() + torch.cdist(other, other).mean()
    return float(2 * across - within)


@dataclass
class Game:
    """A generator and a discriminator that take turns."""

    generator: nn.Module
    discriminator: nn.Module
    makers: torch.optim.Optimizer
    judges: torch.optim.Optimizer
    real: Callable[[int], Tensor]
    judged: Callable[[Tensor, Tensor], Tensor]
    """The loss of the discriminator from its outputs for real and for made samples."""
    made: Callable[[Tensor], Tensor]
    """The loss of the generator from the discriminator's outputs for its samples."""
    noise: int = 8
    batch: int = 64
    unit: float = 1.0
    """What the real samples are multiplied with."""

    def training(self, steps: int, together: bool = False) -> Training:
        """The training whose watched model is the generator, or both networks together."""
        watched = nn.ModuleList([self.generator, self.discriminator]) if together else self.generator
        return Training(watched, self.makers, self.step, self.score, steps)

    def step(self) -> None:
        with torch.no_grad():
            fake = self.generator(torch.randn(self.batch, self.noise))
        self.judges.zero_grad()
        self.judged(self.discriminator(self.real(self.batch) * self.unit), self.discriminator(fake)).backward()
        self.judges.step()
        self.makers.zero_grad()
        self.made(self.discriminator(self.generator(torch.randn(self.batch, self.noise)))).backward()
        self.makers.step()

    @torch.no_grad()
    def score(self) -> float:
        self.generator.eval()
        return -distance(self.generator(torch.randn(500, self.noise)) / self.unit, self.real(500))


def told_apart(real: Tensor, fake: Tensor) -> Tensor:
    """The binary cross-entropy of probabilities."""
    return -(real.clamp(min=1e-7).log() + (1 - fake).clamp(min=1e-7).log()).mean()


def not_saturating(fake: Tensor) -> Tensor:
    """The generator's loss by which it shall be taken for real."""
    return -fake.clamp(min=1e-7).log().mean()


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam with the momentum that Radford et al. have given GANs."""
    return torch.optim.Adam(model.parameters(), rate, (0.5, 0.999))


def lively(inputs: int, *end: nn.Module) -> nn.Sequential:
    """A discriminator of two layers with LeakyReLU."""
    return stacked([inputs, 48, 48, 1], lambda: nn.LeakyReLU(0.2), *end)


def least_squares(seed: int, rate: float, unit: float = 1.0, together: bool = False) -> Training:
    """A least-squares GAN on a spiral; its generator ends with a tanh, and its discriminator is linear."""
    torch.manual_seed(seed)
    generator, discriminator = stacked([8, 48, 48, 2], nn.ReLU, nn.Tanh()), lively(2)

    def judged(real: Tensor, fake: Tensor) -> Tensor:
        return ((real - 1) ** 2 + fake**2).mean()

    def made(fake: Tensor) -> Tensor:
        return ((fake - 1) ** 2).mean()

    return Game(generator, discriminator, adam(generator, rate), adam(discriminator, 1e-3), spiral, judged, made, unit=unit).training(500, together)


def generator_hot_rate(faulty: bool, seed: int) -> Training:
    """The generator has a rate of 0.1, and its tanh output sticks in a corner of the square. The twin has a rate of 0.001."""
    return least_squares(seed, 0.1 if faulty else 1e-3)


def unscaled_points(faulty: bool, seed: int) -> Training:
    """The real points go to 10, and the generator's tanh output ends at 1. The twin keeps them within -1..1."""
    return least_squares(seed, 1e-3, 10.0 if faulty else 1.0)


def watched_together(faulty: bool, seed: int) -> Training:
    """A least-squares GAN on a spiral, whose generator rightly makes points near its border; both networks are watched as one model."""
    return least_squares(seed, 1e-3, together=True)


def handwriting(faulty: bool, seed: int) -> Training:
    """A GAN of digits with pixels in -1..1: most pixels are black, and the tanh output of the generator rightly saturates there."""
    torch.manual_seed(seed)
    generator, discriminator = stacked([16, 64, 64], nn.ReLU, nn.Tanh()), stacked([64, 64, 1], lambda: nn.LeakyReLU(0.2), nn.Sigmoid())
    images = 2 * digits()[0] - 1

    def real(count: int) -> Tensor:
        return images[torch.randint(len(images), (count,))]

    makers, judges = adam(generator, 2e-3), adam(discriminator, 1e-3)
    return Game(generator, discriminator, makers, judges, real, told_apart, not_saturating, noise=16, batch=32).training(800)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "gan_generator_hot_rate",
        "agents",
        "https://github.com/L1aoXingyu/pytorch-beginner/issues/38 (spits out white images), here of a generator",
        generator_hot_rate,
        -0.25,
        ("weight_growth",),
        0.1,
    ),
    Scenario(
        "gan_unscaled_points",
        "agents",
        "https://github.com/soumith/ganhacks (1: normalise the images between -1 and 1, tanh as the last layer of the generator)",
        unscaled_points,
        -0.25,
        ("activation_choice",),
        0.1,
    ),
    Scenario(
        "gan_least_squares",
        "agents",
        "Mao et al., Least Squares Generative Adversarial Networks, 2017; https://github.com/junyanz/CycleGAN/issues/70",
        watched_together,
        -0.25,
    ),
    Scenario(
        "gan_handwriting",
        "agents",
        "https://github.com/mlpack/mlpack/pull/1813 (tanh or sigmoid as the last layer of a generator)",
        handwriting,
        -1.6,
    ),
)
