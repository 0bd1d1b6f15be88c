"""What belongs to the whole process and not to one monitor: hooks on optimizers, the handler of SIGTERM, forked children, the end of the process.

torch calls a global optimizer hook for every optimizer of the process, and a process has one handler for each signal, so monitors cannot each have
their own. A monitor joins with a `Watcher`, a record of functions, and leaves when it is closed. The hooks and the handler exist only while at least
one watcher has joined.

SIGTERM ends a process that has no handler for it at once, without `atexit`. The only purpose of our handler is to write what has been observed before
that happens. It must not change how the process reacts to the signal, so these rules hold:

- It is set only where there is no handler, and not before the first observation has ended: until then nothing can be lost, and most frameworks have
  set their handlers by then. A handler of somebody else stays as it is; the process then ends, or goes on, as that handler decides.
- Where ours is the handler of the process, it writes what there is and lets the signal do what it does without a handler.
- A framework that sets its handler after us may call ours from its own (Lightning does). Then it has taken over the decision how to end. Ours writes
  what there is and returns, and monitoring goes on.
- The handler interrupts the main thread anywhere, even between two lines of ours. What must be whole, such as handing a snapshot to the sinks, runs
  in a block of `undisturbed`, and the signal waits for its end.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchsat.claims import Claim
from torchsat.compile_settings import ignore_hooks, release, restore_stance
from torchsat.internals import open_dispatch_modes, without_dispatch_modes, without_function_modes

log = logging.getLogger("torchsat")

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
    save: Callable[[], None]
    """Called when the process may be about to end: write out what has been observed so far, and go on."""
    fault: Callable[[Exception], None]
    """Called with the exception that `before_step` or `after_step` raised. An error of a monitor must not stop the step of the user's optimizer."""
    forget: Callable[[], None]
    """Called in a forked child. The child has no writer thread, and the files belong to its parent."""
    claim: Claim
    """What the monitor has for itself."""


_watchers: dict[Watcher, None] = {}
"""All watchers, in the order in which they joined. They keep their monitors alive, whether or not the user keeps what `watch` returned."""
_hooks: list[Any] = []
"""The handles of the two global optimizer hooks; empty while nobody watches."""
_NOTHING = contextlib.nullcontext()
"""Entered at each step where no TorchDispatchMode of the user's is open."""
_hooks_running = 0
"""The number of calls of our optimizer hooks that are running, on all threads."""
_PATIENCE = 10.0
"""After SIGTERM, the seconds that closing or writing may take, and the seconds that the signal waits for a block of `undisturbed`."""


class _Sigterm(Enum):
    """What our handler does about a SIGTERM.

    IDLE -> HELD: it came inside a block of `undisturbed`. IDLE, HELD -> SAVING: the monitors are being closed, or write. SAVING -> IDLE: they have
    written, and another handler decides what becomes of the process. A further SIGTERM ends the waiting.
    """

    IDLE = "idle"
    HELD = "held"
    SAVING = "saving"


_sigterm = _Sigterm.IDLE
_undisturbed = 0
"""The number of blocks of `undisturbed` that the main thread is in."""


def join(watcher: Watcher) -> None:
    """Call the functions of this watcher from now on."""
    _watchers[watcher] = None
    if not _hooks:
        _hooks.extend([register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)])


def make_way(claim: Claim) -> None:
    """Close the monitors that have what a new one needs, each with one line in the log."""
    for watcher in list(_watchers):
        why = watcher.claim.why_not_both(claim)
        if why is not None:
            log.warning("torchsat: the earlier monitor of %s is closed, since %s.", watcher.claim.name, why)
            watcher.close()


def catch_sigterm() -> None:
    """Set our handler of SIGTERM if there is no other one. Without effect on any thread but the main one, which alone can set a handler."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def leave(watcher: Watcher) -> None:
    """Stop calling the functions of this watcher. The last watcher that leaves also removes the hooks and the signal handler."""
    _watchers.pop(watcher, None)
    release(watcher)
    ignore_hooks(watcher)
    take_down()
    if not _watchers and threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
        with without_function_modes(), without_dispatch_modes() if open_dispatch_modes() else _NOTHING:
            for watcher, hook in hooks:
                try:
                    hook(optimizer, args, kwargs)
                except Exception as error:
                    watcher.fault(error)
    finally:
        _hooks_running -= 1


@atexit.register
def _close_all() -> None:
    with undisturbed():
        for watcher in list(_watchers):
            watcher.close()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let a SIGTERM that comes while the main thread is in this block wait until the block is left, but at most `_PATIENCE` seconds."""
    global _undisturbed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _undisturbed += 1
    try:
        yield
    finally:
        _undisturbed = max(0, _undisturbed - 1)  # A forked child has left all blocks.
        if not _undisturbed and _sigterm is _Sigterm.HELD:
            _close_and_die()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Our handler of SIGTERM; the module's docstring says what it may do."""
    global _sigterm
    if signal.getsignal(signal.SIGTERM) is not _on_sigterm:
        if _sigterm is _Sigterm.IDLE and not _undisturbed:
            _sigterm = _Sigterm.SAVING
            _in_time([watcher.save for watcher in _watchers])
            _sigterm = _Sigterm.IDLE
    elif _sigterm is _Sigterm.SAVING:
        _die()
    elif _sigterm is _Sigterm.IDLE and _undisturbed:
        _sigterm = _Sigterm.HELD
        reminder = threading.Timer(_PATIENCE, os.kill, (os.getpid(), signal.SIGTERM))
        reminder.daemon = True
        with contextlib.suppress(RuntimeError):  # At the end of the interpreter no thread can be started.
            reminder.start()
    else:
        _close_and_die()


def _close_and_die() -> None:
    global _sigterm
    _sigterm = _Sigterm.SAVING
    _in_time([watcher.close for watcher in _watchers])
    _die()


def _in_time(calls: list[Callable[[], None]]) -> None:
    """Make these calls, but wait for them no longer than `_PATIENCE` seconds.

    They are made on another thread: the signal has interrupted the main thread, which may hold the very lock that they need.
    """

    def work() -> None:
        for call in calls:
            call()

    worker = threading.Thread(target=work, name="torchsat-sigterm", daemon=True)
    with contextlib.suppress(RuntimeError):  # At the end of the interpreter no thread can be started.
        worker.start()
        worker.join(_PATIENCE)


def _die() -> None:
    """End the process as SIGTERM ends a process without a handler."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _after_fork() -> None:
    global _sigterm, _undisturbed
    for watcher in list(_watchers):
        watcher.forget()
    _watchers.clear()
    _sigterm, _undisturbed = _Sigterm.IDLE, 0
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
