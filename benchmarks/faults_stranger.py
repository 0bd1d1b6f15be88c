"""More scenarios that no limit was tuned on: agents, adversaries, attention, graphs and fine-tuning. See faults_strange.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from faults_runs import Scenario, Training
from faults_tasks import Batch, Task
from faults_tasks import fit as fit_task
from faults_trainings import accuracy, adam, digits, draw, fit, mlp, sgd, xavier
from faults_trainings import waves as signals
from torch import Tensor, nn
from torch.nn import functional as F

WGAN = "Arjovsky, Chintala and Bottou, Wasserstein GAN, 2017"


def steering(faulty: bool, seed: int) -> Training:
    """An actor steers a mass to a place, and learns through the motion itself; its last layer is drawn so large that it only pushes at full force."""
    torch.manual_seed(seed)
    actor = nn.Sequential(*mlp((4, 48, 2), nn.ELU), nn.Tanh())
    if faulty:
        nn.init.normal_(cast(nn.Linear, actor[-2]).weight, std=12.0)

    def cost(size: int) -> Tensor:
        place, speed, total = 2 * torch.rand(size, 2) - 1, torch.zeros(size, 2), torch.zeros(())
        for _ in range(8):
            force = actor(torch.cat((place, speed), 1))
            speed = 0.8 * speed + 0.25 * force
            place = place + 0.5 * speed
            total = total + (place.square() + 0.1 * speed.square() + 0.02 * force.square()).sum(1).mean()
        return total / 8

    optimizer = adam(actor, 2e-3)

    def step() -> None:
        optimizer.zero_grad()
        cost(16).backward()
        optimizer.step()

    def score() -> float:
        with torch.no_grad():
            return 1 - cost(512).item()

    return Training(actor, optimizer, step, score, 200)


def thermostat(_: bool, seed: int) -> Training:
    """A heater of limited power brings rooms to their temperature as soon as it can: the actor is on or off nearly always, as it should be."""
    torch.manual_seed(seed)
    actor = nn.Sequential(*mlp((2, 32, 1), nn.Tanh), nn.Tanh())

    def cost(size: int) -> Tensor:
        wanted, now, total = 2 * torch.rand(size, 1) - 1, 2 * torch.rand(size, 1) - 1, torch.zeros(())
        for _ in range(10):
            now = now + 0.15 * actor(torch.cat((now, wanted), 1))
            total = total + (now - wanted).abs().mean()
        return total / 10

    optimizer = adam(actor, 1e-2)

    def step() -> None:
        optimizer.zero_grad()
        cost(64).backward()
        optimizer.step()

    def score() -> float:
        with torch.no_grad():
            return 1 - cost(512).item()

    return Training(actor, optimizer, step, score, 300)


class Pair(nn.Module):
    """The two networks of an adversarial training."""

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic


def _distance(a: Tensor, b: Tensor) -> float:
    """The energy distance between two clouds of points."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def _ring(size: int) -> Tensor:
    angle = 6.2832 * torch.rand(size)
    return 0.8 * torch.stack((angle.cos(), angle.sin()), 1) + 0.03 * torch.randn(size, 2)


def _adversaries(pair: Pair, noise: Callable[[int], Tensor], optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer], steps: int) -> Training:
    """Each step trains the critic twice, and then the generator. The critic's weights are clipped if it is one of Wasserstein's kind."""
    clipped = isinstance(optimizers[1], torch.optim.RMSprop)

    def step() -> None:
        for _ in range(2):
            optimizers[1].zero_grad()
            real, made = pair.critic(_ring(64)), pair.critic(pair.generator(noise(64)).detach())
            (made.mean() - real.mean() if clipped else F.softplus(-real).mean() + F.softplus(made).mean()).backward()
            optimizers[1].step()
            if clipped:
                with torch.no_grad():
                    for weight in pair.critic.parameters():
                        weight.clamp_(-0.1, 0.1)
        optimizers[0].zero_grad()
        made = pair.critic(pair.generator(noise(64)))
        (-made.mean() if clipped else F.softplus(-made).mean()).backward()
        optimizers[0].step()

    def score() -> float:
        with torch.no_grad():
            return -_distance(_ring(500), pair.generator(noise(500)))

    return Training(pair, optimizers[0], step, score, steps)


