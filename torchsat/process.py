"""What belongs to the whole process and not to one monitor: hooks on optimizers, torch's compiler stance, signals, forks, the way out.

All of it is there only while something is watched. Whoever watches joins with a `Watcher`, a row of functions, and leaves when done.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo import eval_frame, external_utils
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Watcher:
    """What a monitor wants to be called for."""

    before_step: StepHook
    """Before and after every step of every optimizer, whoever owns it."""
    after_step: StepHook
    close: Callable[[], None]
    """At the end of the process."""
    fault: Callable[[Exception], None]
    """When one of these raised: a step of the user's optimizer must not."""
    forget: Callable[[], None]
    """In a forked child: it has no writer thread, and its parent's files are not its own."""


_watchers: dict[Watcher, None] = {}
"""In the order in which they joined. They keep their monitors alive, whether or not the user keeps what `watch` returned."""
_hooks: list[Any] = []
_hooks_running = 0
_forcing: dict[Watcher, None] = {}
_stance: tuple[Any, Any] | None = None
"""torch's guard of the stance that we set, and that stance."""
_heeding: dict[Watcher, None] = {}
_skipped_hooks = True
"""What torch's setting was before the first watcher with compiled hooks."""
_previous_handler: Any = None
_handles_sigterm = False


def join(watcher: Watcher) -> None:
    """Call this watcher from now on."""
    global _handles_sigterm, _previous_handler
    _watchers[watcher] = None
    if not _hooks:
        _hooks.extend([register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)])
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if free and not _handles_sigterm and threading.current_thread() is threading.main_thread():
        _previous_handler = signal.signal(signal.SIGTERM, _on_sigterm)
        _handles_sigterm = True


def leave(watcher: Watcher) -> None:
    """Call it no more; with the last one goes everything that was put up."""
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
    """Take the hooks off once nobody needs them; not from inside one of them, since that would break torch's loop over its hooks."""
    while not _watchers and not _hooks_running and _hooks:
        _hooks.pop().remove()


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _tell([(watcher, watcher.before_step) for watcher in _watchers], optimizer, args, kwargs)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _give_back_stance()
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


def heed_hooks(watcher: Watcher) -> None:
    """Let torch.compile look at the hooks of modules before it runs a graph: by default one model's graph serves every other of its class, and a
    model whose hooks have changed."""
    global _skipped_hooks
    if not _heeding:
        _skipped_hooks = torch._dynamo.config.skip_nnmodule_hook_guards
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    _heeding[watcher] = None


def forget_graphs(model: nn.Module) -> None:
    """Compile anew what is made of the code of this model's modules: a graph that was made while hooks were not looked at would serve it too."""
    # Where forward is torch's own, as in a Sequential, what is compiled is a wrapper around the call.
    around = (external_utils.wrap_inline(model.forward), nn.Module._call_impl, nn.Module._wrapped_call_impl)
    for code in {function.__code__ for function in (*around, *(type(each).forward for each in model.modules())) if hasattr(function, "__code__")}:
        eval_frame.remove_from_cache(code)


def ignore_hooks(watcher: Watcher) -> None:
    """This watcher has no compiled hooks (any more)."""
    if watcher in _heeding:
        del _heeding[watcher]
        if not _heeding:
            torch._dynamo.config.skip_nnmodule_hook_guards = _skipped_hooks


def force_eager(watcher: Watcher) -> None:
    """Run compiled code eager until this watcher, and every other one that asked, releases it."""
    global _stance
    if not _forcing:
        _give_back_stance()
    _forcing[watcher] = None
    if _stance is None:
        _stance = torch.compiler.set_stance("force_eager"), eval_frame._stance


def forces_eager() -> bool:
    """Whether some watcher asked for eager execution."""
    return bool(_forcing)


def release(watcher: Watcher) -> None:
    """This watcher no longer needs eager execution."""
    _forcing.pop(watcher, None)
    _give_back_stance()


def linger(watcher: Watcher) -> None:
    """Run graphs that there are, until this watcher releases it, but let the call that is under way end as one that was run eager: a function
    compiled with fullgraph=True raises if it finds no graph and the stance to be the default at its end."""
    global _stance
    if _stance is None and not _forcing:
        _stance = torch.compiler.set_stance("eager_on_recompile"), eval_frame._stance


def _give_back_stance() -> None:
    """Restore the stance once nobody needs ours; where the user has set one meanwhile, when theirs is over."""
    global _stance
    if _stance is not None and not _forcing and eval_frame._stance is _stance[1]:
        _stance[0].__exit__(None, None, None)
        _stance = None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def inside_compiled_code() -> bool:
    """Whether a function made by torch.compile is on the stack. Its wrapper is called compile_wrapper, in older versions _fn."""
    return any(frame.f_code.co_name in ("compile_wrapper", "_fn") and frame.f_code.co_filename == eval_frame.__file__ for frame in _frames())


def steps_on_stack() -> list[Optimizer]:
    """The optimizers whose step is running, outermost first: torch wraps every one in a function of that name."""
    found = [frame.f_locals.get("self") for frame in _frames() if frame.f_code.co_name == "wrapper"]
    return [each for each in reversed(found) if isinstance(each, Optimizer)]


def gradient_scale(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler multiplied the loss with, and whether it found an overflow that the optimizer itself will act on.

    A scaler leaves no trace on model or optimizer before the step, but it is the scaler that calls `step`.
    """
    for frame in _frames():
        caller = frame.f_locals.get("self") if frame.f_code.co_name in ("step", "_maybe_opt_step") else None
        if isinstance(caller, torch.amp.GradScaler):
            # A copy: the scaler changes its own in place.
            scale = caller._scale.clone() if caller.is_enabled() and caller._scale is not None else None
            return scale, getattr(optimizer, "found_inf", None)
    return None, None


@atexit.register
def _close_all() -> None:
    for watcher in list(_watchers):
        watcher.close()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Flush on another thread, then die of the signal as before: the main thread may hold the very lock that a flush needs."""
    flusher = threading.Thread(target=_close_all, daemon=True)
    flusher.start()
    flusher.join(10)
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
