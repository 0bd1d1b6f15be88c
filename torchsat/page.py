"""The report as one HTML page: the view of the Saturation tab with all of its numbers. Never torch.

The page loads nothing. It holds the scripts of the tab joined to one script, and the answer to every query that the tab could send to its server.
The verdict stands before the picture and the report as text behind it (page_head.py); both are there without scripts and in print.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from torchsat.grids import Grid
from torchsat.ledger import ENTRY_METRICS
from torchsat.page_head import STYLE, head, title_of
from torchsat.tensorboard import SCRIPTS
from torchsat.tensorboard.reader import Run
from torchsat.tensorboard.scalars import scalars_beside
from torchsat.text import print_text
from torchsat.view import from_snapshots, heads, histograms, ledger_entries, ledger_grid, mixtures, routing, scales

PAGE_CELLS = 200_000
"""The most numbers of one metric of a run. If there are more, observations are left out at even distances."""
PAGE_HISTOGRAMS = 100
"""The most observations of one histogram."""
_STATIC = Path(__file__).parent / "tensorboard" / "static"


def page(runs: Sequence[Run]) -> str:
    """The HTML of a page with these runs."""
    table: dict[str, Any] = {"scales": scales(), "runs": []}
    for run in runs:
        for path, query, answer in _answers(run):
            table[_key(path, query)] = (
                {"gzip": base64.b64encode(gzip.compress(answer.pack(), mtime=0)).decode()} if isinstance(answer, Grid) else answer
            )
        about = table[_key("run", {"run": run.name})]
        known = {"time": about["time"], "sites": len(about["sites"]), "verdict": about["verdict"]}
        table["runs"].append({"name": run.name, "place": len(table["runs"]), **known})
    plain_text = io.StringIO()
    print_text(plain_text, runs, everything=True)
    return _PAGE.format(
        title=_html(title_of(runs)),
        style=(_STATIC / "style.css").read_text(encoding="utf-8") + STYLE,
        head=head(runs),
        text=_html(plain_text.getvalue()),
        data=json.dumps(table, allow_nan=False).replace("<", "\\u003c"),
        script="\n".join(_bundled(name) for name in (*SCRIPTS, "page.js")),
    )


def _key(path: str, query: Mapping[str, str]) -> str:
    """Path and query as the URLSearchParams of a browser writes them, so that the page finds its answer under this key."""
    return f"{path}?{urlencode(query, safe='*').replace('~', '%7E')}"


def _answers(run: Run) -> Iterator[tuple[str, dict[str, str], Any]]:
    """Every query about a run that the server of the tab answers (tensorboard/plugin.py), as (path, query, answer)."""
    name, series = run.name, from_snapshots(run.name, run.snapshots)
    most = max(2, PAGE_CELLS // max(1, len(series.names)))
    yield "run", {"run": name}, series.describe()
    scalars = scalars_beside(run.directory) if run.directory else {"tags": [], "loss": None, "rate": None, "grids": {}}
    yield from (("scalar", {"run": name, "tag": tag}, grid) for tag, grid in scalars.pop("grids").items())
    yield "scalars", {"run": name}, scalars
    yield "ledger", {"run": name}, ledger_entries(run.snapshots)
    for metric in ENTRY_METRICS:
        yield "ledger_values", {"run": name, "metric": metric}, ledger_grid(metric, run.snapshots).thin(PAGE_HISTOGRAMS)
    yield "experts", {"run": name}, mixtures(run.snapshots)
    yield "routing", {"run": name}, routing(run.snapshots).thin(PAGE_HISTOGRAMS)
    for metric in series.values:
        yield "values", {"run": name, "metric": metric}, series.grid(metric).thin(most)
    for site in series.sites:
        query = {"run": name, "site": site["site"]}
        yield "site", query, series.site(site["site"]).thin(most)
        softmax = site["kind"] == "softmax"
        yield ("heads" if softmax else "histogram"), query, (heads if softmax else histograms)(site["site"], run.snapshots).thin(PAGE_HISTOGRAMS)


def _bundled(name: str) -> str:
    """One module as a part of the joined script. No two modules have a name in common, so it is enough to remove imports and the word `export`."""
    text = (_STATIC / name).read_text(encoding="utf-8")
    return re.sub(r"^export ", "", re.sub(r"^import .*;$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)


def _html(text: str) -> str:
    """The text with every character escaped that HTML would take for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>torchsat: {title}</title>
<style>
{style}</style>
<body>
{head}
<div id="torchsat"></div>
<noscript><p class="report">The picture needs scripts. What follows does not.</p></noscript>
<section aria-label="The report as text"><details class="report text" open><summary>The report as text</summary><pre>{text}</pre></details></section>
<script type="application/json" id="torchsat-data">{data}</script>
<script type="module">
{script}</script>
</html>
"""
