"""What the hooks read, under all that people do to modules and passes."""

import copy
import io
import math
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.test_activations import MODULES
from torchsat import Activation, Snapshot
from torchsat.replay import rnn_gates


def one_step(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor] | None = None,
    x: Tensor | None = None,
    **options: object,
) -> Snapshot:
    """The snapshot of one step of SGD with learning rate 0 on the sum of squares of the output."""
    monitor = torchsat.watch(model, errors="raise", **options)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.0)
    output = forward(model) if forward else model(x)
    loss = output.square().sum()
    if loss.requires_grad:
        loss.backward()
    if parameters:
        optimizer.step()
    else:
        monitor.step()
    monitor.close()
    assert monitor.latest is not None
    return monitor.latest


def truth(f: Callable[[Tensor], Tensor], z: Tensor) -> dict[str, float]:
    """What one activation f at z must show for loss = sum of squares of f(z), by plain autograd."""
    z = z.detach().double().requires_grad_()
    a = f(z)
    (slope,) = torch.autograd.grad(a.sum(), z, retain_graph=True)
    (grad_z,) = torch.autograd.grad(a.square().sum(), z)
    grad_a = 2 * a
    return {
        "n": z.numel(),
        "derivative": slope.abs().mean().item(),
        "derivative_rms": slope.square().mean().sqrt().item(),
        "z_mean": z.mean().item(),
        "z_std": z.std(correction=0).item(),
        "a_mean": a.mean().item(),
        "grad_a_rms": grad_a.square().mean().sqrt().item(),
        "grad_z_rms": grad_z.square().mean().sqrt().item(),
        "attenuation": (grad_z.norm() / grad_a.norm()).item(),
        "grad_n": z.numel(),
    }


def check(record: torchsat.Record, expected: dict[str, float], rel: float = 1e-5) -> None:
    for name, value in expected.items():
        assert getattr(record, name) == pytest.approx(value, rel=rel, abs=1e-7), name


FUNCTIONS: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (nn.Tanh(), torch.tanh),
    (nn.Softsign(), F.softsign),
    (nn.Tanhshrink(), F.tanhshrink),
    (nn.LogSigmoid(), F.logsigmoid),
    (nn.Hardsigmoid(), F.hardsigmoid),
    (nn.PReLU(init=0.3), lambda z: F.prelu(z, torch.tensor([0.3], dtype=z.dtype))),
    *((kind(), lambda z, kind=kind: kind()(z)) for kind in (nn.Mish, nn.GELU, nn.SELU, nn.CELU, nn.Softshrink, nn.Hardshrink, nn.Softplus)),
]
INPLACE = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish]


