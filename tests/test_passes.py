"""Which forward passes count: every training pass once, and only if its gradient reaches the optimizer."""

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable

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


Loop = Callable[[nn.Sequential, torch.optim.Optimizer], None]


def batch(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(4, 8)).square().mean()
    return loss


def measured(loop: Loop, act: type[nn.Module] = nn.Tanh, steps: int = 2) -> list[tuple[float, float]]:
    """For each step of a loop, how many passes of four rows its record has, and how many gradients of such passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 1))
    optimizer, snapshots = torch.optim.SGD(model.parameters(), lr=0.01), list[torchsat.Snapshot]()
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise", sinks=(snapshots.append,))
    for _ in range(steps):
        loop(model, optimizer)
    monitor.close()
    assert [snapshot.step for snapshot in snapshots] == list(range(steps))
    return [(snapshot["1"].n / 64, snapshot["1"].grad_n / 64) for snapshot in snapshots]


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    batch(model).backward()
    optimizer.step()


def micro_batches(count: int, each: Callable[[list[nn.Parameter]], object], factor: float = 1.0) -> Loop:
    """Several batches before a step, with something done to the gradients after each. The loss of the first is multiplied by a factor."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for at in range(count):
            (batch(model) * (factor if at == 0 else 1.0)).backward()
            each(list(model.parameters()))
        optimizer.step()

    return loop


def set_by_division(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = known(parameter.grad) / 2


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize(
    ("each", "factor"),
    [
        (lambda parameters: None, 1.0),
        (lambda parameters: None, 0.0),
        (lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3), 1.0),
        (lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3), 1.0),
        (lambda parameters: [known(each.grad).add_(0.1 * torch.randn_like(each)) for each in parameters], 1.0),
        (set_by_division, 1.0),
    ],
    ids=["plain", "zero_loss", "clip_norm", "clip_value", "noise", "division"],
)
def test_every_micro_batch_counts_whatever_is_done_to_the_gradients_between(each: Callable[..., object], factor: float, count: int) -> None:
    assert measured(micro_batches(count, each, factor)) == [(count, count)] * 2


