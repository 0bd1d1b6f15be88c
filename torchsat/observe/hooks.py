"""The hooks by which the user's training calls our code, and the guard that every hook runs through.

A hook of ours runs in the middle of the user's forward or backward. So it does nothing while torch compiles or traces, or while the user captures a
CUDA graph, which would record our kernels and fail at our copies to the host. It computes without gradients and hidden from the user's modes, and it
never raises: after the first error at a place, one line is logged and that place is no longer watched. A hook that fires when its observation is over
finds the guard closed and does nothing. A model that is saved or copied while our hooks are on it holds no trace of them.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Set
from typing import Any, TypeVar

import torch
from torch import nn

from torchsat import internals
from torchsat.schedule import Clock, Window

_Result = TypeVar("_Result")


def is_capturing() -> bool:
    """Whether the user captures a CUDA graph now: kernels are recorded and not executed, and nothing may be copied to the host."""
    # Without a driver, and in a build without CUDA, the second function raises.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Inert:
    """A hook that copies and pickles of a module lack (saving.py).

    A module that is copied in a way of its own gets a function of the standard library that does nothing, so that it never needs torchsat.
    """

    owner: object
    """Who has put the hook on a module and takes it off."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__


class Hook(Inert):
    """A hook on one module, for eager execution.

    Args:
        call: called with (module, args, kwargs) before the module's forward, or with (module, args, output) after it.
        module: the only module that it acts in. Copies of modules, and modules that are put in the place of others, may have been given the hook too,
            and may call it without keyword arguments.
        owner: who takes it off.
    """

    def __init__(self, call: Callable[..., None], module: nn.Module, owner: object) -> None:
        self.call = call
        self.owner = owner
        self._module = weakref.ref(module)

    def __call__(self, module: nn.Module, args: Any, *given: Any) -> None:
        if not internals.is_traced() and len(given) == 1 and module is self._module():
            self.call(module, args, *given)


class Guard:
    """Wraps the hooks of one observation, so that they compute without gradients, never raise, and do nothing after the end of the observation.

    Args:
        fail: called with a place and an exception when our code raised there.
        window: the schedule's window of this observation, to which the time that hooks take is added.
        clock: the clock of the host.
        failed: the places that are no longer watched; the owner adds to the set.
    """

    def __init__(self, fail: Callable[[str, Exception], None], window: Window, clock: Clock, failed: Set[str]) -> None:
        self._fail = fail
        self._window = window
        self._clock = clock
        self._local = threading.local()
        self._failed = failed
        self.is_open = True

    def close(self) -> None:
        """Make every hook do nothing from now on, since the observation is over."""
        self.is_open = False

    def attempt(self, place: str, call: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """The result of a piece of work for one place; None where it raised, which ends the watching of that place alone.

        It works after the end of the observation too. Subclasses of Tensor and modes of the user see nothing of it.
        """
        try:
            with internals.without_function_modes():
                return call(*arguments)
        except Exception as error:
            self._fail(place, error)
            return None

    @property
    def grad_enabled(self) -> bool:
        """Whether autograd was on where the hook was called on this thread. Inside the guard it is off."""
        return bool(getattr(self._local, "grad_enabled", False))

    def __call__(self, place: str, call: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """Make `call` a hook of this place, which is called with `first` and the hook's own arguments, without gradients, and never raises."""

        def run(*args: Any) -> Any:
            if not self.is_open or place in self._failed or is_capturing():
                return None
            begun = self._clock.seconds()
            with internals.without_function_modes():
                self._local.grad_enabled = enabled = torch.is_grad_enabled()
                internals.set_grad_enabled(False)
                try:
                    if internals.open_dispatch_modes() or torch.is_inference_mode_enabled():
                        with internals.without_dispatch_modes(), torch.inference_mode(False):
                            # Leaving inference mode has switched gradients on again.
                            internals.set_grad_enabled(False)
                            return call(*first, *args)
                    return call(*first, *args)
                except Exception as error:
                    self._fail(place, error)
                    return None
                finally:
                    internals.set_grad_enabled(enabled)
                    self._window.own += self._clock.seconds() - begun

        return run
