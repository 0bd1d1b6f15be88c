"""The causes of trainings whose fault is built in, with their figures read back from the snapshots, and with the code of their remedies executed."""

import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from tests.test_diagnosis import alert, snapshot, weight
from torchsat import Alert, Record, Snapshot, Weight
from torchsat.causes import Moment, Scene, explain, remember
from torchsat.expressions import GAIN, spoken
from torchsat.percent import percent
from torchsat.report import report
from torchsat.tensorboard.stock import alert_table

Data = Callable[[], Tensor]


class Own(nn.Module):
    """A linear layer whose weight is a parameter that stands the other way round, so that its input is not measured."""

    def __init__(self, gain: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(gain / 8 * torch.randn(64, 64)), nn.Parameter(torch.full((64,), float(bias)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


class Scaled(nn.Module):
    """A linear layer whose weight is computed in each pass, so that it is not seen at all."""

    def __init__(self, gain: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.w, self.gain, self.shift = nn.Parameter(torch.randn(64, 64)), gain / 8, shift

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.gain) + self.shift


def stack(
    activation: Callable[[], nn.Module] = nn.Tanh, depth: int = 3, layer: Callable[[], nn.Module] | None = None, gain: float = 1.0
) -> nn.Sequential:
    """Hidden layers of 64 units, and an output of 10."""

    def drawn() -> nn.Module:
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight, std=gain * (math.sqrt(2) if activation is nn.ReLU else 1.0) / 8)
        nn.init.zeros_(linear.bias)
        return linear

    model = nn.Sequential()
    for k in range(depth):
        model.add_module(f"block{k}", nn.Sequential(OrderedDict(fc=(layer or drawn)(), act=activation())))
    return model.append(nn.Linear(64, 10))


def biased(amount: float, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    model = stack(activation)
    with torch.no_grad():
        for k in range(3):
            model.get_parameter(f"block{k}.fc.bias").fill_(amount)
    return model


def inputs(scale: float = 1.0, offset: float = 0.0) -> Data:
    """Inputs of which the largest of ten pixels is the class."""
    return lambda: offset + scale * torch.randn(64, 64)


def rows() -> nn.Module:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)
            with torch.no_grad():
                for parameter in self.rnn.parameters():
                    parameter.mul_(30)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])  # type: ignore[no-any-return]

    return Rows()


Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def sgd(rate: float = 0.05, **more: Any) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, rate, **more)


def adam(rate: float, **more: Any) -> Optimizer:
    return lambda parameters: torch.optim.AdamW(parameters, rate, **{"weight_decay": 0.0, **more})


def train(model: nn.Module, data: Data, optimizer: Optimizer, steps: int = 25) -> tuple[list[Alert], list[Snapshot]]:
    """The alerts and the snapshots of a training."""
    heard: list[Alert] = []
    kept: list[Snapshot] = []
    stepping = optimizer(model.parameters())
    with torchsat.watch(model, every=5, budget=None, errors="raise", on_alert=heard.append, sinks=[kept.append]):
        for _ in range(steps):
            x = data()
            stepping.zero_grad()
            F.cross_entropy(model(x), (x[:, :10] - x.mean()).argmax(1)).backward()
            stepping.step()
    return [each for each in heard if each.firing], kept


