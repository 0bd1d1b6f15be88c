"""How ranks agree on the layout of their numbers, on the number of the step, and on what is remembered of an earlier session.

They agree at their first observation, and again on the layout when the sites of some rank have changed. These are the only collectives that a rank
waits for, at most GRACE seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchsat.internals_distributed import backend_of, nccl_options, timeout_of
from torchsat.transport import meeting
from torchsat.transport.layout import Layout
from torchsat.transport.packing import Vectors


class Collectives:
    """A process group of our own, with the members and the backend of the user's.

    Args:
        group: the backend, such as torch.distributed.ProcessGroupGloo.
        device: the device on which it reads and writes tensors.
    """

    def __init__(self, group: Any, device: torch.device, rank: int, size: int) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._group = group
        self._works: list[Any] = []
        """The handles of collectives that may still be running."""

    @staticmethod
    def like(group: dist.ProcessGroup, store: Any, device: torch.device, rank: int, size: int) -> Collectives:
        """A group of our own like the user's, which all members make at the same time.

        Args:
            store: where the members find each other.
            device: the device of the model. Where the user's group has no backend for it, one for the GPU or the CPU is used.

        Raises:
            RuntimeError: the user's group has no backend that can be used.
        """
        for kind in dict.fromkeys((device.type, "cuda" if torch.cuda.is_available() else "cpu", "cpu")):
            where = device if kind == device.type else torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
            try:
                backend = backend_of(group, torch.device(kind))
            except RuntimeError:
                continue
            timeout = timeout_of(backend)
            if backend.name() == "gloo":
                return Collectives(dist.ProcessGroupGloo(store, rank, size, timeout), torch.device("cpu"), rank, size)
            if backend.name() == "nccl":
                return Collectives(dist.ProcessGroupNCCL(store, rank, size, nccl_options(timeout)), where, rank, size)
            # Another backend is used as it is: all ranks call the collectives of the user's group in the same order.
            return Collectives(backend, where, rank, size)
        raise RuntimeError(f"its process group has no backend for {device.type}")

    def merge(self, vectors: Vectors) -> list[Any]:
        """Start to merge the vectors of all ranks, in place. Returns the handles of the two all-reduces."""
        works = [
            self._group.allreduce([vector], operation) for vector, operation in zip(vectors, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True)
        ]
        self._works = [work for work in self._works if not work.is_completed()] + works
        return works

    def gather(self, numbers: list[int]) -> Tensor:
        """The numbers of all ranks, [ranks, numbers], on the host."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self._finish(self._group.allgather([gathered], [mine]))
        return torch.stack(gathered).cpu()

    def broadcast(self, text: bytes, size: int, root: int) -> bytes:
        """Send the text of the rank `root`, which has `size` bytes, to all ranks, and return it. The `text` that other ranks give is not read."""
        sent = torch.frombuffer(bytearray(text if self.rank == root else bytes(size)), dtype=torch.uint8).to(self.device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._finish(self._group.broadcast([sent], options))
        return sent.cpu().numpy().tobytes()

    def let_go(self) -> None:
        """Release the group. A group whose collectives are still running stays in memory until the process ends: to destroy it would mean to wait for
        them, until the timeout of the group."""
        group, self._group = self._group, None
        if group is not None and not all(work.is_completed() for work in self._works):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._works = []

    def _finish(self, work: Any) -> None:
        """Wait for a collective. Raises TimeoutError if some rank does not join it within GRACE seconds."""
        self._works.append(work)
        until = time.monotonic() + meeting.GRACE
        while not work.is_completed():
            if time.monotonic() > until:
                raise TimeoutError(f"the others did not answer within {meeting.GRACE:g} s")
            time.sleep(1e-4)
        work.wait()


@dataclass(frozen=True)
class Agreement:
    """What all ranks have agreed upon."""

    layout: Layout
    step: int
    """The step number of the furthest rank: the one with the highest number."""
    furthest: int
    """The rank with that step number."""


def agree(collectives: Collectives, told: bytes, step: int) -> Agreement:
    """Exchange sites, layers and step numbers between all ranks. A text that several ranks would send is sent once.

    Args:
        told: the sites and layers of this rank, as layout.told encodes them.

    Raises:
        TimeoutError: a rank did not answer.
    """
    digest = int.from_bytes(hashlib.sha256(told).digest()[:7], "big")
    gathered = collectives.gather([digest, len(told), step])
    texts = [(int(each[0]), int(each[1])) for each in gathered]
    speakers = sorted({texts.index(text) for text in texts})
    heard = {root: told if len(speakers) == 1 else collectives.broadcast(told, texts[root][1], root) for root in speakers}
    furthest = int(gathered[:, 2].argmax())
    return Agreement(Layout.joined(heard), int(gathered[furthest, 2]), furthest)


def agree_on_history(collectives: Collectives, furthest: int, history: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Send what the furthest rank remembers of an earlier session to all others, which may not be able to read its files.

    Returns:
        What that rank remembers; None on that rank itself.

    Raises:
        TimeoutError: a rank did not answer.
    """
    text = encode(history()) if collectives.rank == furthest else b""
    size = int(collectives.gather([len(text)])[furthest, 0])
    sent = collectives.broadcast(text, size, furthest)
    return None if collectives.rank == furthest else decode(sent)


def encode(history: dict[str, Any]) -> bytes:
    """Encode plain types as JSON. Python's JSON also keeps NaN and infinities, and floats to the last bit."""
    return json.dumps(history, separators=(",", ":")).encode()


def decode(text: bytes) -> dict[str, Any]:
    """The history that was encoded. JSON makes no difference between tuples and lists: each comes back as a tuple, as records have them."""
    found: dict[str, Any] = _with_tuples(json.loads(text))
    return found


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(_with_tuples(each) for each in value) if isinstance(value, list) else value
