"""Activations that are called as functions: which calls become sites, how they are named, and that listening to them does not change the training."""

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, wrap_torch_function
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.models import Calling, Everything
from tests.truth import check, known, one_step, same, truth
from torchsat import ACTIVATIONS, Activation, Record
from torchsat.flow import ways

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "leaky_relu": (0.2,),
    "elu": (0.7,),
    "celu": (0.7,),
    "softplus": (2.0, 10.0),
    "hardtanh": (-0.5, 2.0),
    "softshrink": (0.3,),
    "hardshrink": (0.3,),
    "threshold": (0.1, -1.0),
}
"""Arguments that differ from the defaults; module and function take them in the same order."""
SPELLINGS = [(row, call) for row in ACTIVATIONS for call in row.calls]


@pytest.mark.parametrize(("row", "call"), SPELLINGS, ids=lambda value: getattr(value, "name", getattr(value, "__qualname__", "?")))
def test_every_call_shows_what_its_module_shows(row: Activation, call: Callable[..., Any]) -> None:
    arguments = ARGUMENTS.get(row.name, ())
    # In place, torch computes the gradient from the output, which rounds differently. The module must do the same.
    in_place = {"inplace": True} if row.name in ("elu", "selu", "celu") and call.__name__.endswith("_") else {}
    module = row.modules[0](*arguments, **in_place)
    if row.name == "prelu":
        arguments = (torch.full((24,), 0.3),)
        module = nn.PReLU(24, init=0.3)
        module.weight.requires_grad_(False)
    if row.name == "rrelu":
        arguments = (0.1, 0.3, True)
        module = nn.RReLU(0.1, 0.3)
    functional = Calling(lambda z: call(z, *arguments))
    modular = nn.Sequential(functional.layer, module)
    x = torch.randn(64, 16)
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = one_step(functional, x=x).records
    torch.set_rng_state(random)
    expected = one_step(modular, x=x).records
    assert [record.site for record in seen] == [row.name]
    assert (seen[0].kind, expected[0].kind, seen[0].output) == ("call", "module", True)
    same(seen[0], expected[0])


def test_all_rows_have_calls_of_at_least_these_spellings() -> None:
    rows = {row.name: row.calls for row in ACTIVATIONS}
    assert all(rows.values())
    assert {torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_} <= set(rows["sigmoid"])
    assert {torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_} <= set(rows["tanh"])
    assert {torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_} <= set(rows["relu"])
    assert {F.elu, F.elu_} <= set(rows["elu"])
    assert {F.hardtanh, F.hardtanh_} <= set(rows["hardtanh"])
    assert {F.leaky_relu, F.leaky_relu_} <= set(rows["leaky_relu"])


def test_keyword_arguments_in_place_and_out() -> None:
    x = torch.randn(64, 16)
    layer = nn.Linear(16, 24)

    def seen(function: Callable[[Tensor], Tensor]) -> Record:
        model = Calling(function)
        model.layer = layer
        (record,) = one_step(model, x=x).records
        return record

    same(seen(lambda z: F.gelu(input=z, approximate="tanh")), one_step(nn.Sequential(layer, nn.GELU("tanh")), x=x)["1"])
    same(seen(lambda z: F.elu(z, alpha=0.5, inplace=True)), one_step(nn.Sequential(layer, nn.ELU(0.5, inplace=True)), x=x)["1"])
    same(seen(lambda z: F.relu(z, True)), one_step(nn.Sequential(layer, nn.ReLU()), x=x)["1"])

    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = self.layer(x)
                torch.tanh(z, out=z)
            out: Tensor = self.head(z)
            return out

    z = layer(x).detach()
    record = one_step(Out(), x=x)["tanh"]
    assert record.z_mean == pytest.approx(z.double().mean().item())
    assert record.derivative == pytest.approx((1 - z.double().tanh() ** 2).mean().item(), rel=1e-6)
    assert record.attenuation is None


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return F.gelu(self.second(x)).tanh()


