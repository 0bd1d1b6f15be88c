"""Function calls: what is heard, how it is named, and that listening changes nothing."""

import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, wrap_torch_function
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.test_taps import check, one_step, truth
from torchsat import ACTIVATIONS, Activation, Record
from torchsat.calls import uses_flex_attention
from torchsat.taps import Pass

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
"""Away from the defaults, as the module and as the call take them."""
SPELLINGS = [(row, call) for row in ACTIVATIONS for call in row.calls]


class Calling(nn.Module):
    """A layer, and a function called directly in the forward of the model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))  # type: ignore[no-any-return]


def same(first: Record, second: Record) -> None:
    """To the last digit, in all but the name and kind."""
    for each in fields(Record):
        if each.name not in ("site", "kind"):
            assert getattr(first, each.name) == getattr(second, each.name), each.name


@pytest.mark.parametrize(("row", "call"), SPELLINGS, ids=lambda value: getattr(value, "name", getattr(value, "__qualname__", "?")))
def test_every_call_shows_what_its_module_shows(row: Activation, call: Callable[..., Any]) -> None:
    arguments = ARGUMENTS.get(row.name, ())
    # In place torch computes the backward from the output, which rounds otherwise.
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
            return self.head(z)  # type: ignore[no-any-return]

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
    """No double count of nn.GELU; a module that runs twice has the same sites; a recompute adds nothing."""
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
            return checkpoint(self.block, x, use_reentrant=True)  # type: ignore[no-any-return]

    x = torch.randn(16, 8, requires_grad=True)
    plain = one_step(nn.Sequential(block), x=x)
    seen = one_step(Net(), x=x)
    for record in plain.records:
        other = seen[record.site.replace("0/", "block/")]
        assert [site.replace("0/", "block/") for site in record.after] == list(other.after)
        same(replace(record, output=False, after=()), replace(other, output=False, after=()))


def test_calls_outside_the_models_own_forward_are_seen_too() -> None:
    """A model whose parts are called one by one."""
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
    """Raises in the middle, or not."""

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
        # It ends a forward without calling any hook: the next contact takes the mode off.
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
    assert monitor.latest["tanh"].n == 8 * 24  # type: ignore[index]


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


class Everything(nn.Module):
    """Random numbers, attention, recurrence, in-place and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.rrelu(self.layer(x), training=True), 0.1)
        x = self.encoder(self.lstm(x)[0])
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        x = F.glu(x + F.gumbel_softmax(x, dim=-1))
        return F.log_softmax(self.head(F.elu_(x)), -1)


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


