"""What the scripts that write tables into these pages share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torchsat.coverage import Coverage


def filled(page: Path, tables: Mapping[str, Callable[[], str]]) -> str:
    """The text of a page with its tables made anew. The table NAME stands between the comments `<!-- NAME -->` and `<!-- /NAME -->`."""
    text = page.read_text()
    for name, make in tables.items():
        head, rest = text.split(f"<!-- {name} -->\n")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{make()}\n<!-- /{name} -->{tail}"
    return text


def named(coverage: Coverage) -> str:
    """The places that are not measured by their reasons, as a cell of a table. Places that differ in a number alone are one."""
    reasons: dict[str, list[str]] = {}
    for place, reason in coverage.unseen:
        reasons.setdefault(reason, []).append(re.sub(r"\d+", "N", place))
    return "; ".join(f"{', '.join(f'`{place}`' for place in dict.fromkeys(places))}: {reason}" for reason, places in reasons.items()) or "-"