EMPTIES: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "none": lambda parameters: [setattr(each, "grad", None) for each in parameters],
    "zero_": lambda parameters: [known(each.grad).zero_() for each in parameters],
    "detach_": lambda parameters: [known(each.grad).detach_().zero_() for each in parameters],
    "fill_": lambda parameters: [known(each.grad).fill_(0) for each in parameters],
    "foreach": lambda parameters: torch._foreach_zero_([known(each.grad) for each in parameters]),
    "times_zero": lambda parameters: [known(each.grad).mul_(0) for each in parameters],
}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("how", EMPTIES)
def test_batches_whose_gradient_is_emptied_do_not_count_however_it_is_done(how: str, count: int, unused: bool) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if unused:
            # Parameters that get no gradient, before and behind those that do.
            model.unused = nn.Linear(2, 2)
            model._parameters["first"] = nn.Parameter(torch.ones(1))
            model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
        for _ in range(count):
            batch(model).backward()
            EMPTIES[how]([each for each in model.parameters() if each.grad is not None])
        train(model, optimizer)

    assert measured(loop) == [(1, 1)] * 2


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("how", EMPTIES)
def test_micro_batches_whose_gradients_are_kept_in_a_buffer_all_count(how: str, count: int) -> None:
    """As in training with differential privacy: `.grad` is moved into a buffer after each batch, and set from it before the step."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        buffers = [torch.zeros_like(each) for each in parameters]
        for _ in range(count):
            batch(model).backward()
            torch._foreach_add_(buffers, [known(each.grad) for each in parameters])
            EMPTIES[how](parameters)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            parameter.grad = buffer
        optimizer.step()
        optimizer.zero_grad()

    assert measured(loop) == [(count, count)] * 2


def test_gradients_that_the_user_computes_and_sets_count() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(batch(model), parameters), strict=True):
            parameter.grad = grad
        optimizer.step()

    def surgery(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        # One pass, a backward for each task, and what is made of both gradients.
        parameters, out = list(model.parameters()), model(torch.randn(4, 8))
        tasks = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out.square().mean(), out.abs().mean())]
        for parameter, one, other in zip(parameters, *tasks, strict=True):
            parameter.grad = torch.where(one * other > 0, one + other, 0)
        optimizer.step()

    assert measured(loop) == [(1, 1)] * 2
    assert measured(surgery) == [(1, 2)] * 2


def attack(model: nn.Module, how: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    if how == "autograd.grad":
        torch.autograd.grad(model(x).sum(), x)
    elif how == "backward":
        model(x).sum().backward()
    elif how == "inputs":
        model(x).sum().backward(inputs=[x])
    elif how == "frozen":
        model.requires_grad_(False)
        model(x).sum().backward()
        model.requires_grad_(True)
    elif how == "parts":
        assert isinstance(model, nn.Sequential)
        torch.autograd.grad(model[2](model[1](model[0](x))).sum(), x)
    elif how == "curvature":
        grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        torch.autograd.grad(sum((grad.sum() for grad in grads), torch.zeros(())), list(model.parameters()))
    elif how == "raised":
        handle = next(model.parameters()).register_hook(lambda grad: next(iter(())))
        with pytest.raises(StopIteration):
            model(x).sum().backward()
        handle.remove()
    else:
        model(x)


@pytest.mark.parametrize("how", ["autograd.grad", "backward", "inputs", "frozen", "parts", "curvature", "raised", "no backward"])
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("count", [1, 20])
def test_passes_whose_gradient_does_not_enter_the_step_do_not_count(how: str, act: type[nn.Module], count: int) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(count):
            attack(model, how)
        train(model, optimizer)

    assert measured(loop, act) == [(1, 1)] * 2


def test_parts_that_run_again_are_the_next_pass() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        model[1](model[0](torch.randn(4, 8)))
        optimizer.zero_grad()
        model[2](model[1](model[0](torch.randn(4, 8)))).square().mean().backward()
        optimizer.step()

    assert measured(loop) == [(1, 1)] * 2


def test_an_episode_with_one_backward_counts_whole() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        losses = [batch(model) for _ in range(30)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()

    assert measured(loop) == [(30, 30)] * 2


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_a_gradient_that_is_differentiated_again_counts(act: type[nn.Module]) -> None:
    """A backward through the gradient of a ReLU runs through no node of its forward."""

    def penalty(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x = torch.randn(4, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().mean().backward()
        batch(model).backward()
        optimizer.step()

    def maml(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(model.named_parameters())
        loss = torch.func.functional_call(model, parameters, (torch.randn(4, 8),)).square().mean()
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        fast = {name: value - 0.1 * grad for (name, value), grad in zip(parameters.items(), grads, strict=True)}
        optimizer.zero_grad()
        torch.func.functional_call(model, fast, (torch.randn(4, 8),)).square().mean().backward()
        optimizer.step()

    assert [n for n, _ in measured(penalty, act)] == [2, 2]
    assert [n for n, _ in measured(maml, act)] == [2, 2]


@pytest.mark.parametrize("freezes", [False, True])
def test_a_discriminator_is_measured_in_its_own_step_alone(freezes: bool) -> None:
    def run(frozen: bool) -> torchsat.Snapshot:
        torch.manual_seed(0)
        generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        of_generator, of_critic = torch.optim.SGD(generator.parameters(), lr=0.01), torch.optim.SGD(critic.parameters(), lr=0.01)
        monitor = torchsat.watch(critic, every=1, budget=None, errors="raise")
        for _ in range(3):
            fake = generator(torch.randn(4, 4))
            critic.requires_grad_(True)
            of_critic.zero_grad()
            (F.softplus(-critic(torch.randn(4, 8))).mean() + F.softplus(critic(fake.detach())).mean()).backward()
            of_critic.step()
            critic.requires_grad_(not frozen)
            of_generator.zero_grad()
            F.softplus(-critic(fake)).mean().backward()
            of_generator.step()
        monitor.close()
        return known(monitor.latest)

    snapshot, expected = run(freezes), run(False)
    assert (snapshot["1"].n, snapshot["1"].grad_n) == (2 * 64, 2 * 64)
    assert snapshot.records == expected.records


def test_parameters_that_no_optimizer_owns_do_not_keep_a_batch() -> None:
    """The gradients of a trunk that is not trained, but not frozen either, are never emptied."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        head = torch.optim.SGD(model[2].parameters(), lr=0.01)
        batch(model).backward()
        head.zero_grad()
        batch(model).backward()
        head.step()
        head.zero_grad()

    assert measured(loop) == [(1, 1)] * 2


def test_sparse_gradients_are_told_apart_too() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.act = nn.Embedding(10, 4, sparse=True), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.words(x))
            return out

    for sets_to_none in (True, False):
        model = Bag()
        monitor = torchsat.watch(model, every=1, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for keeps in (False, True, True):
            model(torch.randint(10, (4,))).sum().backward()
            if not keeps:
                optimizer.zero_grad(set_to_none=sets_to_none)
        optimizer.step()
        assert known(monitor.latest)["act"].n == 2 * 16
        monitor.close()


def test_a_loop_by_hand_with_optimizers_inside_counts_what_each_has_stepped_with() -> None:
    model = Block()
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
        monitor.step()
    # The first step was over with the first of the optimizer's steps; from the first call on, only calls end a step.
    assert known(monitor.latest)["act"].n == 3 * 32


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
            return torch.sigmoid(self.gate(x)) * self.second(remember(self.first(x)))

        def forward(self, x: Tensor, error: bool = False) -> Tensor:
            out = torch.relu(self.encode(x))
            if error:
                for part in (self.act, self.own, lambda x: self.cell(x[:, :3])):
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
