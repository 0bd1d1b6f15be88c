"""The models that the benchmarks train, and how two trainings are compared: by steps that take turns in one process.

The speed of a machine varies, so every figure is a ratio. Two equal models take their steps in turn, in the order ABBA, and each pair of steps gives
one ratio. The median of the ratios is reported with the quartiles. The same comparison of two bare trainings shows how much of that is noise.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One training: how to make the model, its batches, and its optimizer."""

    name: str
    about: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    autocast: torch.dtype | None = None

    def loss(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


class Mlp(nn.Sequential):
    """A network of ten tanh layers of one width."""

    def __init__(self, width: int = 1024, depth: int = 10, classes: int = 10) -> None:
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
        super().__init__(*hidden, nn.Linear(width, classes))


class Block(nn.Module):
    """The basic block of a ResNet: two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(inner + self.shortcut(x))
        return out


class ResNet18(nn.Sequential):
    """ResNet-18 with 17 ReLUs, in the variant for images of 32 x 32 pixels: the first convolution has a stride of 1, and there is no max pooling."""

    def __init__(self, width: int, classes: int = 10) -> None:
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = [
            Block(widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if first and stage else 1)
            for stage in range(4)
            for first in (True, False)
        ]
        stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


class Lstm(nn.Module):
    """A language model of two LSTM layers."""

    def __init__(self, width: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return out


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return mixed


class Layer(nn.Module):
    """A transformer layer with the normalisation before attention and MLP (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Gpt(nn.Module):
    """A language model of pre-norm transformer layers with causal attention and learned positions."""

    def __init__(self, width: int, layers: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.layers(x)))
        return out


def _tokens(rows: int, length: int, vocabulary: int, device: torch.device) -> Callable[[], Batch]:
    def batch() -> Batch:
        drawn = torch.randint(vocabulary, (rows, length + 1), device=device)
        return drawn[:, :-1], drawn[:, 1:]

    return batch


def workloads(device: torch.device) -> dict[str, Workload]:
    """All trainings by their names. On a GPU the models are larger."""
    cuda = device.type == "cuda"

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)

    def drawn(*shape: int) -> Callable[[], Batch]:
        return lambda: (torch.randn(*shape, device=device), torch.randint(10, shape[:1], device=device))

    width, images = (64, 512) if cuda else (16, 64)
    low = torch.bfloat16 if cuda else None
    gpt = (
        ("12 layers of width 768, 12 heads, 8 x 1024 tokens, vocabulary 50304 (124M parameters), bf16 autocast", (768, 12, 12, 1024, 50304), 8)
        if cuda
        else ("4 layers of width 256, 4 heads, 16 x 128 tokens, vocabulary 256", (256, 4, 4, 128, 256), 16)
    )
    cells = 1024 if cuda else 256
    every = [
        Workload("MLP", "10 x (Linear 1024, Tanh), batch 256, SGD", Mlp, drawn(256, 1024), sgd),
        Workload("ResNet-18", f"width {width}, batch {images} of 3 x 32 x 32, SGD", lambda: ResNet18(width), drawn(images, 3, 32, 32), sgd, low),
        Workload("LSTM", f"2 layers of {cells}, 32 x 64 tokens, SGD", lambda: Lstm(cells), _tokens(32, 64, 256, device), sgd),
        Workload("GPT", f"{gpt[0]}, AdamW", lambda: Gpt(*gpt[1]), _tokens(gpt[2], gpt[1][3], gpt[1][4], device), adamw, low),
    ]
    return {each.name: each for each in every}


class Training:
    """One of two trainings that are compared.

    Args:
        work: what is trained.
        model: the model, which must be on the device already.
        compiled: the mode for torch.compile. None: the model runs eager.
    """

    def __init__(self, work: Workload, model: nn.Module, device: torch.device, compiled: str | None = None) -> None:
        self.work, self.model, self.device = work, model, device
        self.run: Callable[[Tensor], Tensor] = model if compiled is None else torch.compile(model, mode=None if compiled == "default" else compiled)
        self.optimizer = work.optimizer(model)

    def step(self, batch: Batch) -> float:
        """Train one step and return the seconds that it took."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.work.autocast or torch.bfloat16, enabled=self.work.autocast is not None):
            loss = self.work.loss(self.run, batch)
        loss.backward()
        self.optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun


@dataclass(frozen=True)
class Ratio:
    """How the time of the steps of a training B compares with that of a training A."""

    median: float
    """The median of the ratios of the pairs of steps."""
    low: float
    high: float
    """The lower and the upper quartile of the ratios."""
    total: float
    """The ratio of the sums of all steps, which is that of the whole trainings."""
    milliseconds: float
    """The median time of a step of A."""
    pairs: int
    """The number of pairs of steps."""

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def compare(a: Training, b: Training, pairs: int, warm: int = 3) -> Ratio:
    """Let two trainings take their steps in turn and compare the times.

    Args:
        pairs: the number of pairs of steps that are measured.
        warm: the number of steps of each training before that.
    """
    for _ in range(warm):
        batch = a.work.batch()
        a.step(batch)
        b.step(batch)
    first, second = [], []
    for turn in range(pairs):
        batch = a.work.batch()
        order = (a, b) if turn % 2 else (b, a)
        times = {each: each.step(batch) for each in order}
        first.append(times[a])
        second.append(times[b])
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if pairs > 1 else [ratios[0]] * 3
    return Ratio(median, low, high, sum(second) / sum(first), 1e3 * statistics.median(first), pairs)


def twins(work: Workload, device: torch.device, seed: int = 0) -> Iterator[nn.Module]:
    """Equal models of a workload, without end."""
    torch.manual_seed(seed)
    model = work.model().to(device)
    while True:
        twin = copy.deepcopy(model)
        for module in twin.modules():
            if isinstance(module, nn.RNNBase):
                # The weights of a copy lie apart, which cuDNN would put together in each call.
                module.flatten_parameters()
        yield twin


def machine(device: torch.device) -> str:
    """A text that says on what machine and with which torch a figure was measured."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{threads} thread{'' if threads == 1 else 's'} of {name}, torch {torch.__version__}"
