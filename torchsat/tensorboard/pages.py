"""The pages of docs/ as HTML, which the Saturation tab links to where it defines a word. Never torch.

There is no published site, so TensorBoard serves the pages itself. A wheel carries them beside this file (pyproject.toml); in a checkout, which an
editable install uses, they lie in `docs` beside the package. Where they are in neither place the tab names them in words only.

The pages come from our own files. Markup in them is shown as text all the same, so that nothing but Markdown becomes HTML. A page holds no script and
loads nothing but its style and its pictures from the same server, as the content security policy of TensorBoard demands.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import markdown
from markdown.extensions.toc import slugify
from markdown.treeprocessors import Treeprocessor

from torchsat.definitions import CAUSE_DEFINITIONS, RULE_DEFINITIONS
from torchsat.metrics import METRICS

PAGES = ("tensorboard", "metrics", "alerts", "saturation", "how-it-works", "formats", "report", "notebook", "integrations", "distributed", "cost")
"""The pages that are served, in the order of their list, by the names of their files without `.md`."""
PICTURES = ("sure_or_stuck.png",)
"""The pictures in them. Any other picture of a page is left out, with its description in its place."""
THEMES = ("light", "dark")
_OWN = Path(__file__).parent / "docs"
_CHECKOUT = Path(__file__).parents[2]


def folder() -> Path | None:
    """The folder that holds the pages; None where there are none."""
    if _OWN.is_dir():
        return _OWN
    return _CHECKOUT / "docs" if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "docs").is_dir() else None


def files() -> dict[str, Path]:
    """The pages and pictures that are there, by the names under which they are served."""
    found = folder()
    paths = {} if found is None else {**{name: found / f"{name}.md" for name in PAGES}, **{name: found / name for name in PICTURES}}
    return {name: path for name, path in paths.items() if path.is_file()}


def links() -> dict[str, str]:
    """Where each metric, rule and cause is explained, as `docs/<page>#<anchor>` by `<kind> <name>`: only those whose heading is there."""
    there = {page: _anchors(path.read_text(encoding="utf-8")) for page, path in files().items() if page in PAGES}
    return {word: f"docs/{page}#{slugify(title, '-')}" for word, page, title in headings() if slugify(title, "-") in there.get(page, ())}


def headings() -> Iterator[tuple[str, str, str]]:
    """Of each metric, rule and cause its word (`<kind> <name>`), the page that explains it, and the text of its heading there."""
    yield from ((f"metric {each.name}", "metrics", f"{each.title} ({each.name})") for each in METRICS)
    yield from ((f"rule {each.rule}", "alerts", each.rule) for each in RULE_DEFINITIONS)
    yield from ((f"cause {each.cause}", "alerts", each.cause) for each in CAUSE_DEFINITIONS)


def page(name: str, theme: str = "") -> str:
    """The HTML of one page of `files()`. `theme` is one of THEMES, or empty: then the browser decides."""
    query = f"?theme={theme}" if theme in THEMES else ""
    others = files()
    body, title = _body(others[name].read_text(encoding="utf-8"), query, tuple(others))
    listed = [f'<a href="{each}{query}"{" aria-current=page" if each == name else ""}>{_titled(each)}</a>' for each in PAGES if each in others]
    return _PAGE.format(theme=theme if theme in THEMES else "", title=escape(title), pages="\n".join(listed), body=body)


def _titled(name: str) -> str:
    return "the tab" if name == "tensorboard" else name.replace("-", " ")


def _anchors(text: str) -> set[str]:
    """The anchors of the headings of a page."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)}


@functools.lru_cache(64)
def _body(text: str, query: str, served: tuple[str, ...]) -> tuple[str, str]:
    """The HTML of a text in Markdown, and its title. `query` is what links to other pages get, `served` names what is there."""
    # The comments mark the tables that are written from the code.
    text = re.sub(r"^<!--.*?-->\n", "\n", text, flags=re.MULTILINE)
    # In our files a list may stand right behind a paragraph, as in the Markdown of GitHub.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"^((?!- |\d+\. |  |\|).+\n)(?=- |1\. )", r"\1\n", part, flags=re.MULTILINE) for part in parts[::2]]
    made = markdown.Markdown(
        extensions=["tables", "fenced_code", "toc"], extension_configs={"toc": {"permalink": "#", "permalink_title": "a link here"}}
    )
    made.preprocessors.deregister("html_block")
    made.inlinePatterns.deregister("html")
    made.treeprocessors.register(_Links(made, query, served), "links", 1)
    html = str(made.convert("".join(parts))).replace("<pre>", '<pre tabindex="0">')
    return html, re.sub(r"[`*]", "", text.partition("\n")[0].lstrip("# "))


class _Links(Treeprocessor):  # type: ignore[misc]
    """Makes links lead to pages that are served, and turns all others that are no address of the web into plain text."""

    def __init__(self, made: Any, query: str, served: tuple[str, ...]) -> None:
        super().__init__(made)
        self._query, self._served = query, served

    def run(self, root: Element) -> None:
        for table in [each for each in root.iter() if each.tag == "table"]:
            table.set("tabindex", "0")
        for each in list(root.iter("a")):
            each.attrib.update(self._target(each.get("href", "")))
            if not each.get("href"):
                each.tag = "span"
                each.attrib.clear()
        for each in list(root.iter("img")):
            if each.get("src") not in self._served:
                each.tag, each.text = "em", each.get("alt")
                each.attrib.clear()

    def _target(self, href: str) -> dict[str, str]:
        """The attributes of a link. Its `href` is empty where it leads to nothing that is served."""
        if href.startswith("#"):
            return {}
        if href.startswith("https://"):
            return {"rel": "noopener noreferrer", "target": "_blank"}
        path, _, anchor = href.partition("#")
        name = path.removesuffix(".md")
        return {"href": f"{name}{self._query}{'#' if anchor else ''}{anchor}" if path.endswith(".md") and name in self._served else ""}


_PAGE = """<!doctype html>
<html lang="en" class="{theme}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - torchsat</title>
<link rel="stylesheet" href="../docs.css">
</head>
<body>
<nav aria-label="Pages">
<a class="back" href="../../../../#torchsat">\N{LEFTWARDS ARROW} Saturation tab</a>
{pages}
</nav>
<main>
{body}
</main>
</body>
</html>
"""
