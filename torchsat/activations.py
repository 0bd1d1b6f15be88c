"""Activation functions: their derivative, its peak, and where their tails begin.

One row of `ACTIVATIONS` is one function. Every derivative is computed from the pre-activation z in a stable form: from the output it would
be wrong in low precision (a bfloat16 sigmoid rounds to 1 at z = 6.25, where f' is not 0) and impossible for SiLU, Mish or Hardswish.

A *tail* is where |f'| stays below epsilon of its peak, all the way out. Its edges are inclusive, since torch's own derivative is 0 on the
kink of a hard function (ReLU at 0, Hardtanh at 1). A zero of f' elsewhere (GELU near -0.75, Tanhshrink at 0) is not a tail.

A user's function is a longer tuple: `activations=(*ACTIVATIONS, Activation("snake", modules=(Snake,)))`. What such a row leaves out is
found numerically: the derivative by automatic differentiation, peak and tails on a grid. A module that is in no row is judged by what it makes
of real data, never by running it: if its numbers are those of a row, it is that function (`recognise`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsat.record import Tails

Edges = tuple[float | Tensor | None, float | Tensor | None]


@dataclass(frozen=True)
class Activation:
    """One element-wise activation function.

    Args:
        name: for people; letters, digits, `_`, `.` and `-`.
        modules: the module classes that compute it. A subclass counts as long as it keeps the class's `forward`.
        parameters: attributes of the module, handed by name to `derivative`, `peak`, `tails` and `function`. A tensor of more than one
            element is spread over z as `torch.nn.PReLU` does it (dimension 1), or broadcast if it has several dimensions.
        derivative: f'(z) for a float32 or float64 tensor of any shape. None: automatic differentiation of `function`.
        peak: sup|f'|, a number or a function of the parameters; None: found on a grid, unknown if |f'| has no bound there or the parameters
            are learned.
        tails: (z_L, z_R) as a function of (epsilon, **parameters), an absent tail being None; None: found on a grid, unknown where there is no
            peak or where the parameters are learned.
        function: f(z); None: the module or call itself. Used only where there is no `derivative`.
        from_output: `derivative` is also given the output, as keyword `a` (the slope of RReLU is drawn in the forward pass).
        calls: functions and tensor methods of torch that compute it: z first, then `parameters` in their order or by name. A Python function
            of your own is heard where it is decorated with `torch.overrides.wrap_torch_function(lambda z: (z,))`.
        defaults: of `parameters`, where a call leaves them out.

    Raises:
        ValueError: `defaults` are not as many as `parameters`, or torch does not let a function in `calls` be heard.
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
    """What follows from an activation, its plain parameters and epsilon alone."""

    peak: float | None
    low: float | None
    high: float | None
    tails_known: bool
    """False where there is no peak to measure them by."""
    normal_low: float
    normal_high: float
    normal_derivative: float | None


@dataclass(frozen=True)
class Bound:
    """An activation with the parameters of one module: all that a site needs to know of its function."""

    activation: Activation
    derivative: Callable[..., Tensor]
    plain: Mapping[str, Any]
    learned: Mapping[str, Tensor]
    epsilon: float
    constants: Constants | None
    """None where the function has learned parameters: peak and tails then live on the device."""

    @property
    def tails_known(self) -> bool:
        """Whether it is known which elements are saturated: not for a function without bound, nor for learned parameters without `tails`."""
        return self.activation.tails is not None or (self.constants is not None and self.constants.tails_known)

    @property
    def tails(self) -> Tails:
        if self.constants is None:
            return "none"
        low, high = self.constants.low is not None, self.constants.high is not None
        return "both" if low and high else "low" if low else "high" if high else "none"

    def evaluate(self, z: Tensor, a: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, float | Tensor | None, Edges]:
        """|f'(z)|, the peak, and the edges of the tails, for learned parameters already spread over z."""
        given = {**self.plain, **learned}
        slope = self.derivative(z, **given, **({"a": a} if self.activation.from_output else {})).abs()
        if self.constants is not None:
            return slope, self.constants.peak, (self.constants.low, self.constants.high)
        peak = self.activation.peak
        edges = self.activation.tails(self.epsilon, **given) if self.activation.tails else (None, None)
        return slope, peak(**{**self.plain, **self.learned}) if callable(peak) else peak, edges


