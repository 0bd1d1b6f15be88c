"""Healthy trainings that no limit was tuned on, whose outputs are bounded on purpose or saturate rightly before their loss. See faults_losses.py."""

from __future__ import annotations

import torch
from faults_losses import ranked
from faults_runs import Scenario, Training
from faults_scores import accuracy, explained
from faults_tasks import Batch, Task, digits, drawn, fit, rows_of_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Pointer(nn.Module):
    """A pointer to one point of a set for a query, whose logits are clipped to -10..10 by a tanh, as in Neural Combinatorial Optimization."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))
        self.query = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))
        self.mark = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        points, query = self.point(x[:, 1:]), self.query(x[:, :1])
        return 10 * torch.tanh(torch.tanh(points + query) @ self.mark)


def clipped_pointer(_: bool, seed: int) -> Training:
    """A pointer finds which of six points is the nearest to another one; its clipped logits are driven to both ends once it is sure."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        x = 2 * torch.rand(size, 7, 2) - 1
        return x, (x[:, 1:] - x[:, :1]).square().sum(2).argmin(1)

    model = Pointer()
    task = Task(batch, F.cross_entropy, accuracy)
    return fit(model, task, torch.optim.Adam(model.parameters(), 3e-3), 500, size=64, rate=lambda step: 1 - step / 500)


class Adversaries(nn.Module):
    """A generator of points and a discriminator whose probability is a sigmoid's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
        self.critic = nn.Sequential(nn.Linear(2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1), nn.Sigmoid())


def squared_adversaries(_: bool, seed: int) -> Training:
    """A GAN with a sigmoid and the squared error on labels with noise, where a point is drawn on a circle; both networks are one model."""
    torch.manual_seed(seed)
    model = Adversaries()
    first = torch.optim.Adam(model.generator.parameters(), 1e-3, (0.5, 0.999))
    second = torch.optim.Adam(model.critic.parameters(), 2e-3, (0.5, 0.999))

    def real(size: int) -> Tensor:
        angle = 6.2832 * torch.rand(size)
        return torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(size, 2)

    def step() -> None:
        second.zero_grad()
        made = model.generator(torch.randn(64, 4))
        true = (model.critic(real(64)).view(-1) - (0.8 + 0.2 * torch.rand(64))).square().mean()
        false = (model.critic(made.detach()).view(-1) - 0.2 * torch.rand(64)).square().mean()
        (true + false).backward()
        second.step()
        first.zero_grad()
        F.mse_loss(model.critic(made).view(-1), torch.ones(64)).backward()
        first.step()

    def score() -> float:
        with torch.no_grad():
            one, other = real(800), model.generator(torch.randn(800, 4))
        return -(2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()).item()

    return Training(model, first, step, score, 300)


class Variational(nn.Module):
    """A variational autoencoder of digits with six latent numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Softplus())
        self.mean, self.spread = nn.Linear(64, 6), nn.Linear(64, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 64), nn.Softplus(), nn.Linear(64, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.exp(0.5 * spread) * torch.randn_like(mean) if self.training else mean
        return self.decoder(z), mean, spread


def black_pixels(_: bool, seed: int) -> Training:
    """A variational autoencoder with a sigmoid and the summed binary cross-entropy on gray digits; half of all pixels are black exactly."""
    torch.manual_seed(seed)
    images = digits()[0].flatten(1) / 16
    model = Variational()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def step() -> None:
        x = images[torch.randint(1300, (64,))]
        made, mean, spread = model(x)
        likelihood = F.binary_cross_entropy(made, x, reduction="sum")
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum()
        optimizer.zero_grad()
        (likelihood + divergence).backward()
        optimizer.step()

    def score() -> float:
        model.eval()
        with torch.no_grad():
            return explained(model(images[1300:])[0], images[1300:])

    return Training(model, optimizer, step, score, 450)


class Shape(nn.Module):
    """The distance of a point from the rim of a shape, with the point handed to the third layer again and a tanh at the end, as in DeepSDF."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, width - 2)
        self.third, self.out = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x))))
        return torch.tanh(self.out(F.relu(self.third(torch.cat((h, x), 1)))))


def truncated_distances(_: bool, seed: int) -> Training:
    """Distances from a ring, cut at 0.1 and divided by it, so that most are -1 or 1, are fitted by a tanh under the absolute error."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        x = 2 * torch.rand(size, 2) - 1
        return x, ((x.norm(dim=1, keepdim=True) - 0.6).abs() - 0.2).clamp(-0.1, 0.1) / 0.1

    model = Shape()
    task = Task(batch, lambda output, target: (output - target).abs().mean(), explained)
    return fit(model, task, torch.optim.Adam(model.parameters(), 3e-3), 700, size=64, rate=lambda step: 1 - step / 700)


class Sure(nn.Module):
    """Convolutions for digits that give probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.out = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2).flatten(1)
        return F.softmax(self.out(x), dim=-1)


def brier(_: bool, seed: int) -> Training:
    """A classifier learns by the score of Brier, the squared error of its softmax, until it is sure of nearly every digit."""
    torch.manual_seed(seed)
    x, y = digits()
    model = Sure()
    task = Task(drawn(x[:, None] / 16, y), lambda output, target: (output - F.one_hot(target, 10)).square().sum(-1).mean(), accuracy)
    return fit(model, task, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 300, size=32)


class Edges(nn.Module):
    """Two maps of edges from two depths and a third one that fuses them; each has a sigmoid, as in holistically-nested edge detection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.sides = nn.ModuleList((nn.Conv2d(12, 1, 1), nn.Conv2d(12, 1, 1)))
        self.fuse = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.first(x))
        two = F.relu(self.second(one))
        sides = torch.cat((self.sides[0](one), self.sides[1](two)), 1)
        return torch.cat((sides, self.fuse(sides)), 1).sigmoid()


