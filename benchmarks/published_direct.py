"""What the activations of a model are in one batch, computed directly: a copy of the model in float64 runs the same batch, every element is counted.

Nothing of torchsat is used here, so that its numbers can be checked against these. Activations are found by the functions of torch that the copy
calls; the gates of recurrent layers are computed step by step from the formulas in the documentation of torch.nn. A tail is where |f'| stays below a
twentieth of its largest value, and is found by following |f'| in small steps from -40 and from 40 towards 0.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

EPSILON = 0.05
_NAMES = ("relu", "leaky_relu", "prelu", "gelu", "silu", "elu", "selu", "mish", "softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh")
FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(owner, name): name.rstrip("_")
    for owner in (torch, F, Tensor, torch.special)
    for name in (*_NAMES, *(f"{name}_" for name in _NAMES), "expit")
    if hasattr(owner, name)
}
"""The functions of torch that are activations, and the names of these."""
_SLOPED = ("leaky_relu", "prelu")
"""Functions without a tail: their slope on the left is a parameter and no sign of saturation."""


@dataclass
class Site:
    """One activation, with what its elements were in all calls of it."""

    name: str
    elements: int = 0
    saturated: int = 0
    derivative: float = 0.0
    derivative_sq: float = 0.0
    edge: int = 0
    """Elements so near to the edge of a tail that float32 may put them on the other side."""
    calls: dict[Any, int] = field(default_factory=dict)

    def add(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Count the elements of one call. function: the activation as it was called, with its parameters."""
        z = z.detach().double()
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
        slope = slope.abs()
        self.elements += z.numel()
        self.derivative += float(slope.sum())
        self.derivative_sq += float(slope.square().sum())
        if self.name not in _SLOPED:
            low, high, peak = tails(self.name)
            flat = slope < EPSILON * peak
            self.saturated += int((flat & ((z <= low + 1e-9) | (z >= high - 1e-9))).sum())
            near = 1e-5 * (1 + z.abs())
            self.edge += int((((z - low).abs() < near) | ((z - high).abs() < near)).sum())

    @property
    def share(self) -> float | None:
        """The saturated share; None where the function has no tail."""
        return None if self.name in _SLOPED or not self.elements else self.saturated / self.elements

    @property
    def mean(self) -> float:
        return self.derivative / max(1, self.elements)


