"""Causes, compared with sums worked out by hand and with faults that were built into small networks."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from torchsat import Alert, Snapshot, Weight
from torchsat.alerts import sentences
from torchsat.causes import Scene, explain, upstream_of
from torchsat.diagnosis import Diagnosis
from torchsat.expressions import attribute, initialiser, matrix, owner


def weight(name: str = "fc", feeds: str = "act", **given: object) -> Weight:
    values: dict[str, object] = {
        "fan_in": 64,
        "data": False,
        "learning_rate": 0.1,
        "n": 4096,
        "gain": 1.0,
        "norm": 8.0,
        "grad_norm": 1.0,
        "update_ratio": 1e-3,
        "input_rms": 1.0,
        "input_centred_share": 1.0,
        "input_n": 1000,
    }
    return Weight(name=name, feeds=(feeds,), **{**values, **given})  # type: ignore[arg-type]


def alert(site: str = "act", rule: str = "saturated", **given: object) -> Alert:
    values: dict[str, object] = {
        "severity": "critical",
        "value": 0.9,
        "threshold": 0.5,
        "since": 0,
        "step": 2,
        "firing": True,
        "message": f"{site} is bad",
    }
    return Alert(site, rule, **{**values, **given})  # type: ignore[arg-type]


def snapshot(*items: object, step: int = 0) -> Snapshot:
    records = tuple(item for item in items if isinstance(item, torchsat.Record))
    return Snapshot(step, 0.0, records, tuple(item for item in items if isinstance(item, Weight)))


def causes(now: Snapshot, first: Snapshot | None = None, **given: object) -> dict[str, float]:
    found = explain(alert(**given), Scene(now, first or now, now))  # type: ignore[arg-type]
    assert not found or sum(cause.share for cause in found) == pytest.approx(1)
    assert list(found) == sorted(found, key=lambda cause: -cause.share)
    assert all(cause.evidence and cause.remedy for cause in found)
    return {cause.name: cause.share for cause in found}


def test_shares_are_the_terms_of_the_logarithm() -> None:
    """The gain is 4 where tanh needs 1; the input has rms 6, and 3/4 of its mean square is offset. The terms are ln 4, 0.5 ln 4 and ln 3."""
    now = snapshot(record(z_rms=24.0), weight(data=True, gain=4.0, input_rms=6.0, input_centred_share=0.25))
    total = math.log(4) + math.log(6)
    assert causes(now) == pytest.approx(
        {"init_too_large": math.log(4) / total, "inputs_unscaled": math.log(3) / total, "inputs_uncentred": 0.5 * math.log(4) / total}
    )


def test_growth_and_alignment_are_learned() -> None:
    """The gain was 2 at the start and is 6 now; z is 3 times as large as the gain explains."""
    now = snapshot(record(z_rms=18.0), weight(gain=6.0), step=100)
    first = snapshot(record(), weight(gain=2.0))
    total = math.log(2) + math.log(3) + math.log(3)
    assert causes(now, first, since=50) == pytest.approx({"weight_growth": 2 * math.log(3) / total, "init_too_large": math.log(2) / total})


def test_inputs_of_a_hidden_layer_are_no_inputs() -> None:
    """The output of a sigmoid is un-centred by nature. It is no input of the model that the user could standardise."""
    now = snapshot(record(z_rms=6.0), weight(gain=9.0, input_rms=0.7, input_centred_share=0.1))
    assert set(causes(now)) == {"init_too_large"}


def test_blame_goes_back_through_an_unbounded_activation_but_not_through_a_norm() -> None:
    """ReLU passes on the size of its input: there is a gain of 10 before it, and an input of rms 20."""
    relu = record("relu", activation="relu", a_mean=20.0, a_std=30.0, z_rms=200.0)
    tanh = record("tanh", z_rms=math.hypot(20, 30), after=("relu",))
    layers = weight("one", "relu", data=True, gain=10.0, input_rms=20.0), weight("two", "tanh", gain=1.0, input_rms=math.hypot(20, 30))
    total = math.log(10 / math.sqrt(2)) + math.log(20)
    expected = {"inputs_unscaled": math.log(20) / total, "init_too_large": math.log(10 / math.sqrt(2)) / total}
    assert causes(snapshot(relu, tanh, *layers), site="tanh") == pytest.approx(expected)
    normed = replace(layers[1], input_rms=1.0), replace(tanh, z_rms=1.0)
    assert causes(snapshot(relu, normed[1], layers[0], normed[0]), site="tanh") == {"activation_choice": 1.0}


def test_remedies_name_the_users_own_modules() -> None:
    assert attribute("blocks.0.mlp.fc") == "model.blocks[0].mlp.fc"
    assert attribute("0") == "model[0]"
    assert matrix("a.b") == "model.a.b.weight"
    assert matrix("blocks.0.w", parameter=True) == "model.blocks[0].w"
    assert matrix("rnn.weight_ih_l0/forget") == "model.rnn.weight_ih_l0.chunk(4)[1]"
    assert matrix("up/0-63") == "model.up.weight[0:64]"
    assert initialiser("tanh", "0") == "nn.init.xavier_normal_({})"
    assert initialiser("silu", "a.b") == 'nn.init.kaiming_normal_({}, nonlinearity="relu")'
    assert initialiser("selu", "a") == 'nn.init.kaiming_normal_({}, nonlinearity="linear")'
    assert initialiser("sigmoid", "rnn.weight_hh_l0/forget") == "nn.init.orthogonal_({})"
    assert (owner("rnn.weight_ih_l0/forget"), owner("attn.in_proj_weight/q"), owner("up/0-63")) == ("model.rnn", "model.attn", "model.up")


def test_the_cause_names_the_part_of_a_layer_that_feeds_the_site() -> None:
    """The forget rows are too large; the layer as a whole, with three other gates, is not."""
    gates = weight("rnn.weight_ih_l0", "forget", gain=1.2), weight("rnn.weight_ih_l0/forget", "forget", gain=4.0)
    now = snapshot(record("forget", z_rms=4.0), *gates)
    (cause,) = explain(alert("forget"), Scene(now, now, now))
    assert (cause.name, "rnn.weight_ih_l0/forget has a gain of 4" in cause.evidence) == ("init_too_large", True)
    assert ".chunk(4)[1]" in cause.remedy


def test_evidence_names_what_was_measured_and_a_bias_is_blamed_for_what_it_does() -> None:
    """Inputs lie in [0, 1]. A bias of -5 shuts every unit; the offset of the inputs moves z by a tenth of that."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 1))
    x = (0.5 + 0.2 * torch.randn(512, 64)).clamp(0, 1)
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-5.0)
    told = [cause for each in torchsat.probe(model, x).alerts for cause in each.causes]
    assert [cause.name for cause in told] == ["dead_units", "inputs_uncentred"]
    assert told[0].share > 0.8
    offset, spread = x.mean(0).square().mean().sqrt().item(), x.var(0, correction=0).mean().sqrt().item()
    assert f"share an offset of {offset:.3g} and differ by {spread:.3g}" in told[1].evidence
    # Without the bias, but with inputs that are shifted by far, the offset is the cause.
    with torch.no_grad():
        model.get_parameter("0.bias").zero_()
    model.get_parameter("0.weight").data.abs_().neg_()
    told = [cause for each in torchsat.probe(model, x).alerts for cause in each.causes]
    assert f"share an offset of {offset:.3g} and" in next(cause.evidence for cause in told if cause.name == "inputs_uncentred")


