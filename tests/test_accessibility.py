"""axe-core finds nothing in the tab, in its pages and in the page of the report that would keep somebody from using them."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import resources, util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.by import By

from tests.browsing import chromium, open_tab, serving, settled, wait
from tests.test_browser import snapshots as plain_snapshots
from tests.test_ledger_tab import LEDGER
from tests.test_tensorboard import write
from torchsat import Snapshot
from torchsat.report import report
from torchsat.tensorboard import pages

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium with its driver: apt-get install chromium chromium-driver"),
    pytest.mark.skipif(util.find_spec("axe_core_python") is None, reason="axe-core is not installed: pip install axe-core-python"),
]


def snapshots(sites: int, count: int) -> list[Snapshot]:
    return [replace(each, ledger=LEDGER) for each in plain_snapshots(sites, count)]


@pytest.fixture(scope="module")
def axe() -> str:
    return (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "one", snapshots(6, 8))
    write(folder / "two", snapshots(4, 12))
    with serving(folder) as found:
        yield found


def violations(driver: Any, axe: str) -> list[str]:
    """What axe-core finds in the document that the driver is in, as one line per rule with its first element."""
    driver.execute_script(axe)
    script = """const done = arguments[0];
        axe.run(document, {resultTypes: ['violations']}).then(({violations}) =>
            done(violations.map(({impact, id, nodes}) => `${impact} ${id}: ${nodes[0].html.slice(0, 200)}: ${nodes[0].failureSummary}`)));"""
    driver.set_script_timeout(60)
    found: list[str] = driver.execute_async_script(script)
    return found


def darken(driver: Any, dark: bool) -> None:
    """Make TensorBoard's page light or dark, as its own switch does."""
    driver.switch_to.default_content()
    driver.execute_script("document.body.classList.toggle('dark-mode', arguments[0])", dark)
    driver.switch_to.frame(driver.find_element(By.CSS_SELECTOR, "iframe"))
    wait(driver, "return document.documentElement.classList.contains('dark') === arguments[0]", dark)
    settled(driver)


SIGHTS = {
    "the worst": ("", ""),
    "a difference": ("&p.torchsat.difference=1&p.torchsat.runs=one%2Ftorchsat&p.torchsat.runs=two%2Ftorchsat", ""),
    "a zoom": ("&p.torchsat.from=20&p.torchsat.to=50&p.torchsat.metric=saturated&p.torchsat.site=", ""),
    "the definitions": ("", "document.querySelector('.controls .ask').click()"),
    "the list of runs": ("&p.torchsat.site=", "document.querySelector('details.runs').open = true"),
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_the_tab(driver: Any, address: str, axe: str, sight: str, dark: bool) -> None:
    view, script = SIGHTS[sight]
    open_tab(driver, address, view)
    darken(driver, dark)
    driver.execute_script(script)
    assert violations(driver, axe) == []


@pytest.mark.parametrize("theme", pages.THEMES)
def test_the_pages_of_the_documentation(driver: Any, address: str, axe: str, theme: str) -> None:
    driver.switch_to.default_content()
    for name in ("metrics", "saturation"):  # between them they have tables, code, lists and a picture
        driver.get(f"{address}/data/plugin/torchsat/docs/{name}?theme={theme}")
        assert violations(driver, axe) == [], name


def test_the_page_of_the_report(driver: Any, axe: str, tmp_path: Path) -> None:
    write(tmp_path / "run", snapshots(6, 8))
    path = tmp_path / "report.html"
    with path.open("w", encoding="utf-8") as file:
        report(tmp_path / "run", file, "html")
    driver.switch_to.default_content()
    for dark in (False, True):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        try:
            driver.get(f"file://{path}")
            wait(driver, "return document.querySelectorAll('.detail .chart').length > 4")
            assert driver.execute_script("return document.documentElement.classList.contains('dark')") is dark
            assert violations(driver, axe) == []
        finally:
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
