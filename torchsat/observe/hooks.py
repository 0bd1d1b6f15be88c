"""The doors between the user's training and our code: hooks that leave no trace in a saved model, and the guard around every one of them.

A hook of ours runs in the middle of the user's forward or backward. So it does nothing while torch compiles or traces, it computes without gradients
and hidden from the user's modes, and it never raises: the first fault at a place ends the watching of that place, with one line. Once its observation
is over a hook that fires late finds a closed guard and does nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Set
from typing import Any

import torch

from torchsat import internals
from torchsat.schedule import Clock, Window


class Inert:
    """A hook whose copies and pickles do nothing: they are a function of the standard library, so that a saved model never needs torchsat."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__


class Hook(Inert):
    """A hook on a module, for eager execution."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling() and not internals.is_tracing():
            self.call(*args)


class Guard:
    """What every hook of one observation runs through.

    Args:
        fail: told of a place and an exception when something of ours raised there.
        window: where the time that hooks take is added up.
        clock: of the host.
        failed: the places that are no longer watched; the owner adds to it.
    """

    def __init__(self, fail: Callable[[str, Exception], None], window: Window, clock: Clock, failed: Set[str]) -> None:
        self._fail = fail
        self._window = window
        self._clock = clock
        self._local = threading.local()
        self._failed = failed
        self.is_open = True

    def close(self) -> None:
        """Let no hook through any more: the observation is over."""
        self.is_open = False

    @property
    def grad_enabled(self) -> bool:
        """Whether autograd was on where the hook was called on this thread. Inside the guard it is off."""
        return bool(getattr(self._local, "grad_enabled", False))

    def __call__(self, place: str, call: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """The call with these first arguments, without gradients and without ever raising."""

        def run(*args: Any) -> Any:
            if not self.is_open or place in self._failed:
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
