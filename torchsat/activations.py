"""Activation functions: their derivative, its peak, and where their tails begin.

One row of `ACTIVATIONS` is one function. Every derivative is computed from the pre-activation z in a stable form. Computed from the output it would
be wrong in low precision (a bfloat16 sigmoid rounds to 1 at z = 6.25, where f' is not 0), and impossible for SiLU, Mish or Hardswish.

A *tail* is where |f'| stays below epsilon times its peak, all the way out. A z on the edge of a tail belongs to it, since torch's own derivative is 0
on the kink of a hard function (ReLU at 0, Hardtanh at 1). A zero of f' elsewhere (GELU near -0.75, Tanhshrink at 0) is not a tail.

Users add rows of their own: `activations=(*ACTIVATIONS, Activation("snake", modules=(Snake,)))`. What such a row leaves out is found numerically
(numeric.py). A module that no row names is recognised by its numbers (recognise.py).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsat.attributes import stored
from torchsat.internals import CLAMP_PASSES_ITS_BOUNDS, twin
from torchsat.numeric import check_elementwise, derivative_of, grid, normal_mean, peak_on_grid, tails_on_grid
from torchsat.record import Tails
from torchsat.tensors import plain as plain_tensor

Edges = tuple[float | Tensor | None, float | Tensor | None]
"""(z_L, z_R): where the low tail ends and where the high one begins; None where there is none."""


@dataclass(frozen=True)
class Activation:
    """One element-wise activation function.

    Args:
        name: the name that users see; letters, digits, `_`, `.` and `-`.
        modules: the module classes that compute it. A subclass counts as long as it keeps the class's `forward`.
        parameters: attributes of the module, which are passed by name to `derivative`, `peak`, `tails` and `function`. A tensor of more than one
            element is spread over z as `torch.nn.PReLU` does it (dimension 1), or broadcast if it has several dimensions.
        derivative: f'(z) for a float32 or float64 tensor of any shape. None: `function` is differentiated automatically.
        peak: sup|f'|, a number or a function of the parameters; math.inf where |f'| has no bound. None: it is searched on a grid, and unknown if
            |f'| has no bound there or the parameters are learned.
        tails: (z_L, z_R) as a function of (epsilon, **parameters), with None for a tail that is absent. None: they are searched on a grid, and
            unknown where there is no peak or where the parameters are learned.
        function: f(z). None: the module or call itself. It is used only where there is no `derivative`, and to recognise modules by their numbers.
        from_output: whether `derivative` is also given the output, as keyword `a` (the slope of RReLU is drawn in the forward pass).
        calls: functions and tensor methods of torch that compute it. Their arguments are z, then `parameters` in their order or by name. Calls of a
            Python function of your own are seen if it is decorated with `torch.overrides.wrap_torch_function(lambda z: (z,))`.
        defaults: the values of `parameters` where a call leaves them out.

    Raises:
        ValueError: `defaults` and `parameters` differ in number, or calls of a function in `calls` cannot be seen.
    """

    name: str
    modules: tuple[type[nn.Module], ...] = ()
    parameters: tuple[str, ...] = ()
    derivative: Callable[..., Tensor] | None = None
    peak: float | Callable[..., float | Tensor | None] | None = None
    tails: Callable[..., Edges] | None = None
    function: Callable[..., Tensor] | None = None
    from_output: bool = False
    calls: tuple[Callable[..., Any], ...] = ()
    defaults: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.defaults and len(self.defaults) != len(self.parameters):
            raise ValueError(
                f"activation {self.name!r} has {len(self.defaults)} defaults for the {len(self.parameters)} parameters {self.parameters}"
            )
        for call in self.calls:
            if inspect.isfunction(call) and not (call.__module__ or "").startswith("torch") and not hasattr(call, "__wrapped__"):
                raise ValueError(
                    f"activation {self.name!r}: calls of {call.__name__} cannot be heard. Decorate it with "
                    "@torch.overrides.wrap_torch_function(lambda z: (z,)), or put it in a module and name that in `modules=`."
                )

    def computes(self, module: nn.Module) -> bool:
        """Whether this module computes this function."""
        return any(isinstance(module, known) and type(module).forward is known.forward for known in self.modules)


@dataclass(frozen=True)
class Constants:
    """What follows from an activation, its plain parameters and epsilon, whatever z is."""

    peak: float | None
    """sup|f'|; None where |f'| has no bound."""
    low: float | None
    """The upper edge of the low tail; None where there is no low tail."""
    high: float | None
    """The lower edge of the high tail; None where there is no high tail."""
    tails_known: bool
    """False where there is no peak, on which the level of the tails depends."""
    normal_low: float
    """The share of z ~ N(0, 1) in the low tail."""
    normal_high: float
    """The share of z ~ N(0, 1) in the high tail."""
    normal_derivative: float | None
    """E|f'(z)| / peak for z ~ N(0, 1); None without a peak."""


