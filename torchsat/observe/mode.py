"""The function mode by which calls of torch's functions are heard, and the stack of the modules that are running.

A TorchFunctionMode is called in place of every function of torch. The mode costs about 2 us per call of torch, so it is open only while it is known
which module a call belongs to: while a module runs, or between the parts of a model that are called one by one (outside.py).
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from torchsat import internals
from torchsat.observe.origins import HOUSE, Origins

Function = Callable[..., Any]


@dataclass
class Frame:
    """One module whose forward is running."""

    path: str
    module: nn.Module
    hears: bool
    """Whether function calls in this forward are measured."""
    keeps_open: bool = False
    """Whether the mode stays open although no calls are measured, since closing and opening it would cost more than the few calls in this forward."""
    calls: dict[str, int] = field(default_factory=dict)
    """For each site name, such as `gelu`, how often its function has been called so far."""

    lines: dict[tuple[int, int], tuple[types.CodeType, str]] = field(default_factory=dict)
    """The places of the calls that share one, by the code and the position of the instruction that calls. The code is kept, since another could get
    the same id."""

    def place_of_line(self, name: str) -> str:
        """Like `place`, but all calls that one line of code makes in one run of the forward share a place: a loop over time makes thousands."""
        caller = internals.caller_of_torch(HOUSE)
        if caller is None:
            return self.place(name)
        key = id(caller.f_code), caller.f_lasti
        if key not in self.lines:
            self.lines[key] = caller.f_code, self.place(name)
        return self.lines[key][1]

    def place(self, name: str) -> str:
        """The place of the next call of this function, such as `blocks.0/gelu_1`. Each use of this method counts one call."""
        count = self.calls.get(name, 0)
        self.calls[name] = count + 1
        place = f"{self.path}/{name}" if self.path else name
        return f"{place}_{count}" if count else place


class CallMode(TorchFunctionMode):
    """The mode that is called for functions of torch, and for each thread a stack of the modules that are running.

    Args:
        hear: called in place of every function of torch while the mode is open, with (frame, function, args, kwargs). It must call the function.
    """

    def __init__(self, hear: Callable[[Frame, Function, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._hear = hear
        self._local = threading.local()
        self.origins = Origins()

    def __torch_function__(self, function: Function, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if internals.is_traced():
            return function(*args, **kwargs)
        frame = self.top or self.outside
        return self._hear(frame, function, args, kwargs) if frame is not None else self.origins.call(function, args, kwargs)

    @property
    def top(self) -> Frame | None:
        """The innermost module that is running on this thread."""
        frames = self._frames
        return frames[-1] if frames else None

    @property
    def outside(self) -> Frame | None:
        """What functions belong to while no module is running on this thread; None where they are not heard then."""
        found: Frame | None = getattr(self._local, "outside", None)
        return found

    @outside.setter
    def outside(self, frame: Frame | None) -> None:
        self._local.outside = frame
        if self.top is None:
            self._set(frame is not None)

    def enter(self, frame: Frame) -> None:
        """Note that a module's forward begins."""
        self._frames.append(frame)
        self._set(frame.hears or frame.keeps_open)

    def leave(self, module: nn.Module) -> Frame | None:
        """Note that a module's forward has ended, and so have those inside it whose end no hook reported. Returns its frame, if there is one."""
        frames = self._frames
        found = next((at for at in range(len(frames) - 1, -1, -1) if frames[at].module is module), None)
        if found is None:
            return None
        frame = frames[found]
        del frames[found:]
        self._set(frames[-1].hears or frames[-1].keeps_open if frames else self.outside is not None)
        return frame

    def reset(self) -> None:
        """Forget the modules that are running on this thread. A KeyboardInterrupt ends a forward without calling any hook."""
        self._frames.clear()
        self.outside = None

    @property
    def _frames(self) -> list[Frame]:
        frames: list[Frame] | None = getattr(self._local, "frames", None)
        if frames is None:
            frames = self._local.frames = []
        return frames

    def _set(self, on: bool) -> None:
        """Open or close the mode, wherever it is in torch's stack of modes: other code may have opened modes above it since, or may have closed
        it."""
        is_open = self in internals.function_modes()
        if on and not is_open:
            super().__enter__()  # type: ignore[no-untyped-call]
        elif not on and is_open:
            internals.close_function_mode(self)