def bind(activation: Activation, module: nn.Module, epsilon: float) -> Bound:
    """The activation as this module computes it.

    Raises:
        ValueError: the module lacks a parameter, or its function is not element-wise and so has no f'(z).
    """
    try:
        values = {name: getattr(module, name) for name in activation.parameters}
    except AttributeError as error:
        raise ValueError(
            f"activation {activation.name!r} names the parameters {activation.parameters}, but {type(module).__name__} lacks one: {error}"
        ) from None
    return _bind(activation, values, epsilon, module.forward, lambda: _twin(module).forward)


def bind_call(
    activation: Activation, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], epsilon: float, known: Bound | None = None
) -> Bound:
    """The activation as a call computes it; `args` are those after z. `known` is that of an earlier call, to save work.

    Raises:
        ValueError: a parameter is missing, or the function is not element-wise.
    """
    values = {**dict(zip(activation.parameters, activation.defaults, strict=False)), **dict(zip(activation.parameters, args, strict=False))}
    values |= {name: value for name, value in kwargs.items() if name in activation.parameters}
    missing = [name for name in activation.parameters if name not in values]
    if missing:
        raise ValueError(f"activation {activation.name!r} was called without {', '.join(missing)}; give the row `defaults=`")
    if known is not None and all(known.plain.get(name) == value for name, value in values.items() if not isinstance(value, Tensor)):
        return replace(known, learned={name: value.detach() for name, value in values.items() if isinstance(value, Tensor)})
    return _bind(activation, values, epsilon, function, lambda: function)


def bind_plain(activation: Activation, epsilon: float) -> Bound:
    """An activation without parameters, as the kernels of recurrent layers compute it."""
    assert activation.derivative is not None
    return Bound(activation, activation.derivative, {}, {}, epsilon, _constants(activation, activation.derivative, (), epsilon))


def _bind(
    activation: Activation, values: Mapping[str, Any], epsilon: float, function: Callable[..., Any], testable: Callable[[], Callable[..., Any]]
) -> Bound:
    """`testable` makes the function again, for float64 on the CPU and without a trace on the module."""
    learned = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in values.items() if name not in learned}
    derivative = activation.derivative
    if derivative is None:
        given = {name: value.cpu().double() if isinstance(value, Tensor) else value for name, value in {**plain, **learned}.items()}
        differentiate = check_elementwise(activation.name, activation.function or testable(), given)
        derivative = functools.partial(_slope, differentiate, activation.function or function)
    constants = None
    if not learned:
        # A derivative made here holds the module: it must not enter the cache.
        make = _constants if activation.derivative is not None else _constants.__wrapped__
        constants = make(activation, derivative, tuple(sorted(plain.items())), epsilon)
    return Bound(activation, derivative, plain, learned, epsilon, constants)


def recognise(z: Tensor, a: Tensor, rows: Sequence[Activation], epsilon: float) -> Bound | None:
    """The function that made a of z, elements of a module of no row: a row at its defaults, GELU by tanh, quick GELU or squared ReLU.

    Only the numbers are compared, in the precision of a; no function of the module is called. None where no row fits, or too many do.
    """
    tolerance = _tolerance(a.dtype)
    z, a = z.double(), a.double()
    finite = torch.isfinite(z) & torch.isfinite(a)
    z, a = z[finite], a[finite]
    if z.numel() < 16 or not bool((z > 0.1).any()) or not bool((z < -0.1).any()) or bool(torch.isclose(a, z, rtol=tolerance, atol=0).all()):
        return None
    for row in (*rows, *_WITHOUT_MODULE):
        if row.derivative is None or row.from_output or len(row.defaults) != len(row.parameters) or not (row.calls or row.function):
            continue
        function = row.function or row.calls[0]
        for values in (row.defaults, *([("tanh",)] if row.name == "gelu" else [])):
            given = dict(zip(row.parameters, values, strict=True))
            # Near a zero of the function the rounding is that of its terms, which are as large as z.
            made = function(z.clone(), **given)
            if bool(((made - a).abs() <= tolerance * (a.abs() + 0.1 * z.abs().clamp(max=1))).all()):
                return Bound(row, row.derivative, given, {}, epsilon, _constants(row, row.derivative, tuple(sorted(given.items())), epsilon))
    return None


