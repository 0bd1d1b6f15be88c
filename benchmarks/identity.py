"""Whether training with torchsat is bit for bit the training without it, over situations in which a monitor could disturb it.

python benchmarks/identity.py [--only PATTERN]

Each situation is trained twice without torchsat, which shows that it is deterministic, and then watched: at every step, and on the default schedule.
Compared are the losses, all parameters, buffers and gradients, what the user's own hooks and functions were called with and how often, the keys of
the state dict, and the state of the random generator. The exit status is 1 if anything differs. The situations are in identity_cases.py,
their models in identity_models.py.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import identity_cases
import torch
from torch import Tensor, nn

import torchsat

WAYS: Mapping[str, Callable[[nn.Module], Any]] = {
    "every step": lambda model: torchsat.watch(model, every=1, budget=None),
    "by default": torchsat.watch,
}


def trained(situation: identity_cases.Situation, watch: Callable[[nn.Module], Any] | None) -> dict[str, Any]:
    """What one training leaves behind."""
    torch.manual_seed(0)
    monitors: list[Any] = []

    def watched(model: nn.Module) -> None:
        if watch is not None:
            monitors.append(watch(model))

    left = dict(situation(watched))
    left["random"] = torch.get_rng_state()
    for each in monitors:
        each.close()
    return left


def difference(one: Any, other: Any, at: str = "") -> str | None:
    """The first place at which two results differ; None where they are bit for bit the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.untyped_storage().nbytes() >= 0 and _bits(one) == _bits(other)
        return None if same else at or "tensor"
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return f"{at} keys"
        return next((found for key in one if (found := difference(one[key], other[key], f"{at}.{key}".lstrip("."))) is not None), None)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{at} has {len(one)} and {len(other)} entries"
        return next((found for k, (a, b) in enumerate(zip(one, other, strict=True)) if (found := difference(a, b, f"{at}[{k}]")) is not None), None)
    return None if one == other or (one != one and other != other) else f"{at}: {one!r} and {other!r}"


def _bits(tensor: Tensor) -> bytes:
    plain = torch.Tensor.as_subclass(tensor.detach(), Tensor).cpu().contiguous()
    return (
        bytes(plain.view(torch.uint8).numpy().tobytes())
        if plain.numel() and plain.ndim
        else bytes(plain.reshape(1).view(torch.uint8).numpy().tobytes())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="only the situations whose name contains this regular expression")
    pattern = parser.parse_args().only
    torch.set_num_threads(1)
    # What the situations make torch and torchsat say is not the subject.
    logging.disable(logging.WARNING)
    failed = 0
    for name, situation in identity_cases.SITUATIONS.items():
        if not re.search(pattern, name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = trained(situation, None)
            found = {"again, bare": difference(bare, trained(situation, None))}
            for way, watch in WAYS.items():
                try:
                    found[way] = difference(bare, trained(situation, watch))
                except Exception as error:
                    found[way] = f"{type(error).__name__}: {error}"
        wrong = [f"{way}: {what}" for way, what in found.items() if what is not None]
        failed += bool(wrong)
        print(f"{'DIFFERS' if wrong else 'same   '} {name}{': ' if wrong else ''}{'; '.join(wrong)[:180]}", flush=True)
    print(f"{failed} of {len(identity_cases.SITUATIONS)} situations differ" if not pattern else f"{failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
