"""Makes the README's picture: `pip install -e ".[examples,screenshots]" && python docs/screenshot.py`, with Chromium and its driver installed.

Trains examples/digits.py both ways, starts TensorBoard on loopback and takes a picture of its Scalars page.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1480,1180", "--force-device-scale-factor=1"),
)


def browser() -> webdriver.Chrome:
    options = Options()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for extra in ([], ["--sane"]):
            subprocess.run([sys.executable, str(ROOT / "examples" / "digits.py"), *extra], cwd=folder, check=True, capture_output=True)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0", "--host", "127.0.0.1"]
        server = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
        driver = browser()
        try:
            address = next(line for line in server.stderr or () if "http://" in line).split("http://")[1].split("/")[0]
            driver.get(f"http://{address}/#scalars&_smoothingWeight=0&tagFilter=saturated_m%7Cderivative%7Cattenuation%7Csaturated%2F")
            WebDriverWait(driver, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, "tf-scalar-dashboard"))
            time.sleep(6)
            driver.save_screenshot(str(ROOT / "docs" / "dashboard.png"))
        finally:
            driver.quit()
            server.terminate()
            server.wait(20)


if __name__ == "__main__":
    main()