def test_xavier_alone_is_not_said_to_rescue_a_stack_of_sigmoids() -> None:
    sites = [record(f"s{k}", activation="sigmoid", peak=0.25, z_rms=8.0) for k in range(3)]
    now = snapshot(*sites, *(weight(f"w{k}", f"s{k}", gain=8.0) for k in range(3)))
    (cause,) = explain(alert("s0"), Scene(now, now, now))
    assert "no initialisation lets gradients through 3 layers of sigmoid" in cause.remedy
    assert "nn.BatchNorm before each" in cause.remedy


CHAIN = [record("a"), record("b", after=("a",)), record("c", after=("b",)), record("other")]


def test_upstream() -> None:
    assert upstream_of("c", CHAIN) == {"a", "b"}
    assert upstream_of("a", CHAIN) == set()


def test_alerts_of_one_origin_are_one_alert() -> None:
    raw = [alert("b"), alert("c", "stuck_units"), alert("a", "vanishing_gradient", severity="warning"), alert("other")]
    diagnosis = Diagnosis()
    # Of `other` alone the weights are too large.
    told = diagnosis.judge(raw, raw, snapshot(*CHAIN, weight(feeds="other", gain=8.0), step=2))
    assert {(each.site, each.rule): each.also for each in told} == {("b", "saturated"): ("a", "c"), ("other", "saturated"): ()}
    assert diagnosis.firing == told
    # If nothing is new, nothing is told again.
    assert diagnosis.judge([], raw, snapshot(*CHAIN, step=3)) == ()


