"""Hooks are on the model only in observed steps, and a watched model can be copied, saved, traced and exported as if it had no hooks."""

import copy
import io
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.ao import quantization
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.models import Block, Wrapped, mlp
from tests.training import loop_of, traces_of, train
from tests.truth import known
from torchsat import loop
from torchsat.observe import hooks


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
    passes = known(loop_of(monitor).observer.observation).passes
    seen = [each.rows["0.act"][0].item() for each in passes if each.rows]
    for twin in copies:
        twin(x).sum().backward()
    assert [each.rows["0.act"][0].item() for each in passes if each.rows] == seen
    optimizer.step()


class Takes(nn.Module):
    """A module that says itself what is saved of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.Tanh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "more": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.act(self.layer(x))
        return out


class Reduces(Takes):
    """A module that says itself how it is made again."""

    def __reduce__(self) -> Any:
        return _made, (dict(self.__dict__),)


def _made(state: dict[str, Any]) -> Reduces:
    made = Reduces()
    made.__dict__.update(state)
    return made


def _users(module: nn.Module, args: object, *more: object) -> None:
    """A hook of the user's."""


def _hooked() -> nn.Module:
    model = Block()
    model.act.register_forward_pre_hook(_users, with_kwargs=True)
    model.act.register_forward_hook(_users, always_call=True)
    return model


SAVED: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "own state": Takes,
    "own reduce": Reduces,
    "recurrent": lambda: nn.LSTM(4, 4),
    "hooked by the user": _hooked,
    "old weight norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Tanh()),
    "traced": lambda: torch.fx.symbolic_trace(Block()),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_is_saved_of_a_watched_model_is_what_is_saved_of_the_bare_one(kind: str) -> None:
    """Byte for byte; so `torch.load` does with the file whatever it does with that of the bare model."""

    def files() -> list[bytes]:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return [buffer.getvalue(), *(pickle.dumps(model, protocol) for protocol in (2, 3, 4, 5))]

    model = SAVED[kind]()
    bare = files()
    monitor = torchsat.watch(model, errors="raise")
    assert any(isinstance(each, hooks.Hook) for each in traces_of(model))
    assert files() == bare
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not [each for each in traces_of(twin) if "torchsat" in type(each).__module__ or "nullcontext" in repr(each)]
    shared = copy.copy(model)
    assert (shared._forward_hooks is model._forward_hooks) is (kind != "traced")
    monitor.close()
    assert not [each for each in (*traces_of(model), *traces_of(shared)) if "torchsat" in type(each).__module__]
    assert not {"__reduce_ex__", "__prepare_scriptable__"} & set(vars(nn.Module))


def test_a_saved_model_is_loaded_with_weights_only() -> None:
    model, buffer = nn.LSTM(4, 8), io.BytesIO()
    torchsat.watch(model)
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([nn.LSTM]):
        loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded.weight_hh_l0, model.get_parameter("weight_hh_l0"))


def test_a_watched_model_can_be_scripted() -> None:
    model, x = nn.Sequential(Takes(), nn.Linear(4, 2)), torch.randn(3, 4)
    children = list(model.children())
    monitor = torchsat.watch(model, every=1, errors="raise")
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    assert list(model.children()) == children
    assert traces_of(model)
    monitor.close()