def latents_about_fifty(faulty: bool, seed: int) -> Training:
    """The noise of a generator with tanh layers lies about 50 with deviation 2, and its points fall on a few places."""
    torch.manual_seed(seed)
    pair = Pair(nn.Sequential(*mlp((4, 32, 32, 2), nn.Tanh), nn.Tanh()), mlp((2, 32, 32, 1), nn.LeakyReLU))
    optimizers = (torch.optim.Adam(pair.generator.parameters(), 2e-3, (0.5, 0.9)), torch.optim.Adam(pair.critic.parameters(), 2e-3, (0.5, 0.9)))

    def noise(size: int) -> Tensor:
        return 50 + 2 * torch.randn(size, 4) if faulty else torch.randn(size, 4)

    return _adversaries(pair, noise, optimizers, 250)


def clipped_critic(_: bool, seed: int) -> Training:
    """A critic whose weights are clipped after each step learns with most of them at the rim; its outputs have no bound and no sigmoid."""
    torch.manual_seed(seed)
    pair = Pair(nn.Sequential(*mlp((4, 64, 64, 2), nn.ReLU), nn.Tanh()), mlp((2, 64, 64, 1), nn.ReLU))
    optimizers = (torch.optim.RMSprop(pair.generator.parameters(), 5e-4), torch.optim.RMSprop(pair.critic.parameters(), 1e-3))
    return _adversaries(pair, lambda size: torch.randn(size, 4), optimizers, 350)