@functools.cache
def tails(name: str) -> tuple[float, float, float]:
    """Where the low tail ends and the high one begins (infinite where there is none), and the largest |f'|."""
    function: Callable[[Tensor], Tensor] = torch.sigmoid if name == "sigmoid" else torch.tanh if name == "tanh" else getattr(F, name)

    def slope(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
        return found.abs()

    z = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    # A function with a kink has no slope there; the points beside it show what it is.
    values = slope(torch.where(z == 0, torch.full_like(z, -1e-12), z))
    peak = float(values.max())
    steep = (values >= EPSILON * peak).nonzero()[:, 0]
    edges = []
    for inside, outside in ((int(steep[0]), int(steep[0]) - 1), (int(steep[-1]), int(steep[-1]) + 1)):
        if not 0 <= outside < len(z):
            edges.append(-torch.inf if outside < 0 else torch.inf)
            continue
        steep_at, flat_at = z[inside].clone(), z[outside].clone()
        for _ in range(60):
            middle = (steep_at + flat_at) / 2
            if float(slope(middle.reshape(1))) >= EPSILON * peak:
                steep_at = middle
            else:
                flat_at = middle
        edges.append(float(flat_at))
    return edges[0], edges[1], peak


class _Listener(TorchFunctionMode):
    """Adds each call of an activation to the sites. The stack tells which module is running."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self.stack: list[tuple[str, dict[str, int]]] = []
        self.softmaxes: set[str] = set()

    def site(self, place: str, name: str) -> Site:
        return self.sites.setdefault(place, Site(name))

    def enter(self, path: str) -> None:
        self.stack.append((path, {}))

    def place(self, name: str) -> str:
        """The path of the running module, the name of the function, and which call of it in this run of the module's forward this is."""
        path, counts = self.stack[-1] if self.stack else ("", {})
        counts[name] = counts.get(name, 0) + 1
        return f"{path}/{name}" + (f"_{counts[name] - 1}" if counts[name] > 1 else "")

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.float:
            # The code of a network asks for float32 where it has made numbers of integers.
            return args[0].double()
        name = FUNCTIONS.get(function)
        if name == "expit":
            name = "sigmoid"
        if function is F.glu:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self.site(self.place("glu"), "sigmoid").add(args[0].chunk(2, axis)[1], torch.sigmoid)
        elif name is not None:
            given = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
            rest = [value.detach().double() if isinstance(value, Tensor) else value for value in args[1:] if not isinstance(value, bool)]
            plain = F.prelu if name == "prelu" else getattr(F, name) if name not in ("sigmoid", "tanh") else getattr(torch, name)
            self.site(self.place(name), name).add(args[0] if args else kwargs["input"], lambda z: plain(z, *rest, **given))
        elif function in (F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention):
            self.softmaxes.add(self.place("softmax"))
        return function(*args, **kwargs)


def direct(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[dict[str, Site], set[str]]:
    """The activations of a copy of this model in float64, by `path/function` (the path of the module that called it), and the softmaxes.

    Args:
        run: computes the loss of the copy it is given.
    """
    twin = copy.deepcopy(model).double()
    listener = _Listener()
    for path, module in twin.named_modules():
        module.register_forward_pre_hook(functools.partial(_before, listener, path), with_kwargs=True)
        module.register_forward_hook(lambda module, args, output: listener.stack.pop() and None, always_call=True)
    kept = torch.get_default_dtype()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), listener:
            run(twin)
    finally:
        torch.set_default_dtype(kept)
        torch.set_rng_state(state)
    return listener.sites, listener.softmaxes


def doubled(batch: Any) -> Any:
    """A batch with its floating-point tensors in float64, also those that are attributes of its objects."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().double() if value.is_floating_point() else value
        if not hasattr(value, "__dict__"):
            return value
        other = copy.copy(value)
        vars(other).update({name: leaf(each) for name, each in vars(value).items() if isinstance(each, Tensor)})
        return other

    return tree_map(leaf, batch)


def _before(listener: _Listener, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    listener.enter(path)
    if isinstance(module, (nn.LSTM, nn.GRU)):
        x, state = args[0], args[1] if len(args) > 1 else None
        assert not module.bidirectional
        _layers(listener, path, module, x, state)
    elif isinstance(module, (nn.LSTMCell, nn.GRUCell)):
        x, state = args[0], args[1] if len(args) > 1 else None
        zero = x.new_zeros(x.shape[0], module.hidden_size)
        weights = [getattr(module, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        _cell(listener, path, isinstance(module, nn.LSTMCell), weights, x, state or (zero, zero) if isinstance(module, nn.LSTMCell) else state)


def _layers(listener: _Listener, path: str, module: nn.RNNBase, x: Any, state: Any) -> None:
    """The gates of each layer of an LSTM or GRU, in one direction, sequence by sequence where these differ in length."""
    lstm = isinstance(module, nn.LSTM)
    if isinstance(x, nn.utils.rnn.PackedSequence):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        sequences = [padded[at : at + 1, : int(length)] for at, length in enumerate(lengths)]
    else:
        whole = x if module.batch_first else x.transpose(0, 1)
        sequences = [whole]
    for at, sequence in enumerate(sequences):
        rows = sequence
        for layer in range(module.num_layers):
            weights = [getattr(module, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            zero = rows.new_zeros(rows.shape[0], module.hidden_size)
            chosen = slice(None) if len(sequences) == 1 else slice(at, at + 1)
            if state is None:
                now: Any = (zero, zero) if lstm else zero
            else:
                now = tuple(each[layer, chosen] for each in state) if lstm else state[layer, chosen]
            outputs = []
            for step in range(rows.shape[1]):
                now = _cell(listener, f"{path}.l{layer}", lstm, weights, rows[:, step], now)
                outputs.append(now[0] if lstm else now)
            rows = torch.stack(outputs, 1)


def _cell(listener: _Listener, path: str, lstm: bool, weights: list[Tensor], x: Tensor, state: Any) -> Any:
    """One step of an LSTM or GRU, by the formulas in the documentation of torch.nn."""
    w_ih, w_hh, b_ih, b_hh = weights

    def gate(name: str, z: Tensor) -> Tensor:
        function = torch.tanh if name in ("cell", "new", "hidden") else torch.sigmoid
        listener.site(f"{path}/{name}", function.__name__).add(z, function)
        return function(z)

    with torch._C.DisableTorchFunction():
        first, second = x @ w_ih.T + b_ih, (state[0] if lstm else state) @ w_hh.T + b_hh
        if lstm:
            i, f, g, o = (first + second).chunk(4, 1)
            cell = gate("forget", f) * state[1] + gate("input", i) * gate("cell", g)
            return gate("output", o) * gate("hidden", cell), cell
        (r, z, n), (r_h, z_h, n_h) = first.chunk(3, 1), second.chunk(3, 1)
        reset, update = gate("reset", r + r_h), gate("update", z + z_h)
        new = gate("new", n + reset * n_h)
        return (1 - update) * new + update * state