def test_the_origin_stays_while_others_suffer() -> None:
    raw = [alert("a"), alert("b")]
    diagnosis = Diagnosis()
    assert [each.site for each in diagnosis.judge(raw, raw, snapshot(*CHAIN, step=2))] == ["a"]
    over = alert("a", firing=False, message="a: no longer saturated")
    assert diagnosis.judge([over], raw[1:], snapshot(*CHAIN, step=9)) == ()
    (still,) = diagnosis.firing
    assert (still.site, still.also, still.worst) == ("a", ("b",), "b")
    assert still.message == "b is bad, since step 0. It began at a (tanh) at step 0, which has recovered"
    gone = alert("b", firing=False, message="b: no longer saturated")
    told = diagnosis.judge([gone], [], snapshot(*CHAIN, step=12))
    assert [(each.site, each.firing, each.message) for each in told] == [
        ("a", False, "a: no longer saturated; 1 other place no longer suffers either")
    ]
    assert diagnosis.firing == ()


def test_an_alert_that_turns_out_to_have_an_explanation_is_told_on() -> None:
    diagnosis = Diagnosis()
    first = [alert("a", "vanishing_gradient", severity="warning")]
    assert len(diagnosis.judge(first, first, snapshot(*CHAIN, step=2))) == 1
    told = diagnosis.judge([alert("c")], [*first, alert("c")], snapshot(*CHAIN, step=4))
    # It has become critical. Its origin has not changed.
    assert [(each.site, each.rule, each.severity, each.firing, each.also) for each in told] == [("a", "vanishing_gradient", "critical", True, ("c",))]
    assert diagnosis.firing == told


def test_of_two_alerts_of_one_place_the_one_that_was_told_stays() -> None:
    diagnosis = Diagnosis()
    first = [alert("a", "stuck_units", severity="warning")]
    diagnosis.judge(first, first, snapshot(*CHAIN, step=2))
    # `Judge.firing` has the urgent one first.
    told = diagnosis.judge([alert("a")], [alert("a"), *first], snapshot(*CHAIN, step=4))
    assert [(each.site, each.rule, each.severity, each.firing, each.also) for each in told] == [("a", "stuck_units", "critical", True, ())]
    assert diagnosis.judge([], [alert("a"), *first], snapshot(*CHAIN, step=8)) == ()


def test_an_alert_is_never_told_with_itself() -> None:
    rules = ("nonfinite", "saturated", "stuck_units", "attention_collapse", "exploding_gradient", "vanishing_gradient", "frozen_weights")
    for before in rules:
        for after in rules:
            diagnosis = Diagnosis()
            old, new = alert("a", before), alert("a", after)
            diagnosis.judge([old], [old], snapshot(*CHAIN, step=2))
            for event in diagnosis.judge([new], [new, old], snapshot(*CHAIN, step=4)):
                assert "a: told with a" not in event.message
                assert event.firing or event.message == f"a: told as {after} from here on"
                assert "\n".join(sentences(event)).count(f"a is {before}") <= 1
                assert "\n".join(sentences(event)).count(f"a is {after}") <= 1