def test_a_frozen_encoder_keeps_its_fused_path() -> None:
    """Under a mode torch would leave it, and round otherwise."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval().requires_grad_(False)
    model = nn.Sequential(encoder, nn.Linear(32, 4), nn.Tanh())
    x = torch.randn(8, 20, 32)
    expected = model(x)
    monitor = torchsat.watch(model, errors="raise")
    output = model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert ("0", "it is frozen and in evaluation mode, where torch runs it as one kernel") in monitor.coverage.unseen


def test_what_is_compiled_is_neither_heard_nor_broken() -> None:
    inner = torch.compile(lambda x: torch.ops.aten.sigmoid(x) * 2, backend="aot_eager", fullgraph=True)

    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            return inner(torch.tanh(self.layer(x)))  # type: ignore[no-any-return]

    model = Net(torch.tanh)
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(4):
        model(torch.randn(8, 16)).sum().backward()
        optimizer.step()
    assert monitor.coverage.seen == ("tanh",)
    assert monitor.coverage.unseen == (("compiled", "a compiled function: what is fused in it runs no hook"),)


def test_what_torch_tells_no_hook_of_is_found_in_the_graph() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(torch.ops.aten.gelu(x + x.mean()))  # type: ignore[no-any-return,no-untyped-call]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hidden = nn.Linear(4, 4), Hidden()

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.relu(self.hidden(torch.ops.aten.tanh(self.layer(x)))).softmax(-1)

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(8, 4)).sum().backward()
    assert monitor.coverage.seen == ("softmax",)
    seen = dict(monitor.coverage.unseen)
    assert set(seen) == {"Tanh", "hidden/Gelu", "hidden/Double", "Relu"}
    assert seen["hidden/Double"] == "a custom autograd.Function: what it computes is not known"
    assert "torch.ops" in seen["Tanh"]


def test_what_is_heard_but_not_measured_is_listed() -> None:
    model = Everything()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(4, 5, 8)).sum().backward()
    assert monitor.coverage.unseen == (
        ("gumbel_softmax", "its logits are disturbed by random numbers inside"),
        ("log_softmax", "its derivative does not vanish: there is nothing to saturate"),
    )


def test_flex_attention_is_listed() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.layer(flex.flex_attention(x, x, x))  # type: ignore[no-any-return]

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(1, 1, 128, 16))
    assert dict(monitor.coverage.unseen)["flex_attention"].startswith("fused attention")


def test_integers_and_meta_tensors_are_passed_over() -> None:
    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            torch.relu(torch.arange(3))
            torch.tanh(torch.empty(3, device="meta"))
            torch.tanh(torch.empty(0))
            return super().forward(x)

    snapshot = one_step(Net(F.selu), x=torch.randn(4, 16))
    assert [record.site for record in snapshot.records] == ["selu"]


def test_a_call_that_cannot_be_measured_is_named_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            torch.tanh(torch.eye(3).to_sparse())
            return super().forward(x)

    model = Net(F.selu)
    monitor = torchsat.watch(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    assert monitor.coverage.seen == ("selu",)
    assert "sparse" in dict(monitor.coverage.unseen)["tanh"]
    assert len([message for message in caplog.messages if "tanh" in message]) == 1


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
    assert record.grad_a_rms == pytest.approx(gate.grad.square().mean().sqrt().item(), rel=1e-5)
    assert record.grad_z_rms == pytest.approx(z.grad.square().mean().sqrt().item(), rel=1e-5)
    assert record.gate_right == (gate > 0.9).double().mean().item()
    module = nn.Sequential(model.layer, nn.GLU())
    same(one_step(module, x=x)["1/glu"], record)


def test_glu_over_channels_has_its_units_there() -> None:
    record = one_step(nn.Sequential(nn.Conv1d(3, 10, 3), nn.GLU(1)), x=torch.randn(4, 3, 9))["1/glu"]
    assert record.units == 5


def test_a_sigmoid_that_multiplies_is_a_gate() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.down, self.up, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)
            self.hidden = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.hidden(self.conv(x))
            scale = torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))
            return torch.sigmoid(self.head((x * scale).mean((2, 3))))

    snapshot = one_step(SqueezeExcite(), x=torch.randn(4, 3, 6, 6))
    assert {record.site: (record.gate, record.output) for record in snapshot.records} == {
        "hidden": (False, False),
        "tanh": (False, False),
        "sigmoid": (True, False),
        "sigmoid_1": (False, True),
    }


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


def test_a_site_that_stops_is_said_once_and_forgotten_when_it_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    class Net(Calling):
        both = True

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return F.relu(z) + F.elu(z) if self.both else F.relu(z)

    model = Net(F.relu)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).sum().backward()
            optimizer.step()

    train(2)
    model.both = False
    train(4)
    assert monitor.coverage.unseen == ()
    train(4)
    assert monitor.coverage.unseen == (("elu", "it ran before, but not in the last 5 observations"),)
    assert caplog.messages == ["torchsat: step 6: elu ran before, but not in the last observations."]
    model.both = True
    train(1)
    assert monitor.coverage.unseen == ()


def test_softmax_without_a_derivative_writes_and_reads(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 1))
    monitor = torchsat.watch(model, tmp_path, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(4, 5, 8)).sum().backward()
    optimizer.step()
    monitor.close()
    (snapshot,) = torchsat.read(tmp_path)
    record, written = snapshot["1.self_attn/softmax"], monitor.latest["1.self_attn/softmax"]  # type: ignore[index]
    assert (record.kind, record.tails, record.saturated, record.derivative, record.peak, record.histogram) == ("softmax", "unknown", *[None] * 4)
    assert record.heads is not None
    assert written.heads is not None
    assert [head.rows for head in record.heads] == [20, 20]
    assert record.heads[1].entropy == pytest.approx(written.heads[1].entropy)
    assert record.entropy_min == pytest.approx(min(head.entropy for head in written.heads))
    assert record.log_keys == pytest.approx(math.log(5))


def test_a_compiled_model_with_flex_attention_is_not_run_eager(caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo import eval_frame
    from torch.nn.attention.flex_attention import flex_attention

    compiled_flex = torch.compile(flex_attention, backend="eager")

    def attend(q: Tensor) -> Tensor:
        return compiled_flex(q, q, q)  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(attend(x)))

    assert uses_flex_attention(Net())
    assert not uses_flex_attention(Everything())
    model = Net()
    monitor = torchsat.watch(model, every=1, errors="raise")
    assert eval_frame._stance.stance == "default"
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            compiled(torch.randn(1, 1, 128, 16)).sum().backward()
            optimizer.step()
            assert eval_frame._stance.stance == "default"
    (message,) = [message for message in caplog.messages if message.startswith("torchsat")]
    assert "flex_attention" in message
    assert monitor.coverage.unseen[0][0] == "(model)"


def test_two_monitors_do_not_hear_each_other() -> None:
    model = nn.Sequential(Calling(F.silu), nn.Linear(24, 24), nn.Tanh())
    monitors = [torchsat.watch(model, errors="raise"), torchsat.watch(model[0], errors="raise"), torchsat.watch(model, errors="raise")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    assert [monitor.coverage.seen for monitor in monitors] == [("0/silu", "2"), ("silu",), ("0/silu", "2")]
    assert monitors[0].latest == replace(monitors[2].latest, time=monitors[0].latest.time)  # type: ignore[type-var,union-attr]


def test_our_arithmetic_is_hidden_from_modes_of_the_users() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(4, 6, 16)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    plain = count()
    monitor = torchsat.watch(model, errors="raise")
    assert count() == plain
    assert monitor.coverage.seen == ("self_attn/softmax", "relu")


def test_a_model_that_calls_itself_is_one_pass() -> None:
    class Recursive(Calling):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            x = F.relu(self.layer(x))
            return torch.sigmoid(x if depth == 0 else self(x, depth - 1))

    model = Recursive()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(8, 16)).sum().backward()
    monitor.step()
    monitor.flush()
    assert {record.site: (record.n, record.grad_n) for record in monitor.latest.records} == {  # type: ignore[union-attr]
        "relu": (4 * 128, 4 * 128),
        "sigmoid": (4 * 128, 4 * 128),
    }
    assert monitor.coverage.unseen == ()


def test_a_backbone_in_inference_mode_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                features = torch.tanh(self.backbone(x))
            return self.head(features.clone())  # type: ignore[no-any-return]

    snapshot = one_step(Net(), x=torch.randn(8, 4))
    assert [(record.site, record.n, record.grad_n) for record in snapshot.records] == [("backbone.1", 32, 0), ("tanh", 32, 0)]


def test_another_thread_is_not_mixed_in_even_with_gradients() -> None:
    model = Calling(torch.tanh)
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(8, 16)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            model(torch.randn(3, 16))

    for _ in range(3):
        model(x).sum().backward()
        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(20):
            model(x)
        stop.set()
        thread.join()
        stop.clear()
        monitor.step()
        monitor.flush()
        assert monitor.latest["tanh"].n == 21 * 8 * 24  # type: ignore[index]
    assert monitor.coverage.seen == ("tanh",)


def test_odd_attention_calls_end_nothing() -> None:
    class Net(nn.Module):
        keys = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            torch.tensor(1.0).softmax(0)
            return x + F.scaled_dot_product_attention(x, x[:, :, : self.keys], x[:, :, : self.keys])

    model = Net()
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(2, 2, 5, 8)
    model(x).sum().backward()
    monitor.step()
    model.keys = 5
    model(x).sum().backward()
    monitor.step()
    monitor.flush()
    assert monitor.latest["softmax_1"].heads[0].rows == 10  # type: ignore[index]


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


def test_softmax_has_a_gradient_and_softmin_a_sign() -> None:
    x = torch.randn(32, 16)
    model = Calling(lambda z: torch.softmax(z, -1))
    record = one_step(model, x=x)["softmax"]
    z = model.layer(x).detach().double().requires_grad_()
    p = torch.softmax(z, -1)
    (grad_z,) = torch.autograd.grad(p.square().sum(), z)
    assert record.grad_z_rms == pytest.approx(grad_z.square().mean().sqrt().item(), rel=1e-5)
    assert record.grad_a_rms == pytest.approx((2 * p).square().mean().sqrt().item(), rel=1e-5)
    assert record.attenuation == pytest.approx((grad_z.norm() / (2 * p).norm()).item(), rel=1e-5)
    assert record.jacobian == pytest.approx((1 - p.square().sum(-1)).mean().item(), rel=1e-5)
    negative = Calling(lambda z: F.softmin(z, -1))
    negative.layer = model.layer
    assert one_step(negative, x=x)["softmax"].z_max == pytest.approx(-z.min().item(), rel=1e-6)


def test_a_map_with_four_axes_has_no_heads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
            return ((q @ k.transpose(-1, -2)) / 2 + 0.1).softmax(-1)  # type: ignore[no-any-return]

    heat = one_step(nn.Sequential(nn.Conv2d(1, 8, 1), nn.Softmax(-1)), x=torch.randn(4, 1, 5, 6))["1/softmax"]
    assert (len(heat.heads), heat.heads[0].rows) == (1, 4 * 8 * 5)  # type: ignore[arg-type,index]
    assert len(one_step(Attention(), x=torch.randn(4, 5, 8))["softmax"].heads) == 2  # type: ignore[arg-type]


def test_passes_that_are_thrown_away_take_their_heads_with_them() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    x = torch.randn(4, 6, 16)
    plain = one_step(model, x=x)["self_attn/softmax"]
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(20 * x).square().sum().backward()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert monitor.latest["self_attn/softmax"].heads == plain.heads  # type: ignore[index]
    current = Pass()
    heads = torch.tensor([[2.0], [1.0], [1.0], [1.0], [1.0], [-4.0]])
    current.add(current.heads, "a", heads.clone())
    current.keep_where(torch.tensor(False))
    current.add(current.heads, "a", heads)
    assert torch.equal(current.heads["a"], heads)


def test_gates_of_parts_called_one_by_one_and_products_that_are_none() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.scale = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x) * torch.sigmoid(self.scale(x))  # type: ignore[no-any-return]

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.layer(x))
            return h * torch.rsqrt((h * h).mean(-1, keepdim=True)) * self.gain.exp()

    x = torch.randn(16, 8)
    parts = nn.ModuleDict({"gate": Gate(), "head": nn.Linear(8, 1)})
    assert one_step(parts, lambda m: m["head"](m["gate"](x)))["gate/sigmoid"].gate
    assert not one_step(nn.Sequential(Norm(), nn.Linear(8, 1)), x=x)["0/sigmoid"].gate


def test_a_call_that_comes_late_is_decided_then() -> None:
    class Net(Calling):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(torch.tanh(self.layer(x)))
            return torch.sigmoid(x) if self.late else x

    model = Net(torch.tanh)
    model.layer = nn.Linear(16, 16)
    monitor = torchsat.watch(model, every=1, errors="raise")
    for step in range(4):
        model.late = step > 0
        model(torch.randn(8, 16)).sum().backward()
        monitor.step()
    monitor.flush()
    assert {record.site: record.output for record in monitor.latest.records} == {"tanh": False, "sigmoid": True}  # type: ignore[union-attr]


def test_what_comes_into_the_model_is_not_the_models() -> None:
    backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sigmoid())
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    monitor = torchsat.watch(head, errors="raise")
    head(backbone(torch.randn(4, 8))).sum().backward()
    assert monitor.coverage.unseen == ()
    assert monitor.coverage.seen == ("1",)


def test_flex_attention_is_found_however_it_is_written() -> None:
    import torch.nn.attention.flex_attention as fa

    class Dotted(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(lambda: torch.nn.attention.flex_attention.flex_attention(q, q, q))  # type: ignore[no-any-return]

    class Aliased(nn.Module):
        @staticmethod
        def attend(q: Tensor) -> Tensor:
            return fa.flex_attention(q, q, q)  # type: ignore[return-value]

        def forward(self, q: Tensor) -> Tensor:
            return self.attend(q)

    assert uses_flex_attention(Dotted())
    assert uses_flex_attention(Aliased())


def test_a_tensor_whose_history_cannot_be_had_raises_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            a, _ = z.unbind(1)[0:2]
            with torch.no_grad():
                z.mul_(2)
                torch.tanh(a)
            return self.layer(x)  # type: ignore[no-any-return]

    model = Net()
    monitor = torchsat.watch(model)
    model(torch.randn(3, 4)).sum().backward()
    monitor.step()


def test_a_deep_graph_is_not_walked_to_death() -> None:
    """Nodes that Python has seen are freed one inside the other: a walk over 60,000 of them overflows the stack."""
    code = """
import torch, torchsat, torch.nn.functional as F
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, x):
        x = self.layer(x)
        for _ in range(2500):
            for _ in range(20):
                x = x + 1
            x = torch.tanh(x)
        return x
torch.set_num_threads(1)
model = Net()
monitor = torchsat.watch(model, sample=16, errors="raise")
model(torch.randn(2, 4)).sum().backward()
monitor.step()
assert any("its graph has more than" in reason for _, reason in monitor.coverage.unseen), monitor.coverage
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