TRAININGS: dict[str, tuple[Callable[[], nn.Module], Data, Optimizer, tuple[str, ...]]] = {
    "inputs shifted": (stack, inputs(offset=20), sgd(), ("inputs_uncentred",)),
    "inputs too large": (stack, inputs(50), sgd(), ("inputs_unscaled",)),
    "relu, inputs shifted": (lambda: stack(nn.ReLU), inputs(offset=20), sgd(), ("inputs_uncentred",)),
    "relu, inputs too large": (lambda: stack(nn.ReLU), inputs(100), sgd(), ("inputs_unscaled", "weight_growth")),
    "weights too large": (lambda: stack(gain=8), inputs(), sgd(), ("init_too_large",)),
    "relu, weights too large": (lambda: stack(nn.ReLU, gain=8), inputs(), sgd(), ("init_too_large",)),
    "weights and inputs too large": (lambda: stack(gain=8), inputs(8), sgd(), ("init_too_large", "inputs_unscaled")),
    "weights and inputs too large, a bias": (lambda: biased(8, nn.Tanh), inputs(3), sgd(), ("init_too_large", "inputs_unscaled")),
    "weights too small": (lambda: stack(depth=10, gain=0.25), inputs(), sgd(), ("init_too_small",)),
    "relu, biases": (lambda: biased(-10), inputs(), sgd(), ("dead_units",)),
    "tanh, biases": (lambda: biased(8, nn.Tanh), inputs(), sgd(), ("init_too_large",)),
    "rate": (stack, inputs(), adam(0.3), ("weight_growth",)),
    "rate of SGD": (stack, inputs(), sgd(10.0), ("weight_growth",)),
    "relu, rate": (lambda: stack(nn.ReLU), inputs(), adam(1.0), ("weight_growth",)),
    "relu, rate and a small offset": (lambda: stack(nn.ReLU), inputs(offset=2), adam(1.0), ("weight_growth", "inputs_uncentred")),
    "weight decay": (lambda: stack(nn.ReLU, 5), inputs(), adam(3e-3, weight_decay=100.0), ("weight_decay",)),
    "weight decay of SGD": (lambda: stack(nn.Tanh, 6), inputs(), sgd(0.1, weight_decay=3.0), ("weight_decay",)),
    "sigmoids": (lambda: stack(nn.Sigmoid, 12), inputs(), sgd(), ("activation_choice",)),
    "gates": (rows, inputs(), adam(1e-3), ("init_too_large",)),
    "own weights too large": (lambda: stack(layer=lambda: Own(8)), inputs(), sgd(), ("init_too_large",)),
    "own weights, inputs too large": (lambda: stack(layer=Own), inputs(50), sgd(), ("inputs_unscaled",)),
    "own weights, biases": (lambda: stack(layer=lambda: Own(bias=8.0)), inputs(), sgd(), ("init_too_large",)),
    "own weights, rate": (lambda: stack(layer=Own), inputs(), sgd(10.0), ("weight_growth",)),
    "unseen weights too large": (lambda: stack(layer=lambda: Scaled(8)), inputs(), sgd(), ("init_too_large", "inputs_unscaled")),
    "unseen weights, inputs too large": (lambda: stack(layer=Scaled), inputs(50), sgd(), ("inputs_unscaled", "init_too_large")),
    "unseen weights, a shift": (lambda: stack(layer=lambda: Scaled(shift=8)), inputs(), sgd(), ("init_too_large", "inputs_unscaled")),
    "unseen weights, rate": (lambda: stack(layer=Scaled), inputs(), adam(3.0), ("weight_growth",)),
    "unseen weights too small": (lambda: stack(layer=lambda: Scaled(0.2), depth=8), inputs(), sgd(), ("init_too_small",)),
}


def figures(snapshots: list[Snapshot], text: str) -> list[str]:
    """The numbers of a text that are in no field of a record or layer of these snapshots, as fields are printed, and count none of them."""
    for name in sorted(
        {name for each in snapshots for name in (*(r.site for r in each.records), *(w.name for w in each.weights))}, key=len, reverse=True
    ):
        text = re.sub(rf"(?<![\w.]){re.escape(spoken(name))}(?![\w])|(?<![\w.]){re.escape(name)} (?=has|is|had)", " it ", text)
    known = {f"{gain:.3g}" for gain in (*GAIN.values(), 1.0)}
    for each in snapshots:
        known |= {str(each.step), *map(str, range(len(each.records) + 1))}
        items: list[Record | Weight] = [*each.records, *each.weights]
        for item in items:
            values = [value for field in fields(item) if isinstance(value := getattr(item, field.name), (int, float)) and not isinstance(value, bool)]
            for value in values:
                known |= {f"{value:.3g}", f"{value:.2g}", percent(value).removesuffix(" %"), percent(1 - value).removesuffix(" %")}
        for each_weight in each.weights:
            # The offset of an input, and what varies, follow from its rms and its centred share.
            rms, share = each_weight.input_rms, each_weight.input_centred_share
            if rms and share:
                known |= {f"{rms * math.sqrt(1 - share):.3g}", f"{rms * math.sqrt(share):.3g}", f"{1 / math.sqrt(share):.3g}"}
        spine = () if each.ledger is None else each.ledger.spine
        for kind in ("", *{entry.kind for entry in spine}):
            # What the parts of one kind give together, and all of them.
            factors = [entry.factor or 0.0 for entry in spine if kind in ("", entry.kind)]
            known |= {f"{math.prod(factors):.2g}", str(len(factors))}
    found = re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text.replace("rms(W) sqrt(fan_in)", "").replace("sqrt(2 ln T)", ""))
    return [number for number in found if number not in known and number.lstrip("-") not in known]


