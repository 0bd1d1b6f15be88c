"""All that knows TensorBoard: the tags and packed tensors that writer and reader share. Never torch.

One `Summary` per observation. In it, a dozen scalars of the whole network under `torchsat/`, a few scalars per site, each in a group of its
own such as `torchsat.saturated/` (see `stock`), and packed float32 tensors of everything, which a person never sees and `torchsat.read` reads back:

    torchsat/records.<hash>     [metrics, sites]     torchsat/histogram.<hash>   [sites, bins]
    torchsat/weights.<hash>     [metrics, layers]    torchsat/heads.<hash>       [metrics, heads of all softmaxes]
    torchsat/events             one string: the alerts of this step as JSON

TensorBoard keeps only the first metadata of a tag. The content of that metadata names rows and columns, so the tag carries a hash of it: a
resumed run with other sites writes another tag.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

PLUGIN = "torchsat"
FORMAT = 4
SUBRUN = "torchsat"
"""Where the event file goes below the user's directory: a second live file beside the user's own can stop the user's curves."""

RECORDS, HISTOGRAM, WEIGHTS = "torchsat/records", "torchsat/histogram", "torchsat/weights"
HEADS, EVENTS = "torchsat/heads", "torchsat/events"
OVERHEAD = "torchsat/overhead"
"""A scalar; read back as it is."""


def content(kind: str, **names: Any) -> str:
    """The metadata content of a packed tensor, in one canonical form."""
    return json.dumps({"v": FORMAT, "kind": kind, **names}, separators=(",", ":"))


def tag(kind: str, described: str) -> str:
    return f"{kind}.{hashlib.sha256(described.encode()).hexdigest()[:8]}"
