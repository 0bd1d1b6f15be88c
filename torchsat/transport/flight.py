"""One observation on its way to the host, and the copies that bring it there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsat.transport.layout import Layout
from torchsat.transport.packing import Vectors, merge


class Copy(NamedTuple):
    """A pair of vectors on the host, whose numbers may still be on their way."""

    vectors: Vectors
    event: torch.cuda.Event | None
    """A CUDA event that has passed once the numbers are on the host; None: they are there already."""

    @property
    def is_done(self) -> bool:
        return self.event is None or bool(self.event.query())


@dataclass
class Flight:
    """One observation on its way to the host, of one process or of several.

    Where the other ranks have failed, the vectors of this rank alone take the place of the merged ones.
    """

    step: int
    time: float
    """Seconds since the epoch, when the observation ended."""
    layout: Layout
    copies: Sequence[Copy]
    """One copy for each device of this process, or the single copy of what all ranks have merged."""
    works: Sequence[Any] = ()
    """The handles of the collectives that merge the vectors of all ranks; empty for one process."""
    own: Sequence[Copy] = ()
    """Where several ranks observe together, the vectors of this rank alone."""
    averages: float = 1.0
    """The number by which gradients are still to be divided, because data parallelism averages over it (parts.Parts.averages). It is 1 where several
    ranks observe together, which have divided by it before they send."""
    generation: int = 0
    """Which structure of the model the numbers are of (parts.Parts.generation)."""
    give_up: Callable[[str], None] = field(default=lambda why: None, repr=False)
    """Called with the reason when the other ranks no longer answer."""
    failed: bool = False
    """Whether the numbers of the other ranks will never arrive."""

    def arrived(self) -> bool:
        """Whether the numbers are on the host: those of all ranks or, where that has failed, those of this one."""
        if not self.failed:
            try:
                if not all(work.is_completed() for work in self.works):
                    return False
                if all(copy.event is None for copy in self.copies):
                    for work in self.works:
                        # It is completed, so this does not wait. It raises the error of the collective, if there was one.
                        work.wait()
            except Exception as error:
                self.fail(str(error).partition("\n")[0] or type(error).__name__)
        return all(copy.is_done for copy in (self.own if self.failed else self.copies))

    def wait(self, seconds: float = math.inf) -> None:
        """Wait until the numbers have arrived. The other ranks are given up after so many seconds; a device of this process never is."""
        until = time.monotonic() + seconds
        while self.works and not self.failed and not self.arrived():
            if time.monotonic() > until:
                self.fail(f"nothing was heard of them for {seconds:g} s")
            else:
                time.sleep(1e-4)
        for copy in self.own if self.failed else self.copies:
            if copy.event is not None:
                copy.event.synchronize()

    def fail(self, why: str) -> None:
        """Use the numbers of this rank alone."""
        self.failed = True
        self.give_up(why)

    def merged(self) -> Vectors:
        """The numbers that have arrived, as one pair of vectors."""
        return merge([copy.vectors for copy in (self.own if self.failed else self.copies)])


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, made by the current stream of the tensor's device, and the event after which it is there; None: it is there already."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


def copy_to_host(vectors: Vectors) -> Copy:
    """Start to copy both vectors to the host."""
    sums, _ = to_host(vectors.sums)
    maxes, event = to_host(vectors.maxes)
    # One stream makes both copies, one after the other, so the event of the second copy passes after both.
    return Copy(Vectors(sums, maxes), event)


def copy_after(works: Sequence[Any], vectors: Vectors, own: Vectors) -> tuple[Copy, Copy]:
    """Start to copy two pairs of vectors to the host: `vectors`, after the collectives have merged them, and `own`, those of this rank alone.

    On a GPU a stream of its own waits for the collectives, so that the stream of the user's model does not. It copies the rank's own vectors first:
    they arrive even if the collectives never end.
    """
    if vectors.sums.device.type != "cuda":
        return copy_to_host(vectors), copy_to_host(own)
    device = vectors.sums.device
    stream: Any = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        mine = copy_to_host(own)
        for work in works:
            work.wait()
        merged = copy_to_host(vectors)
        for each in (*vectors, *own):
            each.record_stream(stream)
    return merged, mine
