"""Function calls: `F.gelu(x)`, `x.tanh()`, softmax, attention. A mode of torch hears them, a stack of modules says where they happen.

The mode costs about 2 us per call of torch, so it is open only in an observation, only between entering and leaving the outermost module,
and not inside modules that are sites themselves. A call is named after the module in whose forward it happens and numbered within one run
of that forward: `blocks.0/gelu`, `blocks.0/gelu_1`; directly in the model, `gelu`.

With a mode open, torch.nn's encoder layers and attention leave their fused inference path: where they would take it, nothing is heard, so
that training stays bit for bit the same. A function compiled by the user is compiled once more for calls under the mode, and not heard.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

Role = Literal["softmax", "softmin", "attention", "glu"]

ROLES: Mapping[Callable[..., Any], Role] = {
    torch.softmax: "softmax",
    torch.special.softmax: "softmax",
    F.softmax: "softmax",
    Tensor.softmax: "softmax",
    F.softmin: "softmin",
    F.scaled_dot_product_attention: "attention",
    F.multi_head_attention_forward: "attention",
    F.glu: "glu",
}
UNSEEN: Mapping[str, str] = {
    "log_softmax": "its derivative does not vanish: there is nothing to saturate",
    "special_log_softmax": "its derivative does not vanish: there is nothing to saturate",
    "gumbel_softmax": "its logits are disturbed by random numbers inside",
    "flex_attention": "fused attention with scores of the user's own, which torchsat does not compute again",
}
"""What is heard but not measured, by name, and why."""
FUSED_INFERENCE = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass
class Frame:
    """One module whose forward is running."""

    path: str
    module: nn.Module
    hears: bool
    open: bool = False
    """The mode stays open though nothing is heard: opening it again would cost more than letting a call or two pass."""
    calls: dict[str, int] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """The name of the next call of this function."""
        count = self.calls.get(name, 0)
        self.calls[name] = count + 1
        place = f"{self.path}/{name}" if self.path else name
        return f"{place}_{count}" if count else place


class Listener(TorchFunctionMode):
    """The mode, and the modules that are running, by thread.

    Args:
        hear: called in place of every function of torch while the mode is open, with (frame, function, args, kwargs); it must call it.
    """

    def __init__(self, hear: Callable[[Frame, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._hear = hear
        self._local = threading.local()

    def __torch_function__(self, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return function(*args, **kwargs)
        frames = self._frames
        return self._hear(frames[-1], function, args, kwargs) if frames else function(*args, **kwargs)

    @property
    def top(self) -> Frame | None:
        """The innermost module that is running on this thread."""
        frames = self._frames
        return frames[-1] if frames else None

    def enter(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._set(frame.hears or frame.open)

    def leave(self, module: nn.Module) -> Frame | None:
        """Leave a module, and those inside it whose end was not heard."""
        frames = self._frames
        found = next((at for at in range(len(frames) - 1, -1, -1) if frames[at].module is module), None)
        if found is None:
            return None
        frame = frames[found]
        del frames[found:]
        self._set(bool(frames) and (frames[-1].hears or frames[-1].open))
        return frame

    def reset(self) -> None:
        """Leave everything on this thread: a KeyboardInterrupt ends a forward without calling any hook."""
        self._frames.clear()
        self._set(False)

    @property
    def _frames(self) -> list[Frame]:
        frames: list[Frame] | None = getattr(self._local, "frames", None)
        if frames is None:
            frames = self._local.frames = []
        return frames

    def _set(self, on: bool) -> None:
        """Open or close the mode, wherever in the stack it lies: others may have been opened since, or have closed it."""
        modes = _get_current_function_mode_stack()
        if on and self not in modes:
            super().__enter__()  # type: ignore[no-untyped-call]
        elif not on and self in modes:
            above = []
            while (mode := _pop_mode()) is not self:
                above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)


def uses_flex_attention(model: nn.Module) -> bool:
    """Whether a method of a module of this model, or a function that it calls by name, is flex_attention, as it is or compiled."""
    met: set[int] = set()

    def is_flex(value: Any, depth: int) -> bool:
        value = getattr(value, "_torchdynamo_orig_callable", getattr(value, "__func__", value))
        if getattr(value, "__module__", None) == "torch.nn.attention.flex_attention":
            return getattr(value, "__name__", "") == "flex_attention"
        if not inspect.isfunction(value) or id(value) in met or (value.__module__ or "").split(".")[0] == "torch":
            return False
        met.add(id(value))
        if _names_flex(value.__code__):
            return True
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY_CELL]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return depth > 0 and any(is_flex(each, depth - 1) for each in (*cells, *named))

    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "torch"}
    configured = any(getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention" for module in model.modules())
    attributes = [value for module in model.modules() for value in vars(module).values() if callable(value)]
    return configured or any(is_flex(value, 3) for value in (*attributes, *(value for kind in kinds for value in vars(kind).values())))


def _names_flex(code: types.CodeType) -> bool:
    """Whether a piece of code, or one inside it, speaks of flex_attention as an attribute or imports it."""
    return "flex_attention" in code.co_names or any(isinstance(inner, types.CodeType) and _names_flex(inner) for inner in code.co_consts)


_EMPTY_CELL = types.CellType()


def takes_fused_path(module: nn.Module, given: Iterable[Any], grad_enabled: bool) -> bool:
    """Whether torch.nn may run this module in one fused kernel for inference, which it does not under a mode."""
    if module.training or not isinstance(module, FUSED_INFERENCE):
        return False
    tensors = [*module.parameters(), *(value for value in given if isinstance(value, Tensor))]
    return not (grad_enabled and any(tensor.requires_grad for tensor in tensors))
