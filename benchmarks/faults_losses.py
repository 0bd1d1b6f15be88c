"""More scenarios that no limit was tuned on: the last activation of a network, and the loss behind it. See faults_strange.py.

In each faulty one the last activation cannot give what the loss asks for, or the loss applies an activation of its own to what is bounded already.
Those without a fault are in faults_losses_sound.py.
"""

from __future__ import annotations

import inspect
import textwrap
from functools import cache

import torch
from faults_runs import Scenario, Training
from faults_scores import explained
from faults_tasks import Batch, Task, cross_entropy, digits, drawn, fit, likelihood
from torch import Tensor, nn
from torch.nn import functional as F


class Segments(nn.Module):
    """An encoder and a decoder with the places of its maxima handed over, as in SegNet; the scores of the classes are [N, C, H, W]."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        x = F.max_unpool2d(self.inner(pooled), places, [2, 2])
        scores: Tensor = self.out(self.up(x))
        return F.softmax(scores, dim=1) if self.normalised else scores


def _scenes(size: int, side: int = 16) -> Batch:
    """Noisy images with three small patches: a bright one, a dark one and a striped one, and the class of each pixel; most are background."""
    x, y = 0.4 * torch.randn(size, 1, side, side), torch.zeros(size, side, side, dtype=torch.long)
    stripes = torch.tensor([1.0, -1.0]).repeat(2)[:, None].expand(4, 4)
    for kind, patch in enumerate((torch.ones(4, 4), -torch.ones(4, 4), stripes), 1):
        for row in range(size):
            top, left = (int(each) for each in torch.randint(side - 4, (2,)))
            x[row, 0, top : top + 4, left : left + 4] += patch
            y[row, top : top + 4, left : left + 4] = kind
    return x, y


def _overlap(output: Tensor, target: Tensor) -> float:
    """The intersection over the union of the pixels that are said to be of a class and are, averaged over the classes."""
    said = output.argmax(1)
    both = [(((said == kind) & (target == kind)).sum() / ((said == kind) | (target == kind)).sum().clamp(min=1)).item() for kind in range(4)]
    return sum(both) / len(both)


def softmax_of_pixels(faulty: bool, seed: int) -> Training:
    """A network for segmentation returns probabilities, and the cross entropy takes a softmax of them again: rare classes are learned slowly."""
    torch.manual_seed(seed)
    model = Segments(faulty)
    task = Task(_scenes, F.cross_entropy, _overlap)
    return fit(model, task, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 200, size=8)


class Letters(nn.Module):
    """A recurrent model of text, which gives log-probabilities or probabilities of the next letter: [N, C, T], as the loss of PyTorch wants them."""

    def __init__(self, letters: int, logarithm: bool) -> None:
        super().__init__()
        self.logarithm = logarithm
        self.embedding, self.memory, self.out = nn.Embedding(letters, 24), nn.GRU(24, 64, batch_first=True), nn.Linear(64, letters)

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(self.memory(self.embedding(x))[0]).permute(0, 2, 1)
        return F.log_softmax(z, dim=1) if self.logarithm else F.softmax(z, dim=1)


@cache
def _text() -> tuple[Tensor, int]:
    """The source text of a module of Python as numbers of letters, and how many letters there are."""
    text = inspect.getsource(textwrap)
    letters = sorted(set(text))
    return torch.tensor([letters.index(each) for each in text]), len(letters)


def softmax_and_nll(faulty: bool, seed: int) -> Training:
    """A softmax instead of its logarithm goes to NLLLoss, which then rewards a sure guess and hardly blames a wrong one."""
    torch.manual_seed(seed)
    text, letters = _text()

    def batch(size: int) -> Batch:
        rows = torch.randint(len(text) - 33, (size, 1)) + torch.arange(33)
        return text[rows[:, :-1]], text[rows[:, 1:]]

    def right(output: Tensor, target: Tensor) -> float:
        return (output.argmax(1) == target).float().mean().item()

    model = Letters(letters, not faulty)
    return fit(model, Task(batch, F.nll_loss, right), torch.optim.Adam(model.parameters(), 5e-3), 150, size=16)


class Digits(nn.Module):
    """Convolutions for digits, run in bfloat16 where that is safe."""

    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 10), *end),
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.body(x)
        return out.float()


def sigmoid_of_classes(faulty: bool, seed: int) -> Training:
    """A sigmoid stands before the cross entropy of ten classes, so that no class ever gets a probability above 0.24."""
    torch.manual_seed(seed)
    x, y = digits()
    model = Digits(*([nn.Sigmoid()] if faulty else []))
    return fit(model, Task(drawn(x[:, None] / 16, y), F.cross_entropy, likelihood), torch.optim.AdamW(model.parameters(), 2e-3), 200, size=32)


class Tagger(nn.Module):
    """A tag for each word, from an LSTM in both directions and one output layer."""

    def __init__(self, words: int, tags: int, squashed: bool) -> None:
        super().__init__()
        self.squashed = squashed
        self.embedding, self.memory = nn.Embedding(words, 16), nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.out = nn.Linear(48, tags)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.out(self.memory(self.embedding(x))[0])
        return torch.tanh(z) if self.squashed else z


def tanh_of_tags(faulty: bool, seed: int) -> Training:
    """A tanh stands before the cross entropy of the tags of words, of which none is ever given more than 0.37; a tag hangs on the neighbours too."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        words = torch.randint(40, (size, 14))
        before, after = F.pad(words, (1, 0))[:, :-1] >= 20, F.pad(words, (0, 1))[:, 1:] >= 20
        return words, 4 * (words % 3) + 2 * before.long() + after.long()

    model = Tagger(40, 12, faulty)
    return fit(model, Task(batch, cross_entropy, likelihood), torch.optim.Adam(model.parameters(), 1e-2), 200, size=16)


