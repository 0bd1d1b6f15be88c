"""Everything that knows TensorBoard. This file: the names that writer, reader and plugin share; standard library only.

Each observation is one `Summary`. It holds a dozen scalars of the whole network under `torchsat/`, a few scalars of each site in groups such as
`torchsat.health/` (stock.py), and all numbers as packed float64 tensors. People never see those tensors; `torchsat.read` and the Saturation tab
read them:

    torchsat/records.<hash>     [metrics, sites]     torchsat/histogram.<hash>   [sites, bins]
    torchsat/weights.<hash>     [metrics, layers]    torchsat/heads.<hash>       [metrics, heads of all softmaxes]
    torchsat/ledger.<hash>      [metrics, entries of the ledger of the gradient]
    torchsat/formats.<hash>     [metrics, tensors x number formats], where these were asked for
    torchsat/whole.<hash>       [metrics, 1]: the numbers of the observation as a whole
    torchsat/events             one string: the alerts of this step as JSON
    torchsat/experts            one string: the mixtures of experts, if there are any, as JSON
    torchsat/judgement          one string: whether rules were in use, and what came nearest to a warning, as JSON

The metadata of a tag says in its content what the rows and columns are. TensorBoard keeps only the first metadata of each tag. The tag therefore ends
with a hash of the content, so that a resumed run with other sites writes another tag.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

PLUGIN = "torchsat"
FORMAT = 5
"""The version of the packed tensors, which is written into their metadata."""
READABLE = (4, FORMAT)
"""The versions that are read. In version 4 the numbers are float32, and there is no tensor `WHOLE`."""
SUBRUN = "torchsat"
"""The folder, below the user's directory, of our event file. TensorBoard can stop showing the user's curves if two live files lie in one
directory."""

RECORDS, HISTOGRAM, WEIGHTS = "torchsat/records", "torchsat/histogram", "torchsat/weights"
HEADS, WHOLE, EVENTS, JUDGEMENT = "torchsat/heads", "torchsat/whole", "torchsat/events", "torchsat/judgement"
LEDGER = "torchsat/ledger"
EXPERTS = "torchsat/experts"
FORMATS = "torchsat/formats"
OVERHEAD = "torchsat/overhead"
"""The tag of a scalar, a float32, that `torchsat.read` reads from files of version 4."""

SCRIPTS = (
    *("source.js", "numbers.js", "palette.js", "charts.js", "frame.js", "export.js", "help.js", "refill.js", "heatmap.js", "strip.js"),
    *("verdict.js", "panel.js", "rows.js", "difference.js", "address.js", "controls.js", "alerts.js", "depth.js"),
    *("card.js", "ledger.js", "experts.js", "detail.js", "app.js"),
)
"""The modules of the Saturation tab in the folder `static`, each behind those that it imports. The server sends them as files; the report joins them,
in this order, to one script."""


def content(kind: str, **names: Any) -> str:
    """The content of the metadata of a packed tensor. The same names give the same text, so that its hash is the same."""
    return as_json({"v": FORMAT, "kind": kind, **names})


def as_json(value: Any) -> str:
    """JSON of nested dicts, lists and tuples. A scalar of NumPy or torch is written as its number, anything else that JSON does not know as null: a
    single fact that cannot be written must not cost all others."""
    return json.dumps(value, separators=(",", ":"), default=_scalar)


def _scalar(value: Any) -> Any:
    try:
        return value.item()
    except Exception:  # Whatever a foreign type raises: it is not a scalar.
        return None


def tag(kind: str, described: str) -> str:
    """The tag of a packed tensor whose metadata has the content `described`."""
    return f"{kind}.{hashlib.sha256(described.encode()).hexdigest()[:8]}"
