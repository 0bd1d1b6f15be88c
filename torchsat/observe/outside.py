"""Hears function calls where a model is not called as a whole: by a method of its own (`vae.elbo(x)`, `m.forward(x)`), or part by part.

No hook tells that a method of a model runs. What is heard is the call of a part, such as `self.encoder(x)` inside the method. The Python stack then
says who called it:

    METHOD   a method of the class of the model, or of a module in it that holds the part. The functions that this method calls from now on belong to
             that module, as if its forward ran, until the method returns.
    SCRIPT   any other code, such as a training script that calls the encoder, a function and the decoder. A function belongs to the model if its
             input depends on a parameter of the model.

A method is known by its code. Its `self` would have to be read from the local variables of a frame, and before Python 3.13 that has side effects on
the user's function: the values live longer, and a dict that `locals()` has returned changes.

A pass ends when the method returns, when a script calls the first part again, when a backward begins, or when the optimizer steps. The calls of a
function are counted from the beginning of a pass, so that names are the same in each step, and in a method the same as in a call of the whole model.

Nothing tells when a method returns. So the function mode stays open until the model is called next, its optimizer steps or the observation ends, and
lets through what does not belong to the model. This is done only where an open mode changes nothing:

- It is not opened where torch.compile is in use, since a function that was compiled without the mode is compiled again when it is called with it.
- It is not opened above a mode of the user's, whose `with` block would end by closing ours.
- It is closed before a module runs that takes a fused path for inference, which torch does not take while a mode is open.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from enum import Enum
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from torchsat import internals
from torchsat.observe.graph import ends, upstream
from torchsat.observe.mode import CallMode, Frame
from torchsat.observe.nodes import is_leaf
from torchsat.structure import Found

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""The modules that torch may run in one fused kernel for inference."""
_NEAR = 256
"""The most nodes that are looked at to find out whether the input of a function depends on the model."""


class Caller(Enum):
    """What calls the parts of the model.

    NOBODY -> METHOD, SCRIPT: a part of the model is called. METHOD -> NOBODY: the method has returned. Any -> NOBODY: the pass is over for another
    reason.
    """

    NOBODY = "nobody"
    METHOD = "method"
    SCRIPT = "script"


