"""Looks at a page in a real browser, for the tests of the Saturation tab."""

import sys
from pathlib import Path
from typing import Any

import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
from screenshot import browser, chromium, open_tab, serving  # noqa: E402

__all__ = ["browser", "chromium", "hover", "open_tab", "pixel", "serving", "settled", "wait"]


def wait(driver: Any, script: str, *arguments: Any) -> Any:
    return WebDriverWait(driver, 20).until(lambda page: page.execute_script(script, *arguments))


def settled(driver: Any) -> None:
    """Wait until everything that the last change began is drawn."""
    driver.execute_async_script("const done = arguments[0]; torchsat.draw().then(done);")


PIXEL = """
const map = torchsat.panels.get(arguments[0]).heatmap, box = map.box(arguments[1], arguments[2]);
const x = Math.floor((box.x + box.width / 2) * map.scale), y = Math.floor((box.y + arguments[3]) * map.scale);
return Array.from(map.canvas.getContext('2d').getImageData(x, y, 1, 1).data).slice(0, 3);
"""


def pixel(driver: Any, run: str, place: int, row: int, down: int = 2) -> tuple[int, ...]:
    return tuple(driver.execute_script(PIXEL, run, place, row, down))


def hover(driver: Any, run: str, place: int, row: int, click: bool = False) -> None:
    script = """const map = torchsat.panels.get(arguments[0]).heatmap; map.canvas.scrollIntoView({block: 'center'});
        const box = map.box(arguments[1], arguments[2]), at = map.canvas.getBoundingClientRect();
        return [box.x + box.width / 2 - at.width / 2, box.y + box.height / 2 - at.height / 2];"""
    x, y = driver.execute_script(script, run, place, row)
    canvas = driver.find_element(By.CSS_SELECTOR, f"[data-run='{run}'] canvas.heat")
    chain = ActionChains(driver).move_to_element_with_offset(canvas, round(x), round(y))
    (chain.click() if click else chain).perform()
