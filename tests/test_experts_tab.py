"""The mixtures of experts where users see them: in the answers of the server, in the page, and in the tab."""

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
from torchsat import Experts, Snapshot
from torchsat.tensorboard.reader import read_runs
from torchsat.view import ROUTING, mixtures, routing

RUN = str(Path("run", "torchsat"))
EVEN, WORN = Experts("b/experts", 2, 1000, (0.25, 0.25, 0.25, 0.25), 0.75, 0.5), Experts("b/experts", 2, 1000, (0.5, 0.0, 0.375, 0.125), 0.5, 0.25)
FEW = Experts("c/experts", 1, 20, (0.75, 0.25), None, 0.125)
"""Too few tokens tell which of its experts are dead, and its router's entropy is not known."""


def snapshots() -> list[Snapshot]:
    """Three observations, of which the second has no mixtures, and the last has one more."""
    found = ((0, (EVEN,)), (10, ()), (20, (WORN, FEW)))
    return [Snapshot(step, 1000.0 + step, (record("act"),), experts=experts) for step, experts in found]


def test_the_server_and_the_page_have_the_same_answers(tmp_path: Path) -> None:
    given = snapshots()
    write(tmp_path / "run", given)
    served = Server(tmp_path)
    assert served.get("/experts", run=RUN).json == mixtures(given) == json.loads(json.dumps(mixtures(read_runs(tmp_path)[0].snapshots)))
    assert mixtures(given) == [{"site": "b/experts", "k": 2, "experts": 4}, {"site": "c/experts", "k": 1, "experts": 2}]
    names, steps, values = served.grid("/routing", run=RUN)
    assert steps == [0.0, 20.0]
    assert names == [f"{site}/{column}" for site, experts in (("b/experts", 4), ("c/experts", 2)) for column in (*range(experts), *ROUTING)]
    first, last = ([None if math.isnan(each) else each for each in row] for row in values.tolist())
    # Parts of the tokens: each token goes to two of the four experts, so that 0.5 is even. Then come dead, busiest, entropy and margin.
    assert first == [0.5, 0.5, 0.5, 0.5, 0, 1.0, 0.75, 0.5, *[None] * 6]
    assert last == [1.0, 0.0, 0.75, 0.25, 1, 2.0, 0.5, 0.25, 0.75, 0.25, None, 1.5, None, 0.125]
    assert values.tobytes() == routing(given).values.astype("<f4").tobytes()


def test_a_run_without_mixtures_has_none(tmp_path: Path) -> None:
    write(tmp_path / "run", [replace(each, experts=()) for each in snapshots()])
    served = Server(tmp_path)
    assert served.get("/experts", run=RUN).json == []
    names, steps, values = served.grid("/routing", run=RUN)
    assert (names, steps, values.size) == ([], [], 0)


pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from tests.browsing import chromium, open_tab, serving, settled, wait  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if chromium() is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("experts")
    write(folder / "run", snapshots())
    write(folder / "plain", [replace(each, time=each.time - 100, experts=()) for each in snapshots()])
    with serving(folder) as found:
        yield found


def test_the_card_draws_each_expert_over_time_and_tells_what_is_known(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=run%2Ftorchsat")
    wait(driver, "return document.querySelectorAll('.experts canvas').length === 2")
    captions = driver.execute_script("return [...document.querySelectorAll('.experts figcaption')].map((each) => each.textContent)")
    assert captions == [
        "b/experts: 4 experts, 2 for each token; 1 dead; the busiest gets 2 times an even part",
        "c/experts: 2 experts, 1 for each token; too few tokens to tell which are dead; the busiest gets 1.5 times an even part",
    ]
    rows = driver.execute_script(
        "return [...document.querySelectorAll('.experts tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert rows == [["b/experts", "4", "2", "1", "2", "0.5", "0.25"], ["c/experts", "2", "1", "not known", "1.5", "not known", "0.125"]]
    # The lowest row of the picture is expert 0, which gets every token at the last step; the row above it is dead there.
    canvas = next(each for each in driver.find_elements(By.CSS_SELECTOR, ".experts canvas") if each.get_attribute("aria-label").startswith("b/"))
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    read = "return arguments[0].closest('figure').querySelector('.readout').textContent"
    width, height = canvas.size["width"], canvas.size["height"]
    for expert, said in ((0, "100.0 % of the tokens, 2 times an even part"), (1, "0.0 % of the tokens, 0 times an even part")):
        ActionChains(driver).move_to_element_with_offset(canvas, 0.45 * width, height * (0.5 - (expert + 0.5) / 4)).perform()
        assert driver.execute_script(read, canvas) == f"step 20, expert {expert}: {said}"


def test_a_chosen_step_is_told_and_a_run_without_mixtures_has_no_card(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=run%2Ftorchsat&p.torchsat.step=0")
    wait(driver, "return document.querySelectorAll('.experts canvas').length === 2")
    assert "b/experts: 4 experts, 2 for each token; 0 dead; the busiest gets 1 times an even part" in driver.execute_script(
        "return document.querySelector('.experts').textContent"
    )
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.runs=plain%2Ftorchsat")
    settled(driver)
    assert driver.execute_script("return document.querySelector('.experts').hidden") is True