class Recommender(nn.Module):
    """Whether a user likes an item, from a product and from a perceptron of their embeddings."""

    def __init__(self, users: int, items: int, squashed: bool) -> None:
        super().__init__()
        self.squashed = squashed
        self.user, self.item = nn.Embedding(users, 16), nn.Embedding(items, 16)
        self.deep = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.out = nn.Linear(32, 1)

    def forward(self, pair: Tensor) -> Tensor:
        user, item = self.user(pair[:, 0]), self.item(pair[:, 1])
        score: Tensor = self.out(torch.cat((user * item, self.deep(torch.cat((user, item), 1))), 1)).squeeze(-1)
        return torch.sigmoid(score) if self.squashed else score


def ranked(output: Tensor, target: Tensor) -> float:
    """The share of pairs of a positive and a negative sample in which the positive one has the larger output; equal ones count one half."""
    above = output[target > 0.5][:, None] - output[target < 0.5][None]
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean().item()


def sigmoid_of_clicks(faulty: bool, seed: int) -> Training:
    """A recommender returns probabilities to BCEWithLogitsLoss; since most pairs are negative, all of them sink to 0, and the loss to log 2."""
    torch.manual_seed(seed)
    users, items = torch.randn(60, 3), torch.randn(80, 3)
    liked = (users @ items.T > 2.2).float()

    def batch(size: int) -> Batch:
        count = 4096 if size == 512 else size
        pair = torch.stack((torch.randint(60, (count,)), torch.randint(80, (count,))), 1)
        return pair, liked[pair[:, 0], pair[:, 1]]

    model = Recommender(60, 80, faulty)
    task = Task(batch, F.binary_cross_entropy_with_logits, ranked)
    return fit(model, task, torch.optim.Adam(model.parameters(), 5e-3), 500, size=128)


class Events(nn.Module):
    """Convolutions along a signal that tell at each time which of three events go on: [N, T, 3]."""

    def __init__(self, squashed: bool) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv1d(1, 24, 7, padding=3), nn.Conv1d(24, 24, 7, padding=3), nn.Conv1d(24, 3, 1)
        self.squashed = squashed

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.out(F.elu(self.second(F.elu(self.first(x)))))
        return z.tanh().transpose(1, 2) if self.squashed else z.transpose(1, 2)


def _events(size: int, length: int = 64) -> Batch:
    """Noise with three short tones of their own pitch at random times, and where they are."""
    x, y = 0.3 * torch.randn(size, 1, length), torch.zeros(size, length, 3)
    time = torch.arange(length)
    for kind, pitch in enumerate((0.5, 1.2, 2.4)):
        begin = torch.randint(length - 8, (size, 1))
        on = ((time >= begin) & (time < begin + 8)).float()
        x[:, 0] += on * torch.sin(pitch * time + 6.28 * torch.rand(size, 1))
        y[:, :, kind] = on
    return x, y


def tanh_of_events(faulty: bool, seed: int) -> Training:
    """A tanh stands before BCEWithLogitsLoss, so that no event is ever less probable than 0.27, though each is there an eighth of the time."""
    torch.manual_seed(seed)
    model = Events(faulty)
    bce = F.binary_cross_entropy_with_logits
    task = Task(_events, bce, lambda output, target: -bce(output, target).item())
    return fit(model, task, torch.optim.RMSprop(model.parameters(), 1e-3), 250, size=16)


def sigmoid_of_signed_pixels(faulty: bool, seed: int) -> Training:
    """A convolutional autoencoder ends in a sigmoid, but its images have been brought to -1..1, where most pixels are -1; the twin ends in a tanh."""
    torch.manual_seed(seed)
    images = digits()[0][:, None] / 8 - 1
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.LeakyReLU(0.1)),
        *(nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 64), nn.LeakyReLU(0.1), nn.Unflatten(1, (16, 2, 2))),
        *(nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)),
        nn.Sigmoid() if faulty else nn.Tanh(),
    )
    return fit(model, Task(drawn(images, images), nn.MSELoss(), explained), torch.optim.Adam(model.parameters(), 3e-3), 250, size=32)