@pytest.mark.parametrize(("module", "function"), FUNCTIONS, ids=lambda value: type(value).__name__)
def test_forward_and_gradient_are_those_of_plain_autograd(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(32, 16)
    model = nn.Sequential(nn.Linear(16, 16), module)
    check(one_step(model, x=x)["1"], truth(function, model[0](x)))


@pytest.mark.parametrize("kind", [*INPLACE, nn.Threshold], ids=lambda kind: kind.__name__)
def test_an_inplace_activation_is_read_before_it_overwrites_its_input(kind: type[nn.Module]) -> None:
    arguments = (0.2, 0.1) if kind is nn.Threshold else ()
    x = torch.randn(32, 16)
    model = nn.Sequential(nn.Linear(16, 16), kind(*arguments, inplace=True))
    z = model[0](x).detach()
    check(one_step(model, x=x)["1"], truth(kind(*arguments), z))


def test_rrelu_shows_the_slopes_that_were_drawn() -> None:
    model = nn.Sequential(nn.Linear(16, 512), nn.RReLU(inplace=True))
    x = torch.randn(256, 16)
    share = (model[0](x) > 0).float().mean().item()
    record = one_step(model, x=x, sample=None)["1"]
    # The negative side has the slopes U[1/8, 1/3]: E s = .22917, E s^2 = .056134.
    assert record.derivative == pytest.approx(share + (1 - share) * 0.22917, abs=0.001)
    assert record.derivative_rms**2 == pytest.approx(share + (1 - share) * 0.056134, abs=0.001)
    assert record.saturated == 0


def test_a_learned_prelu_is_read_per_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    model = Net()
    with torch.no_grad():
        model.act.weight.copy_(torch.tensor([0.5, 0.0, -2.0]))
    z = torch.randn(4, 3, 5, 5)
    record = one_step(model, x=z)["act"]
    check(record, {"derivative": torch.where(z > 0, 1.0, model.act.weight.detach().abs().reshape(1, 3, 1, 1).expand_as(z)).mean().item()})
    assert record.peak == 2.0
    # Only the channel whose slope is 0 is a ReLU and can saturate.
    assert record.saturated == pytest.approx((z[:, 1] <= 0).float().sum().item() / z.numel())


def test_attenuation_is_of_this_activation_alone_where_z_has_other_uses() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.sigmoid = nn.Linear(16, 16), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            return z * self.sigmoid(z)

    model, x = Swish(), torch.randn(64, 16)
    record = one_step(model, x=x)["sigmoid"]
    z = model.linear(x).detach().double()
    a = torch.sigmoid(z)
    grad_a = 2 * (z * a) * z
    grad_z = grad_a * a * (1 - a)
    assert record.attenuation == pytest.approx((grad_z.norm() / grad_a.norm()).item(), rel=1e-5)
    assert record.attenuation < 0.25


def test_a_module_called_twice_in_a_pass_is_one_site() -> None:
    act = nn.Tanh()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) + self.act(3 * x)

    x = torch.randn(8, 4, requires_grad=True)
    snapshot = one_step(Net(), x=x)
    assert [record.site for record in snapshot.records] == ["act"]
    check(snapshot["act"], {"n": 64, "grad_n": 64, "z_mean": (torch.cat([x, 3 * x]).mean()).item()})


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), act or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(8, 8), Block(act), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.Softsign(), nn.ReLU(inplace=True)], ids=repr)
def test_checkpointing_counts_once_and_still_sees_gradients(reentrant: bool, act: nn.Module) -> None:
    x, model = torch.randn(16, 8), Checkpointed(reentrant, act)
    expected = truth(lambda z: copy.deepcopy(act)(z.clone()), model.block.linear(model.first(x)))
    check(one_step(model, x=x)["block.act"], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_counted_once_where_the_root_is_bypassed(reentrant: bool) -> None:
    x, model = torch.randn(16, 8), Checkpointed(reentrant)
    expected = truth(torch.tanh, model.block.linear(model.first(x)))
    check(one_step(model, forward=lambda m: checkpoint(m.block, m.first(x), use_reentrant=reentrant))["block.act"], expected)


def test_micro_batches_merge_to_the_record_of_the_whole_batch() -> None:
    x = torch.randn(24, 8)

    def run(parts: int) -> torchsat.Record:
        torch.manual_seed(1)
        model = Block()
        monitor = torchsat.watch(model, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for part in x.chunk(parts):
            model(part).square().sum().backward()
        optimizer.step()
        monitor.close()
        return monitor.latest["act"]

    whole, split = run(1), run(6)
    for name in ("n", "grad_n", "saturated", "derivative", "z_std", "a_mean", "grad_a_rms", "grad_z_rms", "attenuation", "z_max"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-6), name


def test_evaluation_and_no_grad_passes_are_not_mixed_in() -> None:
    model, x = Block(), torch.randn(16, 8)
    monitor = torchsat.watch(model, errors="raise", every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model.eval()
        model(100 * x)
        with torch.no_grad():
            model(100 * x)
            model.train()
            model(100 * x)
        model(x).sum().backward()
        optimizer.step()
    monitor.close()
    assert monitor.latest["act"].n == 128
    check(monitor.latest["act"], {"z_mean": model.linear(x).mean().item()})


def test_frozen_parts_are_seen_without_gradient() -> None:
    model = nn.Sequential(Block(), Block())
    model[0].requires_grad_(False)
    snapshot = one_step(model, x=torch.randn(16, 8))
    frozen, trained = snapshot["0.act"], snapshot["1.act"]
    assert frozen.n == trained.n == 128
    assert frozen.attenuation is frozen.grad_z_rms is None
    assert frozen.grad_n == 0
    assert trained.attenuation > 0


def test_a_part_under_no_grad_inside_a_training_pass_is_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.trunk(x)
            return self.head(x)

    snapshot = one_step(Net(), x=torch.randn(16, 8))
    assert snapshot["trunk.act"].n == 128
    assert snapshot["trunk.act"].attenuation is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_measured_in_float32_from_the_low_precision_z(dtype: torch.dtype) -> None:
    model, x = Block(nn.Sigmoid()), torch.randn(64, 8) * 4

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    record = one_step(model, forward)["act"]
    with torch.autocast("cpu", dtype):
        z = model.linear(x)
    assert z.dtype == dtype
    sigmoid = torch.sigmoid(z.double())
    check(record, {"derivative": (sigmoid * (1 - sigmoid)).mean().item(), "z_std": z.double().std(correction=0).item()})
    assert record.attenuation == pytest.approx(record.derivative_rms, rel=0.2)


def test_keyword_arguments_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(8, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(input=self.linear(input=x))

    snapshot = one_step(Net(), x=torch.randn(4, 8))
    assert snapshot["act"].n == 32
    assert snapshot.weights[0].input_n == 32


@pytest.mark.parametrize("shape", [(), (7,), (4, 8), (2, 3, 8), (2, 8, 3, 3), (2, 8, 2, 3, 3)], ids=str)
def test_any_rank_is_measured(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    record = one_step(nn.Sequential(nn.Tanh()), x=z)["0"]
    check(record, truth(torch.tanh, z))
    # Documented: without a layer before it, the unit axis is 1 from rank 4 on, the last at rank 2 and 3, none below.
    assert record.units == (None if len(shape) < 2 else 8)
    assert not z._backward_hooks


def test_the_unit_axis_is_that_of_the_layer_before() -> None:
    def units(*layers: nn.Module, x: Tensor) -> int | None:
        return one_step(nn.Sequential(*layers), x=x).records[0].units

    assert units(nn.Linear(6, 5), nn.Tanh(), x=torch.randn(2, 3, 4, 6)) == 5
    assert units(nn.Linear(6, 5), nn.Tanh(), x=torch.randn(6)) == 5
    assert units(nn.Conv1d(6, 5, 1), nn.Tanh(), x=torch.randn(2, 6, 9)) == 5
    assert units(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), x=torch.randn(2, 6, 4, 4)) == 5
    assert units(nn.Conv2d(6, 5, 1), nn.ReLU(), x=torch.randn(6, 4, 4)) == 5
    assert units(nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), x=torch.randn(2, 6, 4, 4)) == 5


def test_channels_last_and_strided_inputs_give_the_same_record() -> None:
    z = torch.randn(4, 6, 5, 5)
    wide = torch.zeros(4, 6, 5, 10)
    wide[..., ::2] = z
    records = [
        one_step(nn.Sequential(nn.Tanh()), x=each.detach().requires_grad_())["0"]
        for each in (z, z.to(memory_format=torch.channels_last), wide[..., ::2], z.transpose(2, 3).contiguous().transpose(2, 3))
    ]
    for record in records[1:]:
        for name in ("n", "units", "derivative", "z_std", "attenuation", "grad_z_rms", "saturated"):
            assert getattr(record, name) == pytest.approx(getattr(records[0], name), rel=1e-9), name


def test_an_expanded_input_is_measured() -> None:
    z = torch.randn(4, 1).expand(4, 6)
    check(one_step(nn.Sequential(nn.Tanh()), x=z)["0"], {"n": 24, "z_mean": z.mean().item()})


def test_an_empty_batch_changes_nothing() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(0, 8)).sum().backward()
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert monitor.latest["act"].n == 24


def test_a_sample_is_said_to_be_one() -> None:
    record = one_step(nn.Sequential(nn.Linear(64, 64), nn.Tanh()), x=torch.randn(512, 64), sample=1000)["1"]
    assert record.elements == 512 * 64
    assert 900 <= record.n <= 1000
    assert record.grad_n == record.n


def test_outputs_of_the_model_are_told_from_hidden_sites() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()
            self.left, self.right, self.sigmoid, self.tanh = nn.Linear(8, 1), nn.Linear(8, 2), nn.Sigmoid(), nn.Tanh()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x)
            left = self.sigmoid(self.left(h)).squeeze(-1)
            return {"left": left, "right": self.tanh(self.right(h)), "hidden": F.linear(h, torch.eye(8, requires_grad=True))}

    snapshot = one_step(TwoHeads(), lambda m: sum(value.sum() for value in m(torch.randn(4, 8)).values()))
    assert {record.site: record.output for record in snapshot.records} == {"body.act": False, "sigmoid": True, "tanh": True}


def test_the_feeding_layers_are_found_along_the_flow_of_data() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.unused = nn.Linear(8, 8)
            self.conv2, self.norm, self.shortcut = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.norm(self.conv2(x)) + self.shortcut(x)).mean((2, 3)))

    weights = one_step(Residual(), x=torch.randn(2, 3, 6, 6)).weights
    assert {weight.name: weight.feeds for weight in weights} == {"conv2": ("act",), "shortcut": ("act",)}