@pytest.mark.parametrize("name", TRAININGS)
def test_causes_are_told_with_figures_that_were_measured_and_their_cure_works(name: str) -> None:
    """The code of the first remedy is executed at the start of the same training, which then has no alert of this cause."""
    make, data, optimizer, wanted = TRAININGS[name]
    told, kept = train(make(), data, optimizer)
    names = [cause.name for cause in told[0].causes]
    assert set(names[: len(wanted)]) == set(wanted)
    assert names[0] == wanted[0] or told[0].causes[0].share < 0.6
    for each in told:
        for cause in each.causes:
            assert figures([one for one in kept if one.step <= each.step], cause.evidence) == [], cause.evidence
            assert not re.search(r"from (\S+) to \1\b", cause.evidence), cause.evidence
            assert ('group["lr"]' in cause.code) <= (cause.name == names[0] == "weight_growth")
    cause = told[0].causes[0]
    assert cause.code or "seen" in cause.evidence or name == "own weights, biases"
    if cause.code:
        model = make()
        stepping = optimizer(model.parameters())
        given = {"torch": torch, "nn": nn, "model": model, "optimizer": stepping, "x": torch.cat([data() for _ in range(20)])}
        exec(cause.code, given)
        x = given["x"]
        assert isinstance(x, Tensor)
        again, _ = train(model, lambda: x[torch.randint(len(x), (64,))], lambda parameters: stepping, 12)
        assert cause.name not in {one.name for each in again for one in each.causes[:1]}
        assert model(x).isfinite().all()


def test_the_figures_of_a_text_are_found() -> None:
    now = snapshot(record(z_rms=9.25), weight(gain=4.125))
    assert figures([now], "z of act has an rms of 9.25, with a gain of 4.12; 41 % of fc") == ["41"]


def shut(site: str = "act", **given: object) -> torchsat.Record:
    values: dict[str, object] = {"activation": "relu", "tails": "low", "saturated": 0.5, "stuck": 0.0, "z_mean": 0.0}
    return record(site, **{**values, **given})


def test_half_of_the_elements_of_a_rectifier_are_no_sign_that_units_were_shut_from_the_start() -> None:
    """Half of the elements are shut at the first observation, as of any ReLU, and 0.55 when 40 % of the units have died."""
    first = snapshot(shut(), weight())
    now = snapshot(shut(saturated=0.55, stuck=0.4, z_mean=-2.0), weight(gain=1.05, update_ratio=0.4), step=50)
    moments = remember(remember((), first), now)
    (cause,) = explain(alert(rule="stuck_units", since=40), Scene(now, first, now, moments=moments))
    assert cause.name == "weight_growth"
    assert cause.evidence == "z of act has moved from 0 +- 1 to -2 +- 1; step 50 changed fc by 40 % of itself, after 0.1 % of itself at step 0"
    assert "lower the learning rate from 0.1 to 0.002" in cause.remedy
    # The same units were dead at the first observation: then it was no step of this run.
    first = snapshot(shut(stuck=0.4, z_mean=-2.0), weight())
    moments = remember(remember((), first), now)
    told = explain(alert(rule="stuck_units", since=40), Scene(now, first, now, moments=moments))
    assert [each.name for each in told] == ["dead_units", "weight_growth"]
    assert told[0].evidence == "z of act was -2 +- 1 at the first observation: 40 % of its units are shut"


def test_where_nothing_was_too_large_a_step_the_offset_is_told_and_no_rate() -> None:
    first = snapshot(shut(), weight(data=True, input_rms=5.0, input_centred_share=0.05))
    now = snapshot(shut(stuck=0.4, z_mean=-2.0), weight(data=True, input_rms=5.0, input_centred_share=0.05), step=500)
    told = explain(alert(rule="stuck_units", since=400), Scene(now, first, now, moments=remember(remember((), first), now)))
    assert [cause.name for cause in told] == ["inputs_uncentred", "weight_growth"]
    assert 'group["lr"]' not in "".join(cause.remedy for cause in told)


