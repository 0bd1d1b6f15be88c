"""Makes the README's picture: `pip install -e ".[examples,screenshots]" && python docs/screenshot.py`, with Chromium and its driver installed.

Trains examples/digits.py both ways, starts TensorBoard on loopback and takes a picture of its Saturation tab. `serving` and `browser` are what the
browser tests use too.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)


def chromium() -> str | None:
    """The browser, where it and its driver are installed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found if shutil.which("chromedriver") else None


@contextlib.contextmanager
def browser(width: int = 1480, height: int = 1180) -> Iterator[webdriver.Chrome]:
    options = Options()
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.binary_location = chromium() or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """TensorBoard on a free port of loopback; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    try:
        line = next(line for line in server.stderr if "http://" in line)
        yield "http://" + line.split("http://")[1].split()[0].rstrip("/")
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


def open_tab(driver: webdriver.Chrome, address: str, view: str = "") -> None:
    """Show a view of the Saturation tab and wait until it is drawn; the driver is then inside its frame."""
    driver.switch_to.default_content()
    driver.get("about:blank")
    driver.get(f"{address}/#torchsat{view}")
    WebDriverWait(driver, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, "iframe"))
    driver.switch_to.frame(driver.find_element(By.CSS_SELECTOR, "iframe"))
    WebDriverWait(driver, 60).until(lambda page: page.execute_script("return performance.getEntriesByName('torchsat.draw').length > 0"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for extra in ([], ["--sane"]):
            subprocess.run([sys.executable, str(ROOT / "examples" / "digits.py"), *extra], cwd=folder, check=True, capture_output=True)
        with serving(Path(folder, "runs")) as address, browser(1400, 1000) as driver:
            open_tab(driver, address)
            time.sleep(2)
            driver.switch_to.default_content()
            driver.save_screenshot(str(ROOT / "docs" / "dashboard.png"))


if __name__ == "__main__":
    main()