class Sets(nn.Module):
    """Tokens that attend to each other, and one linear layer behind their mean."""

    def __init__(self, inputs: int, width: int, heads: int, out: int, tokens: int) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(inputs, width), nn.Parameter(0.1 * torch.randn(tokens, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mix, self.leave = mlp((width, 2 * width, width), nn.GELU), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.place
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mix(self.second(x))
        return cast(Tensor, self.leave(x.mean(1)))


def _patched_digits() -> Callable[[int], Batch]:
    data = digits()

    def cut(x: Tensor) -> Tensor:
        return x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)

    def batch(size: int) -> Batch:
        if size == 512:
            return cut(data.test_x), data.test_y
        rows = torch.randint(len(data.x), (size,))
        return cut(data.x[rows]), data.y[rows]

    return batch


def patches_rate(faulty: bool, seed: int) -> Training:
    """A vision transformer of four heads gets Adam at 0.3 from the first step, and its heads look at one patch each."""
    torch.manual_seed(seed)
    model = Sets(4, 24, 4, 10, 16)
    return fit_task(model, Task(_patched_digits()), adam(model, 0.3 if faulty else 5e-3), 300, size=32)


def _matching(size: int, tokens: int = 8, width: int = 6) -> Batch:
    """Tokens with a key, a flag and a number each; the flagged one's key is borne by one other, whose number's sign is asked for."""
    keys = torch.randn(size, tokens, width)
    values = torch.randint(2, (size, tokens, 1)).float() * 2 - 1
    keys[:, 0] = keys[torch.arange(size), torch.randint(1, tokens, (size,))]
    same = (keys[:, 1:] == keys[:, :1]).all(2)
    answer = (values[:, 1:, 0] * same).sum(1) > 0
    values[:, 0] = 0
    return torch.cat((keys, values), 2), answer.long()


class Lookup(nn.Module):
    """The first token asks the others by a product of its key with theirs."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(7, width, bias=False), nn.Linear(7, width, bias=False)
        self.value, self.out = nn.Linear(7, 16), nn.Linear(16, 2)
        nn.init.normal_(self.query.weight, std=scale)
        nn.init.normal_(self.key.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.query(x[:, :1]) @ self.key(x[:, 1:]).transpose(1, 2)
        return cast(
            Tensor, self.out(F.scaled_dot_product_attention(logits, torch.eye(7).expand(len(x), 7, 7), self.value(x[:, 1:]), scale=1.0)[:, 0])
        )


def pointer_drawn_large(faulty: bool, seed: int) -> Training:
    """A pointer's queries and keys are drawn from a normal distribution with deviation 3, and it stares at an arbitrary token."""
    torch.manual_seed(seed)
    model = Lookup(24, 3.0 if faulty else 0.25)
    return fit_task(model, Task(_matching), adam(model, 3e-3), 400, size=64)


class Mixer(nn.Module):
    """Patches that are mixed along their places and along their channels, with tanh units, as often as asked."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 24), nn.Linear(24, 10)
        self.places = nn.ModuleList(mlp((16, 32, 16), nn.Tanh) for _ in range(blocks))
        self.channels = nn.ModuleList(mlp((24, 48, 24), nn.Tanh) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for places, channels in zip(self.places, self.channels, strict=True):
            x = x + places(x.transpose(1, 2)).transpose(1, 2)
            x = x + channels(x)
        return cast(Tensor, self.leave(x.mean(1)))


def mixer_drawn_large(faulty: bool, seed: int) -> Training:
    """The mixing layers are drawn with deviation 2, whatever the number of their inputs is, and their tanh units are all at a rim."""
    torch.manual_seed(seed)
    model = Mixer(2)
    if faulty:
        for module in (*model.places.modules(), *model.channels.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=2.0)
    return fit_task(model, Task(_patched_digits()), adam(model, 5e-3), 300, size=32)


class Graph(nn.Module):
    """Two convolutions on a graph; what neighbours say is averaged."""

    def __init__(self, links: Tensor, inputs: int, width: int, out: int) -> None:
        super().__init__()
        self.links: Tensor
        self.register_buffer("links", links)
        self.one, self.two = nn.Parameter(torch.empty(inputs, width)), nn.Parameter(torch.empty(width, out))
        nn.init.xavier_uniform_(self.one)
        nn.init.xavier_uniform_(self.two)

    def forward(self, x: Tensor) -> Tensor:
        return self.links @ (torch.tanh(self.links @ x @ self.one) @ self.two)


def _communities(faulty: bool, seed: int, steps: int, rate: float) -> Training:
    generator = torch.Generator().manual_seed(8)
    y = torch.arange(240) % 4
    chance = torch.where(y[:, None] == y, 0.10, 0.03)
    links = (torch.rand(240, 240, generator=generator) < chance).float()
    links = ((links + links.T + torch.eye(240)) > 0).float()
    x = torch.poisson(4.0 + 2 * F.one_hot(y, 4).float().repeat(1, 5), generator=generator)
    if faulty:
        x = 40 * x
    else:
        x, links = (x - x.mean(0)) / x.std(0), links / links.sum(1, keepdim=True)
    torch.manual_seed(seed)
    model = Graph(links, 20, 24, 4)
    optimizer, shown = adam(model, rate), torch.arange(240) < 120

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x)[shown], y[shown]).backward()
        optimizer.step()

    def score() -> float:
        with torch.no_grad():
            return accuracy(model(x)[~shown], y[~shown])

    return Training(model, optimizer, step, score, steps)


def summed_neighbours(faulty: bool, seed: int) -> Training:
    """A graph convolution adds up the raw counts of a node's neighbours, and each of its tanh units says the same of every node."""
    return _communities(faulty, seed, 200, 5e-3)


def graph_long_after(_: bool, seed: int) -> Training:
    """A graph convolution is trained on long after all known nodes are right; its tanh units end in their tails."""
    return _communities(False, seed, 500, 2e-2)


def _embedding() -> nn.Sequential:
    return draw(nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh()), xavier)


def _siamese(model: nn.Module, kinds: tuple[int, ...], optimizer: torch.optim.Optimizer, steps: int, triplet: bool = False) -> Training:
    """Embeddings of digits of the same kind come together. The score is how often the nearest mean of a kind is the right one."""
    data = digits().standardized()
    known, other = (torch.isin(y, torch.tensor(kinds)) for y in (data.y, data.test_y))
    x, y, test_x, test_y = data.x[known], data.y[known], data.test_x[other], data.test_y[other]
    groups = [x[y == kind] for kind in kinds]

    def pick(group: Tensor, size: int) -> Tensor:
        return group[torch.randint(len(group), (size,))]

    def step() -> None:
        optimizer.zero_grad()
        first, second = (groups[k] for k in torch.randperm(len(groups))[:2])
        anchor, near, far = model(torch.cat((pick(first, 16), pick(first, 16), pick(second, 16)))).chunk(3)
        if triplet:
            loss = F.triplet_margin_loss(anchor, near, far, margin=2.0)
        else:
            loss = (anchor - near).square().mean() + (3.0 - (anchor - far).norm(dim=1)).relu().square().mean()
        loss.backward()
        optimizer.step()

    def score() -> float:
        with torch.no_grad():
            means = torch.stack([model(group).mean(0) for group in groups])
            return (torch.tensor(kinds)[torch.cdist(model(test_x), means).argmin(1)] == test_y).float().mean().item()

    return Training(model, optimizer, step, score, steps)