def test_exploding_gradients_of_inputs_that_are_too_large_have_a_cause() -> None:
    now = snapshot(shut(), weight(data=True, gain=1.4, input_rms=120.0, input_centred_share=0.6))
    (cause, second) = explain(alert(rule="exploding_gradient"), Scene(now, now, now))
    assert (cause.name, second.name) == ("inputs_unscaled", "inputs_uncentred")
    # sqrt(0.6) x 120 = 93.0, sqrt(0.4) x 120 = 75.9, 1 / sqrt(0.6) = 1.29; and 93.0 x 1.29 = 120
    assert cause.evidence == "samples of the input of fc differ by 93, where about 1 is expected: that alone makes z 93 times as large"
    told = "samples of the input of fc share an offset of 75.9 and differ by 93: the offset alone makes z 1.29 times as large"
    assert second.evidence == told
    assert math.exp(math.log(93 * 1.29) * cause.share) == pytest.approx(93, rel=1e-2)


@pytest.mark.parametrize(
    ("spread", "mean", "told"),
    [
        (4.0, 130.0, {"inputs_uncentred": "130 and differ by 4: the offset alone makes z 32.5 times as large", "inputs_unscaled": "differ by 4,"}),
        (0.1, 50.0, {"inputs_uncentred": "50 and differ by 0.1: the offset alone makes z 50 times as large as inputs that vary by 1 would"}),
        (0.0, 50.0, {"inputs_uncentred": "50 and differ by 0: the offset alone makes z 50 times as large as inputs that vary by 1 would"}),
        (0.0, 1e6, {"inputs_uncentred": "1e+06 and differ by 0: the offset alone makes z 1e+06 times as large as inputs that vary by 1 would"}),
        (30.0, 0.0, {"inputs_unscaled": "the input of fc has an rms of 30; it should vary by about 1"}),
    ],
)
def test_the_offset_and_the_spread_of_inputs_are_told_as_factors_of_z(spread: float, mean: float, told: dict[str, str]) -> None:
    rms = math.hypot(spread, mean)
    now = snapshot(record(), weight(data=True, input_rms=rms, input_centred_share=(spread / rms) ** 2))
    causes = {cause.name: cause for cause in explain(alert(), Scene(now, now, now))}
    assert causes.keys() == told.keys()
    for name, text in told.items():
        assert text in causes[name].evidence
    if len(told) == 2:
        assert causes["inputs_uncentred"].share == pytest.approx(math.log(rms / spread) / math.log(rms), abs=1e-3)


RATES: dict[str, tuple[tuple[float, ...], int, str]] = {
    "at once": ((1e-3, 1e-3, 1e-3, 0.1, 0.1), 40, "the learning rate rose from 0.001 to 0.1 between steps 20 and 30, 10 steps before this began"),
    "seen with the rise": (
        (1e-3, 1e-3, 1e-3, 0.1, 0.1),
        30,
        "the learning rate rose from 0.001 to 0.1 between steps 20 and 30, just before this was seen",
    ),
    "a restart": ((0.1, 0.03, 0.01, 0.1, 0.03), 40, "the learning rate rose from 0.01 to 0.1 between steps 20 and 30, 10 steps before this began"),
    "a rise that is too small": ((1e-2, 1e-2, 1e-2, 0.028, 0.028), 40, ""),
    "a warm-up": ((1e-4, 1e-3, 1e-2, 0.1, 0.1), 40, ""),
    "a warm-up from 0": ((0.0, 1e-2, 0.1, 0.1, 0.1), 20, ""),
    "long before": ((1e-3, 1e-3, 0.1, *[0.1] * 9), 100, ""),
    "afterwards": ((1e-3, 1e-3, 1e-3, 1e-3, 0.1), 30, ""),
    "constant": ((0.1,) * 5, 40, ""),
}


@pytest.mark.parametrize("rule", ["saturated", "attention_collapse"])
@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate_that_rose_just_before_is_named_once(name: str, rule: str) -> None:
    rates, since, told = RATES[name]
    moments: tuple[Moment, ...] = ()
    made = [snapshot(record(z_rms=1.0), weight(learning_rate=rate, gain=1.0), step=10 * at) for at, rate in enumerate(rates)]
    for each in made:
        moments = remember(moments, each)
    last = 10 * (len(rates) - 1)
    kind: dict[str, Any] = {"kind": "softmax", "activation": "softmax", "logit_std": 9.0, "log_keys": 2.0} if rule == "attention_collapse" else {}
    now = snapshot(record(z_rms=9.0, **kind), weight(learning_rate=rates[-1], gain=9.0), step=last)
    causes = explain(alert(rule=rule, since=since), Scene(now, made[0], made[0], moments=moments))
    said = " ".join(cause.evidence for cause in causes)
    assert said.count("learning rate") == bool(told)
    assert said.count(told) >= 1
    assert causes
    kept = tuple(Moment(**{key: value for key, value in each.as_dict().items() if key != "rates"}) for each in moments)
    old = explain(alert(rule=rule, since=since), Scene(now, made[0], made[0], moments=kept))
    assert "learning rate" not in " ".join(cause.evidence for cause in old)  # a state of an earlier version does not know the rates