def test_a_watched_model_is_pickled_and_copied_without_us() -> None:
    model = nn.Sequential(Block(), Block())
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    monitor = torchsat.watch(model, errors="raise")
    assert list(model.state_dict()) == list(reference)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"torchsat" not in buffer.getvalue()
    assert b"torchsat" not in pickle.dumps(model)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copies = [loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module]
    x = torch.randn(4, 8)
    for twin in copies:
        assert torch.equal(twin(x), model(x))
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = [each.rows["0.act"][0].item() for each in monitor._taps._passes if each.rows]
    for twin in copies:
        twin(x).sum().backward()
    assert [each.rows["0.act"][0].item() for each in monitor._taps._passes if each.rows] == seen
    optimizer.step()


def test_tracing_and_exporting_a_watched_model_is_not_disturbed() -> None:
    model, x = Block(), torch.randn(4, 8)
    plain = str(torch.jit.trace(copy.deepcopy(model), x).graph)
    torchsat.watch(model, every=1, errors="raise")
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.act._forward_hooks
    assert str(torch.jit.trace(model, x).graph).count("aten::") == plain.count("aten::")
    # Dynamo of torch 2.6, which strict export uses, breaks on a module hook of any kind.
    for strict in (False,) if torch.__version__ < "2.7" else (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert targets == [torch.ops.aten.linear.default, torch.ops.aten.tanh.default]


def test_a_site_that_fails_is_named_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4]

    model = nn.Sequential(Block(), Broken(), nn.Linear(4, 2), nn.Tanh())
    row = Activation("broken", (Broken,), derivative=torch.ones_like)
    monitor = torchsat.watch(model, activations=(*torchsat.ACTIVATIONS, row))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    monitor.close()
    assert [record.site for record in monitor.latest.records] == ["0.act", "3"]
    assert ("1", "TypeError: it maps (4, 8) to (4, 4)") in monitor.coverage.unseen
    assert [message for message in caplog.messages if "1:" in message] == [
        "torchsat: 1: TypeError: it maps (4, 8) to (4, 4); 1 is no longer watched. Training is not affected."
    ]