def test_an_alert_that_worsens_is_told_again() -> None:
    diagnosis = Diagnosis()
    mild = [alert("a", severity="warning")]
    diagnosis.judge(mild, mild, snapshot(*CHAIN, step=2))
    worse = [alert("a", severity="warning"), alert("b")]
    told = diagnosis.judge([alert("b")], worse, snapshot(*CHAIN, step=4))
    assert [(each.site, each.severity, each.also) for each in told] == [("a", "critical", ("b",))]


def test_a_users_rule_is_its_own_origin() -> None:
    raw = [alert("a"), alert("b", "hot")]
    assert {each.rule for each in Diagnosis().judge(raw, raw, snapshot(*CHAIN, step=2))} == {"saturated", "hot"}


def test_the_sentences_of_an_alert() -> None:
    now = snapshot(*(replace(each, z_rms=8.0) for each in CHAIN), weight(feeds="a", gain=8.0))
    (told,) = Diagnosis().judge([alert("a")], [alert("a"), alert("b")], now)
    assert sentences(told) == [
        "2 of 4 tanh layers are saturated since step 0, worst a (tanh): a is bad. It began at a (tanh)",
        "Why: init_too_large: fc has a gain of 8 (rms(W) sqrt(fan_in)) where tanh wants 1",
        "Try: draw the weights anew as their activation needs them",
    ]


def stack(activation: Callable[[], nn.Module], depth: int = 3, gain: float = 1.0, width: int = 64) -> nn.Sequential:
    model = nn.Sequential()
    for k in range(depth):
        linear = nn.Linear(width, width)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(width))
        nn.init.zeros_(linear.bias)
        model.add_module(f"block{k}", nn.Sequential(OrderedDict(fc=linear, act=activation())))
    model.add_module("head", nn.Linear(width, 10))
    return model