@dataclass(frozen=True)
class Bound:
    """An activation with the parameters of one module or call: all that a site needs to know of its function."""

    activation: Activation
    derivative: Callable[..., Tensor]
    """f'(z), as a function of z and the parameters by name."""
    plain: Mapping[str, Any]
    """The parameters that are no tensors."""
    learned: Mapping[str, Tensor]
    """The parameters that are tensors."""
    epsilon: float
    """An element is saturated where |f'| stays below this share of the peak."""
    constants: Constants | None
    """None where the function has learned parameters. Peak and tails then depend on tensors, and are computed on the device at each call."""

    @property
    def tails_known(self) -> bool:
        """Whether it is known which elements are saturated. It is not where |f'| has no bound, nor where parameters are learned and the row has no
        `tails`."""
        return self.activation.tails is not None or (self.constants is not None and self.constants.tails_known)

    @property
    def tails(self) -> Tails:
        """Which sides of the function have a tail; "none" where the parameters are learned."""
        if self.constants is None:
            return "none"
        low, high = self.constants.low is not None, self.constants.high is not None
        return "both" if low and high else "low" if low else "high" if high else "none"

    def evaluate(self, z: Tensor, a: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, float | Tensor | None, Edges]:
        """|f'(z)|, the peak, and the edges of the tails.

        Args:
            a: the output, which only a function with `from_output` reads.
            learned: the learned parameters, each as one number or with one value for each element of z.
        """
        given = {**self.plain, **learned}
        slope = self.derivative(z, **given, **({"a": a} if self.activation.from_output else {})).abs()
        peak = self.activation.peak if self.constants is None else self.constants.peak
        found = peak(**{**self.plain, **self.learned}) if callable(peak) else peak
        return slope, None if isinstance(found, float) and math.isinf(found) else found, self.edges(learned)

    def edges(self, learned: Mapping[str, Tensor]) -> Edges:
        """The edges of the tails. `learned` are the learned parameters, as in `evaluate`."""
        if self.constants is not None:
            return self.constants.low, self.constants.high
        return self.activation.tails(self.epsilon, **self.plain, **learned) if self.activation.tails else (None, None)


def bind(activation: Activation, module: nn.Module, epsilon: float) -> Bound:
    """The activation as this module computes it.

    Raises:
        ValueError: the module lacks a parameter, or its function is not element-wise and so has no f'(z).
    """
    try:
        values = {name: stored(module, name) for name in activation.parameters}
    except AttributeError as error:
        raise ValueError(
            f"activation {activation.name!r} names the parameters {activation.parameters}, but {type(module).__name__} lacks one: {error}"
        ) from None
    return _bind(activation, values, epsilon, module.forward, lambda: twin(module).forward)


def bind_call(
    activation: Activation, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], epsilon: float, known: Bound | None = None
) -> Bound:
    """The activation as a call computes it.

    Args:
        args: the positional arguments after z.
        known: the activation of an earlier call of the same site. It is used again if the plain parameters are the same.

    Raises:
        ValueError: a parameter is missing, or the function is not element-wise.
    """
    values = {**dict(zip(activation.parameters, activation.defaults, strict=False)), **dict(zip(activation.parameters, args, strict=False))}
    values |= {name: value for name, value in kwargs.items() if name in activation.parameters}
    missing = [name for name in activation.parameters if name not in values]
    if missing:
        raise ValueError(f"activation {activation.name!r} was called without {', '.join(missing)}; give the row `defaults=`")
    if known is not None and all(known.plain.get(name) == value for name, value in values.items() if not isinstance(value, Tensor)):
        return replace(known, learned={name: plain_tensor(value).detach() for name, value in values.items() if isinstance(value, Tensor)})
    return _bind(activation, values, epsilon, function, lambda: function)


def bind_plain(activation: Activation, epsilon: float, values: Mapping[str, Any] | None = None) -> Bound:
    """An activation with a `derivative` and with these plain parameters, without a module or call to read them from."""
    assert activation.derivative is not None
    plain = dict(values or {})
    return Bound(activation, activation.derivative, plain, {}, epsilon, _constants(activation, activation.derivative, _key(plain), epsilon))