class Forecast(nn.Module):
    """A GRU that tells the next value of a series as a probability is told."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.out = nn.GRU(2, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.memory(x)[0]
        return torch.sigmoid(self.out(state[:, -1])).squeeze(1)


def sigmoid_of_standardised_load(faulty: bool, seed: int) -> Training:
    """The load of a grid is standardised and asked of a sigmoid under Huber's loss; the twin brings it to 0..1."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        hour = torch.randint(24, (size, 1)) + torch.arange(13)
        level = 0.5 * torch.randn(size, 1)
        load = level - torch.cos(hour * 0.2618) + 0.3 * torch.sin(hour * 0.5236) + 0.1 * torch.randn(size, 13)
        wanted = load[:, -1] if faulty else (load[:, -1] + 3.5) / 7
        return torch.stack((load[:, :-1], torch.cos(hour[:, 1:] * 0.2618)), 2), wanted

    model = Forecast()
    return fit(model, Task(batch, F.huber_loss, explained), torch.optim.Adam(model.parameters(), 5e-3), 250, size=32, clip=1.0)


class Pose(nn.Module):
    """The angle of a bar in an image, from convolutions and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.hidden, self.out = nn.Linear(16 * 36, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))).flatten(1)
        return torch.tanh(self.out(F.relu(self.hidden(x)))).view(-1)


def _bars(size: int, side: int = 12) -> Batch:
    """Noisy images of a bar through the middle, and its angle in degrees, from -70 to 70."""
    angle = 140 * torch.rand(size) - 70
    place = torch.arange(side) - (side - 1) / 2
    radian = (angle * torch.pi / 180)[:, None, None]
    off = place[:, None] * radian.cos() - place * radian.sin()
    return (torch.exp(-off.square() / 2) + 0.1 * torch.randn(size, side, side))[:, None], angle


def degrees_behind_tanh(faulty: bool, seed: int) -> Training:
    """Angles in degrees are asked of a tanh, under a squared error that is written by hand; the twin asks for them in units of 90 degrees."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        x, angle = _bars(size)
        return x, angle if faulty else angle / 90

    model = Pose()
    task = Task(batch, lambda a, y: ((a - y) ** 2).mean(), explained)
    return fit(model, task, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), 400, size=32)


class Price(nn.Module):
    """The price of a house from six columns, by weight-normalised layers and a softsign."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.Sequential(norm(nn.Linear(6, 32)), nn.GELU(), norm(nn.Linear(32, 32)), nn.GELU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(self.layers(x))


def log_price_behind_softsign(faulty: bool, seed: int) -> Training:
    """The logarithm of a price in millions is asked of a softsign, which ends at -1, their mean; the twin asks for half the distance from it."""
    torch.manual_seed(seed)
    x = torch.randn(2000, 6)
    price = -1 + 0.3 * x[:, :1] + 0.15 * x[:, 1:2] * x[:, 2:3].sign() + 0.2 * torch.tanh(2 * x[:, 3:4])
    y = price if faulty else (price + 1) / 2
    model = Price()
    return fit(model, Task(drawn(x, y), F.smooth_l1_loss, explained), torch.optim.NAdam(model.parameters(), 2e-3), 600, size=16)


class Critic(nn.Module):
    """The value of a state, by two layers of einsum."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.first, self.first_bias = nn.Parameter(torch.randn(48, 3) * 0.6), nn.Parameter(torch.zeros(48))
        self.second, self.second_bias = nn.Parameter(torch.randn(48) * 0.1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("ni,oi->no", x, self.first) + self.first_bias)
        value = torch.einsum("no,o->n", hidden, self.second) + self.second_bias
        return F.relu(value) if self.rectified else value


def costs_behind_relu(faulty: bool, seed: int) -> Training:
    """A critic learns by temporal differences what is lost until a drifting state comes to rest: never above 0, where its ReLU begins."""
    torch.manual_seed(seed)
    model = Critic(faulty)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    weight = 0.1 / (1 - 0.8 * 0.81)

    def step() -> None:
        x = torch.randn(32, 3)
        after = 0.9 * x + 0.2 * torch.randn(32, 3)
        wanted = -0.1 * x.square().sum(1) + 0.8 * model(after).detach()
        optimizer.zero_grad()
        F.mse_loss(model(x), wanted).backward()
        optimizer.step()

    def score() -> float:
        x = torch.randn(1000, 3)
        value = -weight * x.square().sum(1) - 0.8 * weight * 3 * 0.04 / 0.2
        with torch.no_grad():
            return explained(model(x), value)

    return Training(model, optimizer, step, score, 800)