def test_what_cannot_be_measured_is_said() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.sigmoid(x) * x.mean()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.attention, self.own = nn.LSTM(8, 8), nn.GRU(8, 8), nn.MultiheadAttention(8, 2), Own()
            self.softmax, self.never, self.act = nn.Softmax(-1), nn.Tanh(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(self.own(self.act(self.lstm(x)[0])))

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    unseen = dict(monitor.coverage.unseen)
    assert monitor.coverage.seen == (*(f"lstm.l0/{gate}" for gate in ("input", "forget", "cell", "output", "hidden")), "act", "softmax/softmax")
    assert set(unseen) == {"gru", "attention/softmax", "own/Sigmoid", "never"}
    assert unseen["gru"] == unseen["never"] == unseen["attention/softmax"] == "it has not run in an observed training pass"
    assert unseen["own/Sigmoid"].startswith("called where no hook of torch is heard: in a compiled or scripted function, in torch.ops")
    assert monitor.coverage.kinds == (("recurrent", 5), ("module", 1), ("softmax", 1))
    assert str(monitor.coverage).startswith("7 sites (5 gates, 1 module, 1 softmax) seen; not seen, or seen in part:\n  own/Sigmoid: called")


def test_complex_and_integer_inputs_are_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Tanh())
    monitor = torchsat.watch(model)
    model(torch.randn(3, dtype=torch.complex64, requires_grad=True))
    assert monitor.coverage.unseen[0][0] == "0"
    assert "complex64" in monitor.coverage.unseen[0][1]


