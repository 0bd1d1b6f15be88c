"""The ledger of the gradient where users see it: in the tab, in the page, in the report as text and as JSON."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import record
from tests.test_plugin import Server
from tests.test_tensorboard import write
from torchsat import Snapshot
from torchsat.ledger import ENTRY_FACTS, ENTRY_METRICS, Entry, Kind, Ledger
from torchsat.report import report
from torchsat.tensorboard.reader import read_runs
from torchsat.view import ledger_entries, ledger_grid

RUN = str(Path("run", "torchsat"))
LEDGER = Ledger(
    (
        Entry("head", Kind.LAYER, 0, None, 2.0, 0.5),
        Entry("block/add", Kind.JOIN, 0, None, 1.0, 1.25, 0.25),
        Entry("block.fc", Kind.LAYER, 1, "block/add", 1.0, 0.5),
        Entry("block.act", Kind.ACTIVATION, 1, "block/add", 0.5, 0.25),
        Entry("block.norm", Kind.NORM, 1, "block/add", 0.125, 2.0, None, 3.0, 48.0, 5),
        Entry("act", Kind.ACTIVATION, 0, None, 1.25, 1e-3),
        Entry("norm", Kind.NORM, 0, None, 1.25e-3, 4.0, None, 1.5, 6.0, 0),
    )
)


def snapshots() -> list[Snapshot]:
    """Three observations, of which the gradient of the last is half as large, and the second has no ledger."""
    records = (record("act"), record("block.act", after=("act",)))
    smaller = Ledger(tuple(replace(each, norm=(each.norm or 0.0) / 2) for each in LEDGER.entries))
    return [Snapshot(step, 1000.0 + step, records, ledger=ledger) for step, ledger in ((0, LEDGER), (10, None), (20, smaller))]


def test_the_server_and_the_page_have_the_same_answers(tmp_path: Path) -> None:
    given = snapshots()
    write(tmp_path / "run", given)
    served = Server(tmp_path)
    entries = served.get("/ledger", run=RUN).json
    assert entries == json.loads(json.dumps(ledger_entries(given)))
    assert entries[1] == dict(zip(ENTRY_FACTS, ("block/add", "join", 0, None), strict=True))
    for metric in ENTRY_METRICS:
        names, steps, values = served.grid("/ledger_values", run=RUN, metric=metric)
        grid = ledger_grid(metric, given)
        assert (names, steps) == (list(grid.names), [0.0, 20.0])
        assert values.tobytes() == grid.values.astype("<f4").tobytes()
    names, _, values = served.grid("/ledger_values", run=RUN, metric="norm")
    assert dict(zip(names, values[1].tolist(), strict=True))["act"] == 0.625
    assert served.get("/ledger_values", run=RUN, metric="factors").status_code == 400


def test_a_run_of_an_older_version_has_no_ledger(tmp_path: Path) -> None:
    write(tmp_path / "run", [replace(each, ledger=None) for each in snapshots()])
    served = Server(tmp_path)
    assert served.get("/ledger", run=RUN).json == []
    names, steps, values = served.grid("/ledger_values", run=RUN, metric="norm")
    assert (names, steps, values.size) == ([], [], 0)
    assert ledger_entries(read_runs(tmp_path)[0].snapshots) == []


def test_the_report_tells_where_the_gradient_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    write(tmp_path / "run", snapshots())
    out = io.StringIO()
    report(tmp_path / "run", out, "text")
    text = " ".join(out.getvalue().split())
    assert "Where the gradient goes: from the output to the input of the model the gradient's norm changes by a factor of 0.0025: " in text
    assert "1 activation gives 0.001, 1 norm gives 4, 1 layer gives 0.5, 1 join gives 1.2" in text
    rows = {line.split()[0]: line.split() for line in out.getvalue().splitlines() if line.split()}
    assert rows["block/add"] == ["block/add", "join", "1.25", "6.25e-01", "25", "%", "-", "-"]
    assert rows["act"][:4] == ["act", "activation", "0.001", "6.25e-04"]
    assert rows["block.norm"] == ["block.norm", "norm", "2", "-", "-", "3", "48", "(channel", "5)"]
    out = io.StringIO()
    report(tmp_path / "run", out, "json")
    last = json.loads(out.getvalue())["runs"][0]["last"]["ledger"]
    assert last["entries"][0] == {
        **dict.fromkeys(ENTRY_METRICS),
        "place": "head",
        "kind": "layer",
        "level": 0,
        "parent": None,
        "norm": 1.0,
        "factor": 0.5,
    }


pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from tests.browsing import chromium, open_tab, serving, settled, wait  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if chromium() is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("ledger")
    write(folder / "run", snapshots())
    write(folder / "other", [replace(each, time=each.time - 100) for each in snapshots()])
    write(folder / "older", [replace(each, time=each.time - 200, ledger=None) for each in snapshots()])
    with serving(folder) as found:
        yield found


BARS = """return [...document.querySelectorAll('.ledger .waterfall')].map((svg) => [...svg.querySelectorAll('.bar-of-part')].map((bar) => {
    const box = bar.querySelectorAll('rect')[1];
    return [Number(box.getAttribute('y')), Number(box.getAttribute('height')), bar.querySelector('title').textContent];
}));"""


def test_a_waterfall_reaches_from_the_norm_before_each_part_to_the_norm_behind_it(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=run%2Ftorchsat&p.torchsat.runs=other%2Ftorchsat")
    wait(driver, "return document.querySelectorAll('.ledger .waterfall').length === 2")
    for bars in driver.execute_script(BARS):
        assert [text.partition(":")[0] for *_, text in bars] == ["head (layer)", "block/add (join)", "act (activation)", "norm (norm)"]
        # On a logarithmic scale a length is a factor. The first bar goes down by 2, the second up by 1.25, and begins where the first ends.
        (top, height, _), (join, rise, said), (_, fall, _), (_, last, _) = bars
        assert join + rise == pytest.approx(top + height, abs=0.1)
        assert fall / height == pytest.approx(math.log(1e3) / math.log(2), rel=0.02)
        assert last / height == pytest.approx(2, rel=0.02)
        assert (
            said
            == "block/add (join): \N{MULTIPLICATION SIGN} 1.25, which leaves 0.625; by its branches comes 0.25 of what comes by the skip connection"
        )
    assert driver.execute_script("return document.querySelector('.ledger figcaption').textContent") == (
        "From the output to the input the norm changes by a factor of 0.0025"
    )


def test_a_join_shows_its_branches_and_a_site_opens(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=run%2Ftorchsat")
    wait(driver, "return document.querySelectorAll('.ledger .waterfall').length === 1")
    bars = driver.find_elements(By.CSS_SELECTOR, ".ledger .bar-of-part .catch")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", bars[1])
    ActionChains(driver).move_to_element(bars[1]).click().perform()
    wait(driver, "return document.querySelectorAll('.ledger .waterfall').length === 2")
    inside = driver.execute_script(BARS)[1]
    assert [text.partition(" (")[0] for *_, text in inside] == ["block.fc", "block.act", "block.norm"]
    assert inside[2][2] == "block.norm (norm): \N{MULTIPLICATION SIGN} 2, which leaves 0.25"
    # The same by the table, which the keyboard reaches.
    driver.execute_script("document.querySelector('.ledger details').open = true")
    names = driver.find_elements(By.CSS_SELECTOR, ".ledger td button")
    assert [each.text for each in names] == ["block/add", "block.act", "act"]
    assert names[0].get_attribute("aria-expanded") == "true"
    names[0].send_keys("\n")
    wait(driver, "return document.querySelectorAll('.ledger .waterfall').length === 1")
    driver.find_elements(By.CSS_SELECTOR, ".ledger td button")[2].send_keys("\n")
    wait(driver, "return torchsat.view.site === 'act' && !document.querySelector('.detail').hidden")
    settled(driver)


def test_a_run_without_a_ledger_has_no_such_section(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=older%2Ftorchsat")
    settled(driver)
    assert driver.execute_script("return document.querySelector('.ledger').hidden") is True
    assert driver.execute_script("return document.querySelector('.depth').hidden") is False
