"""What a notebook shows of each value: the verdict first, small, escaped, and without a colour of its own for text."""

import dataclasses
import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import torchsat
from tests.conftest import record
from tests.test_diagnosis import stack
from torchsat import Alert, Cause, Coverage, Snapshot
from torchsat.cards import ROWS, card
from torchsat.record import Nearest


class Balance(HTMLParser):
    """Finds whether every tag is closed, and collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(value: object) -> str:
    """The text of a card, which is well-formed and sets no colour of text but on a background of its own."""
    html = value._repr_html_()  # type: ignore[attr-defined]
    parsed = Balance(html)
    assert parsed.open == []
    for style in re.findall(r'style="([^"]*)"', html):
        colours = re.findall(r"(?:^|;)color:([^;]*)", style)
        assert colours in ([], ["inherit"]) or "background:#" in style, style
    return parsed.text


def alert(site: str = "a.act", **given: object) -> Alert:
    cause = Cause("init_too_large", 1.0, "a has a gain of 8", "draw it anew:\n    nn.init.zeros_(model.a)")
    values: dict[str, object] = {"value": 0.9, "threshold": 0.5, "since": 3, "step": 8, "firing": True, "message": "4 of 4 layers are saturated"}
    return Alert(site, "saturated", "critical", **{**values, "causes": (cause,), **given})  # type: ignore[arg-type]


def trained(model: nn.Module, steps: int = 6) -> torchsat.Monitor:
    torch.manual_seed(0)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    monitor.close()
    return monitor


def test_a_monitor_begins_with_the_verdict_and_what_to_try() -> None:
    monitor = trained(stack(nn.Tanh, gain=8.0))
    (first,) = monitor.alerts
    text = shown(monitor)
    assert text.startswith(f"critical {str(monitor.verdict).removeprefix('critical: ')}Try: {first.causes[0].advice.rstrip(':')}")
    assert first.causes[0].code in text
    assert repr(monitor) == f"<torchsat.Monitor: {monitor.verdict}; 3 sites, step 6, closed>"
    assert "critical: block0.act (tanh) and 2 more places: saturated (init_too_large), since step 0" in repr(monitor)
    assert text.rindex("block0.act") > text.index("health over the run")


def test_a_healthy_monitor_says_so_and_one_that_saw_nothing_does_not() -> None:
    assert re.match("healthy no alert was raised; nearest to a limit: .* of the way to a warning", shown(trained(stack(nn.ReLU), 3)))
    monitor = torchsat.watch(stack(nn.Tanh))
    assert repr(monitor.verdict) == "<Verdict not judged: nothing has been observed yet>"
    assert shown(monitor.verdict) == "not judged nothing has been observed yet"
    assert repr(monitor) == "<torchsat.Monitor: nothing observed yet; 0 sites, step 0>"
    assert shown(monitor).startswith("not judged Nothing has been observed yet.")
    monitor.close()


def test_an_alert_that_has_cleared_is_not_forgotten() -> None:
    told: list[Alert] = []
    model = stack(nn.Tanh, gain=8.0)
    monitor = torchsat.watch(model, every=1, errors="raise", on_alert=told.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(30):
        if step == 10:
            for each in model.parameters():
                each.data.mul_(0.1)
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    monitor.close()
    assert [each.firing for each in told] == [True, False]
    assert repr(monitor).startswith("<torchsat.Monitor: healthy: its alert has cleared;")


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (lambda: record("a", alert_level=1.0), "<Record a (tanh): critical>"),
        (lambda: record("a", alert_level=0.5), "<Record a (tanh): warning>"),
        (lambda: record("a", alert_level=0.0), "<Record a (tanh): healthy>"),
        (lambda: record("a", nonfinite=1, alert_level=0.0), "<Record a (tanh): not finite>"),
        (lambda: record("a"), "<Record a (tanh): not judged>"),
        (lambda: alert(also=("b", "c")), "<Alert critical: saturated at a.act and 2 more, since step 3>"),
        (lambda: alert(firing=False), "<Alert over: saturated at a.act, since step 3>"),
        (lambda: Snapshot(7, 0.0, (record("a", alert_level=0.0), record("b", alert_level=0.7))), "<Snapshot of step 7: 2 sites, 0 layers; worst: b"),
        (lambda: Snapshot(7, 0.0, ()), "<Snapshot of step 7: 0 sites, 0 layers>"),
        (lambda: Coverage(("a",), (("b", "why"),), (("module", 1),)), "<Coverage 1 site (1 module) seen, 1 unseen>"),
    ],
)
def test_a_value_is_one_short_line_and_has_a_card(make: Callable[[], object], begins: str) -> None:
    value = make()
    assert repr(value).startswith(begins)
    assert len(repr(value)) < 120
    assert shown(value)


def test_five_hundred_sites_stay_small_and_the_worst_stand_first() -> None:
    records = tuple(record(f"blocks.{k}.act", alert_level=1.0 if k == 321 else 0.7 if k == 77 else 0.1) for k in range(500))
    broken = dataclasses.replace(records[200], nonfinite=3, alert_level=0.0)
    snapshot = Snapshot(3, 0.0, (*records[:200], broken, *records[201:]), alerts=(alert(also=tuple(each.site for each in records)),))
    text = shown(snapshot)
    places = re.findall(r"blocks\.\d+\.act(?=not finite|critical|warning)", text)
    assert places == ["blocks.200.act", "blocks.321.act", "blocks.77.act"]
    assert f"and {500 - ROWS} more, none of them worse" in text
    assert len(snapshot._repr_html_()) < 15_000
    assert len(repr(snapshot)) < 200
    coverage = Coverage(tuple(each.site for each in records), tuple((f"kind{'x' * k}", "why " * 1000) for k in range(500)))
    assert len(coverage._repr_html_()) < 5_000


def test_a_snapshot_without_events_says_how_many_places_are_beyond_a_limit() -> None:
    sick = Snapshot(3, 0.0, (record("a", alert_level=1.0), record("b", alert_level=0.0)))
    assert shown(sick).startswith("critical 1 of 2 sites and layers are beyond a limit.")
    assert shown(Snapshot(3, 0.0, (record("b", alert_level=0.0),))).startswith("healthy No site and no layer is beyond a limit.")
    near = Snapshot(3, 0.0, (record("b", alert_level=0.0),), nearest=Nearest("b", "saturated", 0.5))
    assert shown(near).startswith("healthy No site and no layer is beyond a limit; nearest to a limit: b (tanh), 50 % of the way")
    assert shown(Snapshot(3, 0.0, (record("b"),), judged=False)).startswith("not judged no rules were given")


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x>', "&amp;'\"", "</table></div>"])
def test_whatever_a_user_names_is_escaped(hostile: str) -> None:
    cause = Cause(hostile, 1.0, hostile, f"{hostile}:\n    {hostile}")
    told = alert(hostile, message=hostile, also=(hostile,), causes=(cause,))
    values = (record(hostile, activation=hostile), told, Snapshot(1, 0.0, (record(hostile, alert_level=1.0),), alerts=(told,)))
    for value in (*values, Coverage((hostile,), ((hostile, hostile),))):
        html = value._repr_html_()
        assert escape(hostile) in html
        assert "<script" not in html
        assert "<img" not in html
        assert hostile in shown(value)


def test_what_has_no_card_is_refused() -> None:
    with pytest.raises(TypeError, match="there is no card of a int"):
        card(3)
