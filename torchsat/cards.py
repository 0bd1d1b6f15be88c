"""What a notebook shows of a value: a small card of HTML that begins with the verdict. Never torch.

A card has a bounded size, whatever the size of the model: the worst sites stand first, and the rest is counted. All styles stand in the elements
themselves, since notebooks remove style sheets from files that they do not trust. Text has the colour of the notebook, light or dark; colours of ours
are behind it or beside it and half transparent. Everything that comes from the user is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape
from typing import Any

from torchsat.alerts import Episode
from torchsat.coverage import Coverage
from torchsat.percent import listed, number_or_dash, percent, percent_or_dash
from torchsat.record import Alert, Record, Snapshot, Weight
from torchsat.shown import WARNING, level_in_words
from torchsat.verdict import Health, Verdict, verdict_of, what_is_where

ROWS = 8
"""The most sites that a table shows, and the most alerts."""
STRIP = 32
"""How many columns the history of a site has."""
_NAMES = 6
"""The most names in a list of names."""
_WIDEST = 300
"""The most characters of one text, so that no name of a user's makes a card large."""

_COLOUR = {
    "healthy": "#3f9b5f",
    "near a warning": "#3f9b5f",
    "not judged": "#8a8f98",
    "in doubt": "#8a8f98",
    "warning": "#c98a1b",
    "critical": "#cf3f45",
    "not finite": "#8e44ad",
}
"""The colours of the words for how something is: readable as a background of white text, and visible on light and dark pages."""


@singledispatch
def card(value: Any) -> str:
    """The card of a value."""
    raise TypeError(f"there is no card of a {type(value).__name__}")


@dataclass(frozen=True)
class State:
    """What the card of a monitor shows."""

    verdict: Verdict
    alerts: Sequence[Alert]
    """Those that fire now."""
    snapshot: Snapshot | None
    """The newest one."""
    coverage: Coverage
    levels: Mapping[str, Sequence[float]]
    """For each site its `alert_level` over the run."""
    footing: str
    """How far the run is, and what observing has cost."""


@card.register
def monitor_card(state: State) -> str:
    """The verdict, the alerts, the worst sites with their history, and what is not seen."""
    if state.snapshot is None:
        return _card(_line("not judged", "Nothing has been observed yet."), _unseen(state.coverage), _faint(state.footing))
    return _card(
        _verdict(state.verdict),
        _sites(state.snapshot, state.levels),
        _alerts(state.alerts),
        _unseen(state.coverage),
        _faint(state.footing),
    )


@card.register
def _(snapshot: Snapshot) -> str:
    """What the observation told, and its worst sites. What fires since an earlier observation is not known here."""
    told = [alert for alert in snapshot.alerts if alert.firing]
    items: tuple[Record | Weight, ...] = (*snapshot.records, *snapshot.weights)
    words = [_word(item) for item in items]
    beyond = [word for word in ("not finite", "critical", "warning") if word in words]
    verdict = verdict_of(
        [Episode(alert, alert.since, None) for alert in told], what_is_where(snapshot.records, snapshot.weights), snapshot.judged, snapshot.nearest
    )
    if verdict.health.is_sick or verdict.health is Health.NOT_JUDGED:
        first = _verdict(verdict)
    elif beyond:
        first = _line(beyond[0], f"{sum(word in beyond for word in words)} of {len(items)} sites and layers are beyond a limit.")
    else:
        first = _line("healthy", "No site and no layer is beyond a limit" + (f"; {verdict.margin}." if verdict.margin else "."))
    return _card(first, _sites(snapshot, {}), _alerts(told), _faint(f"step {snapshot.step}, {len(snapshot.records)} sites"))