def test_a_rate_of_one_group_that_rises_in_a_training_is_named_with_its_layer() -> None:
    model, heard = stack(), list[Alert]()
    optimizer = torch.optim.Adam([{"params": model[:1].parameters()}, {"params": model[1:].parameters()}], lr=1e-3)
    with torchsat.watch(model, every=5, budget=None, errors="raise", on_alert=heard.append):
        for step in range(70):
            optimizer.param_groups[0]["lr"] = 1e-3 if step < 33 else 1.0
            x = torch.randn(64, 64)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
            optimizer.step()
    evidence = [cause.evidence for each in heard for cause in each.causes]
    assert any("the learning rate of block0.fc rose from 0.001 to 1 between steps 32 and 35" in each for each in evidence), evidence
    advice = {cause.remedy for each in heard for cause in each.causes if cause.name == "weight_growth"}
    assert (
        "begin again from a checkpoint of step 32 or before, with the learning rate of block0.fc at 0.001 and not 1, or let it rise slowly" in advice
    )


def test_a_rate_that_rose_is_set_back_to_what_it_was() -> None:
    rates, moments = (1e-3, 1e-3, 1e-3, 1e30), tuple[Moment, ...]()
    made = [
        snapshot(record(z_rms=1.0), weight(learning_rate=rate, gain=1.0, update_ratio=9.0 if rate > 1 else 1e-3), step=10 * at)
        for at, rate in enumerate(rates)
    ]
    for each in made:
        moments = remember(moments, each)
    now = snapshot(record(z_rms=9.0), weight(learning_rate=1e30, gain=9.0, update_ratio=9.0), step=30)
    causes = {cause.name: cause for cause in explain(alert(since=30), Scene(now, made[0], made[0], moments=moments))}
    assert causes["weight_growth"].advice == (
        "begin again from a checkpoint of step 20 or before, with the learning rate at 0.001 and not 1e+30, or let it rise slowly:"
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e30)
    exec(causes["weight_growth"].code, {"optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3, rel=1e-2)


def test_weights_that_were_right_at_first_and_grew_a_little_are_no_growth() -> None:
    first, now = snapshot(record(z_rms=1.0), weight(gain=1.45)), snapshot(record(z_rms=1.0), weight(gain=1.4501), step=60)
    told = explain(alert(since=50), Scene(now, first, now, moments=remember(remember((), first), now)))
    assert "weight_growth" not in {cause.name for cause in told}


OUTPUT: dict[str, Any] = {"activation": "sigmoid", "output": True, "peak": 0.25, "high": 0.99, "saturated": 0.99, "low": 0.0}


def test_an_output_that_is_asked_for_more_than_it_can_give() -> None:
    """The elements on the plateau are asked to go on (trapped is 0), and the gradient does not fall."""

    start = record(**OUTPUT, grad_a_rms=0.52)
    asked = record(**OUTPUT, z_rms=9.0, z_mean=9.0, a_mean=1.0, a_std=0.0, grad_a_rms=0.5, blocked=0.97, trapped=0.0)
    first, now = snapshot(start, weight()), snapshot(asked, weight(gain=3.0), step=200)
    (cause,) = explain(alert(since=150), Scene(now, first, now, moments=remember(remember((), first), now)))
    assert cause.name == "activation_choice"
    assert "act gives 1 +- 0, at the end of the range of sigmoid" in cause.evidence
    assert "dL/da is 0.5, and was 0.52 at the first observation" in cause.evidence
    assert cause.code == 'model.set_submodule("act", nn.Identity())'


@pytest.mark.parametrize("rule", ["saturated", "stuck_units", "outputs", "gates"])
@pytest.mark.parametrize("place", [{"output": True}, {"gate": True}, {"kind": "recurrent"}, {"kind": "call"}])
def test_a_cause_comes_out_at_any_kind_of_site(rule: str, place: dict[str, Any]) -> None:
    """A step that was far too large has thrown a site onto its plateau; its layer is seen or not."""
    for feeds in ("act", "elsewhere"):
        first = snapshot(record(**place), weight(feeds=feeds))
        now = snapshot(record(**place, z_mean=9.0, z_std=1.0, z_rms=9.06), weight(feeds=feeds, gain=7.0, update_ratio=0.6), step=40)
        moments = remember(remember((), first), now)
        (cause,) = explain(alert(rule=rule, since=35), Scene(now, first, now, moments=moments))
        assert cause.name == "weight_growth"
        assert figures([first, now], cause.evidence) == []


def drawn(kind: type, names: dict[str, object], numbers: random.Random) -> object:
    """A record or a layer in which each number is one of a few, very large ones and None among them."""
    values = {field.name: names.get(field.name) for field in fields(kind)}
    for field in fields(kind):
        if "float" in str(field.type) and field.name not in names:
            values[field.name] = numbers.choice((None, 0.0, 1e-8, 0.3, 1.0, 7.0, 300.0, 1e30, math.inf if kind is Weight else 1e300))
    return kind(**values)


@pytest.mark.parametrize(
    "rule",
    ["saturated", "stuck_units", "vanishing_gradient", "exploding_gradient", "frozen_weights", "shrunk_weights", "faded_input", "nonfinite", "mine"],
)
def test_no_numbers_make_an_explanation_fail(rule: str) -> None:
    numbers = random.Random(0)
    whole = {
        "n": 100,
        "elements": 100,
        "nonfinite": 0,
        "grad_n": 0,
        "grad_nonfinite": 0,
        "histogram": None,
        "heads": None,
        "units": 64,
        "last": False,
        "losses": ("mse_loss", "log_softmax"),
    }
    for _ in range(300):
        made = []
        for step in (0, 7):
            records = [
                drawn(
                    torchsat.Record,
                    {
                        "site": site,
                        "after": after,
                        "kind": numbers.choice(("module", "call", "recurrent", "softmax")),
                        **whole,
                        "activation": numbers.choice(("tanh", "relu", "sigmoid", "selu")),
                        "tails": numbers.choice(("both", "low", "unknown")),
                        "output": numbers.random() < 0.2,
                        "gate": numbers.random() < 0.2,
                        "peak": numbers.choice((None, 0.25, 1.0)),
                    },
                    numbers,
                )
                for site, after in (("a", ()), ("b", ("a",)), ("c/relu", ("b", "gone")))
            ]
            facts = {"fan_in": 64, "n": 100, "input_n": 100, "parameter": False}
            weights = [
                drawn(Weight, {"name": name, "feeds": (feeds,), "data": name == "0", **facts}, numbers)
                for name, feeds in (("0", "a"), ("1", "b"), ("x", "c/relu"))
            ]
            made.append(snapshot(*records, *weights[: numbers.randint(0, 3)], step=step))
        first, now = made
        moments = remember(remember((), first), now)
        for since in (0, 5):
            told = explain(alert(numbers.choice("abc"), rule, since=since), Scene(now, first, first, moments=moments))
            assert all("None" not in cause.evidence + cause.remedy and ("nan" not in cause.evidence or rule == "nonfinite") for cause in told)
            for cause in told:
                compile(cause.code, "code", "exec")


def test_few_numbers_are_kept_of_the_observations_between() -> None:
    moments: tuple[Moment, ...] = ()
    for step in range(100):
        moments = remember(moments, snapshot(record(stuck=step / 100), weight(update_ratio=0.01 * step), step=step))
    assert [moment.step for moment in moments] == [0, 1, 2, *range(68, 100)]
    scene = Scene(snapshot(step=80), snapshot(), snapshot(), moments=moments)
    jump = scene.jump(["fc"])
    assert jump is not None
    assert jump.step == 80
    assert jump.ratio == pytest.approx(0.8)
    assert scene.stuck_at_first("act") == 0.0


def test_a_network_that_is_aligned_with_its_inputs_came_trained() -> None:
    """Small layers are never uneven. After some training each makes more of its input than weights that know nothing of it."""
    x = torch.randn(256, 64)
    fresh, trained = stack(), stack()
    stepping = torch.optim.SGD(trained.parameters(), 0.3)
    for _ in range(150):
        batch = torch.randn(64, 64)
        stepping.zero_grad()
        F.cross_entropy(trained(batch), batch[:, :10].argmax(1)).backward()
        stepping.step()
    for model, known in ((fresh, False), (trained, True)):
        first = torchsat.probe(model, x)
        assert Scene(first, first, first).trained is known


@pytest.mark.parametrize(
    "draw", [nn.init.orthogonal_, lambda w: nn.init.sparse_(w, 0.9), nn.init.trunc_normal_, nn.init.eye_, nn.init.xavier_uniform_]
)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_an_initialiser_draws_is_not_taken_for_trained(draw: Callable[[Tensor], object], activation: Callable[[], nn.Module]) -> None:
    model = stack(activation)
    for k in range(3):
        draw(model.get_parameter(f"block{k}.fc.weight"))
    for data in (inputs(), inputs(30, 20), lambda: torch.rand(64, 64)):
        first = torchsat.probe(model, data())
        assert not Scene(first, first, first).trained
    constant = stack(activation)
    for k in range(3):
        nn.init.constant_(constant.get_parameter(f"block{k}.fc.weight"), 0.1)
    first = torchsat.probe(constant, torch.randn(64, 64))
    assert not Scene(first, first, first).trained


def test_code_is_shown_on_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    told = torchsat.probe(stack(gain=8), torch.randn(64, 64))
    (cause,) = told.alerts[0].causes
    layers = "".join(f"    model.block{k}.fc.weight,\n" for k in range(3))
    assert cause.code == f"for weight in (\n{layers}):\n    nn.init.xavier_normal_(weight)"
    assert cause.remedy.startswith(cause.advice)
    assert "model.block2.fc.weight,<br>):<br>    nn.init.xavier&#95;normal&#95;(weight)</pre>" in alert_table(told.alerts)
    report(told)
    assert max(len(line) for line in cause.code.splitlines()) <= 76


def test_the_inputs_are_standardised_whatever_their_features_are() -> None:
    """A constant feature, one that is 0 throughout, one in thousands, one that is nearly constant."""
    told = torchsat.probe(stack(), 40 + 30 * torch.randn(64, 64))
    code = told.alerts[0].causes[0].code
    x = torch.stack([torch.full((500,), 1e4), torch.zeros(500), 3e3 + 1e3 * torch.randn(500), torch.eye(500)[3], 1e-4 * torch.randn(500)], 1)
    names: dict[str, object] = {"x": x}
    exec(code, names)
    done = names["x"]
    assert isinstance(done, Tensor)
    assert done.isfinite().all()
    assert done.abs().max() <= 5
    assert done[:, :2].abs().max() < 1e-2
    assert done[:, [2, 4]].std(0) == pytest.approx(1, abs=0.02)


def test_an_input_that_the_model_makes_is_large_because_of_what_makes_it() -> None:
    """At the first observation by weights that were drawn too large, later by weights that have grown; else by a branch that adds up."""

    def told(first_rms: float, rms: float, other_gain: float) -> list[tuple[str, str]]:
        def at(value: float, step: int) -> Snapshot:
            sites = (record("before", z_rms=1.0), record("act", after=("before",), z_rms=9.0, saturated=0.9 if step else 0.0))
            layers = (weight("fc0", feeds="before", gain=other_gain, data=True), weight(gain=1.0, input_rms=value, data=False))
            return Snapshot(step, 0.0, sites, layers)

        first, now = at(first_rms, 0), at(rms, 50)
        found = explain(alert(since=40), Scene(now, first, now, moments=remember(remember((), first), now)))
        return [(cause.name, cause.evidence) for cause in found]

    ((name, evidence),) = [each for each in told(1.0, 6.0, 1.0) if "which the model itself makes" in each[1]]
    assert name == "weight_growth"
    assert "the input of fc, which the model itself makes, has grown from an rms of 1 to 6" in evidence
    assert "inputs_unscaled" not in dict(told(1.0, 6.0, 1.0))
    assert "has an rms of 6 where 1 is expected" in dict(told(6.0, 6.0, 1.0))["inputs_unscaled"]
    assert "init_too_large" in dict(told(6.0, 6.0, 10.0))
    assert "inputs_unscaled" not in dict(told(6.0, 6.0, 10.0))