def test_a_torch_func_transform_is_passed_over() -> None:
    model, x = Block(), torch.randn(5, 8)
    monitor = torchsat.watch(model, errors="raise")
    out = torch.func.vmap(lambda row: torch.func.functional_call(model, dict(model.named_parameters()), (row,)))(x)
    assert torch.allclose(out, model(x))
    monitor.step()
    assert monitor.latest["act"].n == 40


@pytest.mark.parametrize("order", ["before_forward", "before_backward", "after_step"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pass_whose_gradient_was_thrown_away_is_forgotten(order: str, set_to_none: bool) -> None:
    model, x = Block(), torch.randn(16, 8)
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for scale in (50.0, 70.0, 1.0):
        if order == "before_forward":
            optimizer.zero_grad(set_to_none)
        loss = model(scale * x).sum()
        if order == "before_backward":
            optimizer.zero_grad(set_to_none)
        loss.backward()
        if scale == 1.0:
            optimizer.step()
        if order == "after_step":
            optimizer.zero_grad(set_to_none)
    check(monitor.latest["act"], {"n": 128, "grad_n": 128, "z_mean": model.linear(x).mean().item()})
    assert monitor.latest.weights[0].input_n == 128
    assert monitor.latest.weights[0].input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
    assert monitor._taps.sites["act"].block[0].tolist() == [16.0] * 8


def test_two_passes_of_one_backward_both_count() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one, other = model(torch.randn(16, 8)), model(torch.randn(4, 8))
    (one.sum() + other.sum()).backward()
    optimizer.step()
    assert (monitor.latest["act"].n, monitor.latest["act"].grad_n) == (160, 160)


def test_a_gradient_penalty_discards_nothing() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (model(torch.randn(4, 8)).mean() + slope.square().mean()).backward()
    optimizer.step()
    assert monitor.latest["act"].n == 96


def test_a_forward_that_raised_is_forgotten() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(), nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            h = self.block(x)
            if len(x) > 50:
                raise torch.cuda.OutOfMemoryError("too large")
            return self.head(h)

    model = Fails()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model(torch.randn(100, 8))
    model(torch.randn(8, 8)).sum().backward()
    optimizer.step()
    assert monitor.latest["block.act"].n == 64
    assert {record.site: record.output for record in monitor.latest.records} == {"block.act": False, "head.1": True}


def test_another_threads_inference_is_not_mixed_in() -> None:
    model, x = Block(), torch.randn(16, 8)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inside, go_on = threading.Event(), threading.Event()

    def pause(module: nn.Module, args: object) -> None:
        if threading.current_thread() is threading.main_thread():
            inside.set()
            assert go_on.wait(20)

    def infer() -> None:
        assert inside.wait(20)
        with torch.no_grad():
            model(torch.randn(500, 8))
        go_on.set()

    model.act.register_forward_pre_hook(pause)
    thread = threading.Thread(target=infer)
    thread.start()
    model(x).sum().backward()
    thread.join()
    optimizer.step()
    check(monitor.latest["act"], {"n": 128, "grad_n": 128, "z_mean": model.linear(x).mean().item()})


def test_an_inplace_activation_on_a_view() -> None:
    class Net(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.conv, self.act, self.whole = nn.Conv2d(1, 2, 3), nn.SiLU(inplace=True), whole

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            if self.whole:
                return self.act(h.flatten(1))
            self.act(h[:, :1])
            return h

    x = torch.randn(4, 1, 6, 6)
    for whole in (True, False):
        model = Net(whole)
        z = model.conv(x).flatten(1) if whole else model.conv(x)[:, :1]
        expected = truth(F.silu, z)
        monitor = torchsat.watch(model, errors="raise")
        model(x).square().sum().backward()
        monitor.step()
        if not whole:
            assert "in-place activation on a part of a tensor" in dict(monitor.coverage.unseen)["act"]
            for name in ("grad_a_rms", "grad_z_rms", "attenuation", "grad_n"):
                del expected[name]
                assert not getattr(monitor.latest["act"], name)
        check(monitor.latest["act"], expected)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_no_tensor_outlives_its_pass(module: nn.Module) -> None:
    alive: list[weakref.ReferenceType[Tensor]] = []
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(module).float().train())
    model[1].register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert [reference() for reference in alive] == [None] * 3
    assert monitor.latest.step == 2


def test_hooks_never_wait_for_the_device() -> None:
    """On a CPU: no operator that a GPU would have to be waited for runs in a step."""

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None) -> object:
            assert not any(name in str(func) for name in ("_local_scalar_dense", "aten.nonzero", "masked_select", "unique", "bincount"))
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 8), nn.PReLU(), nn.Softsign())
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 1, 6, 6)
    for _ in range(3):
        with NoWaiting():
            model(x).square().sum().backward()
            optimizer.step()
    assert monitor.latest.step == 2