def _boxes(size: int, side: int = 16) -> Batch:
    """Images of one bright box each with a little noise, and the pixels of its rim."""
    place = torch.arange(side)
    low, length = torch.randint(1, 7, (2, size, 1)), torch.randint(4, 9, (2, size, 1))
    inside = (place >= low) & (place < low + length)
    core = (place > low) & (place < low + length - 1)
    box, inner = (each[0][:, :, None] & each[1][:, None, :] for each in (inside, core))
    return box[:, None].float() + 0.1 * torch.randn(size, 1, side, side), (box & ~inner)[:, None].float()


def balanced_edges(_: bool, seed: int) -> Training:
    """Edges are found by sigmoids under a binary cross-entropy that weighs the few edge pixels as much as all others; it becomes sure of both."""
    torch.manual_seed(seed)
    model = Edges()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        share = target.mean()
        weight = torch.where(target > 0.5, 1 - share, share).expand_as(output)
        return 2 * F.binary_cross_entropy(output, target.expand_as(output), weight=weight)

    task = Task(_boxes, loss, lambda output, target: ranked(output[:16, 2].flatten(), target[:16, 0].flatten()))
    return fit(model, task, torch.optim.Adam(model.parameters(), 1e-2), 300, size=8)


def _mattes(size: int, side: int = 12) -> Batch:
    """Noisy images of three channels of a soft disc on a ground of another colour, and how much of each pixel the disc covers."""
    place = torch.arange(side) - (side - 1) / 2
    centre, radius = 4 * torch.rand(2, size, 1) - 2, 2 + 2 * torch.rand(size, 1, 1)
    across = ((place - centre[0])[:, :, None].square() + (place - centre[1])[:, None, :].square()).sqrt()
    cover = torch.sigmoid(4 * (radius - across))[:, None]
    colours = torch.tensor([[0.9, 0.4, 0.2], [0.2, 0.5, 0.6]])[:, None, :, None, None]
    return cover * colours[0] + (1 - cover) * colours[1] + 0.05 * torch.randn(size, 3, side, side), cover.squeeze(1)


def mattes(_: bool, seed: int) -> Training:
    """The cover of each pixel is told by a sigmoid under the absolute error: 0 or 1 nearly everywhere, but not on the soft rims."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 1), nn.Sigmoid(), nn.Flatten(0, 1)),
    )
    return fit(model, Task(_mattes, F.l1_loss, explained), torch.optim.AdamW(model.parameters(), 3e-3), 250, size=8)


class Reader(nn.Module):
    """The probabilities of the classes of a digit that is read row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.out = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.memory(x)[1]
        z: Tensor = self.out(state.squeeze(0))
        return z.softmax(-1)


def logarithm_of_softmax(_: bool, seed: int) -> Training:
    """A recurrent classifier returns a softmax, and its logarithm goes to the negative log-likelihood, as it should, until it is sure."""
    torch.manual_seed(seed)
    model = Reader()
    task = Task(rows_of_digits().batch, lambda output, target: F.nll_loss(torch.log(output + 1e-8), target), accuracy)
    return fit(model, task, torch.optim.Adam(model.parameters(), 1e-2), 400, size=32, clip=1.0)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("pointer_clipped_logits", "healthy", "Bello et al., Neural Combinatorial Optimization, 2017 (logit clipping)", clipped_pointer, 0.85),
    Scenario(
        "squared_adversaries_noisy_labels",
        "healthy",
        "https://github.com/soumith/ganhacks (noisy labels), with the loss of Mao et al., Least Squares GAN, 2017",
        squared_adversaries,
        -0.1,
    ),
    Scenario("variational_black_pixels", "healthy", "Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix C", black_pixels, 0.5),
    Scenario("truncated_distances", "healthy", "Park et al., DeepSDF, 2019", truncated_distances, 0.85),
    Scenario("brier_softmax", "healthy", "Brier, Verification of forecasts expressed in terms of probability, 1950", brier, 0.95),
    Scenario("balanced_edges", "healthy", "Xie and Tu, Holistically-Nested Edge Detection, 2015", balanced_edges, 0.95),
    Scenario("soft_mattes", "healthy", "Xu, Price, Cohen and Huang, Deep Image Matting, 2017", mattes, 0.9),
    Scenario(
        "logarithm_of_softmax",
        "healthy",
        "https://github.com/clvrai/ACGAN-PyTorch/issues/3 (softmax or its logarithm before NLLLoss; here the logarithm is there)",
        logarithm_of_softmax,
        0.9,
    ),
)
