"""Calls a function of torch so that its warnings name the line of the user's that called it.

While a mode of ours is open, torch calls us in place of each function, and we call the function. A frame of ours would then lie between the user's
line and the function. Python takes the origin of a warning from that frame: its file, its line, and the registry that says which warnings of this
file have been shown. A warning that is shown once would be shown again, as one of torchsat. So the call is made from a function that has the file,
the line and the globals of the frame that called torch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchsat import internals

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_DIRECT = 3
"""The `_stacklevel` of a softmax whose caller is the user's line."""
HOUSE = str(Path(__file__).parent)
# It stands on one line, so that all of it gets the line number that is put in.
_call: Call = lambda function, args, kwargs: function(*args, **kwargs)  # noqa: E731


class Origins:
    """The functions that call on behalf of the lines of the user's that were met in one observation."""

    def __init__(self) -> None:
        self._calls: dict[tuple[int, int], tuple[types.CodeType, Call]] = {}
        """By the code and the position of the instruction that calls. The code is kept, since another could get the same id."""

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function in the name of the line that has called torch."""
        frame = internals.caller_of_torch(HOUSE)
        if "_stacklevel" in kwargs:
            # torch.nn.Softmax tells the function how many frames above it the user's line is.
            for _ in range(kwargs["_stacklevel"] - _DIRECT):
                function, args, kwargs = self._for(frame), (function, args, kwargs), {}
                frame = internals.caller_without_hooks(frame)
        return self._for(frame)(function, args, kwargs)

    def _for(self, frame: types.FrameType | None) -> Call:
        """The function that calls in the name of this frame."""
        if frame is None:
            return _call
        key = id(frame.f_code), frame.f_lasti
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = frame.f_code, _on_behalf_of(frame)
        return known[1]


def _on_behalf_of(frame: types.FrameType) -> Call:
    code = frame.f_code
    given = _call.__code__.replace(co_filename=code.co_filename, co_firstlineno=frame.f_lineno or code.co_firstlineno, co_name=code.co_name)
    return types.FunctionType(given, frame.f_globals)