def _bind(
    activation: Activation, values: Mapping[str, Any], epsilon: float, function: Callable[..., Any], testable: Callable[[], Callable[..., Any]]
) -> Bound:
    """The activation with these values of its parameters.

    Args:
        function: what computes it in the model.
        testable: makes a function that computes the same in float64 on the CPU, and leaves no trace on the module.
    """
    learned = {name: plain_tensor(value).detach() for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: _number(value) for name, value in values.items() if name not in learned}
    derivative = activation.derivative
    if derivative is None:
        given = {name: value.cpu().double() if isinstance(value, Tensor) else value for name, value in {**plain, **learned}.items()}
        differentiate = check_elementwise(activation.name, activation.function or testable(), given)
        derivative = functools.partial(derivative_of, differentiate, activation.function or function)
    constants = None
    if not learned:
        # A derivative that was made here holds the user's module, which a cache would keep alive.
        make = _constants if activation.derivative is not None else _constants.__wrapped__
        constants = make(activation, derivative, _key(plain), epsilon)
    return Bound(activation, derivative, plain, learned, epsilon, constants)


def _number(value: Any) -> Any:
    """A scalar or one-element array of NumPy as a number of Python, which can be the key of a cache. Anything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.size == 1 else value


def _key(plain: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Parameters as a key of a cache."""
    return tuple(sorted(plain.items()))


@functools.lru_cache(maxsize=4096)
def _constants(activation: Activation, derivative: Callable[..., Tensor], plain: tuple[tuple[str, Any], ...], epsilon: float) -> Constants:
    given = dict(plain)

    def slope(z: Tensor) -> Tensor:
        unknown = {"a": torch.full_like(z, math.nan)} if activation.from_output else {}
        return derivative(z, **given, **unknown).abs()

    peak = activation.peak(**given) if callable(activation.peak) else activation.peak
    magnitude = grid() if peak == math.inf else slope(grid())
    peak = peak_on_grid(slope, magnitude) if peak is None else None if peak == math.inf else peak
    if activation.tails is not None:
        low, high = activation.tails(epsilon, **given)
    elif peak is None:
        low, high = None, None
    else:
        low, high = tails_on_grid(slope, magnitude, epsilon * float(peak))
    low, high = (None if edge is None else float(edge) for edge in (low, high))
    return Constants(
        peak=None if peak is None else float(peak),
        low=low,
        high=high,
        tails_known=peak is not None,
        normal_low=0.0 if low is None else 0.5 * math.erfc(-low / math.sqrt(2)),
        normal_high=0.0 if high is None else 0.5 * math.erfc(high / math.sqrt(2)),
        normal_derivative=normal_mean(slope) / float(peak) if peak else None,
    )


def _sigmoid(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _tanh(z: Tensor) -> Tensor:
    return 4 * _sigmoid(2 * z)


def _between(z: Tensor, min_val: float, max_val: float) -> Tensor:
    return ((z > min_val) & (z < max_val)).to(z.dtype)


def _leaky(z: Tensor, slope: float | Tensor) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.ones_like(z) * slope)


def _rrelu(z: Tensor, lower: float, upper: float, training: bool, a: Tensor) -> Tensor:
    mean = (lower + upper) / 2
    if not training:
        return _leaky(z, mean)
    drawn = torch.where(z < 0, a / z, torch.ones_like(z))
    return torch.where(z == 0, torch.full_like(z, mean), torch.where(torch.isfinite(drawn), drawn, torch.full_like(z, mean)))


def _elu(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0)))


def _celu(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.exp(z.clamp(max=0) / alpha))


def _selu(z: Tensor) -> Tensor:
    return _SELU_SCALE * _elu(z, _SELU_ALPHA)