def fits(bound: Bound, z: Tensor, a: Tensor) -> Tensor:
    """Whether a recognised function still makes a of z: a boolean on the device, true where they differ."""
    function = bound.activation.function or bound.activation.calls[0]
    made = function(z.clone(), **bound.plain)
    return ((made - a.to(made)).abs() > 4 * _tolerance(a.dtype) * (made.abs() + z.abs().clamp(max=1))).any()


def _tolerance(dtype: torch.dtype) -> float:
    """How far two ways of writing a function may lie apart; of the low precisions only the result is rounded."""
    return torch.finfo(dtype).eps * (4 if dtype in (torch.float16, torch.bfloat16) else 64)


def is_function(z: Tensor, slope: Tensor, axes: Sequence[Tensor | None]) -> bool:
    """Whether a derivative that differs from element to element is a function of z, alone or within each unit of an axis.

    Sorted by z, neighbours have nearly the same slope if it is one; the slopes of a random mask have nothing to do with each other
    (von Neumann's ratio: 0 and 1).

    Args:
        z, slope: vectors.
        axes: for each grouping, the unit of each element; None: no grouping.
    """
    spread = slope.double().var(correction=0)
    if not float(spread) > 1e-10 * float(slope.double().square().mean()):
        return False
    for units in axes:
        order = z.argsort() if units is None else z.argsort()[units[z.argsort()].argsort(stable=True)]
        jumps = slope.double()[order].diff().square()
        within = slope.double()
        if units is not None:
            sorted_units = units[order]
            jumps = jumps[sorted_units.diff() == 0]
            count = torch.zeros(int(units.max()) + 1, dtype=torch.float64, device=z.device).index_add_(0, units, torch.ones_like(within))
            mean = torch.zeros_like(count).index_add_(0, units, within) / count.clamp(min=1)
            within = within - mean[units]
            spread = within.square().mean()
            if not float(spread) > 1e-10 * float(slope.double().square().mean()):
                continue
        if jumps.numel() and float(jumps.mean()) < 0.5 * 2 * float(spread):
            return True
    return False


def differentiated(name: str, epsilon: float) -> Bound:
    """A function of which only the derivative at each element is known, from autograd: neither peak nor tails."""
    return Bound(Activation(name), lambda z: torch.full_like(z, math.nan), {}, {}, epsilon, None)


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same attributes, whose parameters are in float64 on the CPU, without gradients.

    Not a deep copy: an activation may hold a reference to a whole model.
    """
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    plain = vars(module)["_parameters"]
    vars(twin)["_parameters"] = {name: None if value is None else value.detach().cpu().double() for name, value in plain.items()}
    vars(twin)["_buffers"] = {name: None if value is None else value.detach().cpu().clone() for name, value in vars(module)["_buffers"].items()}
    vars(twin)["_modules"] = {name: None if child is None else _twin(child) for name, child in vars(module)["_modules"].items()}
    return twin


Differentiate = Callable[..., Tensor]
"""From (function, z, direction, **parameters) to f'(z) * direction, for a function that acts on each element alone."""


def check_elementwise(name: str, function: Callable[..., Tensor], given: Mapping[str, Any]) -> Differentiate:
    """How to differentiate a function that maps every element on its own, without drawing random numbers; ValueError for any other."""

    def reject(fact: str) -> ValueError:
        return ValueError(
            f"activation {name!r}: {fact}. torchsat can differentiate by itself only functions that act on each element alone "
            "and draw no random numbers: give `derivative=`, or leave the row out."
        )

    generator = torch.Generator("cpu").manual_seed(0)
    z = torch.randn(64, dtype=torch.float64, generator=generator, device="cpu") * 2
    direction = torch.rand(64, dtype=torch.float64, generator=generator, device="cpu") + 0.5
    state = torch.get_rng_state()
    try:
        full = function(z.clone(), **given)
        differentiate: Differentiate = _forward_mode
        try:
            slope = _slope(differentiate, function, z, **given)
        except Exception:
            # An autograd.Function need not have a forward mode; its backward is what training sees.
            differentiate = _reverse_mode
            slope = _slope(differentiate, function, z, **given)
        mixed = differentiate(function, z.clone(), direction, **given)
        shifted = function(z.roll(7)[:40].clone(), **given)
    except Exception as error:
        raise reject(f"f(z) for 64 numbers failed: {type(error).__name__}: {error}") from error
    finally:
        drawn = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
    if drawn:
        raise reject("it draws random numbers")
    if not isinstance(full, Tensor) or full.shape != z.shape:
        raise reject(f"64 numbers become {tuple(getattr(full, 'shape', ()))}")
    if not torch.allclose(mixed, slope * direction, rtol=1e-9, atol=1e-12) or not torch.allclose(shifted, full.roll(7)[:40], rtol=1e-9, atol=1e-12):
        raise reject("an element of its output depends on other elements of its input")
    return differentiate