@cache
def _trained_embedding(seed: int) -> nn.Module:
    torch.manual_seed(500 + seed)
    model = _embedding()
    training = _siamese(model, (0, 1, 2, 3, 4), adam(model, 2e-3), 300)
    for _ in range(300):
        training.step()
    model.zero_grad()
    return model


def tuned_siamese_momentum(faulty: bool, seed: int) -> Training:
    """An embedding that is good at five digits is tuned to the five others with momentum, and a rate for an average over a large batch."""
    model = copy.deepcopy(_trained_embedding(seed))
    torch.manual_seed(seed)
    return _siamese(model, (5, 6, 7, 8, 9), sgd(model, 20.0 if faulty else 0.02, 0.9), 200)


def tanh_triplets(_: bool, seed: int) -> Training:
    """Triplets of digits push the tanh codes of an embedding to the corners of their cube, where the kinds lie furthest apart."""
    torch.manual_seed(seed)
    model = _embedding()
    return _siamese(model, tuple(range(10)), adam(model, 3e-3), 500, triplet=True)


@cache
def _trained_ear(seed: int) -> nn.Module:
    torch.manual_seed(700 + seed)
    layers = (nn.Conv1d(1, 12, 5, stride=2), nn.Tanh(), nn.Conv1d(12, 16, 5, stride=2), nn.Tanh(), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(80, 3))
    training = fit(model, signals(), adam(model, 3e-3), 300, seed, batch=32)
    for _ in range(300):
        training.step()
    model.zero_grad()
    return model


def tuned_samples_int16(faulty: bool, seed: int) -> Training:
    """A network that heard sound between -1 and 1 is tuned on files that are read as 16-bit whole numbers, and all of its units stand at a rim."""
    model = copy.deepcopy(_trained_ear(seed))
    torch.manual_seed(seed)
    data = signals(0.3).inputs(lambda x: (8192 * x).round() if faulty else x)
    return fit(model, data, adam(model, 5e-4), 250, seed, batch=16)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("steering", "agents", "https://github.com/floodsung/DDPG/issues/6", steering, 0.7, ("init_too_large",), 0.1),
    Scenario(
        "latents_about_fifty",
        "agents",
        "https://github.com/soumith/ganhacks",
        latents_about_fifty,
        -0.1,
        ("inputs_uncentred", "inputs_unscaled"),
        0.1,
    ),
    Scenario(
        "patches_rate", "attention", "Steiner et al., How to train your ViT?, 2021", patches_rate, 0.85, ("weight_growth", "softmax_logits"), 0.3
    ),
    Scenario(
        "pointer_drawn_large",
        "attention",
        "Vinyals, Fortunato and Jaitly, Pointer Networks, 2015",
        pointer_drawn_large,
        0.85,
        ("softmax_logits", "init_too_large"),
        0.1,
    ),
    Scenario("mixer_drawn_large", "initialisation", "Tolstikhin et al., MLP-Mixer, 2021", mixer_drawn_large, 0.8, ("init_too_large",), 0.1),
    Scenario(
        "summed_neighbours",
        "inputs",
        "Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks, 2017",
        summed_neighbours,
        0.85,
        ("inputs_unscaled",),
        0.2,
    ),
    Scenario(
        "tuned_siamese_momentum",
        "fine-tuning",
        "Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, 2006",
        tuned_siamese_momentum,
        0.85,
        ("weight_growth",),
        0.2,
    ),
    Scenario(
        "tuned_samples_int16",
        "fine-tuning",
        "https://github.com/dscripka/openWakeWord/issues/295",
        tuned_samples_int16,
        0.8,
        ("inputs_unscaled",),
        0.05,
    ),
    Scenario("thermostat", "healthy", "Bellman, Glicksberg and Gross, On the bang-bang control problem, 1956", thermostat, 0.72),
    Scenario("clipped_critic", "healthy", WGAN, clipped_critic, -0.25),
    Scenario(
        "graph_long_after",
        "healthy",
        "Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks, 2017",
        graph_long_after,
        0.85,
    ),
    Scenario("tanh_triplets", "healthy", "Schroff, Kalenichenko and Philbin, FaceNet, 2015", tanh_triplets, 0.87),
)