def _gelu(z: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return 0.5 * torch.erfc(-z * math.sqrt(0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    # Beyond |z| = 30 the second term is 0; the clamp keeps z^3 and z^2 from overflowing into inf * 0.
    z = z.clamp(-30, 30)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    twice = 2 * scale * (z + cubic * z**3)
    return torch.sigmoid(twice) + z * 2 * _sigmoid(twice) * scale * (1 + 3 * cubic * z * z)


def _silu(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def _mish(z: Tensor) -> Tensor:
    softplus = F.softplus(z)
    return torch.tanh(softplus) + z * torch.sigmoid(z) * _tanh(softplus)


def _softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * z > threshold, torch.ones_like(z), torch.sigmoid(beta * z))


def _hardswish(z: Tensor) -> Tensor:
    return torch.where(z >= 3, torch.ones_like(z), torch.where(z <= -3, torch.zeros_like(z), (2 * z + 3) / 6))


def _clamp(z: Tensor, **bounds: float | None) -> Tensor:
    """1 between the bounds `min` and `max`, and on them as torch has it. A bound that is None is not there."""
    low, high = bounds["min"], bounds["max"]
    if not CLAMP_PASSES_ITS_BOUNDS:
        inside = torch.ones_like(z) if low is None else (z > low).to(z.dtype)
        return inside if high is None else inside * (z < high)
    inside = torch.ones_like(z) if low is None else (z >= low).to(z.dtype)
    return inside if high is None else inside * (z <= high)


def _clamp_tails(epsilon: float, **bounds: float | None) -> Edges:
    low, high = bounds["min"], bounds["max"]
    if not CLAMP_PASSES_ITS_BOUNDS:
        return low, high
    # An element on an edge is in the tail, and one on a bound of such a clamp is not: the edge is the next number beyond the bound.
    below = None if low is None else torch.nextafter(torch.tensor(float(low)), torch.tensor(-math.inf)).item()
    return below, None if high is None else torch.nextafter(torch.tensor(float(high)), torch.tensor(math.inf)).item()


def _outside(z: Tensor, lambd: float) -> Tensor:
    return ((z > lambd) | (z < -lambd)).to(z.dtype)


def _fixed(low: float | None, high: float | None) -> Callable[..., Edges]:
    """Tails that begin at the same place whatever epsilon is, as those of hard functions do."""
    return lambda epsilon, **parameters: (low, high)


def _cosh_tails(scale: float) -> Callable[..., Edges]:
    """The tails of f' = peak / cosh(z / scale)^2."""

    def tails(epsilon: float) -> Edges:
        edge = scale * math.acosh(epsilon**-0.5)
        return -edge, edge

    return tails


def _leaky_tails(epsilon: float, **slopes: float | Tensor) -> Edges:
    """A leaky rectifier never saturates, unless its slope is exactly 0, which makes it a ReLU."""
    (slope,) = (value for name, value in slopes.items() if name in ("negative_slope", "weight"))
    if isinstance(slope, Tensor):
        return torch.where(slope == 0, torch.zeros_like(slope), torch.full_like(slope, -math.inf)), None
    return (0.0 if slope == 0 else None), None


def _exponential_tails(epsilon: float, alpha: float) -> Edges:
    """The low tail of ELU begins where |alpha| e^z falls below epsilon * max(1, |alpha|)."""
    if alpha == 0:
        return 0.0, None
    return min(0.0, math.log(epsilon * max(1.0, abs(alpha)) / abs(alpha))), None


def _softplus_tails(epsilon: float, beta: float, threshold: float) -> Edges:
    return math.log(epsilon / (1 - epsilon)) / beta, None


def _rrelu_tails(epsilon: float, lower: float, upper: float, training: bool) -> Edges:
    return (0.0 if lower == upper == 0 else None), None


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

_NAMESPACES = (torch, torch.special, F, Tensor)


def calls_of(*names: str) -> tuple[Callable[..., Any], ...]:
    """Every function and tensor method of torch that has one of these names, and its in-place form."""
    spellings = [name + ending for name in names for ending in ("", "_")]
    found = [getattr(place, name) for place in _NAMESPACES for name in spellings if callable(getattr(place, name, None))]
    return tuple(dict.fromkeys(found))


ACTIVATIONS: tuple[Activation, ...] = (
    Activation("sigmoid", (nn.Sigmoid,), (), _sigmoid, 0.25, _cosh_tails(2.0), calls=calls_of("sigmoid", "expit")),
    Activation("tanh", (nn.Tanh,), (), _tanh, 1.0, _cosh_tails(1.0), calls=calls_of("tanh")),
    Activation("relu", (nn.ReLU,), (), lambda z: (z > 0).to(z.dtype), 1.0, _fixed(0.0, None), calls=calls_of("relu")),
    # ReLU6 must come before Hardtanh: in torch it is a subclass of it, with other limits and the same forward.
    Activation("relu6", (nn.ReLU6,), (), lambda z: _between(z, 0.0, 6.0), 1.0, _fixed(0.0, 6.0), calls=calls_of("relu6")),
    Activation(
        "leaky_relu",
        (nn.LeakyReLU,),
        ("negative_slope",),
        lambda z, negative_slope: _leaky(z, negative_slope),
        lambda negative_slope: max(1.0, abs(negative_slope)),
        _leaky_tails,
        calls=calls_of("leaky_relu"),
        defaults=(0.01,),
    ),
    Activation(
        "prelu",
        (nn.PReLU,),
        ("weight",),
        lambda z, weight: _leaky(z, weight),
        lambda weight: weight.abs().max().clamp(min=1),
        _leaky_tails,
        calls=calls_of("prelu"),
    ),
    Activation(
        "rrelu",
        (nn.RReLU,),
        ("lower", "upper", "training"),
        _rrelu,
        lambda lower, upper, training: max(1.0, abs(lower), abs(upper)),
        _rrelu_tails,
        from_output=True,
        calls=calls_of("rrelu"),
        defaults=(1 / 8, 1 / 3, False),
    ),
    Activation("elu", (nn.ELU,), ("alpha",), _elu, lambda alpha: max(1.0, abs(alpha)), _exponential_tails, calls=calls_of("elu"), defaults=(1.0,)),
    Activation("selu", (nn.SELU,), (), _selu, _SELU_SCALE * _SELU_ALPHA, lambda epsilon: (math.log(epsilon), None), calls=calls_of("selu")),
    Activation(
        "celu", (nn.CELU,), ("alpha",), _celu, 1.0, lambda epsilon, alpha: (alpha * math.log(epsilon), None), calls=calls_of("celu"), defaults=(1.0,)
    ),
    Activation("gelu", (nn.GELU,), ("approximate",), _gelu, calls=calls_of("gelu"), defaults=("none",)),
    Activation("silu", (nn.SiLU,), (), _silu, calls=calls_of("silu")),
    Activation("mish", (nn.Mish,), (), _mish, calls=calls_of("mish")),
    Activation("softplus", (nn.Softplus,), ("beta", "threshold"), _softplus, 1.0, _softplus_tails, calls=calls_of("softplus"), defaults=(1.0, 20.0)),
    Activation(
        "softsign",
        (nn.Softsign,),
        (),
        lambda z: (1 + z.abs()) ** -2,
        1.0,
        lambda epsilon: (1 - epsilon**-0.5, epsilon**-0.5 - 1),
        calls=calls_of("softsign"),
    ),
    Activation(
        "hardtanh",
        (nn.Hardtanh,),
        ("min_val", "max_val"),
        _between,
        1.0,
        lambda epsilon, min_val, max_val: (float(min_val), float(max_val)),
        calls=calls_of("hardtanh"),
        defaults=(-1.0, 1.0),
    ),
    Activation("hardsigmoid", (nn.Hardsigmoid,), (), lambda z: _between(z, -3.0, 3.0) / 6, 1 / 6, _fixed(-3.0, 3.0), calls=calls_of("hardsigmoid")),
    Activation("hardswish", (nn.Hardswish,), (), _hardswish, 1.5, _fixed(-3.0, None), calls=calls_of("hardswish")),
    Activation(
        "log_sigmoid",
        (nn.LogSigmoid,),
        (),
        lambda z: torch.sigmoid(-z),
        1.0,
        lambda epsilon: (None, math.log((1 - epsilon) / epsilon)),
        calls=calls_of("logsigmoid"),
    ),
    Activation("tanhshrink", (nn.Tanhshrink,), (), lambda z: torch.tanh(z) ** 2, 1.0, _fixed(None, None), calls=calls_of("tanhshrink")),
    Activation("softshrink", (nn.Softshrink,), ("lambd",), _outside, 1.0, _fixed(None, None), calls=calls_of("softshrink"), defaults=(0.5,)),
    Activation("hardshrink", (nn.Hardshrink,), ("lambd",), _outside, 1.0, _fixed(None, None), calls=calls_of("hardshrink"), defaults=(0.5,)),
    Activation(
        "threshold",
        (nn.Threshold,),
        ("threshold", "value"),
        lambda z, threshold, value: (z > threshold).to(z.dtype),
        1.0,
        lambda epsilon, threshold, value: (float(threshold), None),
        calls=calls_of("threshold"),
    ),
)
"""The element-wise activations of torch.nn. Peak (sup|f'| > 1) and tails of GELU, SiLU and Mish have no closed form and are searched on the grid."""

CLAMP = Activation("clamp", (), ("min", "max"), _clamp, 1.0, _clamp_tails, lambda z, **bounds: z.clamp(**bounds), defaults=(None, None))
"""`z.clamp(min, max)` of a signal, with one bound or two. It is no row of the table, since its calls are told apart by their arguments
(observe/calls.py): with tensors for bounds, or to keep a divisor away from 0, a clamp is no activation."""