def verdicts(model: nn.Module, inputs: Callable[[], Tensor], lr: float = 0.05, steps: int = 30) -> tuple[Alert, ...]:
    monitor = torchsat.watch(model, every=5, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        x = inputs()
        nn.functional.cross_entropy(model(x), (x.flatten(1)[:, :10] - x.mean()).argmax(1)).backward()
        optimizer.step()
    monitor.close()
    return monitor.alerts


def test_faults_are_named_at_their_source() -> None:
    normal = lambda: torch.randn(64, 64)  # noqa: E731
    (told,) = verdicts(stack(nn.Tanh, gain=8.0), normal)
    assert (told.site, told.causes[0].name, told.also) == ("block0.act", "init_too_large", ("block1.act", "block2.act"))
    layers = "".join(f"    model.block{k}.fc.weight,\n" for k in range(3))
    assert told.causes[0].code == f"for weight in (\n{layers}):\n    nn.init.xavier_normal_(weight)"
    (told,) = verdicts(stack(nn.Tanh), lambda: 50 * torch.randn(64, 64))
    assert (told.site, told.causes[0].name) == ("block0.act", "inputs_unscaled")
    (told,) = verdicts(stack(nn.Tanh), lambda: 20 + torch.randn(64, 64))
    assert (told.site, told.causes[0].name) == ("block0.act", "inputs_uncentred")
    (told,) = verdicts(stack(nn.Sigmoid, depth=12), normal)
    assert (told.rule, told.causes[0].name) == ("vanishing_gradient", "activation_choice")
    (told,) = verdicts(stack(nn.Tanh, depth=10, gain=0.3), normal)
    assert (told.rule, told.causes[0].name) == ("vanishing_gradient", "init_too_small")
    assert verdicts(stack(nn.Tanh), normal) == ()


def test_only_the_layer_that_is_wrong_is_named() -> None:
    model = stack(nn.Tanh)
    with torch.no_grad():
        model.block1.fc.weight *= 10  # type: ignore[operator,union-attr]
    (told,) = verdicts(model, lambda: torch.randn(64, 64))
    assert (told.site, told.causes[0].name) == ("block1.act", "init_too_large")
    assert "model.block1.fc.weight" in told.causes[0].remedy


def test_the_order_is_that_of_data_not_of_registration() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.act2 = nn.Linear(64, 64), nn.Tanh()
            self.head = nn.Linear(64, 10)
            self.early, self.act1 = nn.Linear(64, 64), nn.Tanh()
            for layer in (self.last, self.early):
                nn.init.normal_(layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act2(self.last(self.act1(self.early(x)))))  # type: ignore[no-any-return]

    (told,) = verdicts(Net(), lambda: torch.randn(64, 64))
    assert (told.site, told.also) == ("act1", ("act2",))


def test_dead_units_and_non_finite_numbers() -> None:
    model = stack(nn.ReLU, gain=math.sqrt(2))
    with torch.no_grad():
        model.block0.fc.bias -= 10  # type: ignore[operator,union-attr]
    (told,) = verdicts(model, lambda: torch.randn(64, 64))
    assert (told.site, told.causes[0].name) == ("block0.act", "dead_units")

    def broken() -> Tensor:
        x = torch.randn(64, 64)
        x[3, 5] = math.inf
        return x

    (told,) = verdicts(stack(nn.Tanh), broken)
    assert (told.rule, told.site, told.causes[0].name) == ("nonfinite", "block0.act", "numeric_range")
    exploded = verdicts(stack(nn.ReLU, depth=6, gain=30.0), lambda: torch.randn(64, 64), lr=1.0)
    assert (exploded[0].rule, exploded[0].causes[0].name) == ("nonfinite", "init_too_large")


def test_collapsed_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.head = nn.Linear(64, 10)
            with torch.no_grad():
                self.attention.in_proj_weight[:128] *= 60

        def forward(self, x: Tensor) -> Tensor:
            tokens = x[:, None, :] * torch.linspace(-1, 1, 9)[:, None]
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))  # type: ignore[no-any-return]

    (told,) = verdicts(Net(), lambda: torch.randn(64, 64))
    assert (told.rule, told.site, told.causes[0].name) == ("attention_collapse", "attention/softmax", "softmax_logits")
    assert "model.attention" in told.causes[0].remedy


def test_what_lies_between_layer_and_activation_is_not_blamed_on_the_inputs() -> None:
    model = stack(nn.Tanh)
    with torch.no_grad():
        for block in (model.block0, model.block1, model.block2):
            block.fc.bias.fill_(8)  # type: ignore[operator,union-attr]
    (told,) = torchsat.probe(model, torch.randn(256, 64)).alerts
    assert (told.site, told.causes[0].name) == ("block0.act", "init_too_large")
    assert told.causes[0].remedy.startswith("set the bias of model.block0.fc and of 2 more layers to 0")


def test_a_layer_that_the_model_itself_feeds_too_much() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            with torch.no_grad():
                self.embedding.weight *= 50

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.fc(self.embedding(x))))  # type: ignore[no-any-return]

    (told,) = torchsat.probe(Net(), torch.randint(50, (512,))).alerts
    assert (told.site, told.causes[0].name) == ("tanh", "inputs_unscaled")
    assert "which the model itself makes, has an rms of 5" in told.causes[0].evidence or "rms of 4" in told.causes[0].evidence
    assert "make what comes into model.fc smaller" in told.causes[0].remedy


DRAWING = ("nn.init", "nitialis", "draw", "bias of", "replace")
"""Words of remedies that undo what a network has learned."""


