"""Which tensors of a user hold numbers that can be read, and why others do not.

Libraries derive classes from torch.Tensor. Most of them hold the same data as a plain tensor and only carry something with it, such as the affine
matrix of a medical image (MONAI) or the kind of a picture (torchvision, fastai). Such a tensor is read as the plain tensor that it is. A class with a
`__torch_dispatch__` of its own may hold its data in any other way (quantized, in several tensors, not at all), so it is named and not read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchsat import internals

_PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself, or a plain tensor of the same data where a class of its own holds plain data. Its autograd node stays with the original."""
    kind = type(tensor)
    if kind in _PLAIN or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_lazy(tensor):
        return tensor
    with torch.no_grad(), internals.without_function_modes():
        return tensor.as_subclass(Tensor)


def why_unread(tensor: Tensor) -> str | None:
    """Why this tensor, as `plain` gives it, is no dense tensor of real numbers, in words that follow "it is"; None where it is one."""
    # A subclass of Tensor may run code of the user's where an attribute is read.
    with internals.without_function_modes():
        return _why_unread(tensor)


def _why_unread(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "a tensor that does not exist yet"
    if tensor.is_meta:
        return "a tensor on the meta device, which holds no numbers"
    if not internals.is_real(tensor):
        return "a tensor that holds no numbers of its own (fake, or inside a transform of torch.func)"
    if tensor.is_nested:
        return "a nested tensor, not a dense one"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout}), not a dense one"
    if type(tensor) not in _PLAIN:
        return f"a {type(tensor).__name__}, which keeps its numbers in a way of its own"
    if tensor.is_complex():
        return f"a tensor of complex numbers ({tensor.dtype})"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if not tensor.is_floating_point():
        return f"a tensor of integers ({tensor.dtype})"
    return None