class Outside:
    """What runs outside of the model's own forward, on the thread that trains.

    Args:
        found: the modules of the model.
        mode: the function mode, which is opened and closed.
    """

    def __init__(self, found: Found, mode: CallMode) -> None:
        self._mode = mode
        self._root = weakref.ref(found.model)
        self._paths = weakref.WeakKeyDictionary({each.module: each.name for each in found.modules})
        self._modules = weakref.WeakValueDictionary({each.name: each.module for each in found.modules})
        self._methods = _methods_of({type(each.module) for each in found.modules})
        self._parameters = {id(parameter) for parameter in found.model.parameters()}
        self._holders: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        """For each module that is no part of the model and was met on the stack, whether the model is a part of it."""
        self._caller = Caller.NOBODY
        self._frame: Frame | None = None
        """What functions belong to in this pass."""
        self._method: FrameType | None = None
        """The Python frame of the method that is running. It is let go of at the next call of torch after the method has returned."""
        self._first: Callable[[], nn.Module | None] = _nothing
        """The part that was called first in this pass."""
        self._thread = 0
        self._handle: RemovableHandle | None = None

    def begins(self, part: nn.Module) -> tuple[bool, str]:
        """Note that a part of the model is called, while the model itself does not run.

        Returns:
            Whether a pass begins, and the path of the module that what runs between the parts belongs to.
        """
        method = self._method_on_stack()
        if method is not None:
            begins = method is not self._method
            if begins:
                self._frame = self._frame_of(method, part)
            self._caller, self._method = Caller.METHOD, method
        else:
            begins = self._caller is not Caller.SCRIPT or self._first() is part
            if begins:
                self._frame = Frame("", self._root() or part, hears=True)
            self._caller, self._method = Caller.SCRIPT, None
        if begins:
            self._first = weakref.ref(part)
        assert self._frame is not None
        return begins, self._frame.path

    def ends(self) -> bool:
        """Note that the part has returned, and hear what is called from now on. Returns whether that is possible."""
        if self._caller is Caller.NOBODY:
            return True
        if internals.compiles() or any(not isinstance(each, CallMode) for each in internals.modes_of_the_users()):
            self._mode.outside = None
            return False
        self._thread = threading.get_ident()
        if self._handle is None:
            self._handle = register_module_forward_pre_hook(self._before_any)
        self._mode.outside = self._frame
        return True

    def end_pass(self) -> None:
        """Note that the pass is over."""
        self._caller, self._frame, self._method = Caller.NOBODY, None, None

    def close(self) -> None:
        """End the pass and close the mode, where this thread has opened it."""
        self.end_pass()
        if self._mode.outside is not None:
            self._mode.outside = None

    def remove(self) -> None:
        """Leave nothing behind."""
        self.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def is_over(self) -> bool:
        """Whether functions are no longer heard, since the method has returned. Asked at each call of torch."""
        if self._caller is Caller.METHOD and not any(frame is self._method for frame in internals.frames()):
            self.end_pass()
        return self._caller is Caller.NOBODY

    def claims(self, given: Any) -> bool:
        """Whether a function that is called now with these arguments belongs to the model."""
        for frame in internals.frames():
            if frame is self._method:
                return True
            called = internals.called_module(frame)
            if called is not None and called not in self._paths and not self._holds_model(called):
                return False
        return self._caller is Caller.SCRIPT and self._depends(given)

    def owns(self, leaf: Tensor) -> bool:
        """Whether this is a parameter of the model."""
        return id(leaf) in self._parameters

    def _depends(self, given: Any) -> bool:
        """Whether one of these tensors was computed from a parameter of the model."""
        return any(self.owns(leaf) for node in upstream(ends(given), is_leaf, _NEAR) if (leaf := getattr(node, "variable", None)) is not None)

    def _holds_model(self, module: nn.Module) -> bool:
        if module not in self._holders:
            root = self._root()
            self._holders[module] = any(each is root for each in module.modules())
        return self._holders[module]

    def _method_on_stack(self) -> FrameType | None:
        """The outermost frame that runs a method of the model or of its modules. What it calls, other methods among them, is one pass."""
        found = None
        for frame in internals.frames():
            if frame.f_code in self._methods:
                found = frame
        return found

    def _frame_of(self, method: FrameType, part: nn.Module) -> Frame:
        """The module whose method calls this part: the outermost one of the right class that holds the part."""
        path, kinds = self._paths[part], self._methods[method.f_code]
        names = ["", *(path[:at] for at, letter in enumerate(path) if letter == "."), path]
        for name in names:
            module = self._modules.get(name)
            if module is not None and issubclass(type(module), kinds):
                return Frame(name, module, hears=True)
        return Frame("", self._root() or part, hears=True)

    def _before_any(self, module: nn.Module, args: Any) -> None:
        """Called before the forward of any module of the process, as long as the observation is open."""
        if (
            isinstance(module, FUSED)
            and not internals.is_traced()
            and threading.get_ident() == self._thread
            and self._mode.top is None
            and self._mode.outside is not None
        ):
            self._mode.outside = None


def _methods_of(classes: set[type[nn.Module]]) -> dict[CodeType, tuple[type, ...]]:
    """For the code of each method of these classes, the classes that have it. What nn.Module itself has is left out."""
    found: dict[CodeType, tuple[type, ...]] = {}
    for kind in {kind for each in classes for kind in each.__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module}:
        for member in vars(kind).values():
            function = inspect.unwrap(member) if inspect.isfunction(member) else None
            if function is not None and inspect.isfunction(function):
                found[function.__code__] = (*found.get(function.__code__, ()), kind)
    return found


def _nothing() -> None:
    """Returns None, like a weak reference to a module that is gone."""