class Box(nn.Module):
    """The place and the size of a rectangle in an image: the centre as a share of the side, and the logarithms of the sizes against an anchor."""

    def __init__(self, squash_sizes: bool) -> None:
        super().__init__()
        self.squash_sizes = squash_sizes
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, stride=2), nn.Mish(), nn.Conv2d(12, 24, 3), nn.Mish(), nn.Flatten(), nn.Linear(384, 4))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.body(x)
        return z.sigmoid() if self.squash_sizes else torch.cat((z[:, :2].sigmoid(), z[:, 2:]), 1)


def sigmoid_of_box_sizes(faulty: bool, seed: int) -> Training:
    """A detector takes the sigmoid of all four numbers of a box and not only of the centre's: of the logarithms of sizes, half are negative."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        place, centre, log_size = (torch.arange(14) + 0.5) / 14, 0.3 + 0.4 * torch.rand(size, 2), 1.6 * torch.rand(size, 2) - 0.8
        inside = (((place - centre[..., None]).abs() - 0.15 * log_size.exp()[..., None]) * -40).sigmoid()
        x = inside[:, 0, None, :] * inside[:, 1, :, None] + 0.05 * torch.randn(size, 14, 14)
        return x[:, None], torch.cat((centre, log_size), 1)

    def worst(output: Tensor, target: Tensor) -> float:
        return min(explained(output[:, which], target[:, which]) for which in range(4))

    model = Box(faulty)
    return fit(model, Task(batch, F.mse_loss, worst), torch.optim.AdamW(model.parameters(), 2e-3), 400, size=16)


CHOICE = ("activation_choice",)
SCENARIOS: tuple[Scenario, ...] = (
    Scenario("segnet_softmax", "outputs", "https://github.com/say4n/pytorch-segnet/issues/5", softmax_of_pixels, 0.5, CHOICE, 0.1),
    Scenario(
        "letters_softmax_nll",
        "outputs",
        "https://github.com/AnubhavGupta3377/Text-Classification-Models-Pytorch/issues/9",
        softmax_and_nll,
        0.4,
        CHOICE,
        0.1,
    ),
    Scenario(
        "sigmoid_cross_entropy_bfloat16",
        "outputs",
        "https://runebook.dev/en/docs/pytorch/generated/torch.nn.functional.sigmoid (sigmoid before CrossEntropyLoss)",
        sigmoid_of_classes,
        -0.3,
        CHOICE,
        0.5,
    ),
    Scenario("tags_tanh_cross_entropy", "outputs", "https://github.com/ufal/neuralmonkey/pull/489", tanh_of_tags, -0.3, CHOICE, 0.4),
    Scenario("clicks_double_sigmoid", "outputs", "https://github.com/yudi-mars/daisyRec/pull/15", sigmoid_of_clicks, 0.8, CHOICE, 0.1),
    Scenario(
        "events_tanh_bce",
        "outputs",
        "https://github.com/itakurah/focal-loss-pytorch/pull/5 (a bounded score before BCEWithLogitsLoss; here by a tanh)",
        tanh_of_events,
        -0.25,
        CHOICE,
        0.1,
    ),
    Scenario(
        "autoencoder_signed_pixels",
        "outputs",
        "https://github.com/mikesj-public/convolutional_autoencoder/pull/9",
        sigmoid_of_signed_pixels,
        0.7,
        CHOICE,
        0.3,
    ),
    Scenario(
        "load_standardised",
        "outputs",
        "https://github.com/jsyoon0823/Time-series-prediction/issues/3",
        sigmoid_of_standardised_load,
        0.8,
        CHOICE,
        0.2,
    ),
    Scenario(
        "degrees_behind_tanh",
        "outputs",
        "http://dvbuntu.github.io/wisdom/2016/08/18/steer/ (a steering angle behind a bounded output)",
        degrees_behind_tanh,
        0.9,
        CHOICE,
        0.3,
    ),
    Scenario(
        "box_sizes_behind_sigmoid",
        "outputs",
        "Redmon and Farhadi, YOLO9000, 2017, section 2 (a sigmoid for the centre of a box, none for its size)",
        sigmoid_of_box_sizes,
        0.75,
        CHOICE,
        0.2,
    ),
    Scenario(
        "log_price_behind_softsign",
        "outputs",
        "https://github.com/UC-IIC2613/Syllabus/issues/220 (prices, and the ranges of tanh and sigmoid)",
        log_price_behind_softsign,
        0.8,
        CHOICE,
        0.3,
    ),
    Scenario(
        "costs_behind_relu",
        "outputs",
        "https://github.com/dennybritz/reinforcement-learning/pull/104 (a ReLU behind values that can be negative)",
        costs_behind_relu,
        0.7,
        (*CHOICE, "dead_units"),
        0.3,
    ),
)
