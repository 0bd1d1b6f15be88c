"""`probe` and `try_remedies` give the right numbers and leave the model, the optimizer and the random numbers as they were."""

import copy
import io
import itertools
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.test_cards import shown
from tests.test_diagnosis import stack
from torchsat import REMEDIES, Remedy, Trial, Trials
from torchsat.report import report
from torchsat.trial import _context, _Plan


def data(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [5 + 8 * torch.randn(32, 64, generator=generator) for _ in range(batches)]
    return [(x, (x[:, :10] - 5).argmax(1)) for x in inputs]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def state(model: nn.Module) -> list[Tensor]:
    """Copies of everything that training could change, random numbers included."""
    values = [*model.state_dict().values(), *(each.grad for each in model.parameters() if each.grad is not None), torch.get_rng_state()]
    return [value.clone() for value in values]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_probe_gives_the_verdict_and_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.1), *stack(nn.Tanh, gain=8.0))
    x, y = data()[0]
    model(x).sum().backward()
    before = state(model)
    snapshot = torchsat.probe(model, x, loss=lambda output: nn.functional.cross_entropy(output, y))
    assert same(before, state(model))
    assert caplog.messages == []
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    (alert,) = snapshot.alerts
    assert (alert.site, alert.causes[0].name) == ("2.act", "init_too_large")
    assert snapshot["2.act"].grad_n == snapshot["2.act"].elements == 32 * 64
    out = io.StringIO()
    report(snapshot, out)
    assert "Why:  init_too_large" in out.getvalue()
    assert "Try:  draw the weights anew as their activation needs them:" in out.getvalue()
    assert "for weight in (model[2].fc.weight, model[3].fc.weight, model[4].fc.weight):" in out.getvalue()