@card.register
def _(record: Record) -> str:
    role = ", an output" if record.output else ", a gate" if record.gate else ""
    rows = [
        ("saturated", percent_or_dash(record.saturated), "share of inputs on a plateau, where |f'| is below 5 % of its peak by default"),
        ("blocked", percent_or_dash(record.blocked), "of what the gradient asks for, the part that plateaus take"),
        ("trapped", percent_or_dash(record.trapped), "the part of that which asks to leave the plateau"),
        ("E|f'| / peak", number_or_dash(record.relative_derivative), "mean derivative: 1 is fully open, 0 is closed"),
        ("stuck units", percent_or_dash(record.stuck), "units saturated in at least 99 % of their newest samples"),
        ("attenuation", number_or_dash(record.attenuation), "what the activation does to the size of the gradient"),
        ("gradient", number_or_dash(record.grad_z_rms), "root mean square of dL/dz"),
        ("z", _spread(record.z_mean, record.z_std), "mean ± standard deviation of the inputs"),
        ("entropy", number_or_dash(record.entropy), "of the attention: 1 is even, 0 is one key alone"),
        ("not finite", str(record.nonfinite) if record.nonfinite else "-", "elements that are inf or nan"),
    ]
    shown = [(name, value, _dim(says)) for name, value, says in rows if value != "-"]
    return _card(_line(_word(record), f"<b>{_text(record.site)}</b> ({_text(record.activation)}{role})", raw=True), _table((), shown, raw=(1, 2)))


@card.register
def _(weight: Weight) -> str:
    rows = [
        ("gain", number_or_dash(weight.gain), "rms(W) sqrt(fan_in): 1 under Xavier, 1.41 under He"),
        ("gradient norm", number_or_dash(weight.grad_norm), "||dL/dW||"),
        ("update ratio", number_or_dash(weight.update_ratio), "||change of W|| / ||W|| by this step"),
        ("input rms", number_or_dash(weight.input_rms), "root mean square of the layer's input"),
    ]
    shown = [(name, value, _dim(says)) for name, value, says in rows if value != "-"]
    name = f"<b>{_text(weight.name)}</b>" + (f" ({_text(weight.layer)})" if weight.layer else "")
    return _card(_line(_word(weight), f"{name}, feeds {_text(listed(weight.feeds, _NAMES))}", raw=True), _table((), shown, raw=(1, 2)))


@card.register
def _(verdict: Verdict) -> str:
    return _card(_verdict(verdict))


@card.register
def _(alert: Alert) -> str:
    return _card(*_alert(alert))


@card.register
def _(coverage: Coverage) -> str:
    return _card(f"<div>{_text(coverage.described)} seen.</div>", _unseen(coverage, ROWS) or _faint("Nothing is known to be unseen."))


@dataclass(frozen=True)
class Tried:
    """One row of the card of `try_remedies`."""

    remedy: str
    loss: str
    of_untouched: str
    share: float | None
    """The loss as a share of that of the untouched copy; None where one of them is not known."""
    change: str
    best: bool = False


@dataclass(frozen=True)
class Treatment:
    """What the card of `try_remedies` shows."""

    sentence: str
    rows: Sequence[Tried]
    notes: Sequence[str]
    code: str
    """The best change as code; empty where there is none."""


@card.register
def _(treatment: Treatment) -> str:
    """The best remedy first, then a table with the untouched copy as its first row."""
    rows = []
    for tried in treatment.rows:
        name = f"<b>{_text(tried.remedy)}</b> ★" if tried.best else _text(tried.remedy)
        rows.append((name, _text(tried.loss), _text(tried.of_untouched), _bar(tried.share), _dim(tried.change)))
    code = f"<div>The best change as code, from <code>trials.code()</code>:</div>{_code(treatment.code)}" if treatment.code else ""
    table = _table(("remedy", "loss at the end", "of untouched", "", "what was changed"), rows, raw=range(5))
    return _card(f"<div><b>{_text(treatment.sentence)}</b></div>", table, *(_faint(note) for note in treatment.notes), code)


