"""The report as one JSON document, for scripts and other programs. Never torch.

Its keys are documented in docs/report.md, and a test holds that page. A key keeps its name and its meaning as long as `schema` stays the same; keys
may be added. JSON knows neither NaN nor infinity: what is not known is null, and what is infinite is the string "inf" or "-inf".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchsat.cause import Cause
from torchsat.forecast import forecasts
from torchsat.sheets import verdicts_of
from torchsat.tensorboard.reader import Run
from torchsat.verdict import Health, Verdict, summary, worst_first
from torchsat.view import from_snapshots, plain

SCHEMA = 1
"""The version of the document. It rises where a key is removed or changes its meaning."""


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """The verdict on all runs, and everything about each, the worst first."""
    verdicts = verdicts_of(runs)
    order, by_name = worst_first(verdicts), {run.name: run for run in runs}
    return {
        "verdict": {
            "health": verdicts[order[0]].health.value,
            "sentence": summary(verdicts),
            "worst": order[0],
            "sick": sum(verdict.health.is_sick for verdict in verdicts.values()),
            "unjudged": sum(verdict.health is Health.NOT_JUDGED for verdict in verdicts.values()),
            "runs": len(runs),
        },
        "schema": SCHEMA,
        "runs": [_run(by_name[name], verdicts[name]) for name in order],
    }


def _run(run: Run, verdict: Verdict) -> dict[str, Any]:
    """The verdict on a run, its alerts, its last observation, and every metric of every site over time."""
    last, series = run.snapshots[-1], from_snapshots(run.name, run.snapshots)
    described = series.describe()
    bare = replace(last, records=tuple(replace(record, histogram=None) for record in last.records), alerts=())
    kept = {name: value for name, value in bare.as_dict().items() if name != "alerts"}
    found: dict[str, Any] = plain(
        {
            "verdict": verdict.as_dict(),
            "run": run.name,
            "directory": run.directory,
            "observations": len(run.snapshots),
            "damage": run.damage,
            "notes": run.notes,
            "alerts": [{**alert, "causes": [_cause(cause) for cause in alert["causes"]]} for alert in described["alerts"]],
            "last": {**kept, "records": [{name: value for name, value in record.items() if name != "histogram"} for record in kept["records"]]},
            **({"forecasts": forecasts(last.formats)} if last.formats else {}),
            "steps": [int(step) for step in series.steps.tolist()],
            "over_time": {name: dict(zip(series.names, values.T.tolist(), strict=True)) for name, values in series.values.items()},
        }
    )
    return found


def _cause(cause: dict[str, Any]) -> dict[str, Any]:
    """A cause with its remedy in two parts: the sentence, and the lines of code, which may be empty."""
    made = Cause(**cause)
    return {**cause, "advice": made.advice, "code": made.code}
