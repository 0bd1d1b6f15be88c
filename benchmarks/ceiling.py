"""What the exact numbers of an attention cost, and how exact they are: `python benchmarks/ceiling.py [--length 2048] [--threads 1] [--write]`.

One token is an outlier, so that the largest logit of each head sits in a single row, which a sample misses. For each kind of attention it measures
the time and the memory (beyond what was in use before) of

- the call of torch itself,
- the sample: the logits of some rows, and the row of statistics from them,
- the exact numbers: all rows, some at a time,
- the whole matrix at once, in float32, from which the same numbers are computed in plain torch.

Then it compares each with the whole matrix in float64: the largest logit, the entropy and the share of the first key, of the worst head. `--write`
puts the tables into docs/cost.md.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from overhead import put, table
from torch import Tensor
from workloads import machine

from torchsat.attention import Attention
from torchsat.columns import HEADS
from torchsat.softmax import observe_softmax

SAMPLE = 65536
OUTLIER = 12.0
Numbers = Mapping[str, Tensor]
"""The largest logit, the entropy and the share of the first key of each head."""


@dataclass(frozen=True)
class Kind:
    """One kind of attention."""

    name: str
    batch: int
    heads: int
    groups: int
    is_causal: bool
    has_bias: bool = False
    shorter: int = 1
    """The length is divided by this."""


KINDS = (
    Kind("plain", 1, 8, 8, False),
    Kind("causal", 1, 8, 8, True),
    Kind("causal, 2 groups of keys", 1, 8, 2, True),
    Kind("ALiBi", 1, 8, 8, False, has_bias=True),
    Kind("causal, an eighth of the length, batch of 8", 8, 12, 12, True, shorter=8),
)


def inputs(kind: Kind, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and mask. The token at two thirds of the last sample is an outlier."""
    torch.manual_seed(0)
    q, k = (torch.randn(kind.batch, heads, length, 64) for heads in (kind.heads, kind.groups))
    for each in (q, k):
        each[-1, :, 2 * length // 3] *= OUTLIER
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    slopes = 2.0 ** -torch.arange(1, kind.heads + 1).view(-1, 1, 1)
    return q, k, (-slopes * distance).masked_fill(distance < 0, -math.inf) if kind.has_bias else None


def direct(kind: Kind, q: Tensor, k: Tensor, bias: Tensor | None) -> Numbers:
    """The numbers of the whole matrix at once, in the type of the queries."""
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if kind.is_causal or kind.has_bias else seen
    z = q @ k.repeat_interleave(kind.heads // kind.groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    z = (z if bias is None else z + bias.to(z)).masked_fill(~seen, -math.inf)
    keys = seen.sum(-1)
    z, keys = z[:, :, keys > 1], keys[keys > 1]
    p = torch.softmax(z, -1)
    entropy = -torch.special.xlogy(p, p).sum(-1) / keys.to(z).log()
    return {"logit_max": z.amax((0, 2, 3)), "entropy": entropy.mean((0, 2)), "first_key": p[..., 0].mean((0, 2))}


def from_block(block: Tensor) -> Numbers:
    """The numbers of a block of heads."""
    rows = block[HEADS.index("rows")]
    return {"logit_max": block[-1], **{name: block[HEADS.index(name)] / rows for name in ("entropy", "first_key")}}


def peak() -> int | None:
    """The most memory that this process has had since `forget_peak`, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def forget_peak() -> None:
    """Give freed memory back to the system, and let the peak be what is in use now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return


def measured(run: Callable[[], object], turns: int) -> tuple[float, float]:
    """Seconds, the least of so many turns, and bytes of memory beyond what was in use; nan where that is not known."""
    run()
    forget_peak()
    before = peak()
    run()
    after, taken = peak(), []
    for _ in range(turns):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken), math.nan if before is None or after is None else after - before


def cost(kinds: Iterable[Kind], length: int, turns: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of the two tables: what each way costs, and how far it is from the whole matrix in float64."""
    costs, errors = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for kind in kinds:
        q, k, bias = inputs(kind, length // kind.shorter)
        given = {"is_causal": kind.is_causal, "enable_gqa": kind.groups != kind.heads}
        attention = Attention.of(F.scaled_dot_product_attention, (q, k, k, bias), given)
        rows = attention.rows(SAMPLE, 1)
        output = F.scaled_dot_product_attention(q, k, k, bias, **given)

        def sample(attention: Attention = attention) -> Tensor:
            logits = attention.logits(rows)  # noqa: B023
            return observe_softmax(logits.z, logits.visible, logits.elements)[1]

        ways: dict[str, Callable[[], object]] = {
            "the call": lambda: F.scaled_dot_product_attention(q, k, k, bias, **given),  # noqa: B023
            "sample": sample,
            "exact": lambda: attention.scan(output),  # noqa: B023
            "whole matrix": lambda: direct(kind, q, k, bias),  # noqa: B023
        }
        for name, run in ways.items():
            seconds, size = measured(run, turns)
            costs.append((kind.name, name, f"{1e3 * seconds:.1f}", "-" if math.isnan(size) else f"{size / 2**20:.1f}"))
        right = direct(kind, q.double(), k.double(), bias)
        for name, found in (
            ("sample", from_block(sample())),
            ("exact", from_block(attention.scan(output)[1])),
            ("float32", direct(kind, q, k, bias)),
        ):
            errors.append((kind.name, name, *(f"{_error(found[each].double(), right[each]):.1e}" for each in ("logit_max", "entropy", "first_key"))))
    return costs, errors


def _error(found: Tensor, right: Tensor) -> float:
    return float(((found - right).abs() / right.abs()).max())


def main(kinds: Iterable[Kind] = KINDS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    costs, errors = cost(kinds, given.length, given.turns)
    about = f"{given.length} tokens, one of them an outlier, 64 features a head, float32"
    text = (
        f"{machine(torch.device('cpu'))}; {about}; a sample of {SAMPLE} logits.\n\n{table(('attention', 'way', 'ms', 'MB'), costs)}\n\n"
        "The largest relative difference of a head from the whole matrix in float64:\n\n"
        f"{table(('attention', 'way', 'largest logit', 'entropy', 'first key'), errors)}"
    )
    print(text)
    if given.write:
        put(text, "ceiling")


if __name__ == "__main__":
    main()
