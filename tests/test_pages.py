"""The pages of the documentation that the Saturation tab links to."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client
from werkzeug.wrappers import Request

from torchsat.alerts import ADJECTIVE
from torchsat.definitions import CAUSE_TITLES
from torchsat.metrics import METRICS
from torchsat.rules import RULES
from torchsat.tensorboard import pages
from torchsat.tensorboard.plugin import SaturationPlugin

ROOT = Path(__file__).parent.parent


def served(path: str) -> Any:
    """The answer of the plugin to a path."""
    apps = SaturationPlugin(TBContext()).get_plugin_apps()

    @Request.application
    def answer(request: Request) -> Any:
        return apps[request.path]

    return Client(answer).get(path)


def anchors(html: str) -> list[str]:
    return re.findall(r'<h[1-6] id="([^"]*)"', html)


def test_every_metric_rule_and_cause_has_a_heading_that_its_link_leads_to() -> None:
    found = pages.links()
    words = {f"metric {metric.name}" for metric in METRICS} | {f"rule {rule.name}" for rule in RULES} | {f"cause {name}" for name in CAUSE_TITLES}
    assert set(found) == words
    assert {f"rule {name}" for name in ADJECTIVE} <= words
    for word, link in found.items():
        path, anchor = link.split("#")
        answer = served(f"/{path}")
        assert answer.status_code == 200
        assert anchors(answer.text).count(anchor) == 1, word


def test_every_link_between_the_pages_leads_to_a_page_and_a_heading() -> None:
    html = {name: pages.page(name, "dark") for name in pages.PAGES}
    count = 0
    for name, text in html.items():
        for href in re.findall(r'<a[^>]* href="([^"]*)"', text):
            if href.startswith("https://") or href == "../../../../#torchsat":
                continue
            path, _, anchor = href.partition("#")
            assert not path or path.endswith("?theme=dark"), href
            target = path.removesuffix("?theme=dark") or name
            assert target in html, f"{name}: {href}"
            assert not anchor or anchor in anchors(html[target]), f"{name}: {href}"
            count += bool(anchor)
    assert count > 20


def test_a_page_holds_no_script_and_loads_nothing_from_elsewhere() -> None:
    for name in pages.PAGES:
        text = pages.page(name)
        assert "<script" not in text
        assert set(re.findall(r' (?:src|srcset)="([^"]*)"', text)) <= set(pages.PICTURES)
        assert re.findall(r"<link[^>]*>", text) == ['<link rel="stylesheet" href="../docs.css">']
        assert not re.findall(r' on\w+="', text)
    policy = served("/docs/alerts").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert served("/docs/sure_or_stuck.png").content_type == "image/png"


def test_markup_in_a_page_and_in_a_query_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "<script>alert(1)</script>"
    text = f"# Title {attack}\n\n{attack} and <img src=x onerror=alert(1)>, [a](javascript:alert(1)) [b](//evil.example) ![c](https://evil.example/x.png)\n"
    (tmp_path / "alerts.md").write_text(text)
    monkeypatch.setattr(pages, "folder", lambda: tmp_path)
    html = pages.page("alerts", '"><script>')
    body = html.partition("<main>")[2]
    assert not re.findall(r"<(?:script|img)\b", html)
    assert re.findall(r'href="([^"]*)"', body) == re.findall(r'href="(#[^"]*)"', body)
    assert "&lt;script&gt;" in body
    assert ">c</em>" in body
    assert 'class=""' in html


def test_a_page_is_light_or_dark_as_the_tab_is() -> None:
    assert '<html lang="en" class="dark">' in served("/docs/metrics?theme=dark").text
    assert '<html lang="en" class="light">' in served("/docs/metrics?theme=light").text
    assert '<html lang="en" class="">' in served("/docs/metrics").text


def test_without_the_pages_there_are_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "folder", lambda: None)
    assert pages.links() == {}
    assert not [path for path in SaturationPlugin(TBContext()).get_plugin_apps() if path.startswith("/docs/")]


def test_a_wheel_carries_what_is_served() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    carried = dict(re.findall(r'^"docs/(.*)" = "torchsat/tensorboard/docs/(.*)"$', text, re.MULTILINE))
    assert all(source == target for source, target in carried.items())
    assert set(carried) == {*(f"{name}.md" for name in pages.PAGES), *pages.PICTURES}
    assert all((ROOT / "docs" / name).is_file() for name in carried)