def test_a_shared_activation_knows_every_layer_that_feeds_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head, self.act = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 1), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(layer(x))
            return self.act(self.head(x))

    snapshot = one_step(Shared(), x=torch.randn(4, 8))
    assert [weight.name for weight in snapshot.weights] == ["layers.0", "layers.1", "layers.2", "head"]
    # It makes the output, but hidden layers too: it is judged.
    assert snapshot["act"].output is False


def test_hidden_features_that_are_also_returned_stay_hidden() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Block(), nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.head(h), h

    snapshot = one_step(Features(), lambda m: m(torch.randn(4, 8))[0])
    assert {record.site: record.output for record in snapshot.records} == {"body.act": False, "head.1": True}


def test_outputs_are_found_where_the_root_is_never_called() -> None:
    model = nn.ModuleDict({"encoder": Block(), "head": nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())})
    snapshot = one_step(model, lambda m: m["head"](m["encoder"](torch.randn(4, 8))))
    assert {record.site: record.output for record in snapshot.records} == {"encoder.act": False, "head.1": True}


def test_a_model_that_grows_is_looked_at_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    monitor = torchsat.watch(model, every=1, errors="raise")
    for width in (8, 5):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert [record.output for record in monitor.latest.records] == ([True] if width == 8 else [False, True])
        model.append(nn.Linear(8, 5))
        model.append(nn.Sigmoid())
        if width == 8:
            optimizer.step()
    assert monitor.latest["3"].units == 5