def _slope(differentiate: Differentiate, function: Callable[..., Tensor], z: Tensor, **parameters: Any) -> Tensor:
    return differentiate(function, z.clone(), torch.ones_like(z), **parameters)


def _forward_mode(function: Callable[..., Tensor], z: Tensor, direction: Tensor, **parameters: Any) -> Tensor:
    return torch.func.jvp(lambda x: function(x, **parameters), (z,), (direction,))[1]  # type: ignore[no-any-return]


def _reverse_mode(function: Callable[..., Tensor], z: Tensor, direction: Tensor, **parameters: Any) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf.clone(), **parameters), leaf, direction)[0]


@functools.lru_cache(maxsize=4096)
def _constants(activation: Activation, derivative: Callable[..., Tensor], plain: tuple[tuple[str, Any], ...], epsilon: float) -> Constants:
    given = dict(plain)

    def slope(z: Tensor) -> Tensor:
        unknown = {"a": torch.full_like(z, math.nan)} if activation.from_output else {}
        return derivative(z, **given, **unknown).abs()

    magnitude = slope(_grid())
    peak = activation.peak(**given) if callable(activation.peak) else activation.peak
    if peak is None:
        peak = _grid_peak(slope, magnitude)
    if activation.tails is not None:
        low, high = activation.tails(epsilon, **given)
    elif peak is None:
        low, high = None, None
    else:
        low, high = _grid_tails(slope, magnitude, epsilon * float(peak))
    low, high = (None if edge is None else float(edge) for edge in (low, high))
    return Constants(
        peak=None if peak is None else float(peak),
        low=low,
        high=high,
        tails_known=peak is not None,
        normal_low=0.0 if low is None else 0.5 * math.erfc(-low / math.sqrt(2)),
        normal_high=0.0 if high is None else 0.5 * math.erfc(high / math.sqrt(2)),
        normal_derivative=_normal_mean(slope) / float(peak) if peak else None,
    )


_REACH, _PER_UNIT = 60, 500


@functools.lru_cache(maxsize=1)
def _grid() -> Tensor:
    """z from -1e6 to 1e6: even steps to +-60, then geometric ones, for functions with algebraic tails or stretched by a parameter."""
    even = torch.linspace(-_REACH, _REACH, 2 * _REACH * _PER_UNIT + 1, dtype=torch.float64, device="cpu")
    far = torch.logspace(math.log10(_REACH), 6, 4001, dtype=torch.float64, device="cpu")[1:]
    return torch.cat([-far.flip(0), even, far])


def _grid_peak(slope: Callable[[Tensor], Tensor], magnitude: Tensor) -> float | None:
    """sup|f'|, or None where it is not finite or still grows at the end of the grid."""
    top = int(magnitude.argmax())
    peak = float(magnitude[top])
    ends = max(float(magnitude[0]), float(magnitude[-1]))
    inner = float(magnitude[4000:-4000].max())
    if not math.isfinite(peak) or peak == 0 or ends > 1.001 * inner:
        return None
    left, right = (float(_grid()[min(max(at, 0), len(_grid()) - 1)]) for at in (top - 1, top + 1))
    return max(peak, float(slope(torch.linspace(left, right, 4001, dtype=torch.float64, device="cpu")).max()))


def _grid_tails(slope: Callable[[Tensor], Tensor], magnitude: Tensor, level: float) -> tuple[float | None, float | None]:
    grid = _grid()
    above = (magnitude >= level).nonzero()
    if not len(above):
        return None, None
    edges: list[float | None] = []
    for outer, inner in ((int(above[0]) - 1, int(above[0])), (int(above[-1]) + 1, int(above[-1]))):
        if not 0 <= outer < len(grid):
            edges.append(None)
            continue
        flat, steep = float(grid[outer]), float(grid[inner])
        for _ in range(60):
            middle = (flat + steep) / 2
            if float(slope(torch.tensor([middle], dtype=torch.float64, device="cpu"))) < level:
                flat = middle
            else:
                steep = middle
        edges.append((flat + steep) / 2)
    return edges[0], edges[1]


