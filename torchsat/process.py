"""What belongs to the whole process and not to one monitor: hooks on optimizers, the handler of SIGTERM, forked children, the end of the process.

torch calls a global optimizer hook for every optimizer of the process, and a process has one handler for each signal, so monitors cannot each have
their own. A monitor joins with a `Watcher`, a record of functions, and leaves when it is closed. The hooks and the handler exist only while at least
one watcher has joined.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchsat.compile_settings import ignore_hooks, release, restore_stance

StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Watcher:
    """The functions of a monitor that the process calls. Two watchers are equal only if they are the same object, so they serve as keys."""

    before_step: StepHook
    """Called before each step of every optimizer of the process."""
    after_step: StepHook
    """Called after each step of every optimizer of the process."""
    close: Callable[[], None]
    """Called at the end of the process."""
    fault: Callable[[Exception], None]
    """Called with the exception that `before_step` or `after_step` raised. An error of a monitor must not stop the step of the user's optimizer."""
    forget: Callable[[], None]
    """Called in a forked child. The child has no writer thread, and the files belong to its parent."""


_watchers: dict[Watcher, None] = {}
"""All watchers, in the order in which they joined. They keep their monitors alive, whether or not the user keeps what `watch` returned."""
_hooks: list[Any] = []
"""The handles of the two global optimizer hooks; empty while nobody watches."""
_hooks_running = 0
"""The number of calls of our optimizer hooks that are running, on all threads."""
_previous_handler: Any = None
"""The handler of SIGTERM before ours."""
_handles_sigterm = False


def join(watcher: Watcher) -> None:
    """Call the functions of this watcher from now on.

    A handler of SIGTERM is set only where there is none yet, and only from the main thread, which alone can set one.
    """
    global _handles_sigterm, _previous_handler
    _watchers[watcher] = None
    if not _hooks:
        _hooks.extend([register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)])
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if free and not _handles_sigterm and threading.current_thread() is threading.main_thread():
        _previous_handler = signal.signal(signal.SIGTERM, _on_sigterm)
        _handles_sigterm = True


def leave(watcher: Watcher) -> None:
    """Stop calling the functions of this watcher. The last watcher that leaves also removes the hooks and the signal handler."""
    global _handles_sigterm
    _watchers.pop(watcher, None)
    release(watcher)
    ignore_hooks(watcher)
    take_down()
    if _handles_sigterm and not _watchers and threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, _previous_handler)
        _handles_sigterm = False


def take_down() -> None:
    """Remove the optimizer hooks if no watcher is left.

    Inside a hook nothing is removed, since torch is iterating over its hooks then. They stay, and call nobody, until the next watcher leaves.
    """
    while not _watchers and not _hooks_running and _hooks:
        _hooks.pop().remove()


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _tell([(watcher, watcher.before_step) for watcher in _watchers], optimizer, args, kwargs)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        restore_stance()
        _tell([(watcher, watcher.after_step) for watcher in _watchers], optimizer, args, kwargs)


def _tell(hooks: list[tuple[Watcher, StepHook]], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _hooks_running
    _hooks_running += 1
    try:
        for watcher, hook in hooks:
            try:
                hook(optimizer, args, kwargs)
            except Exception as error:
                watcher.fault(error)
    finally:
        _hooks_running -= 1


@atexit.register
def _close_all() -> None:
    for watcher in list(_watchers):
        watcher.close()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Close all monitors, which writes what they have, and then die of the signal as a process without a handler does.

    They are closed on another thread: this handler interrupts the main thread, which may hold the very lock that closing needs. After 10 seconds the
    process ends in any case.
    """
    closer = threading.Thread(target=_close_all, daemon=True)
    closer.start()
    closer.join(10)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _after_fork() -> None:
    global _handles_sigterm
    for watcher in list(_watchers):
        watcher.forget()
    _watchers.clear()
    if _handles_sigterm and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _handles_sigterm = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