def test_a_probe_agrees_with_watching() -> None:
    model = stack(nn.Tanh)
    x, y = data()[0]
    snapshot = torchsat.probe(model, x, loss=lambda output: nn.functional.cross_entropy(output, y))
    monitor = torchsat.watch(model, sample=None, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert monitor.latest is not None
    assert snapshot.records == monitor.latest.records


def test_a_probe_without_a_loss_uses_the_output() -> None:
    class Out:
        def __init__(self, value: Tensor) -> None:
            self.loss, self.extra = value, torch.zeros(3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(nn.Tanh)

        def forward(self, x: Tensor) -> Out:
            return Out(self.inner(x).square().mean())

    x = data()[0][0]
    model = Net()
    ours = torchsat.probe(model, x)["inner.block0.act"].grad_z_rms
    assert ours == torchsat.probe(model.inner, x)["block0.act"].grad_z_rms
    assert torchsat.probe(stack(nn.Tanh).eval(), x)["block0.act"].grad_n > 0


def test_what_a_probe_refuses() -> None:
    x = torch.randn(4, 64)
    with pytest.raises(TypeError, match="model is a str; allowed is a"):
        torchsat.probe("model", x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the loss is \(4, 10\); a scalar tensor is needed"):
        torchsat.probe(stack(nn.Tanh), x, loss=lambda output: output)
    with pytest.raises(ValueError, match="no activation ran in this pass"):
        torchsat.probe(nn.Linear(64, 2), x)
    model = stack(nn.Tanh)
    lock = model.lock = open(__file__)  # type: ignore[assignment] # noqa: SIM115
    with lock, pytest.raises(TypeError, match=r"Sequential cannot be copied \(TypeError: cannot pickle .*a trial needs a copy"):
        torchsat.probe(model, x)


def test_every_remedy_is_tried_and_nothing_is_left_behind(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    model = stack(nn.Sigmoid, gain=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    loss(model, data()[0]).backward()
    optimizer.step()
    before, momentum = state(model), [entry["momentum_buffer"].clone() for entry in optimizer.state.values()]
    trials = torchsat.try_remedies(model, data(), loss, optimizer=optimizer, steps=30)
    assert same(before, state(model))
    assert all(torch.equal(one, entry["momentum_buffer"]) for one, entry in zip(momentum, optimizer.state.values(), strict=True))
    assert caplog.messages == []
    assert [trial.remedy for trial in trials.trials] == ["as it is", *(remedy.name for remedy in REMEDIES)]
    assert all(trial.tried and len(trial.losses) == 30 for trial in trials.trials)
    assert trials["as it is"].worst("saturated") > 0.5  # type: ignore[operator]
    assert trials["standardised inputs"].change == "inputs standardised per feature"
    assert trials["BatchNorm"].worst("saturated") < 0.05  # type: ignore[operator]
    assert trials["ReLU"].snapshots[0].records[0].activation == "relu"
    # A learning rate of a tenth moves the weights a tenth as far in the first step.
    plain, slow = (trials[name].snapshots[0].weights[0].update_ratio for name in ("as it is", "lower learning rate"))
    assert slow == pytest.approx(plain / 10, rel=1e-3)  # type: ignore[operator]
    assert trials.best.remedy in ("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "BatchNorm")
    monkeypatch.setenv("COLUMNS", "200")
    text = str(trials)
    assert "4 layers" not in text
    assert "3 activations are ReLU; 3 layers drawn anew, He" in text
    assert trials.sentence("ReLU").startswith("ReLU helps: loss ")


def test_the_untouched_copy_trains_as_the_model_would() -> None:
    model = nn.Sequential(nn.Dropout(0.2), *stack(nn.Tanh))
    batches = data(3)
    random = torch.get_rng_state()
    trials = torchsat.try_remedies(model, batches, loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=7, remedies=())
    assert torch.equal(random, torch.get_rng_state())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for batch in itertools.islice(itertools.cycle(batches), 7):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        expected.append(value.item())
    assert trials["as it is"].losses == tuple(expected)


def test_convolutions_tokens_and_what_cannot_be_changed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 6, 3), nn.Tanh()
            self.token, self.hidden, self.head = nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x.unflatten(1, (1, 8, 8)))).flatten(2).transpose(1, 2)
            return self.head(torch.relu(self.hidden(self.token(x))).mean(1))  # type: ignore[no-any-return]

    trials = torchsat.try_remedies(Net(), data(2), loss, steps=3, progress=False)
    assert all(trial.tried for trial in trials.trials), [trial.change for trial in trials.trials]
    assert trials.notes == ("not changed, since they are no modules: relu",)
    assert trials["LayerNorm"].change == "LayerNorm before 2 activations"


def test_what_try_remedies_refuses_and_says() -> None:
    model = stack(nn.Tanh)
    with pytest.raises(TypeError, match="batches is an iterator, which can be read only once"):
        torchsat.try_remedies(model, iter(data()), loss)
    with pytest.raises(ValueError, match="batches is empty"):
        torchsat.try_remedies(model, [], loss)
    with pytest.raises(ValueError, match="steps is 0"):
        torchsat.try_remedies(model, data(), loss, steps=0)
    with pytest.raises(TypeError, match="a scalar tensor is needed: loss=lambda model, batch"):
        torchsat.try_remedies(model, data(), lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="no hidden activation of this model is a module"):
        torchsat.try_remedies(nn.TransformerEncoderLayer(64, 4, 8), [torch.randn(3, 2, 64)], lambda m, b: m(b).sum())

    def refuse(model: nn.Module, context: object) -> str:
        raise ValueError("it has no such thing")

    trials = torchsat.try_remedies(model, data(), loss, steps=2, remedies=[Remedy("mine", refuse)])
    assert not trials["mine"].tried
    assert math.isnan(trials["mine"].loss)
    with pytest.raises(ValueError, match="seeds is 0; allowed are whole numbers from 1 up"):
        torchsat.try_remedies(model, data(), loss, seeds=0)
    assert trials.sentence("mine") == "mine was not tried: it has no such thing"
    assert "not tried: it has no such thing" in str(trials)
    with pytest.raises(KeyError, match="no remedy 'other'; there are: as it is, mine"):
        trials["other"]


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    trials = torchsat.try_remedies(stack(nn.Tanh), data(), loss, steps=12, remedies=REMEDIES[:2])
    trials.picture(tmp_path / "trials.png")
    assert (tmp_path / "trials.png").read_bytes()[:4] == b"\x89PNG"
    panels = trials.plot().axes
    assert panels[0].get_title() == "loss"
    for trial, line in zip(trials.trials, panels[0].lines, strict=True):
        assert tuple(line.get_ydata()) == trial.losses  # type: ignore[arg-type]


def test_a_module_that_is_given_a_list_can_be_tried() -> None:
    class Join(nn.Module):
        def forward(self, parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join, self.inner = Join(), stack(nn.Tanh)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.join([x[:, :32], x[:, 32:]]))  # type: ignore[no-any-return]

    trials = torchsat.try_remedies(Net(), data(2), loss, steps=2)
    assert all(trial.tried for trial in trials.trials), [trial.change for trial in trials.trials]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS, torch.optim.RMSprop])
def test_every_kind_of_optimizer_is_made_again(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = stack(nn.Tanh)
    trials = torchsat.try_remedies(model, data(2), loss, optimizer=kind(model.parameters(), lr=0.01), steps=3, remedies=REMEDIES[:1])
    assert all(math.isfinite(trial.loss) for trial in trials.trials)
    with pytest.raises(ValueError, match="the optimizer holds no parameter of this model"):
        torchsat.try_remedies(model, data(2), loss, optimizer=kind(stack(nn.Tanh).parameters(), lr=0.01))


def test_a_remedy_that_cannot_be_run_does_not_end_the_others() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head, self.act = nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 10), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.second(self.act(self.first(x)))))  # type: ignore[no-any-return]

    trials = torchsat.try_remedies(Shared().eval(), data(2), loss, steps=3)
    assert trials["BatchNorm"].change.startswith("could not be run: RuntimeError")
    assert trials["ReLU"].tried
    assert trials["lower learning rate"].tried