def _normal_mean(slope: Callable[[Tensor], Tensor]) -> float:
    """E|f'(z)| for z ~ N(0, 1), by the midpoint rule: the kinks of hard functions lie between the points."""
    z = (torch.arange(-20_000, 20_000, dtype=torch.float64, device="cpu") + 0.5) / 2000
    return float((slope(z) * torch.exp(-0.5 * z * z)).sum()) / 2000 / math.sqrt(2 * math.pi)


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


def _outside(z: Tensor, lambd: float) -> Tensor:
    return ((z > lambd) | (z < -lambd)).to(z.dtype)


def _fixed(low: float | None, high: float | None) -> Callable[..., Edges]:
    """Tails that begin at the same place whatever epsilon is: those of hard functions."""
    return lambda epsilon, **parameters: (low, high)


def _cosh_tails(scale: float) -> Callable[..., Edges]:
    """Tails of f' = peak / cosh(z / scale)^2."""

    def tails(epsilon: float) -> Edges:
        edge = scale * math.acosh(epsilon**-0.5)
        return -edge, edge

    return tails


def _leaky_tails(epsilon: float, **slopes: float | Tensor) -> Edges:
    """A leaky rectifier never saturates, unless its slope is exactly 0 and it is a ReLU."""
    (slope,) = (value for name, value in slopes.items() if name in ("negative_slope", "weight"))
    if isinstance(slope, Tensor):
        return torch.where(slope == 0, torch.zeros_like(slope), torch.full_like(slope, -math.inf)), None
    return (0.0 if slope == 0 else None), None


def _exponential_tails(epsilon: float, alpha: float) -> Edges:
    """ELU: |alpha| e^z falls below epsilon of max(1, |alpha|)."""
    if alpha == 0:
        return 0.0, None
    return min(0.0, math.log(epsilon * max(1.0, abs(alpha)) / abs(alpha))), None


def _softplus_tails(epsilon: float, beta: float, threshold: float) -> Edges:
    return math.log(epsilon / (1 - epsilon)) / beta, None


def _rrelu_tails(epsilon: float, lower: float, upper: float, training: bool) -> Edges:
    return (0.0 if lower == upper == 0 else None), None


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

_NAMESPACES = (torch, torch.special, F, Tensor)


def _calls(*names: str) -> tuple[Callable[..., Any], ...]:
    """Every function and tensor method of torch of these names, and their in-place forms."""
    spellings = [name + ending for name in names for ending in ("", "_")]
    found = [getattr(place, name) for place in _NAMESPACES for name in spellings if callable(getattr(place, name, None))]
    return tuple(dict.fromkeys(found))