def _verdict(verdict: Verdict) -> str:
    """The verdict in one line, and what to try, with its code."""
    sentence = str(verdict).removeprefix(f"{verdict.health.value}: ")
    rest = f"<div><b>Try:</b> {_text(verdict.advice)}</div>" if verdict.advice else ""
    code = _code(verdict.alert.causes[0].code) if verdict.alert is not None and verdict.alert.causes else ""
    return _line(verdict.health.value, sentence) + rest + code


def _card(*parts: str) -> str:
    return f'<div style="font-size:13px;line-height:1.5;max-width:64em;padding:2px 0">{"".join(parts)}</div>'


def _text(value: object) -> str:
    """Anything as text in HTML, cut where it is very long."""
    text = str(value)
    return escape(text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…")


def _line(word: str, sentence: str, raw: bool = False) -> str:
    """A line that begins with how it is, such as "critical", on the colour of that word. `raw`: the sentence is HTML already."""
    return f"<div>{_badge(word)} {sentence if raw else _text(sentence)}</div>"


def _badge(word: str) -> str:
    style = f"background:{_COLOUR[word]};color:#fff;border-radius:3px;padding:1px 6px;font-size:11px;font-weight:600;white-space:nowrap"
    return f'<span style="{style}">{word}</span>'


def _faint(text: str) -> str:
    return f'<div style="opacity:.7;font-size:12px">{_text(text)}</div>' if text else ""


def _dim(text: str) -> str:
    return f'<span style="opacity:.7">{_text(text)}</span>'


def _code(code: str) -> str:
    box = "margin:2px 0 4px;padding:4px 8px;background:rgba(128,128,128,.14);color:inherit;border-radius:3px;overflow-x:auto;font-size:12px"
    return f'<pre style="{box};line-height:1.4">{escape(code[:4000])}</pre>' if code else ""


def _alerts(alerts: Sequence[Alert]) -> str:
    """The alerts with their figures and causes, folded away."""
    if not alerts:
        return ""
    box = "margin:4px 0;padding-left:8px;border-left:3px solid rgba(128,128,128,.4)"
    shown = "".join(f'<div style="{box}">{"".join(_alert(alert, with_code=False))}</div>' for alert in alerts[:ROWS])
    more = _faint(f"and {len(alerts) - ROWS} more alerts") if len(alerts) > ROWS else ""
    title = "The alert" if len(alerts) == 1 else f"All {len(alerts)} alerts"
    return f"<details><summary>{title}, with figures and causes</summary>{shown}{more}</details>"


def _alert(alert: Alert, with_code: bool = True) -> Iterator[str]:
    yield _line(alert.severity if alert.firing else "healthy", alert.message)
    if alert.also:
        yield _faint(f"also: {listed(alert.also, _NAMES)}")
    told = set[str]()
    for cause in alert.causes[:3]:
        share = f" ({percent(cause.share)})" if cause.share < 1 else ""
        yield f"<div><b>Why:</b> {_text(cause.name.replace('_', ' '))}{share}: {_text(cause.evidence)}</div>"
        if cause.remedy not in told:
            yield f"<div><b>Try:</b> {_text(cause.advice.rstrip(':'))}</div>" + (_code(cause.code) if with_code else "")
        told.add(cause.remedy)


def _sites(snapshot: Snapshot, levels: Mapping[str, Sequence[float]]) -> str:
    """The worst sites and layers, with their history where it is known."""
    items: list[Record | Weight] = sorted(
        (*snapshot.records, *(weight for weight in snapshot.weights if (weight.alert_level or 0.0) >= WARNING)), key=_badness, reverse=True
    )
    rows = []
    for item in items[:ROWS]:
        if isinstance(item, Record):
            cells = (
                _text(item.activation),
                _text(percent_or_dash(item.saturated)),
                _text(percent_or_dash(item.trapped)),
                _text(number_or_dash(item.grad_z_rms)),
            )
            rows.append((_text(item.site), _badge(_word(item)), *cells, _strip(levels.get(item.site, ()))))
        else:
            rows.append((_text(item.name), _badge(_word(item)), _text(item.layer or "weight"), "", "", "", ""))
    head = ("site, worst first", "", "activation", "saturated", "trapped", "rms dL/dz", "health over the run" if levels else "")
    rest = len(items) - ROWS
    return _table(head, rows, raw=range(7)) + (_faint(f"and {rest} more, none of them worse") if rest > 0 else "")


def _word(item: Record | Weight) -> str:
    """How a site or a layer is, in words."""
    broken = item.nonfinite or item.grad_nonfinite if isinstance(item, Record) else 0
    return level_in_words(item.alert_level, broken)


def _badness(item: Record | Weight) -> float:
    if isinstance(item, Record) and (item.nonfinite or item.grad_nonfinite):
        return math.inf
    return -1.0 if item.alert_level is None else item.alert_level


def _strip(levels: Sequence[float]) -> str:
    """The health of a site over the run: transparent where it is healthy, red where it is critical, violet where something is not finite."""
    if not levels:
        return ""
    colours = [_shade(level) for level in levels]
    stops, begin = [], 0
    for at in range(1, len(colours) + 1):
        if at == len(colours) or colours[at] != colours[begin]:
            stops.append(f"{colours[begin]} {100 * begin / len(colours):.3g}% {100 * at / len(colours):.3g}%")
            begin = at
    box = "display:inline-block;width:11em;height:.9em;vertical-align:middle;border:1px solid rgba(128,128,128,.5)"
    # Not every browser, and not every notebook, takes a gradient of one colour.
    fill = f"linear-gradient(90deg,{','.join(stops)})" if len(stops) > 1 else colours[0]
    return f'<span style="{box};background:{fill}"></span>'


def _shade(level: float) -> str:
    if math.isinf(level):
        return _COLOUR["not finite"]
    if math.isnan(level):
        return "rgba(128,128,128,.25)"
    return f"rgba(207,63,69,{round(level, 1):g})"


def _bar(share: float | None) -> str:
    """A share of the untouched loss as a bar; what is beyond twice of it is cut off."""
    if share is None or not math.isfinite(share):
        return ""
    colour = _COLOUR["healthy"] if share < 0.9 else _COLOUR["critical"] if share > 1.1 else _COLOUR["not judged"]
    box = f"display:inline-block;height:.7em;width:{4 * min(share, 2.0):.2f}em;background:{colour};vertical-align:middle"
    return f'<span style="{box}"></span>'


def _unseen(coverage: Coverage, most: int = 2) -> str:
    """What is not seen, in a few lines."""
    found = coverage.unseen_alike
    if not found:
        return ""
    lines = "".join(_faint(f"{places}: {reason}") for places, reason in found[:most])
    more = _faint(f"and {len(found) - most} more kinds: print(monitor.coverage)") if len(found) > most else ""
    return f'<div style="margin-top:4px">Not seen, or seen in part:</div>{lines}{more}'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], raw: Iterable[int] = ()) -> str:
    """A table. The columns `raw` are HTML already, the others are text."""
    if not rows:
        return ""
    is_raw, cell = set(raw), "text-align:left;padding:1px 12px 1px 0;border:none;white-space:nowrap;vertical-align:top;background:none"
    lines = [f'<tr>{"".join(f"""<th style="{cell};font-weight:600;opacity:.7">{_text(name)}</th>""" for name in head)}</tr>'] if head else []
    for row in rows:
        cells = (each if at in is_raw else _text(each) for at, each in enumerate(row))
        lines.append(f'<tr style="background:none">{"".join(f"""<td style="{cell}">{each}</td>""" for each in cells)}</tr>')
    return f'<table style="border-collapse:collapse;margin:6px 0;font-size:12px;color:inherit;border:none">{"".join(lines)}</table>'


def _spread(mean: float | None, deviation: float | None) -> str:
    return "-" if mean is None or deviation is None else f"{mean:.3g} ± {deviation:.3g}"