class Nested(nn.Module):
    def __init__(self, rerun: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.act, self.rerun = nn.GELU(), rerun

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.rerun else block(x)
        return torch.sigmoid(self.blocks[0](self.act(x))).sigmoid()


NESTED = [
    "sigmoid",
    *(f"blocks.{k}/{call}" for k in (0, 1) for call in ("gelu", "gelu_1", "tanh")),
    "act",
    "sigmoid_1",
    "sigmoid_2",
]


@pytest.mark.parametrize("rerun", [False, True])
def test_a_call_is_named_after_the_module_in_whose_forward_it_happens(rerun: bool) -> None:
    """The call inside nn.GELU is not counted a second time, a module that runs twice keeps its sites, and a recomputed forward adds nothing."""
    model = Nested(rerun)
    snapshot = one_step(model, x=torch.randn(16, 8, requires_grad=True))
    assert [record.site for record in snapshot.records] == NESTED
    counts = {record.site: (record.n, record.grad_n) for record in snapshot.records}
    assert counts["act"] == counts["sigmoid"] == counts["blocks.1/gelu"] == (128, 128)
    assert counts["blocks.0/gelu"] == counts["blocks.0/tanh"] == (256, 256)


def test_a_reentrant_checkpoint_has_values_and_gradients() -> None:
    block = Block()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, x, use_reentrant=True)
            return out

    x = torch.randn(16, 8, requires_grad=True)
    plain = one_step(nn.Sequential(block), x=x)
    seen = one_step(Net(), x=x)
    for record in plain.records:
        other = seen[record.site.replace("0/", "block/")]
        assert [site.replace("0/", "block/") for site in record.after] == list(other.after)
        unknown: dict[str, Any] = {"output": False, "last": False, "after": (), "losses": ()}
        same(replace(record, **unknown), replace(other, **unknown))


def test_calls_outside_the_models_own_forward_are_seen_too() -> None:
    """The training loop calls the parts of the model and never the model itself."""
    model = nn.ModuleDict({"encoder": Block(), "head": nn.Linear(8, 1)})
    x = torch.randn(16, 8)
    snapshot = one_step(model, lambda m: m["head"](m["encoder"](x)))
    assert [(record.site, record.n, record.grad_n) for record in snapshot.records] == [
        ("encoder/gelu", 128, 128),
        ("encoder/gelu_1", 128, 128),
        ("encoder/tanh", 128, 128),
    ]


def test_gradients_are_those_of_plain_autograd() -> None:
    model = Calling(torch.tanh)
    x = torch.randn(64, 16)
    check(one_step(model, x=x)["tanh"], truth(torch.tanh, model.layer(x)))