def test_recurrent_gates_are_sites() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell, self.head = nn.LSTM(6, 7, 2, dropout=0.3), nn.GRUCell(7, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = None
            for step in self.rnn(x)[0]:
                h = self.cell(step, h)
            return self.head(h)

    model, x = Net(), 3 * torch.randn(5, 3, 6)
    state = torch.get_rng_state()
    plain = model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    snapshot = one_step(model, forward=lambda m: m(x))
    assert torch.equal(torch.get_rng_state(), after)
    gates = ("input", "forget", "cell", "output", "hidden")
    expected = [f"rnn.l{k}/{gate}" for k in (0, 1) for gate in gates] + [f"cell/{gate}" for gate in ("reset", "update", "new")]
    assert [record.site for record in snapshot.records] == expected
    assert plain.shape == (3, 1)
    forget = snapshot["rnn.l0/forget"]
    z = next(gate.z for gate in rnn_gates(model.rnn, x, None, state) if gate.name == "forget")
    values = torch.sigmoid(z.double())
    check(forget, {"n": 105, "z_std": z.std(correction=0).item(), "derivative": (values * (1 - values)).mean().item()})
    assert forget.gate_left == pytest.approx((values < 0.1).double().mean().item())
    assert forget.gate_right == pytest.approx((values > 0.9).double().mean().item())
    assert (forget.gate, forget.units, forget.attenuation) == (True, 7, None)
    assert (snapshot["rnn.l0/cell"].gate, snapshot["rnn.l0/hidden"].gate, snapshot["rnn.l0/cell"].gate_left) == (True, True, None)
    assert one_step(nn.RNN(6, 7), lambda m: m(x)[0])["rnn.l0/hidden"].gate is False
    weights = {weight.name: weight for weight in snapshot.weights}
    first, second = weights["rnn.weight_ih_l0"], weights["rnn.weight_hh_l1"]
    assert first.feeds == tuple(f"rnn.l0/{gate}" for gate in gates)
    assert (first.fan_in, first.data, second.fan_in, second.data) == (6, True, 7, False)
    assert first.input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    assert second.gain == pytest.approx(model.rnn.weight_hh_l1.norm().item() / 28**0.5, rel=1e-5)
    assert second.input_rms is None


class NewGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


class QuickGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(1.702 * z)


class Squared(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z).square()


class Swish(nn.Module):
    """With parameters for the features of the last axis."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.linspace(0.5, 2, size))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


class ChannelSwish(Swish):
    """With parameters for the channels of the second axis."""

    def forward(self, z: Tensor) -> Tensor:
        beta = self.beta.reshape(-1, *[1] * (z.ndim - 2)) if z.ndim > 1 else self.beta
        return z * torch.sigmoid(beta * z)


class Custom(torch.autograd.Function):
    """tanh, with a backward of its own and no forward mode."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(z) ** 2)


class Fused(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return Custom.apply(z)  # type: ignore[no-any-return,no-untyped-call]


class Counting(nn.Module):
    """In place, and it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z.clamp_(-2, 2)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, z: Tensor) -> Tensor:
        return z / z.square().mean(-1, keepdim=True).sqrt() * self.weight


class Noise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z) + torch.rand_like(z)


class Scale(Swish):
    def forward(self, z: Tensor) -> Tensor:
        return z * self.beta


class Two(nn.Module):
    def forward(self, z: Tensor, other: Tensor) -> Tensor:
        return torch.tanh(z) * other


class Snake(nn.Module):
    """As in vocoders: a parameter of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.linspace(0.5, 2, 6).reshape(1, 6, 1))

    def forward(self, z: Tensor) -> Tensor:
        return z + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * z) ** 2


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(1.3))
        self.seen: list[float] = []

    def forward(self, z: Tensor) -> Tensor:
        self.seen.append(float(z.detach().abs().max()) + random.random())
        return torch.sin(self.rate * z)


