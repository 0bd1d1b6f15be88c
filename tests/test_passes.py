"""Which forward passes count: every training pass once, and only if its gradient reaches the optimizer."""

import contextlib
import copy
import gc
import threading
import weakref
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.models import Block, Calling
from tests.training import loop_of
from tests.truth import check, known, one_step, truth
from torchsat.observe.passes import Pass


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(8, 8), Block(act), reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return out


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
        assert monitor.latest is not None
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
    assert monitor.latest is not None
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
    assert known(trained.attenuation) > 0


def test_a_part_under_no_grad_inside_a_training_pass_is_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.trunk(x)
            out: Tensor = self.head(x)
            return out

    snapshot = one_step(Net(), x=torch.randn(16, 8))
    assert snapshot["trunk.act"].n == 128
    assert snapshot["trunk.act"].attenuation is None


def test_an_empty_batch_changes_nothing() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(0, 8)).sum().backward()
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest["act"].n == 24


def test_a_torch_func_transform_is_passed_over() -> None:
    model, x = Block(), torch.randn(5, 8)
    monitor = torchsat.watch(model, errors="raise")
    out = torch.func.vmap(lambda row: torch.func.functional_call(model, dict(model.named_parameters()), (row,)))(x)
    assert torch.allclose(out, model(x))
    monitor.step()
    assert monitor.latest is not None
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
    assert monitor.latest is not None
    check(monitor.latest["act"], {"n": 128, "grad_n": 128, "z_mean": model.linear(x).mean().item()})
    assert monitor.latest.weights[0].input_n == 128
    assert monitor.latest.weights[0].input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
    assert known(loop_of(monitor).observer.route.local.windows.get("act"))[0].tolist() == [16.0] * 8


def test_two_passes_of_one_backward_both_count() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one, other = model(torch.randn(16, 8)), model(torch.randn(4, 8))
    (one.sum() + other.sum()).backward()
    optimizer.step()
    assert monitor.latest is not None
    assert (monitor.latest["act"].n, monitor.latest["act"].grad_n) == (160, 160)


def test_a_gradient_penalty_discards_nothing() -> None:
    model = Block()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (model(torch.randn(4, 8)).mean() + slope.square().mean()).backward()
    optimizer.step()
    assert monitor.latest is not None
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
            out: Tensor = self.head(h)
            return out

    model = Fails()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model(torch.randn(100, 8))
    model(torch.randn(8, 8)).sum().backward()
    optimizer.step()
    assert monitor.latest is not None
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
    assert monitor.latest is not None
    check(monitor.latest["act"], {"n": 128, "grad_n": 128, "z_mean": model.linear(x).mean().item()})


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
    assert {record.site: (record.n, record.grad_n) for record in known(monitor.latest).records} == {
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
            out: Tensor = self.head(features.clone())
            return out

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
            model(x).sum().backward()
        stop.set()
        thread.join()
        stop.clear()
        monitor.step()
        monitor.flush()
        assert known(monitor.latest)["tanh"].n == 21 * 8 * 24
    assert monitor.coverage.seen == ("tanh",)


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
    assert known(monitor.latest)["self_attn/softmax"].heads == plain.heads
    current = Pass()
    heads = torch.tensor([[2.0], [1.0], [1.0], [1.0], [1.0], [-4.0]])
    current.add(current.heads, "a", heads.clone())
    current.keep_where(torch.tensor(False))
    current.add(current.heads, "a", heads)
    assert torch.equal(current.heads["a"], heads)


class Keeps(nn.Module):
    """A model that returns nothing and keeps its output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.error: Exception | None = None

    def forward(self, x: Tensor) -> None:
        self.out = self.block(x)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("again", [False, True])
def test_a_retry_where_an_error_is_handled_counts(again: bool) -> None:
    """`again`: the retry raises the very exception that is being handled."""
    model = Keeps()
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    error = model.error = RuntimeError("out of memory")
    try:
        model(torch.randn(100, 8))
    except RuntimeError:
        if again:
            with pytest.raises(RuntimeError, match="out of memory"):
                model(torch.randn(50, 8))
        assert model.error is error
        model.error = None
        model(torch.randn(4, 8))
        model.out.square().mean().backward()
        optimizer.step()
    monitor.flush()
    assert (known(monitor.latest).step, known(monitor.latest)["block.act"].n) == (0, 32)


class Raises(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


class OwnRaises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("how", ["method", "part", "parts", "whole", "raised"])
def test_no_graph_is_kept_that_the_user_has_dropped(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.gate = Block(), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8)
            self.act, self.own, self.cell = Raises(), OwnRaises(), nn.GRUCell(8, 8)

        def encode(self, x: Tensor) -> Tensor:
            return cast(Tensor, torch.sigmoid(self.gate(x)) * self.second(remember(self.first(x))))

        def narrow(self, x: Tensor) -> None:
            self.cell(x[:, :3])

        def forward(self, x: Tensor, error: bool = False) -> Tensor:
            out: Tensor = torch.relu(self.encode(x))
            if error:
                for part in (self.act, self.own, self.narrow):
                    with contextlib.suppress(RuntimeError):
                        part(remember(out))
                raise RuntimeError
            return out

    class Witness:
        """Lives as long as the graph that it was put into."""

        def __call__(self, grad: object) -> None:
            return None

    alive = weakref.WeakSet[Witness]()

    def remember(x: Tensor) -> Tensor:
        witness = Witness()
        alive.add(witness)
        out = 2 * x
        known(out.grad_fn).register_prehook(witness)
        return out

    model, x = Net(), torch.randn(4, 8)
    monitor = torchsat.watch(model, errors="raise")
    observation = known(loop_of(monitor).observer.observation)
    for _ in range(5):
        if how == "method":
            model.encode(x)
        elif how == "part":
            remember(model.second(x))
        elif how == "parts":
            model.second(remember(model.first(x)))
        elif how == "whole":
            model(x)
        else:
            with pytest.raises(RuntimeError):
                model(x, error=True)
    assert observation.is_open
    assert observation.has_measured
    gc.collect()
    assert len(alive) == 0