def scenes() -> dict[str, tuple[Alert, list[object]]]:
    """For each rule an alert and what was measured, at weights that are too large or too small."""
    large = weight(data=True, gain=9.0, input_rms=1.0)
    small = [weight(f"w{k}", f"s{k}", gain=0.2) for k in range(4)]
    sigmoids = [record(f"s{k}", activation="sigmoid", peak=0.25, grad_z_rms=1.0) for k in range(4)]
    shut = record(activation="relu", tails="low", saturated=0.99, stuck=0.9, z_mean=-5.0)
    attention = record("attention/softmax", activation="softmax", kind="softmax", logit_std=9.0, log_keys=2.0)
    return {
        "saturated, gain": (alert(), [record(z_rms=9.0), large]),
        "saturated, bias": (alert(), [record(z_rms=9.0), weight()]),
        "saturated, drift": (alert(), [record(z_mean=5.0, z_std=1.0, z_rms=0.9), weight()]),
        "saturated, choice": (alert(), [record(), weight()]),
        "saturated, stack": (alert("s0"), [*sigmoids, *(replace(each, gain=8.0) for each in small)]),
        "stuck_units": (alert(rule="stuck_units"), [shut, weight()]),
        "vanishing_gradient, gain": (alert("s0", "vanishing_gradient"), [*(replace(each, peak=1.0) for each in sigmoids), *small]),
        "vanishing_gradient, choice": (alert("s0", "vanishing_gradient"), [*sigmoids, *small]),
        "vanishing_gradient, shut": (alert(rule="vanishing_gradient"), [shut, weight(gain=1.4)]),
        "exploding_gradient": (alert(rule="exploding_gradient"), [record(), large]),
        "attention_collapse": (alert("attention/softmax", "attention_collapse"), [attention]),
        "a rule of the user's": (alert(rule="mine"), [record(z_rms=9.0), large]),
    }


@pytest.mark.parametrize("case", scenes())
@pytest.mark.parametrize("began", [0, 2])
def test_no_remedy_undoes_what_loaded_weights_have_learned(case: str, began: int) -> None:
    """Whether the condition was there when the run began, or came two steps later."""
    raised, items = scenes()[case]
    raised = replace(raised, since=began)
    marks = [weight(f"other{k}", "else", unevenness=value) for k, value in enumerate((30.0, 12.0, -0.5))]
    fresh, trained = (
        snapshot(*items, *(replace(each, unevenness=each.unevenness and scale * each.unevenness) for each in marks)) for scale in (0.1, 1.0)
    )

    def remedies(now: Snapshot) -> list[str]:
        return [cause.remedy for cause in explain(raised, Scene(replace(now, step=began), now, now))]

    assert any(word in remedy for remedy in remedies(fresh) for word in DRAWING) or "bias" in case
    assert not [remedy for remedy in remedies(trained) for word in DRAWING if word in remedy]
    assert "init_too_large" not in {cause.name for cause in explain(raised, Scene(trained, trained, trained))}


def test_large_weights_that_came_trained_have_grown_before_the_run() -> None:
    now = snapshot(record(z_rms=9.0), weight(data=True, gain=9.0, input_rms=1.0, unevenness=20.0))
    (cause,) = explain(alert(), Scene(now, now, now))
    assert (cause.name, cause.share) == ("weight_growth", 1.0)
    assert cause.evidence == "fc has a gain of 9 (rms(W) sqrt(fan_in)) where tanh wants 1; the weights came trained"
    assert cause.remedy.startswith("nothing, if the network does its task; if not, compare the scale of its inputs")


def test_a_network_that_is_loaded_and_a_new_one_are_told_apart() -> None:
    """The same fault, twice: weights that are four times too large, drawn by torch, and learned before the run."""
    advice = []
    for learned in (False, True):
        torch.manual_seed(0)
        model = stack(nn.Tanh)
        with torch.no_grad():
            for block in (model.block0, model.block1, model.block2):
                if learned:
                    block.fc.weight *= torch.linspace(0.1, 2, 64)  # type: ignore[operator,union-attr]
                block.fc.weight *= 6  # type: ignore[operator,union-attr]
        advice.append([(told.rule, told.causes[0].name, "nn.init" in told.causes[0].remedy) for told in verdicts(model, lambda: torch.randn(64, 64))])
    # What is saturated at the start is told of the new one only.
    assert advice == [[("saturated", "init_too_large", True)], []]