class DropPath(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.bernoulli(torch.full((len(z), *[1] * (z.ndim - 1)), 0.5))


class Steps(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cumsum(torch.tanh(z), -1)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (NewGELU(), "gelu"),
        (QuickGELU(), "quick_gelu"),
        (Squared(), "squared_relu"),
        (Fused(), "tanh"),
        (Counting(), "Counting"),
        (Swish(5), "Swish"),
        (ChannelSwish(), "ChannelSwish"),
        (Snake(), "Snake"),
        (Buffered(), "Buffered"),
        (Noise(), "Noise"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_an_activation_of_the_users_own_is_found_from_what_it_does(module: nn.Module, name: str) -> None:
    """Without running it once more than the model does."""
    model = nn.Sequential(nn.Conv1d(3, 6, 1), copy.deepcopy(module))
    x = 3 * torch.randn(16, 3, 5)
    random.seed(3)
    snapshot = one_step(model, x=x)
    assert [(record.site, record.activation, record.kind, record.units) for record in snapshot.records] == [("1", name, "module", 6)]
    record = snapshot["1"]
    assert random.random() == (random.seed(3), random.random(), random.random())[isinstance(module, Buffered) + 1]
    if isinstance(module, (Counting, Buffered)):
        assert (model[1].calls if isinstance(module, Counting) else len(model[1].seen)) == 1
    z = model[0](x).detach().double().requires_grad_()
    torch.manual_seed(0)
    a = copy.deepcopy(module).double()(z.clone())
    (slope,) = torch.autograd.grad(a.sum(), z, retain_graph=True)
    assert record.derivative == pytest.approx(slope.abs().mean().item(), rel=1e-5)
    assert record.derivative_rms == pytest.approx(slope.square().mean().sqrt().item(), rel=1e-5)
    assert record.z_std == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    if not isinstance(module, Noise):
        (grad_z,) = torch.autograd.grad(a.square().sum(), z)
        assert record.grad_z_rms == pytest.approx(grad_z.square().mean().sqrt().item(), rel=1e-5)
    assert (record.saturated is None) == (name[0].isupper() or name == "squared_relu")


@pytest.mark.parametrize("module", [RMSNorm(), Scale(6), DropPath(), Steps(), nn.Dropout()], ids=lambda module: type(module).__name__)
def test_what_is_no_activation_is_no_site(module: nn.Module) -> None:
    snapshot = one_step(nn.Sequential(nn.Linear(3, 6), module, nn.Linear(6, 6), nn.Tanh()), x=torch.randn(32, 3))
    assert [record.site for record in snapshot.records] == (["1/tanh", "3"] if isinstance(module, Steps) else ["3"])


def test_a_module_that_changes_what_it_computes_is_not_taken_for_what_it_was() -> None:
    class Annealed(nn.Module):
        beta = 1.0

        def forward(self, z: Tensor) -> Tensor:
            return torch.tanh(self.beta * z)

    model = nn.Sequential(nn.Linear(4, 6), Annealed())
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(32, 4)
    seen = []
    for beta in (1.0, 1.0, 10.0, 10.0):
        model[1].beta = beta
        model(x).sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.latest is not None
        seen.append(monitor.latest["1"])
    z = model[0](x).detach().double()
    assert [record.activation for record in seen] == ["tanh", "tanh", "Annealed", "Annealed"]
    assert seen[1].derivative == pytest.approx((1 - z.tanh() ** 2).mean().item(), rel=1e-5)
    assert seen[2].derivative == seen[3].derivative == pytest.approx((10 * (1 - (10 * z).tanh() ** 2)).mean().item(), rel=1e-5)
    assert (seen[2].peak, seen[2].saturated) == (None, None)


def test_a_function_that_is_called_inside_an_own_activation_is_no_second_site() -> None:
    model = nn.Sequential(nn.Linear(4, 6), NewGELU(), nn.Linear(6, 6), Swish())
    monitor = torchsat.watch(model, every=1, errors="raise")
    for _ in range(3):
        model(torch.randn(32, 4)).sum().backward()
        monitor.step()
        assert monitor.coverage.seen == ("1", "3")
        assert monitor.coverage.unseen == ()


def test_an_own_activation_in_a_checkpoint_is_found_or_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.known, self.other = nn.Linear(4, 6), NewGELU(), Squashed()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.other(self.known(self.layer(x))), x, use_reentrant=False)  # type: ignore[no-any-return]

    class Squashed(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z * torch.erf(z)

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(32, 4)).sum().backward()
    assert monitor.coverage.seen == ("known",)
    assert [place for place, _ in monitor.coverage.unseen] == ["other"]


def test_learned_parameters_are_read_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 6), Swish())
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(8, 4)
    for beta in (1.0, 0.0):
        model[1].weight = nn.Parameter(torch.full((6,), beta))
        model[3].beta = nn.Parameter(torch.full((6,), beta))
        model(x).sum().backward()
        monitor.step()
    # With beta = 0 it is z / 2.
    assert monitor.latest is not None
    assert monitor.latest["3"].derivative == pytest.approx(0.5)
    assert monitor.latest["1"].derivative == pytest.approx((model[0](x) > 0).double().mean().item())


def test_a_weight_that_dies_leaves_its_address_to_no_other() -> None:
    """FSDP2 puts others in its place; a bias at the old address must not be taken for the layer."""
    taps = torchsat.watch(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))._taps
    weight = nn.Parameter(torch.randn(2, 2))
    key = id(weight)
    taps._know(weight, "layer")
    assert taps._weights[key] == "layer"
    del weight
    assert key not in taps._weights