def test_generators_of_python_and_numpy_and_the_users_gradients_are_kept() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(nn.Tanh)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * random.random() * float(np.random.rand()))  # type: ignore[no-any-return]

    batches = [(x.requires_grad_(), y) for x, y in data(2)]
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    torchsat.probe(Random(), batches[0][0])
    trials = torchsat.try_remedies(Random(), batches, loss, steps=4, remedies=[Remedy("none", lambda model, context: "nothing")])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    assert batches[0][0].grad is None
    assert trials["none"].losses == trials["as it is"].losses


def test_the_input_is_standardised_and_not_the_target() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = [(torch.randn(32, 3), 100 * x) for x, _ in data(2)]
    trials = torchsat.try_remedies(model, batches, lambda m, b: (m(b[1]) - b[0]).square().mean(), steps=3)
    assert trials["standardised inputs"].worst("saturated") < 0.2 < trials["as it is"].worst("saturated")  # type: ignore[operator]


def test_a_frozen_layer_is_not_drawn_anew() -> None:
    model = stack(nn.Tanh, depth=2)
    model.block0.requires_grad_(False)
    assert torchsat.try_remedies(model, data(2), loss, steps=2)["Xavier init"].change == "1 layers drawn anew, Xavier"


def trial(name: str, *ends: float, change: str = "changed", code: str = "") -> Trial:
    """A trial of one step for each seed, with these losses."""
    return Trial(name, change, tuple(ends[:1]), repeats=tuple((end,) for end in ends[1:]), code=code)


def test_the_table_begins_with_the_untouched_copy_and_is_sorted_by_what_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("as it is", "worse", "best", "diverged", "refused", "better")
    given = (trial("as it is", 2.0), trial("worse", 3.0), trial("best", 0.5, code="x = 1"), trial("diverged", math.nan), trial("refused"))
    trials = Trials((*given, trial("better", 1.0)), notes=("a note",))
    assert [each.remedy for each in trials.trials] == list(names)
    assert [each.remedy for each in trials.ranked] == ["as it is", "best", "better", "worse", "diverged", "refused"]
    monkeypatch.setenv("COLUMNS", "200")
    lines = str(trials).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:7]] == ["as it is", "best (best)", "better", "worse", "diverged", "refused"]
    assert [line.split("%")[0].split()[-1] for line in lines[2:5]] == ["25", "50", "150.0"]
    at = lines.index("a note")
    assert lines[at + 1] == ""
    assert " ".join(lines[at + 2 :]) == "best helps most: loss 0.5 where the untouched copy has 2, 25 % of it; print(trials.code()) prints it as code"
    assert repr(trials) == "<Trials of 5 remedies: best helps most: loss 0.5 where the untouched copy has 2, 25 % of it>"
    assert (trials.code(), trials.code("worse")) == ("x = 1", "")
    assert repr(trials["best"]) == "<Trial best: loss 0.5>"
    text = shown(trials)
    assert text.startswith("best helps most: loss 0.5")
    assert text.index("as it is") < text.index("best ★") < text.index("better") < text.index("worse") < text.index("refused")
    assert len(trials._repr_html_()) < 6000