def _fused(model: nn.Sequential) -> nn.Module:
    # These modules are marked as deprecated in torch, and have no successor in it.
    quantization.fuse_modules_qat(model, [["0", "1", "2"], ["4", "5"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    return model


def _shallow(model: nn.Sequential) -> nn.Module:
    """Puts a shallow copy in the place of each module, as libraries do that add adapters."""
    for name, module in list(model.named_children()):
        setattr(model, name, copy.copy(module))
    return model


class Adapted(nn.Module):
    """A layer with an adapter beside it, which takes over the attributes of the layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in base.__dict__.items() if name != "_modules"})
        self.base, self.down = base, nn.Linear(144, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.down(x)
        return out


def _adapted(model: nn.Sequential) -> nn.Module:
    model[4] = Adapted(model[4])
    return model


def _moved(model: nn.Sequential) -> nn.Module:
    """Registers the hooks of one module on others, in all ways."""
    given, target = [*model[5]._forward_hooks.values(), *model[5]._forward_pre_hooks.values()], model[6]
    for hook in given:
        target.register_forward_pre_hook(hook)
        target.register_forward_pre_hook(hook, with_kwargs=True)
        target.register_forward_hook(hook)
        target.register_forward_hook(hook, with_kwargs=True, always_call=True)
    return model


def _unnormed(model: nn.Sequential) -> nn.Module:
    torch.nn.utils.spectral_norm(model[6])
    torch.nn.utils.remove_spectral_norm(model[6])
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surgery", [_fused, _shallow, _adapted, _moved, _unnormed])
@pytest.mark.parametrize("when", ["before the first pass", "after it"])
def test_hooks_that_are_carried_to_other_modules_do_nothing_there_and_are_taken_off(
    surgery: Callable[[nn.Sequential], nn.Module], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(watched: bool) -> tuple[list[float], list[object]]:
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 1))
        model, losses = nn.Sequential(*layers), []
        monitor = torchsat.watch(model, every=1, budget=None) if watched else None
        if when == "before the first pass":
            surgery(model)
        for step in range(3):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss = model(torch.randn(8, 1, 8, 8)).square().mean()
            loss.backward()
            if step == 0 and when == "after it":
                surgery(model)
            optimizer.step()
            losses.append(loss.item())
        if monitor is not None:
            monitor.close()
            assert known(monitor.latest).step == 2
        return losses, [each for each in traces_of(model) if "torchsat" in type(each).__module__]

    assert trained(True) == (trained(False)[0], [])
    assert [message for message in caplog.messages if "longer" in message or "Error" in message] == []


def _make_fx(model: nn.Module, x: torch.Tensor) -> object:
    return make_fx(model)(x).code


def _fx(model: nn.Module, x: torch.Tensor) -> object:
    return str(torch.fx.symbolic_trace(model).graph)


def _fake(model: nn.Module, x: torch.Tensor) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x)).shape


def _vmap(model: nn.Module, x: torch.Tensor) -> object:
    return torch.func.vmap(model)(x.unsqueeze(0)).tolist()


def _functional_grad(model: nn.Module, x: torch.Tensor) -> object:
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).sum())(parameters)
    return [each.tolist() for each in found.values()]


def _jvp(model: nn.Module, x: torch.Tensor) -> object:
    return torch.func.jvp(model, (x,), (x,))[1].tolist()


def _meta(model: nn.Module, x: torch.Tensor) -> object:
    return copy.deepcopy(model).to("meta")(x.to("meta")).shape


@pytest.mark.parametrize("meets", [_make_fx, _fx, _fake, _vmap, _functional_grad, _jvp, _meta])
def test_a_call_that_computes_nothing_of_training_is_passed_over(
    meets: Callable[[nn.Module, torch.Tensor], object], caplog: pytest.LogCaptureFixture
) -> None:
    """What only traces a model, or calls it with tensors that stand for others, is neither disturbed nor counted, and the sites stay watched."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.own, self.b = nn.Linear(4, 4), nn.ReLU(), Takes(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.b(self.own(self.relu(self.a(x)))))

    def trained(watched: bool) -> tuple[list[float], list[object]]:
        torch.manual_seed(0)
        model, losses, met = Net(), list[float](), list[object]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, every=1, budget=None) if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            met.append(meets(model, torch.ones(3, 4)))
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if monitor is not None:
            monitor.close()
            assert {record.site: record.n for record in known(monitor.latest).records} == {"relu": 20, "own.act": 20, "tanh": 20}
            named = dict(monitor.coverage.unseen)
            assert set(named) == ({"(model)"} if meets in (_vmap, _functional_grad, _jvp) else set())
        return losses, met

    assert trained(True) == trained(False)
    assert caplog.messages == []


def test_tracing_and_exporting_a_watched_model_is_not_disturbed() -> None:
    model, x = Block(), torch.randn(4, 8)
    plain = str(torch.jit.trace(copy.deepcopy(model), x).graph)
    torchsat.watch(model, every=1, errors="raise")
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.act._forward_hooks
    assert str(torch.jit.trace(model, x).graph).count("aten::") == plain.count("aten::")
    # Strict export uses Dynamo, and that of torch 2.6 fails on any module hook, ours or not.
    for strict in (False,) if torch.__version__ < "2.7" else (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert targets == [torch.ops.aten.linear.default, torch.ops.aten.tanh.default]


def test_unobserved_steps_run_none_of_our_code_on_the_model() -> None:
    """Steps that are not observed cost nothing, because no hook is on the model then."""
    model, seen = mlp(), {}
    torchsat.watch(model, every=5, errors="raise")
    seen[0] = bool(traces_of(model))
    train(model, 14, each=lambda step: seen.__setitem__(step + 1, bool(traces_of(model))))
    assert [step for step, hooked in seen.items() if hooked] == [0, 1, 2, 4, 5, 8, 10]


def test_a_model_may_hold_its_monitor() -> None:
    model = mlp()
    model.monitor = torchsat.watch(model)  # type: ignore[assignment]
    assert copy.deepcopy(model).monitor is None
    assert pickle.loads(pickle.dumps(model)).monitor is None


def test_between_observations_nothing_of_ours_runs_but_the_hook_on_the_optimizer() -> None:
    """Counts every Python call into a file of torchsat during forward, backward and optimizer step."""
    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torchsat.watch(model, every=50, errors="raise")
    house = str(Path(torchsat.__file__).parent)
    ours: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(house):
            ours.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    calls = []
    for _ in range(12):
        ours.clear()
        sys.setprofile(count)
        model(torch.randn(8, 64)).sum().backward()
        passes = len(ours)
        optimizer.step()
        sys.setprofile(None)
        calls.append((passes, len(ours), sorted(set(ours))))
    assert all(calls[step][0] > 20 for step in (0, 1, 2, 4, 8))
    hook = [
        "loop.after_step",
        "loop.before_step",
        "hooks.is_capturing",
        "steps.begins_short",
        "steps.ends",
        "process._after_step",
        "process._before_step",
        "compile_settings.restore_stance",
        "process._tell",
    ]
    for step in (5, 6, 9, 10, 11):
        passes, total, names = calls[step]
        assert passes == 0
        assert total <= 14
        # In the first steps after an observation the schedule reads the clock.
        assert set(names) <= {
            *hook,
            "process.<listcomp>",
            "schedule.due",
            "schedule.follow",
            "conftest.mark",
        }


class CountingCalls(TorchFunctionMode):
    """A mode of the user's that counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class CountingOperators(TorchDispatchMode):
    """A mode of the user's that counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [CountingCalls, CountingOperators])
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_modes_of_the_user_see_nothing_of_ours(kind: type[CountingCalls] | type[CountingOperators], by_hand: bool) -> None:
    counts = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, every=1, budget=None, errors="raise") if watched else None
        with kind() as mode:
            for _ in range(3):
                model(torch.ones(4, 8)).sum().backward()
                optimizer.step()
                if by_hand and monitor is not None:
                    monitor.step()
        counts.append(dict(mode.calls))
        if monitor is not None:
            monitor.close()
            assert monitor.latest is not None
    assert counts[0] == counts[1]


@pytest.mark.parametrize("by_hand", [False, True])
def test_steps_that_are_captured_in_a_cuda_graph_are_left_alone(
    by_hand: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA graph is captured, says torch. tests/test_gpu.py captures one."""
    model, capturing, found = mlp(), False, list[torchsat.Snapshot]()
    monkeypatch.setattr(hooks, "is_capturing", lambda: capturing)
    monkeypatch.setattr(loop, "is_capturing", lambda: capturing)
    monitor = torchsat.watch(model, every=1, budget=None, sinks=[found.append], errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if by_hand:
            monitor.step()
        else:
            optimizer.step()

    step(torch.randn(16, 64))
    capturing = True
    for _ in range(2):
        step(torch.full((16, 64), torch.nan))
    capturing = False
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    step(torch.randn(16, 64))
    monitor.close()
    assert [snapshot.step for snapshot in found] == [0, 1]
    assert [[record.nonfinite for record in snapshot.records] for snapshot in found] == [[0] * len(found[0].records)] * 2
    assert [message for message in caplog.messages if "was captured in a CUDA graph" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_where_cuda_was_never_used_nobody_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch on a machine without a driver raises where it is asked for the current stream."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    assert not hooks.is_capturing()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hooks.is_capturing()