class Odd(nn.Module):
    """A model that raises an error in the middle of its forward, or none."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.inner, self.error = Block(), error
        self.inner.register_forward_hook(self.fail)

    def fail(self, *args: object) -> None:
        assert _get_current_function_mode_stack()
        if self.error is not None:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        try:
            return F.relu(self.inner(torch.relu(x)))
        except ValueError:
            return F.relu(self.inner.second(x))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_mode_is_left_after_an_exception(error: type[BaseException]) -> None:
    model = Odd(error)
    monitor = torchsat.watch(model, errors="raise")
    with pytest.raises(error):
        model(torch.randn(4, 8))
    if error is KeyboardInterrupt:
        # A KeyboardInterrupt ends forward without calling a forward hook. The mode is removed when the model is next called.
        model.error = None
        model(torch.randn(4, 8))
    assert _get_current_function_mode_stack() == []
    monitor.close()
    assert _get_current_function_mode_stack() == []


def test_a_close_after_an_interrupt_takes_the_mode_off() -> None:
    model = Odd(KeyboardInterrupt)
    with torchsat.watch(model), pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 8))
    assert _get_current_function_mode_stack() == []


def test_after_an_exception_caught_in_the_model_names_are_right() -> None:
    snapshot = one_step(Odd(ValueError), x=torch.randn(4, 8))
    assert [record.site for record in snapshot.records] == ["relu", "inner/gelu", "inner/gelu_1", "inner/tanh", "relu_1"]


def test_a_mode_of_the_users_stays_where_it_is() -> None:
    class Mine(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            with Mine():
                return super().forward(x)

    mine = Mine()
    with mine:
        snapshot = one_step(Net(torch.tanh), x=torch.randn(8, 16))
        assert _get_current_function_mode_stack() == [mine]
    assert [record.site for record in snapshot.records] == ["tanh"]


def test_passes_that_do_not_count_are_not_heard() -> None:
    model = Calling(torch.tanh)
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 16)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    model.train()(x).sum().backward()
    other = threading.Thread(target=lambda: model.eval()(x))
    other.start()
    other.join()
    optimizer.step()
    assert known(monitor.latest)["tanh"].n == 8 * 24


def test_between_observations_nothing_is_heard() -> None:
    model = Calling(torch.tanh)
    torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    depth = []
    model.layer.register_forward_hook(lambda *args: depth.append(len(_get_current_function_mode_stack())))
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).sum().backward()
        optimizer.step()
    assert depth == [1, 1, 1, 0, 1, 0, 0, 0]


def test_calls_can_be_chosen_and_switched_off() -> None:
    x = torch.randn(16, 8)
    assert [record.site for record in one_step(Nested(), x=x, include="blocks.*").records] == [name for name in NESTED if name.startswith("blocks")]
    assert [record.site for record in one_step(Nested(), x=x, exclude=["*/*", "sigmoid_?"]).records] == ["sigmoid", "act"]
    assert [record.site for record in one_step(Nested(), x=x, calls=False).records] == ["act"]
    with pytest.raises(TypeError, match=r"calls is 1; allowed are True .* and False"):
        torchsat.watch(Nested(), calls=1)  # type: ignore[arg-type]
    monitor = torchsat.watch(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), calls=False)
    assert monitor.coverage.unseen == (("1/softmax", "function calls are not heard (calls=False)"),)


def test_an_excluded_call_is_not_listed_as_unseen() -> None:
    model = Nested()
    monitor = torchsat.watch(model, exclude="*gelu*", errors="raise")
    model(torch.randn(16, 8)).sum().backward()
    assert monitor.coverage.unseen == ()


def test_training_is_bit_for_bit_the_same() -> None:
    def run(watched: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(1)
        model = Everything()
        if watched:
            torchsat.watch(model, every=2, errors="raise")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 5, 8)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()], torch.get_rng_state()

    plain, watched = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(plain[0], watched[0], strict=True))
    assert torch.equal(plain[1], watched[1])


def test_integers_and_meta_tensors_are_passed_over() -> None:
    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            torch.relu(torch.arange(3))
            torch.tanh(torch.empty(3, device="meta"))
            torch.tanh(torch.empty(0))
            return super().forward(x)

    snapshot = one_step(Net(F.selu), x=torch.randn(4, 16))
    assert [record.site for record in snapshot.records] == ["selu"]


def test_glu_has_a_gate() -> None:
    model = Calling(lambda z: F.glu(z, -1))
    x = torch.randn(64, 16)
    record = one_step(model, x=x)["glu"]
    value, z = model.layer(x).detach().double().chunk(2, -1)
    z.requires_grad_()
    gate = torch.sigmoid(z)
    gate.retain_grad()
    (value * gate).square().sum().backward()
    assert (record.activation, record.gate, record.kind, record.units) == ("sigmoid", True, "call", 12)
    assert record.z_std == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    assert record.derivative == pytest.approx((gate * (1 - gate)).mean().item(), rel=1e-5)
    assert record.grad_a_rms == pytest.approx(known(gate.grad).square().mean().sqrt().item(), rel=1e-5)
    assert record.grad_z_rms == pytest.approx(z.grad.square().mean().sqrt().item(), rel=1e-5)
    assert record.gate_right == (gate > 0.9).double().mean().item()
    module = nn.Sequential(model.layer, nn.GLU())
    same(one_step(module, x=x)["1/glu"], record)


def test_glu_over_channels_has_its_units_there() -> None:
    record = one_step(nn.Sequential(nn.Conv1d(3, 10, 3), nn.GLU(1)), x=torch.randn(4, 3, 9))["1/glu"]
    assert record.units == 5


def test_a_function_of_the_users_is_heard_where_it_is_decorated() -> None:
    @wrap_torch_function(lambda z: (z,))
    def snake(z: Tensor) -> Tensor:
        return z + torch.sin(z) ** 2

    def plain(z: Tensor) -> Tensor:
        return z + torch.sin(z) ** 2

    row = Activation("snake", calls=(snake,))
    x = torch.randn(32, 16)
    model = Calling(snake)
    check(one_step(model, x=x, activations=(*ACTIVATIONS, row))["snake"], truth(plain, model.layer(x)))
    with pytest.raises(ValueError, match=r"calls of plain cannot be heard\. Decorate it with @torch\.overrides\.wrap_torch_function"):
        Activation("snake", calls=(plain,))
    sine = Activation("sine", calls=(torch.sin,), derivative=torch.cos, peak=1.0)
    model = Calling(torch.sin)
    check(one_step(model, x=x, activations=(sine,))["sine"], truth(torch.sin, model.layer(x)))


def test_a_row_whose_defaults_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 defaults for the 2 parameters"):
        Activation("mine", parameters=("a", "b"), defaults=(1,))


def test_two_monitors_do_not_hear_each_other() -> None:
    model = nn.Sequential(Calling(F.silu), nn.Linear(24, 24), nn.Tanh())
    outer = nn.Sequential(model)
    monitors = [torchsat.watch(each, errors="raise") for each in (model, model[0], outer)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    outer(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    assert [monitor.coverage.seen for monitor in monitors] == [("0/silu", "2"), ("silu",), ("0.0/silu", "0.2")]
    inner, whole = known(monitors[0].latest), known(monitors[2].latest)
    for one, other in zip(inner, whole, strict=True):
        assert replace(one, site=f"0.{one.site}", after=other.after) == other


def test_our_arithmetic_is_hidden_from_modes_of_the_users() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(4, 6, 16)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        out: int = counter.get_total_flops()
        return out

    plain = count()
    monitor = torchsat.watch(model, errors="raise")
    assert count() == plain
    assert monitor.coverage.seen == ("self_attn/softmax", "relu")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_is_observed_eager_and_not_compiled_again(backend: str) -> None:
    runs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        runs.append(1)
        return graph.forward

    model = Nested()
    model.forward = torch.compile(model.forward, backend=counting)  # type: ignore[method-assign]
    monitor = torchsat.watch(model, every=2, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(12):
        model(torch.randn(16, 8)).sum().backward()
        optimizer.step()
    assert monitor.coverage.seen == tuple(NESTED)
    assert len(runs) == 1


def test_the_softmax_inside_a_gumbel_softmax_is_measured() -> None:
    """Its entropy is that of the probabilities it returns, and dL/dz that of the disturbed logits, with the numbers of autograd in float64."""

    class Net(nn.Module):
        def __init__(self, hard: bool) -> None:
            super().__init__()
            self.layer, self.last, self.hard = nn.Linear(4, 6), nn.Linear(6, 2), hard

        def forward(self, x: Tensor) -> Tensor:
            self.p = F.gumbel_softmax(self.layer(x), tau=0.7, hard=self.hard)
            out: Tensor = self.last(self.p)
            return out

    model, x = Net(hard=False), torch.randn(64, 4)
    record = one_step(model, x=x)["gumbel_softmax"]
    p = model.p.detach().double()
    assert (record.activation, record.kind) == ("softmax", "softmax")
    assert record.entropy == pytest.approx((-(p * p.log()).sum(-1).mean() / math.log(6)).item(), rel=1e-4)
    z = p.log().requires_grad_()
    a = z.softmax(-1)
    weight, bias = model.last.weight.detach().double(), model.last.bias.detach().double()
    (grad_a,) = torch.autograd.grad(F.linear(a, weight, bias).square().sum(), a, retain_graph=True)
    (grad_z,) = torch.autograd.grad(F.linear(a, weight, bias).square().sum(), z)
    assert record.attenuation == pytest.approx((grad_z.norm() / grad_a.norm()).item(), rel=1e-4)
    monitor = torchsat.watch(hard := Net(hard=True), errors="raise")
    hard(x).sum().backward()
    monitor.step()
    assert [place for place, _ in monitor.coverage.unseen] == ["gumbel_softmax"]


def test_a_function_in_a_loop_over_time_is_one_site_and_a_curve_in_each_layer_is_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.sin(layer(x))
            state = torch.zeros(())
            for at in range(5):
                state = 0.5 * state + torch.exp(x[:, at % 4])
            return state

    snapshot = one_step(Net(), x=torch.randn(16, 4))
    assert [(record.site, record.n, record.kind) for record in snapshot.records] == [
        *((site, 64, "call") for site in ("sin", "sin_1", "sin_2")),
        ("exp", 80, "function"),
    ]
    assert [record.after for record in snapshot.records] == [(), ("sin",), ("sin_1",), ("sin_2",)]


def test_functions_stand_beside_the_way_of_the_gradient() -> None:
    """What is behind a sigmoid that computes an output does not make it a hidden layer, and a square in front of a layer is no end of a path."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.sigmoid(self.last(F.relu(self.first(x)) ** 2))
            return out.log()

    snapshot = one_step(Net(), x=torch.randn(32, 4))
    assert [(r.site, r.output, r.gate) for r in snapshot.records] == [
        ("relu", False, False),
        ("square", False, False),
        ("sigmoid", True, False),
        ("log", False, False),
    ]
    assert snapshot["sigmoid"].after == ("relu",)
    assert snapshot["log"].after == ("sigmoid",)
    assert list(ways(snapshot)) == []
    for record in snapshot.records:
        if record.kind == "function":
            assert (record.saturated, record.stuck, record.blocked, record.relative_derivative) == (None, None, None, None)
            assert record.attenuation is not None


def test_a_swiglu_has_no_gate_and_a_glu_has_one() -> None:
    class Net(nn.Module):
        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.up, self.gate, self.down, self.act = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2), act

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
            return out

    for act, name, is_gate in ((F.silu, "silu", False), (F.gelu, "gelu", False), (F.relu, "relu", False), (torch.sigmoid, "sigmoid", True)):
        assert one_step(Net(act), x=torch.randn(16, 4))[name].gate == is_gate
