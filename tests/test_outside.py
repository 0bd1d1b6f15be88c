"""A model that is used by its methods, or part by part: functions between the parts are heard, and nothing else changes."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.training import loop_of
from tests.truth import check, known, one_step, same, truth
from torchsat import internals


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the same process may have used torch.compile, beside which the mode is not opened."""
    monkeypatch.setattr(internals, "compiles", lambda: False)


class Auto(nn.Module):
    """An autoencoder that has a method for each part. All its modules are plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.m, self.d, self.o = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(2, 16), nn.Linear(16, 8)

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.m(F.relu(self.e(x)))
        return out

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.o(torch.tanh(self.d(z))))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.enable_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        yield self.forward(x)


def in_script(m: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(m.o(torch.tanh(m.d(m.m(F.relu(m.e(x)))))))


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "forward": lambda m, x: m.forward(x),
    "methods": lambda m, x: m.decode(m.encode(x)),
    "a decorated method": lambda m, x: m.decorated(x),
    "a generator": lambda m, x: sum(m.steps(x)),
    "a script": in_script,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_use_a_model_shows_what_a_call_shows(way: str) -> None:
    model, x = Auto(), torch.rand(32, 8)
    called, used = one_step(model, x=x), one_step(model, lambda m: WAYS[way](m, x))
    assert [record.site for record in used.records] == ["relu", "tanh", "sigmoid"]
    assert [record.output for record in used.records] == [False, False, True]
    for record in called.records:
        other = used[record.site]
        same(replace(record, after=(), last=False), replace(other, after=(), last=False))
        assert way == "methods" or (record.after, record.last) == (other.after, other.last)
    with torch.no_grad():
        z = model.d(model.encode(x))
    assert used["tanh"].derivative == pytest.approx((1 - z.double().tanh() ** 2).mean().item(), rel=1e-6)


def test_a_function_after_the_last_part_has_its_gradients() -> None:
    model, x = Auto(), torch.rand(32, 8)
    check(one_step(model, lambda m: torch.tanh(m.e(x)))["tanh"], truth(torch.tanh, model.e(x)))


def train(model: nn.Module, use: Callable[[Any, Tensor], Tensor], watched: bool = True) -> tuple[list[float], Tensor, list[list[str]], Any]:
    """Losses, random state, the names of the sites in each observation and the monitor, after four steps."""
    torch.manual_seed(1)
    names: list[list[str]] = []
    monitor = None
    if watched:
        monitor = torchsat.watch(
            model, every=1, budget=None, errors="raise", sinks=(lambda snapshot: names.append([record.site for record in snapshot.records]),)
        )
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = use(model, torch.rand(16, 8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if monitor is not None:
        monitor.close()
    return losses, torch.get_rng_state(), names, monitor


def mean(way: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: WAYS[way](m, x).square().mean()


def dropping(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.forward(x), 0.3).square().mean()


def rerun(m: Any, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(lambda x: F.relu(m.e(x)), x, use_reentrant=False)
    return out.square().mean()


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (mean("methods"), ["relu", "tanh", "sigmoid"]),
        (mean("a script"), ["relu", "tanh", "sigmoid"]),
        (lambda m, x: mean("forward")(m, x) + mean("forward")(m, x / 2), ["relu", "tanh", "sigmoid"]),
        (dropping, ["relu", "tanh", "sigmoid"]),
        (rerun, ["relu"]),
    ],
)
def test_training_is_bit_for_bit_the_same_and_names_stay(use: Callable[[Any, Tensor], Tensor], names: list[str]) -> None:
    torch.manual_seed(0)
    plain, watched = Auto(), Auto()
    watched.load_state_dict(plain.state_dict())
    expected, seen = train(plain, use, watched=False), train(watched, use)
    assert seen[0] == expected[0]
    assert torch.equal(seen[1], expected[1])
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters(), strict=True))
    assert seen[2] == [names] * 4
    assert seen[3].coverage.unseen == ()
    assert seen[3].alerts == ()


def test_what_does_not_depend_on_the_model_is_not_heard() -> None:
    """Data preparation, another model, the loss module of a script, and what runs without gradients."""
    other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    class Loss(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return F.softplus(F.silu(a)).mean()

    loss = Loss()

    def use(m: Any, x: Tensor) -> Tensor:
        h = m.e(torch.tanh(other(torch.sigmoid(x))))
        with torch.no_grad():
            torch.selu(h)
        out: Tensor = loss(m.o(F.relu(h))) + torch.sigmoid(other(x)).mean() + torch.tanh(torch.randn(3)).mean()
        return out

    _, _, names, monitor = train(Auto(), use)
    assert names == [["relu"]] * 4
    assert monitor.coverage.unseen == ()


def test_functions_that_a_script_calls_after_a_method_are_its_loss() -> None:
    _, _, names, _ = train(Auto(), lambda m, x: F.softplus(m.encode(x)).mean())
    assert names == [["relu"]] * 4


def test_a_method_of_a_part_names_its_calls_after_the_part() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto, self.head = Auto(), nn.Linear(8, 4)

        def loss(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(self.auto.decode(self.auto.encode(x))))

        def forward(self, x: Tensor) -> Tensor:
            return self.loss(x)

    model, x = Net(), torch.rand(4, 8)
    called = [record.site for record in one_step(model, x=x).records]
    assert [record.site for record in one_step(model, lambda m: m.loss(x)).records] == called == ["relu", "tanh", "sigmoid", "tanh_1"]
    assert [record.site for record in one_step(model, lambda m: m.auto.encode(x)).records] == ["auto/relu"]


def test_activations_between_parts_that_no_hook_hears_are_named() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.m(torch.sin(torch.ops.aten.tanh(m.e(torch.ops.aten.relu(x.requires_grad_())))))
        return out.mean()

    _, _, _, monitor = train(Auto(), use)
    assert {place for place, _ in monitor.coverage.unseen} == {"Tanh"}
    assert "sin" in monitor.coverage.seen


class Mine(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_no_mode_is_opened_above_one_of_the_users_or_beside_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        with Mine():
            h = m.e(x)
        assert _get_current_function_mode_stack() == []
        out: Tensor = m.m(F.relu(h))
        return out.mean()

    _, _, names, monitor = train(Auto(), use)
    assert names == []
    assert [place for place, _ in monitor.coverage.unseen] == ["(model)", "Relu"]
    assert "not heard" in dict(monitor.coverage.unseen)["(model)"]
    monkeypatch.setattr(internals, "compiles", lambda: True)
    _, _, names, monitor = train(Auto(), mean("methods"))
    assert names == []
    assert {"(model)", "Relu", "Tanh"} <= dict(monitor.coverage.unseen).keys()


def test_compiled_code_in_the_process_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.compiler.reset()
    assert not internals.compiles()
    torch.compile(torch.tanh, backend="eager")
    assert internals.compiles()
    torch.compiler.reset()


def test_the_default_device_is_no_mode_of_the_users() -> None:
    torch.set_default_device("cpu")
    try:
        _, _, names, _ = train(Auto(), mean("methods"))
    finally:
        torch.set_default_device(None)
    assert names == [["relu", "tanh", "sigmoid"]] * 4


def test_another_model_keeps_its_fused_inference() -> None:
    teacher = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.rand(4, 5, 8)
    with torch.no_grad():
        plain = teacher(x)
    found = []

    def use(m: Any, _: Tensor) -> Tensor:
        h = F.relu(m.e(x))
        with torch.no_grad():
            found.append(teacher(x))
        return torch.tanh(m.m(h)).mean()

    _, _, names, _ = train(Auto(), use)
    assert all(torch.equal(each, plain) for each in found)
    assert names == [["relu", "tanh"]] * 4


class Raising(Auto):
    error: type[BaseException] | None = ValueError

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.m(F.relu(self.e(x)))
        if self.error is not None:
            raise self.error
        return out


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_mode_is_left_after_an_error(error: type[BaseException]) -> None:
    """Where a method raises, no hook is called. The next call of torch lets go of its frame, and the next event takes the mode off."""
    model = Raising()
    model.error = error
    monitor = torchsat.watch(model, errors="raise")
    with pytest.raises(error):
        model.encode(torch.rand(4, 8))
    torch.zeros(1)
    outside = known(loop_of(monitor).observer.observation).calls._outside
    assert known(outside)._method is None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.encode(torch.rand(4, 9))
    assert _get_current_function_mode_stack() == []
    with pytest.raises(error):
        model.encode(torch.rand(4, 8))
    monitor.close()
    assert _get_current_function_mode_stack() == []
    assert not torch_module._global_forward_pre_hooks


def test_the_optimizer_and_a_call_of_the_model_take_the_mode_off() -> None:
    model = Auto()
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    depths = []
    optimizer.register_step_pre_hook(lambda *args: depths.append(len(_get_current_function_mode_stack())))
    model.encode(torch.rand(4, 8)).mean().backward()
    assert len(_get_current_function_mode_stack()) == 1
    optimizer.step()
    model.encode(torch.rand(4, 8)).mean().backward()
    model(torch.rand(4, 8))
    assert _get_current_function_mode_stack() == []
    monitor.close()


def test_other_threads_hear_nothing() -> None:
    model, depths = Auto(), list[int]()
    monitor = torchsat.watch(model, errors="raise")

    def work() -> None:
        model.e(torch.rand(4, 8))
        depths.append(len(_get_current_function_mode_stack()))

    out = model.encode(torch.rand(4, 8))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    out.mean().backward()
    monitor.step()
    monitor.close()
    assert depths == [0]
    assert [(record.site, record.n) for record in known(monitor.latest).records] == [("relu", 64)]


class Counted(torch.autograd.Function):
    """A function whose graphs are counted."""

    alive = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        class Held:
            def __del__(self) -> None:
                Counted.alive -= 1

        ctx.held = Held()
        Counted.alive += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_graphs_of_results_that_are_dropped_are_not_kept() -> None:
    class Net(Auto):
        def encode(self, x: Tensor) -> Tensor:
            h: Tensor = Counted.apply(self.e(x))  # type: ignore[no-untyped-call]
            out: Tensor = self.m(torch.tanh(h))
            return out

    model = Net()
    with torchsat.watch(model, errors="raise"):
        for _ in range(20):
            model.encode(torch.rand(4, 8))
        assert Counted.alive <= 1
        for _ in range(20):
            model.m(torch.tanh(Counted.apply(model.e(torch.rand(4, 8)))))  # type: ignore[no-untyped-call]
        assert Counted.alive <= 1