ACTIVATIONS: tuple[Activation, ...] = (
    Activation("sigmoid", (nn.Sigmoid,), (), _sigmoid, 0.25, _cosh_tails(2.0), calls=_calls("sigmoid", "expit")),
    Activation("tanh", (nn.Tanh,), (), _tanh, 1.0, _cosh_tails(1.0), calls=_calls("tanh")),
    Activation("relu", (nn.ReLU,), (), lambda z: (z > 0).to(z.dtype), 1.0, _fixed(0.0, None), calls=_calls("relu")),
    # ReLU6 is a Hardtanh in torch, with min_val and max_val of its own, and shares its forward: it must come first.
    Activation("relu6", (nn.ReLU6,), (), lambda z: _between(z, 0.0, 6.0), 1.0, _fixed(0.0, 6.0), calls=_calls("relu6")),
    Activation(
        "leaky_relu",
        (nn.LeakyReLU,),
        ("negative_slope",),
        lambda z, negative_slope: _leaky(z, negative_slope),
        lambda negative_slope: max(1.0, abs(negative_slope)),
        _leaky_tails,
        calls=_calls("leaky_relu"),
        defaults=(0.01,),
    ),
    Activation(
        "prelu",
        (nn.PReLU,),
        ("weight",),
        lambda z, weight: _leaky(z, weight),
        lambda weight: weight.abs().max().clamp(min=1),
        _leaky_tails,
        calls=_calls("prelu"),
    ),
    Activation(
        "rrelu",
        (nn.RReLU,),
        ("lower", "upper", "training"),
        _rrelu,
        lambda lower, upper, training: max(1.0, abs(lower), abs(upper)),
        _rrelu_tails,
        from_output=True,
        calls=_calls("rrelu"),
        defaults=(1 / 8, 1 / 3, False),
    ),
    Activation("elu", (nn.ELU,), ("alpha",), _elu, lambda alpha: max(1.0, abs(alpha)), _exponential_tails, calls=_calls("elu"), defaults=(1.0,)),
    Activation("selu", (nn.SELU,), (), _selu, _SELU_SCALE * _SELU_ALPHA, lambda epsilon: (math.log(epsilon), None), calls=_calls("selu")),
    Activation(
        "celu", (nn.CELU,), ("alpha",), _celu, 1.0, lambda epsilon, alpha: (alpha * math.log(epsilon), None), calls=_calls("celu"), defaults=(1.0,)
    ),
    Activation("gelu", (nn.GELU,), ("approximate",), _gelu, calls=_calls("gelu"), defaults=("none",)),
    Activation("silu", (nn.SiLU,), (), _silu, calls=_calls("silu")),
    Activation("mish", (nn.Mish,), (), _mish, calls=_calls("mish")),
    Activation("softplus", (nn.Softplus,), ("beta", "threshold"), _softplus, 1.0, _softplus_tails, calls=_calls("softplus"), defaults=(1.0, 20.0)),
    Activation(
        "softsign",
        (nn.Softsign,),
        (),
        lambda z: (1 + z.abs()) ** -2,
        1.0,
        lambda epsilon: (1 - epsilon**-0.5, epsilon**-0.5 - 1),
        calls=_calls("softsign"),
    ),
    Activation(
        "hardtanh",
        (nn.Hardtanh,),
        ("min_val", "max_val"),
        _between,
        1.0,
        lambda epsilon, min_val, max_val: (float(min_val), float(max_val)),
        calls=_calls("hardtanh"),
        defaults=(-1.0, 1.0),
    ),
    Activation("hardsigmoid", (nn.Hardsigmoid,), (), lambda z: _between(z, -3.0, 3.0) / 6, 1 / 6, _fixed(-3.0, 3.0), calls=_calls("hardsigmoid")),
    Activation("hardswish", (nn.Hardswish,), (), _hardswish, 1.5, _fixed(-3.0, None), calls=_calls("hardswish")),
    Activation(
        "log_sigmoid",
        (nn.LogSigmoid,),
        (),
        lambda z: torch.sigmoid(-z),
        1.0,
        lambda epsilon: (None, math.log((1 - epsilon) / epsilon)),
        calls=_calls("logsigmoid"),
    ),
    Activation("tanhshrink", (nn.Tanhshrink,), (), lambda z: torch.tanh(z) ** 2, 1.0, _fixed(None, None), calls=_calls("tanhshrink")),
    Activation("softshrink", (nn.Softshrink,), ("lambd",), _outside, 1.0, _fixed(None, None), calls=_calls("softshrink"), defaults=(0.5,)),
    Activation("hardshrink", (nn.Hardshrink,), ("lambd",), _outside, 1.0, _fixed(None, None), calls=_calls("hardshrink"), defaults=(0.5,)),
    Activation(
        "threshold",
        (nn.Threshold,),
        ("threshold", "value"),
        lambda z, threshold, value: (z > threshold).to(z.dtype),
        1.0,
        lambda epsilon, threshold, value: (float(threshold), None),
        calls=_calls("threshold"),
    ),
)
"""The element-wise activations of torch.nn. GELU, SiLU and Mish have their peak (sup|f'| > 1) and tails found on the grid."""

_WITHOUT_MODULE = (
    Activation(
        "quick_gelu",
        derivative=lambda z: torch.sigmoid(1.702 * z) * (1 + 1.702 * z * torch.sigmoid(-1.702 * z)),
        function=lambda z: z * torch.sigmoid(1.702 * z),
    ),
    Activation("squared_relu", derivative=lambda z: 2 * F.relu(z), function=lambda z: F.relu(z).square()),
)
"""Functions that models write out by hand, known only by their numbers."""