def test_where_nothing_helps_no_remedy_is_marked() -> None:
    trials = Trials((trial("as it is", 1.0), trial("worse", 1.5)))
    assert "(best)" not in str(trials)
    assert "★" not in trials._repr_html_()
    assert str(trials).endswith("no remedy gives a lower loss than the untouched copy")
    assert trials.code() == ""
    negative = Trials((trial("as it is", -1.0), trial("better", -2.0)))
    assert negative.best.remedy == "better"
    assert "better helps: " in negative.sentence("better")


def test_a_difference_counts_where_it_is_larger_than_the_spread_over_seeds() -> None:
    trials = Trials((trial("as it is", 1.0, 1.2), trial("noisy", 0.2, 1.4), trial("sure", 0.5, 0.52), trial("broken", 0.1, math.nan)))
    assert trials["noisy"].loss == pytest.approx(0.8)
    assert trials["noisy"].spread == pytest.approx(1.2 / math.sqrt(2))
    assert "noisy changes little: " in trials.sentence("noisy")
    assert "sure helps: " in trials.sentence("sure")
    assert "broken makes it diverge: " in trials.sentence("broken")
    assert trials.best.remedy == "sure"
    assert trials.best is trials.cured
    noisy = Trials((trial("as it is", 1.0, 1.2), trial("noisy", 0.2, 1.4, code="x = 1")))
    assert (noisy.best.remedy, noisy.cured, noisy.code()) == ("noisy", None, "x = 1")
    told = "no remedy surely helps: at best noisy, loss 0.8 where the untouched copy has 1.1, 73 % of it; too little to tell"
    assert noisy.summary == told
    assert " ".join(noisy.cure.replace("\n#", "").split()) == f"# {told}"
    assert "(best)" not in str(noisy)
    assert "★" not in noisy._repr_html_()
    assert "x = 1" not in noisy._repr_html_()
    assert "0.51 ± 0.014" in str(trials)


def test_what_to_apply_is_printed_as_code_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    nn.init.normal_(model.get_parameter("0.weight"), std=30.0)
    x = torch.randn(64, 4)
    before, batches = state(model), [(x, x.sum(1, keepdim=True))]
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    given: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2), "steps": 30, "progress": False}
    wanted = tuple(each for each in REMEDIES if each.name in ("Xavier init", "BatchNorm"))
    trials = torchsat.try_remedies(model, batches, loss, remedies=wanted, apply=True, **given)
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {trials.best.remedy} helps most: loss ")
    assert printed.endswith(f"{trials.code()}\n")
    assert same(before, state(model))
    exec(printed, {"model": model})
    assert not same(before, state(model))
    worse = Remedy(
        "worse",
        lambda model, context: str(model.get_parameter("0.weight").data.mul_(100.0).shape),
        code=lambda context: "model[0].weight.data *= 100",
    )
    torchsat.try_remedies(model, batches, loss, remedies=[worse], apply=True, **given)
    assert capsys.readouterr().out == "# no remedy gives a lower loss than the untouched copy\n"
    torchsat.try_remedies(model, batches, loss, remedies=[worse], **given)
    assert capsys.readouterr().out == ""
    silent = Trials((trial("as it is", 2.0), trial("mine", 0.5)))
    assert "the remedy does not say its change as code" in " ".join(silent.cure.replace("\n#", "").split())


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_table_is_as_wide_as_the_terminal_and_no_word_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = "not tried: no linear or convolutional layer with a weight of its own that learns feeds a hidden activation"
    odd = trial("standardised inputs of mine", 0.51234, 0.52345, change="12 activations are nn.LeakyReLU; 12 layers drawn anew, He")
    trials = Trials((trial("as it is", 1234567.0, 1230000.0), odd, trial("refused", change=changed)), (changed,))
    monkeypatch.setenv("COLUMNS", str(width))
    lines = str(trials).splitlines()
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).split())
    told = f"{changed} {odd.change} {changed} 1.23e+06 0.518 0.518 ± 0.0079 standardised inputs of mine (best) of untouched".split()
    assert words >= set(told), set(told) - words


