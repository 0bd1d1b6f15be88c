"""Each state that the monitor can be in, and each way from one to another: the tables in the docstrings, cell by cell."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import Block, compiled
from tests.training import loop_of, traces_of
from tests.truth import known
from torchsat import compile_settings, compiling, internals
from torchsat.activations import ACTIVATIONS
from torchsat.compiling import Compilation, Mode
from torchsat.faults import MODEL
from torchsat.loop import Driver
from torchsat.observe.ingraph import GraphHooks
from torchsat.observe.observation import Execution, Retry, State
from torchsat.observer import Observer
from torchsat.schedule import Mark, Schedule, WindowState
from torchsat.sites import MISSES, Place, Site, Sites, Status, Structure
from torchsat.structure import Found

Step = Callable[[Tensor | None], None]


def watched(model: nn.Module, **options: object) -> tuple[torchsat.Monitor, Observer, Step]:
    """A monitor that observes every step, its observer, and a function that makes a step; of None, one without a pass."""
    monitor = torchsat.watch(model, every=1, errors="raise", **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(x: Tensor | None) -> None:
        optimizer.zero_grad()
        if x is not None:
            model(x).sum().backward()
        optimizer.step()

    return monitor, loop_of(monitor).observer, step


def x() -> Tensor:
    return torch.randn(4, 8)


# The life of an observation.


def test_an_observation_is_hooked_entered_and_finished() -> None:
    model = Block()
    _, observer, step = watched(model)
    first = known(observer.observation)
    assert first.state is State.HOOKED
    model(x()).sum().backward()
    assert (first.state, first.window.state) == (State.ENTERED, WindowState.OPEN)
    step(x())
    assert (first.state, first.window.state) == (State.FINISHED, WindowState.FINISHED)
    assert known(observer.observation) is not first


@pytest.mark.parametrize("entered", [False, True])
def test_an_observation_is_abandoned(entered: bool) -> None:
    model = Block()
    monitor, observer, _ = watched(model)
    first = known(observer.observation)
    if entered:
        model(x()).sum().backward()
    observer.abandon(Retry.OTHER_MODEL)
    assert (first.state, first.abandoned_for, first.window.state) == (State.ABANDONED, Retry.OTHER_MODEL, WindowState.VOID)
    assert (observer.observation, observer.retry) == (None, Retry.OTHER_MODEL)
    assert not traces_of(model)
    # Nothing leads out of it.
    first.abandon(Retry.NO_PASS)
    assert first.abandoned_for is Retry.OTHER_MODEL
    monitor.close()
    assert first.state is State.ABANDONED


@pytest.mark.parametrize("ends", ["finish", "abandon"])
def test_a_hook_that_fires_late_sees_a_dead_observation(ends: str) -> None:
    model = Block()
    _, observer, step = watched(model)
    first = known(observer.observation)
    # The backward of this pass runs after the end of the observation.
    late = model(x()).sum()
    if ends == "finish":
        step(x())
    else:
        observer.abandon(None)
    rows = {name: row.clone() for each in first.passes for name, row in each.rows.items()}
    late.backward()
    for each in first.passes:
        for name, row in each.rows.items():
            assert torch.equal(row, rows[name])


def test_a_fault_of_everything_ends_the_observation(caplog: pytest.LogCaptureFixture) -> None:
    model = Block()
    monitor = torchsat.watch(model, every=1)
    observer = loop_of(monitor).observer
    first = known(observer.observation)
    first.fail(MODEL, KeyError("bug"))
    assert (first.state, observer.observation, observer.faults.ended) == (State.ABANDONED, None, "KeyError: 'bug'")
    assert monitor.coverage.unseen[0] == (MODEL, "'bug'")
    assert len([message for message in caplog.messages if "all monitoring stops" in message]) == 1
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert observer.observation is None


def test_an_observation_that_hears_a_graph_is_made_in_the_graph() -> None:
    _, observer, _ = watched(Block())
    observation = known(observer.observation)
    executions = [observation.execution]
    observation.heard_graph()
    assert [*executions, observation.execution] == [Execution.EAGER, Execution.GRAPH]


# Reasons to observe again.


def test_a_step_without_a_pass_is_made_up_for_three_times() -> None:
    _, observer, step = watched(Block())
    observer.schedule.every = 100
    reasons = []
    for _ in range(3):
        step(None)
        reasons.append((observer.observation is not None, observer.retry))
    # The reason is forgotten when the observation that it asked for opens.
    assert reasons == [(True, None), (True, None), (False, None)]


def test_a_skipped_step_is_made_up_for() -> None:
    model = Block()
    monitor = torchsat.watch(model, every=100, errors="raise")
    observer = loop_of(monitor).observer

    # A fused optimizer is told of an overflow by the GradScaler, and acts on it itself.
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0, fused=True), torch.amp.GradScaler("cpu")
    for bad in (True, False):
        scaler.scale(model(x()).sum() * (torch.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert observer.observation is not None
            assert monitor.latest is None
    assert known(monitor.latest).step == 1


def test_another_model_that_trains_first_is_waited_for_in_eager() -> None:
    model, other = Block(), Block()
    _, observer, step = watched(model)
    first = known(observer.observation)
    steps_of_other = torch.optim.SGD(other.parameters(), lr=0.0)
    for at in range(8):
        assert observer.observation is first, at
        other(x()).sum().backward()
        steps_of_other.step()
    assert (first.abandoned_for, observer.retry) == (Retry.OTHER_MODEL, Retry.OTHER_MODEL)
    assert not compile_settings.forces_eager()
    step(x())
    assert (observer.observation is not None, observer.retry) == (True, None)
    assert compile_settings.forces_eager()


def test_a_session_that_goes_on_is_observed_at_once() -> None:
    monitor, observer, _ = watched(Block())
    first = known(observer.observation)
    monitor.load_state_dict({**monitor.state_dict(), "step": 7})
    assert (first.state, first.abandoned_for) == (State.ABANDONED, Retry.RESUMED)
    assert (known(observer.observation).window.step, observer.retry) == (7, None)


# How a model runs.


@pytest.fixture
def compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compilation]:
    key = object()
    monkeypatch.setattr(compiling, "uses_flex_attention", lambda model: isinstance(model, Flex))
    yield Compilation(key)
    compile_settings.release(key)


class Flex(Block):
    """Stands for a model with flex_attention."""


def mode_of(compilation: Compilation) -> Mode:
    return compilation.mode


def hides_model(compilation: Compilation) -> bool:
    return compilation.hides_model


def structure_of(observer: Observer) -> Structure:
    return observer.sites.structure


def enter(compilation: Compilation, monkeypatch: pytest.MonkeyPatch, model: nn.Module, from_compiled: bool) -> Mode:
    monkeypatch.setattr(internals, "inside_compiled_code", lambda: from_compiled)
    compilation.entered(model, training=True)
    return compilation.mode


MODES = {
    # from: (entered not compiled, entered compiled, a step without a pass)
    Mode.UNKNOWN: (Mode.EAGER, Mode.COMPILED, Mode.COMPILED),
    Mode.EAGER: (Mode.EAGER, Mode.COMPILED, Mode.COMPILED),
    Mode.COMPILED: (Mode.EAGER, Mode.COMPILED, Mode.COMPILED),
    Mode.REFUSED: (Mode.EAGER, Mode.REFUSED, Mode.REFUSED),
    Mode.IN_GRAPH: (Mode.IN_GRAPH, Mode.IN_GRAPH, Mode.IN_GRAPH),
}


@pytest.mark.parametrize("start", MODES)
@pytest.mark.parametrize("event", [0, 1, 2])
def test_each_mode_leads_where_the_table_says(start: Mode, event: int, compilation: Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Flex() if start is Mode.REFUSED else Block()
    compilation.mode = start
    compilation.graph_hooks = GraphHooks() if start is Mode.IN_GRAPH else None
    if event == 2:
        compilation.missed_pass(model, speaks=True)
    else:
        enter(compilation, monkeypatch, model, from_compiled=event == 1)
    assert compilation.mode is MODES[start][event]


def test_hooks_in_the_graph_are_tried_however_the_model_runs(compilation: Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    compilation.graph_hooks = GraphHooks()
    assert enter(compilation, monkeypatch, Block(), from_compiled=False) is Mode.IN_GRAPH


def test_a_graph_that_is_silent_twice_is_given_up(compilation: Compilation, caplog: pytest.LogCaptureFixture) -> None:
    model = Block()
    compilation.graph_hooks, compilation.mode = GraphHooks(), Mode.IN_GRAPH
    assert compilation.missed_pass(model, speaks=True) is Retry.SILENT_GRAPH
    assert mode_of(compilation) is Mode.IN_GRAPH
    assert compilation.missed_pass(model, speaks=True) is Retry.SILENT_GRAPH
    assert mode_of(compilation) is Mode.COMPILED
    assert [compilation.graph_hooks] == [None]
    assert "no compiled graph of Block was heard" in caplog.text
    # From here on it is a compiled model whose pass is missed: three times.
    assert [compilation.missed_pass(model, speaks=True) for _ in range(3)] == [Retry.NO_PASS, Retry.NO_PASS, None]


def test_a_pass_that_was_seen_begins_the_count_anew(compilation: Compilation) -> None:
    model = Flex()
    assert [compilation.missed_pass(model, speaks=True) for _ in range(2)] == [Retry.NO_PASS] * 2
    assert hides_model(compilation)
    compilation.saw_pass()
    assert not hides_model(compilation)
    assert [compilation.missed_pass(model, speaks=True) for _ in range(3)] == [Retry.NO_PASS, Retry.NO_PASS, None]


def test_a_model_with_flex_attention_is_never_run_eager(compilation: Compilation) -> None:
    compilation.opened(Flex(), is_first=True)
    assert not compile_settings.forces_eager()
    compilation.opened(Block(), is_first=True)
    # What has been found out of a model is kept: a monitor has one.
    assert not compile_settings.forces_eager()


def test_a_real_compiled_model_is_known_after_its_first_pass() -> None:
    torch._dynamo.reset()
    model = Block()
    monitor = torchsat.watch(model, every=1, errors="raise")
    run = compiled(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert loop_of(monitor).observer.compilation.mode is Mode.UNKNOWN
    run(x()).sum().backward()
    optimizer.step()
    assert loop_of(monitor).observer.compilation.mode is Mode.COMPILED
    torch._dynamo.reset()


# The status of a place.


def sites() -> Sites:
    return Sites(ACTIVATIONS, 0.05)


def in_status(status: Status) -> Sites:
    """Sites with one place, "act", in this status."""
    found = sites()
    site = found.known["act"] = Site("act", found.bind_named("tanh"))
    if status is Status.EXPECTED:
        expect(found, calls=["act"])
    elif status is Status.UNMEASURABLE:
        expect(found, unmeasurable=[("act", "why")])
    elif status is Status.UNSEEN:
        found.note("act", "why")
    elif status is Status.FAILED:
        found.fail("act", "why")
    elif status in (Status.SEEN, Status.PARTLY, Status.STOPPED):
        found.has_run(site)
        if status is Status.PARTLY:
            found.note("act", "why")
        if status is Status.STOPPED:
            for _ in range(MISSES):
                found.settle({}, {}, counts_misses=True)
    assert status_of(found) is status
    return found


def expect(found: Sites, calls: list[str] | None = None, unmeasurable: list[tuple[str, str]] | None = None) -> None:
    found.expect(Found(nn.Identity(), calls=calls or [], unmeasurable=unmeasurable or []), calls or [], hears_calls=True)


def status_of(found: Sites) -> Status | None:
    """The one status of "act"; None where it is not listed."""
    listed = dict(found.coverage({}).unseen)
    if "act" in found.ran:
        assert (found.ran["act"].place.status is Status.SEEN) == ("act" not in listed)
        return found.ran["act"].place.status
    place = found._others.get("act")
    assert (place is None) == ("act" not in listed)
    return None if place is None else place.status


def run_and_settle(found: Sites, noted: dict[str, str] | None = None) -> None:
    site = found.known.get("act") or Site("act", found.bind_named("tanh"))
    found.has_run(site)
    found.settle({"act": None}, noted or {}, counts_misses=True)


def miss(found: Sites) -> None:
    for _ in range(MISSES):
        found.settle({}, {}, counts_misses=True)


STATUSES: dict[Status, tuple[Status | None, Status, Status, Status | None, Status]] = {
    # from: (found by a walk as a call, ran, noted, missed, failed)
    Status.EXPECTED: (Status.EXPECTED, Status.SEEN, Status.UNSEEN, Status.EXPECTED, Status.FAILED),
    Status.UNMEASURABLE: (Status.EXPECTED, Status.SEEN, Status.UNSEEN, Status.UNMEASURABLE, Status.FAILED),
    Status.UNSEEN: (Status.UNSEEN, Status.SEEN, Status.UNSEEN, Status.UNSEEN, Status.FAILED),
    Status.SEEN: (Status.SEEN, Status.SEEN, Status.PARTLY, Status.STOPPED, Status.FAILED),
    Status.PARTLY: (Status.PARTLY, Status.SEEN, Status.PARTLY, Status.STOPPED, Status.FAILED),
    Status.STOPPED: (Status.STOPPED, Status.SEEN, Status.PARTLY, Status.STOPPED, Status.FAILED),
    Status.FAILED: (Status.FAILED, Status.FAILED, Status.FAILED, Status.FAILED, Status.FAILED),
}
EVENTS: tuple[Callable[[Sites], None], ...] = (
    lambda found: expect(found, calls=["act"]),
    run_and_settle,
    lambda found: found.note("act", "another reason"),
    miss,
    lambda found: found.fail("act", "it raised"),
)


@pytest.mark.parametrize("start", STATUSES)
@pytest.mark.parametrize("event", range(len(EVENTS)), ids=["walk", "ran", "noted", "missed", "failed"])
def test_each_status_leads_where_the_table_says(start: Status, event: int) -> None:
    found = in_status(start)
    EVENTS[event](found)
    assert status_of(found) is STATUSES[start][event]


@pytest.mark.parametrize("start", STATUSES)
def test_what_an_observation_notes_of_a_site_that_it_measures_stays_until_the_next(start: Status) -> None:
    found = in_status(start)
    run_and_settle(found, {"act": "its gradient is not seen"})
    assert status_of(found) is (Status.FAILED if start is Status.FAILED else Status.PARTLY)
    run_and_settle(found)
    assert status_of(found) is (Status.FAILED if start is Status.FAILED else Status.SEEN)


def test_a_place_that_a_walk_rejects_and_that_runs_is_measured_in_part() -> None:
    found = in_status(Status.SEEN)
    expect(found, unmeasurable=[("act", "its weight is computed from others")])
    assert found.ran["act"].place == Place(Status.PARTLY, "its weight is computed from others")
    assert found.coverage({}).unseen == (("act", "its weight is computed from others"),)


# What feeds what.


def test_the_structure_is_known_after_a_pass_and_new_when_modules_change() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    _, observer, step = watched(model)
    assert structure_of(observer) is Structure.NEW
    step(x())
    assert structure_of(observer) is Structure.KNOWN
    generation = observer.sites.generation
    step(None)
    assert (structure_of(observer), observer.sites.generation) == (Structure.KNOWN, generation)
    model.append(nn.Sigmoid())
    step(x())
    assert (structure_of(observer), observer.sites.generation) == (Structure.NEW, generation + 1)
    step(x())
    assert structure_of(observer) is Structure.KNOWN


def test_a_site_that_runs_late_makes_the_structure_new() -> None:
    class Late(Block):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.sigmoid(out) if self.late else out

    model = Late()
    _, observer, step = watched(model)
    step(x())
    assert structure_of(observer) is Structure.KNOWN
    model.late = True
    step(x())
    assert structure_of(observer) is Structure.NEW
    step(x())
    assert structure_of(observer) is Structure.KNOWN


# What ends a step.


def test_a_loop_that_is_driven_by_hand_no_longer_listens_to_optimizers() -> None:
    monitor, _, step = watched(Block())
    loop = loop_of(monitor)
    step(x())
    assert (loop._driver, loop.step) == (Driver.OPTIMIZERS, 1)
    monitor.step()
    assert (loop._driver, loop.step) == (Driver.BY_HAND, 2)
    step(x())
    assert loop.step == 2


# A window of the schedule.


def test_a_window_that_is_void_holds_back_nothing() -> None:
    plan = Schedule(5, 0.1)
    void = plan.begin(100, Mark(0.0, None))
    void.void()
    void.finish(Mark(1.0, None))
    assert (void.state, void.end) == (WindowState.VOID, None)
    window = plan.begin(100, Mark(2.0, None))
    plan.spend(0.5)
    plan.finish(window, Mark(3.0, None))
    window.void()
    assert window.state is WindowState.FINISHED
    plan.begin(105, Mark(8.0, None))
    plan.adjust(105)
    assert plan.overhead == pytest.approx(0.5 / 6)