def test_seeds_vary_the_order_of_batches_and_the_draws_and_leave_no_trace() -> None:
    model = nn.Sequential(nn.Dropout(0.2), *stack(nn.Tanh))
    before = state(model), random.getstate()
    trials = torchsat.try_remedies(model, data(4), loss, steps=8, seeds=3, remedies=[REMEDIES[5], REMEDIES[-1]])
    assert same(before[0], state(model))
    assert before[1] == random.getstate()
    for each in trials.trials:
        assert len(each.ends) == 3
        assert len({each.losses, *each.repeats}) == 3
        assert each.loss == pytest.approx(sum(each.ends) / 3)
        assert each.spread == pytest.approx(float(np.std(each.ends, ddof=1)))
    # The first seed is what one seed alone would be, and another call finds the same.
    alone = torchsat.try_remedies(model, data(4), loss, steps=8, remedies=[REMEDIES[5]])
    again = torchsat.try_remedies(model, data(4), loss, steps=8, seeds=3, remedies=[REMEDIES[5]])
    assert alone["Xavier init"].losses == trials["Xavier init"].losses == again["Xavier init"].losses
    assert trials["Xavier init"].repeats == again["Xavier init"].repeats


class Images(nn.Module):
    """Convolutions, tokens, and a layer that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 6, 3), nn.Tanh()
        self.token, self.hidden = nn.Linear(6, 12, bias=False), nn.Tanh()
        self.frozen, self.last, self.head = nn.Linear(12, 12), nn.Sigmoid(), nn.Linear(12, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x.unflatten(1, (1, 8, 8)))).flatten(2).transpose(1, 2)
        return self.head(self.last(self.frozen(self.hidden(self.token(x)).mean(1))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [lambda: stack(nn.Tanh), Images])
@pytest.mark.parametrize("remedy", [each for each in REMEDIES if each.applies is None], ids=lambda remedy: remedy.name)
def test_the_code_of_a_remedy_does_what_the_remedy_did(make: Callable[[], nn.Module], remedy: Remedy) -> None:
    torch.manual_seed(3)
    model, batches = make(), data(2)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    context, _ = _context(_Plan(model, batches, loss, None, 1, 1, 1, {}))
    torch.manual_seed(7)
    remedy.apply(ours, context)
    torch.manual_seed(7)
    names = {"model": theirs, "optimizer": optimizer, "x": torch.cat([x for x, _ in batches]), "torch": torch}
    exec(remedy.as_code(context), names)
    given = torch.cat([x for x, _ in batches])
    assert torch.allclose(ours(given), theirs(names["x"]), rtol=1e-4, atol=1e-5)
    assert optimizer.param_groups[0]["lr"] == 0.5 * remedy.learning_rate
    assert [type(each) for each in ours.modules()] == [type(each) for each in theirs.modules()]


@pytest.mark.parametrize("x", [torch.ones(8, 64), torch.cat([torch.zeros(8, 63), torch.arange(8.0)[:, None]], 1)])
def test_the_code_of_standardised_inputs_never_divides_by_a_deviation_of_0(x: Tensor) -> None:
    (remedy,) = (each for each in REMEDIES if each.name == "standardised inputs")
    model = stack(nn.Tanh)
    batches = [(x, torch.zeros(8, dtype=torch.long))]
    context, _ = _context(_Plan(model, batches, loss, None, 1, 1, 1, {}))
    names: dict[str, object] = {"x": x.clone(), "torch": torch}
    exec(remedy.as_code(context), names)
    treated = copy.deepcopy(model)
    remedy.apply(treated, context)
    standardised = names["x"]
    assert isinstance(standardised, Tensor)
    assert standardised.isfinite().all()
    assert torch.allclose(model(standardised), treated(x), rtol=1e-4, atol=1e-5)
