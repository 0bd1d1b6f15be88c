"""The Saturation tab in a real browser, served by a real TensorBoard on loopback."""

import colorsys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from tests.browsing import chromium, hover, open_tab, pixel, serving, settled, wait  # noqa: E402
from tests.conftest import record  # noqa: E402
from tests.test_tensorboard import ALERT, write  # noqa: E402
from tests.truth import known  # noqa: E402
from torchsat import Alert, Cause, Snapshot, Weight  # noqa: E402
from torchsat.colours import shade, shades  # noqa: E402
from torchsat.metrics import METRICS  # noqa: E402
from torchsat.percent import percent  # noqa: E402
from torchsat.record import HISTOGRAM_BINS, HISTOGRAM_EDGES  # noqa: E402
from torchsat.report import report  # noqa: E402
from torchsat.view import from_snapshots  # noqa: E402

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium with its driver: apt-get install chromium chromium-driver")

NAME = "<img src=x onerror=document.title='attacked'>"
BY_NAME = {metric.name: metric for metric in METRICS}


def snapshots(sites: int, count: int, every: int = 10) -> list[Snapshot]:
    """Shares that differ from cell to cell, histograms and layers; an alert that fires to the end, and one that clears, at a site with markup for a
    name."""
    generator, made = np.random.default_rng(0), []
    for index in range(count):
        shares = generator.random(sites)
        records = [
            record(
                NAME if k == 1 else f"blocks.{k}.act",
                kind="call" if k % 2 else "module",
                saturated=float(share),
                low=float(share) / 2,
                relative_derivative=float(1 - share),
                grad_z_rms=float(10 ** (-6 * share)),
                histogram=(1 / HISTOGRAM_BINS,) * HISTOGRAM_BINS,
            )
            for k, share in enumerate(shares)
        ]
        if sites > 3:
            records[3] = replace(records[3], saturated=None if index == 2 else records[3].saturated)
        alerts: tuple[Alert, ...] = ()
        if index == 2:
            causes = (Cause("init_too_large", 0.75, "gain 8", "nn.init.xavier_normal_"), Cause("inputs_unscaled", 0.25, "rms 4", "standardise"))
            raised = replace(ALERT, step=index * every, since=every, causes=causes)
            alerts = (replace(raised, site="blocks.0.act"), replace(raised, site=NAME, message=f"{NAME} is saturated", severity="warning"))
        elif index == 5:
            alerts = (replace(ALERT, site=NAME, step=index * every, firing=False, message="no longer"),)
        weights = (Weight("fc", ("blocks.0.act",), 8, False, 0.1, 64, 1.5, 1.0, 0.25, 1e-3, 1.0, 0.5, 128),)
        made.append(Snapshot(index * every, 1000.0 + index, tuple(records), weights, alerts))
    return made


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "one", snapshots(6, 8))
    write(folder / "two", [replace(each, time=each.time - 500, alerts=()) for each in snapshots(4, 12)])
    write(folder / "old", [replace(each, time=1.0) for each in snapshots(2, 2)])
    with serving(folder) as found:
        yield found


def test_pixels_are_the_stored_values(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=")
    series = from_snapshots("one/torchsat", snapshots(6, 8))
    for name in ("excess", "saturated", "relative_derivative"):
        driver.execute_async_script("torchsat.change({metric: arguments[0]}).then(arguments[1])", name)
        metric, values = BY_NAME[name], series.values[name]
        for place in (2, 4, 5):  # sites without an alert mark
            for row in range(8):
                expected = shades(metric.ramp)[int(shade(metric, values[row : row + 1, place], 0.0, 1.0)[0])]
                assert pixel(driver, "one/torchsat", place, row) == expected, (name, place, row)
    driver.execute_async_script("torchsat.change({metric: 'excess'}).then(arguments[0])")
    blanks = {pixel(driver, "one/torchsat", 3, 2, down) for down in (2, 8)}
    assert all(min(colour) >= 0xC6 and max(colour) - min(colour) < 12 for colour in blanks)  # white or grey: no number there


def test_numbers_are_printed_as_python_prints_them(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=blocks.0.act")
    generator = np.random.default_rng(1)
    shares = [0.0, 1.0, *(float(share) for scale in (1.0, 0.1, 0.01, 0.001) for part in generator.random(200) * scale for share in (part, 1 - part))]
    assert driver.execute_script("return arguments[0].map((share) => torchsat.print.percent(share))", shares) == [percent(share) for share in shares]
    negative = driver.execute_script("return [-0.2, -0.05, -0.0001].map((share) => torchsat.print.percent(share))")
    assert negative == ["\N{MINUS SIGN}20 %", "\N{MINUS SIGN}5.0 %", "> \N{MINUS SIGN}0.1 %"]
    assert driver.execute_script("return torchsat.scales.histogram_edges") == list(HISTOGRAM_EDGES)
    wait(driver, "return document.querySelector('.detail canvas.bands') !== null")
    canvas = driver.find_element(By.CSS_SELECTOR, ".detail canvas.bands")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(driver).move_to_element_with_offset(canvas, -canvas.size["width"] // 4, -canvas.size["height"] // 2 + 2).perform()
    said = driver.find_element(By.CSS_SELECTOR, ".detail .readout").text
    assert said.endswith(f"|f'| / peak from 0.75 to 1: {percent(1 / HISTOGRAM_BINS)}")


def test_where_observations_share_a_pixel_the_worst_is_shown(driver: Any, tmp_path: Path) -> None:
    calm = [Snapshot(step, 1000.0 + step, (record("a", saturated=0.0),)) for step in range(2400)]
    calm[1201] = Snapshot(1201, 2201.0, (record("a", saturated=1.0),))
    write(tmp_path / "long", calm)
    with serving(tmp_path, "--samples_per_plugin=torchsat=5000") as found:
        open_tab(driver, found, "&p.torchsat.metric=saturated&p.torchsat.site=")
        script = """const map = torchsat.panels.get('long/torchsat').heatmap, box = map.box(0, 1201);
            const line = map.canvas.getContext('2d').getImageData(Math.floor(box.x) - 2, Math.floor(box.y) + 2, 6, 1).data;
            return Array.from({length: 6}, (_, k) => Array.from(line.slice(4 * k, 4 * k + 3)));"""
        assert list(shades("heat")[-1]) in driver.execute_script(script)


def test_hover_shows_the_figures(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.metric=saturated")
    hover(driver, "one/torchsat", 4, 3)
    tip = driver.find_element(By.CSS_SELECTOR, "[data-run='one/torchsat'] .tip")
    share = known(snapshots(6, 8)[3].records[4].saturated)
    assert tip.text.splitlines() == ["blocks.4.act", "tanh", f"Saturated: {100 * share:.{1 if share < 0.1 or share > 0.9 else 0}f} %", "step 30"]
    hover(driver, "one/torchsat", 0, 3)
    assert tip.text.splitlines()[-1] == "saturated, since step 10"


def test_a_click_opens_a_site_with_its_causes_and_remedies(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=")
    detail = driver.find_element(By.CSS_SELECTOR, ".detail")
    assert not detail.is_displayed()
    hover(driver, "one/torchsat", 0, 4, click=True)
    wait(driver, "return document.querySelectorAll('.detail .chart').length > 4")
    text = detail.text
    assert "blocks.0.act" in text
    assert "fed by fc" in text
    assert "critical: saturated? since step 10, raised at step 20, still firing" in text
    assert "weights that began too large init_too_large? 75 % of the cause" in text
    assert "Try: nn.init.xavier_normal_ copy" in text
    assert "At step 40." in text
    titles = [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".detail figcaption")]
    assert titles[0].startswith("|f'| / peak over time")
    assert {"Saturated share?", "Attenuation?", "Gradient?", "Update ratio?"} <= set(titles)
    driver.switch_to.default_content()
    assert "p.torchsat.site=blocks.0.act" in driver.current_url
    assert "p.torchsat.step=40" in driver.current_url


def test_the_first_alert_is_open_at_first(driver: Any, address: str) -> None:
    open_tab(driver, address)
    wait(driver, "return document.querySelector('.detail h2')?.textContent === 'blocks.0.act'")


def test_a_shared_link_shows_the_same_view(driver: Any, address: str) -> None:
    view = (
        "&p.torchsat.runs=two%2Ftorchsat&p.torchsat.metric=grad_z_rms&p.torchsat.site=blocks.2.act&p.torchsat.order=worst&p.torchsat.axis=observation"
    )
    open_tab(driver, address, view + "&p.torchsat.step=20&p.torchsat.filter=blocks&p.torchsat.hidden=call")
    wait(driver, "return document.querySelector('.detail h2')?.textContent === 'blocks.2.act'")
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["two"]
    assert Select(driver.find_element(By.CSS_SELECTOR, "[data-control=metric]")).first_selected_option.text == "Gradient"
    shown = driver.execute_script("return torchsat.panels.get('two/torchsat').heatmap.given.sites")
    at = snapshots(4, 12)[2].records
    assert shown == sorted(["blocks.0.act", "blocks.2.act"], key=lambda site: -known(next(each.grad_z_rms for each in at if each.site == site)))
    assert driver.find_element(By.CSS_SELECTOR, ".depth output").text == "step 20"


def test_runs_are_chosen_and_stand_side_by_side(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=")
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["one", "two"]  # the two newest of three
    tops = [each.location["y"] for each in driver.find_elements(By.CSS_SELECTOR, ".panel")]
    assert tops[0] == tops[1]
    driver.find_element(By.CSS_SELECTOR, ".runs summary").click()
    driver.find_element(By.XPATH, "//div[@class='torchsat']//label[span='old']/input").click()
    settled(driver)
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["one", "two", "old"]


def test_the_metric_and_the_filter_change_the_picture(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=")
    Select(driver.find_element(By.CSS_SELECTOR, "[data-control=metric]")).select_by_visible_text("Update ratio")
    settled(driver)
    assert driver.execute_script("return torchsat.panels.get('one/torchsat').heatmap.given.sites") == ["blocks.0.act"]
    Select(driver.find_element(By.CSS_SELECTOR, "[data-control=metric]")).select_by_visible_text("Saturated")
    field = driver.find_element(By.CSS_SELECTOR, "[data-control=filter]")
    field.send_keys("BLOCKS 4")
    settled(driver)
    assert driver.execute_script("return torchsat.panels.get('one/torchsat').heatmap.given.sites") == ["blocks.4.act"]
    assert driver.switch_to.active_element.get_attribute("data-control") == "filter"
    kinds = driver.find_elements(By.CSS_SELECTOR, ".kinds input")
    kinds[0].click()
    settled(driver)
    assert driver.execute_script("return torchsat.panels.get('one/torchsat').heatmap.given.sites") == []


def test_the_keyboard_reaches_every_cell(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=")
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-run='one/torchsat'] canvas.heat")
    driver.execute_script("arguments[0].focus()", canvas)
    canvas.send_keys(Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    said = driver.find_element(By.CSS_SELECTOR, "[data-run='one/torchsat'] .said")
    assert said.get_attribute("textContent").startswith("blocks.2.act, step 10, Saturated beyond normal ")
    canvas.send_keys(Keys.ENTER)
    wait(driver, "return document.querySelector('.detail h2')?.textContent === 'blocks.2.act'")
    assert driver.execute_script("return torchsat.view.step") == 10


def test_a_reload_takes_neither_the_cursor_nor_the_focus_away(driver: Any, address: str) -> None:
    open_tab(driver, address)
    wait(driver, "return document.querySelectorAll('.detail .chart').length > 4")
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-run='one/torchsat'] canvas.heat")
    driver.execute_script("arguments[0].focus()", canvas)
    canvas.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    driver.execute_script("document.querySelector('.alerts button').marked = true; document.querySelector('.detail .close').marked = true")
    driver.execute_async_script("torchsat.reload().then(arguments[0])")
    assert driver.execute_script("return torchsat.panels.get('one/torchsat').heatmap.cursor.row") == 1
    assert driver.execute_script("return document.querySelector('.alerts button').marked && document.querySelector('.detail .close').marked")


def test_a_link_with_nonsense_says_what_is_not_there(driver: Any, address: str) -> None:
    nonsense = "&p.torchsat.axis=toString&p.torchsat.order=constructor&p.torchsat.hidden=toString.softmax&p.torchsat.step=x"
    open_tab(driver, address, f"{nonsense}&p.torchsat.metric=nope&p.torchsat.runs=gone&p.torchsat.runs=two%2Ftorchsat&p.torchsat.site=where")
    settled(driver)
    message = driver.find_element(By.CSS_SELECTOR, ".message").text
    assert "There is no run gone." in message
    assert "There is no metric nope." in message
    assert "The runs shown have no site where." in message
    assert len(driver.execute_script("return torchsat.panels.get('two/torchsat').heatmap.given.sites")) == 4


def test_the_depth_profile_shows_no_run_before_its_first_step(driver: Any, tmp_path: Path) -> None:
    write(tmp_path / "early", snapshots(4, 6))
    write(tmp_path / "late", [replace(each, step=each.step + 500, alerts=()) for each in snapshots(6, 6)])
    with serving(tmp_path) as found:
        open_tab(driver, found, "&p.torchsat.site=&p.torchsat.step=20")
        assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".depth .legend > span")] == ["early"]
        driver.execute_async_script("torchsat.change({step: 520}).then(arguments[0])")
        assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".depth .legend > span")] == ["early, step 50", "late"]


def test_dark_pages_have_dark_colours(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.site=&p.torchsat.metric=saturated")
    driver.switch_to.default_content()
    driver.execute_script("document.body.classList.add('dark-mode')")
    driver.switch_to.frame(driver.find_element(By.CSS_SELECTOR, "iframe"))
    wait(driver, "return document.body.classList.contains('dark')")
    settled(driver)
    value = from_snapshots("", snapshots(6, 8)).values["saturated"][3:4, 4]
    assert pixel(driver, "one/torchsat", 4, 3) == shades("heat", dark=True)[int(shade(BY_NAME["saturated"], value, 0.0, 1.0)[0])]
    red, green, blue = (
        int(part) / 255 for part in driver.execute_script("return getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    )
    assert colorsys.rgb_to_hls(red, green, blue)[1] < 0.2


def test_names_are_text(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.runs=one%2Ftorchsat&p.torchsat.site=")
    hover(driver, "one/torchsat", 1, 3, click=True)
    wait(driver, "return document.querySelector('.detail h2')?.textContent === arguments[0]", NAME)
    assert driver.find_elements(By.CSS_SELECTOR, "img") == []
    assert NAME in driver.find_element(By.CSS_SELECTOR, ".alerts").text
    driver.switch_to.default_content()
    assert driver.title != "attacked"


def test_nothing_goes_wrong_and_nothing_foreign_is_asked(driver: Any, address: str) -> None:
    driver.get_log("browser")
    open_tab(driver, address)
    settled(driver)
    ours = [
        entry["message"] for entry in driver.get_log("browser") if "plugin/torchsat" in entry["message"] or "Content Security" in entry["message"]
    ]
    assert ours == []
    asked = driver.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert asked
    assert all(each.startswith(f"{address}/data/plugin/torchsat/") for each in asked)


@pytest.mark.parametrize("flags", [("--load_fast=false",), ("--path_prefix=/a/b",)])
def test_it_works_with_the_other_data_server_and_below_a_path(driver: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    write(tmp_path / "run", snapshots(3, 30))
    with serving(tmp_path, *flags) as found:
        open_tab(driver, found)
        assert driver.execute_script("return torchsat.grids.get('run/torchsat').steps.length") == 30


def test_a_run_still_being_written_grows_on_reload(driver: Any, tmp_path: Path) -> None:
    from torchsat.tensorboard.writer import TensorBoardWriter

    given = snapshots(3, 9)
    writer = TensorBoardWriter(tmp_path / "live")
    for snapshot in given[:4]:
        writer(snapshot)
    writer.flush()
    with serving(tmp_path, "--reload_interval=1") as found:
        open_tab(driver, found)
        assert driver.execute_script("return torchsat.grids.get('live/torchsat').steps.length") == 4
        for snapshot in given[4:]:
            writer(snapshot)
        writer.flush()

        def grown(page: Any) -> bool:
            page.switch_to.default_content()
            page.find_element(By.CSS_SELECTOR, "app-header-reload button").click()
            page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe"))
            return bool(page.execute_script("return torchsat.grids.get('live/torchsat').steps.length === 9"))

        WebDriverWait(driver, 30, poll_frequency=1).until(grown)
    writer.close()


def test_there_is_no_tab_without_data(driver: Any, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    with serving(tmp_path) as found:
        driver.switch_to.default_content()
        driver.get(found)
        WebDriverWait(driver, 30).until(lambda page: "SCALARS" in page.find_element(By.CSS_SELECTOR, "app-header").text.upper())
        assert "SATURATION" not in driver.find_element(By.CSS_SELECTOR, "app-header").text.upper()


LARGE = """
const done = arguments[0];
(async () => {
const [count, sites] = [1000, 500], own = await import(new URL('./source.js', document.baseURI));
const names = Array.from({length: sites}, (_, k) => `layer.${k}.act`), steps = Float64Array.from({length: count}, (_, k) => 10 * k);
const values = new Float32Array(count * sites);
for (let row = 0; row < count; row++) for (let k = 0; k < sites; k++) values[row * sites + k] = ((7 * row + 13 * k) % 101) / 100;
const about = {...await torchsat.source.json('run', {run: 'one/torchsat'}), alerts: [], observations: count};
about.sites = names.map((site) => ({...about.sites[0], site}));
const answers = {scales: torchsat.scales, runs: torchsat.runs.filter((run) => run.name === 'one/torchsat'), run: about,
    scalars: {loss: null, rate: null}};
torchsat.source = {json: async (name) => answers[name], grid: async () => new own.Grid(names, steps, values), forget() {}};
performance.clearMeasures();
await torchsat.draw();
done(performance.getEntriesByName('torchsat.fill').map((each) => each.duration));
})().catch((error) => done([String(error)]));
"""


def test_five_hundred_sites_and_a_thousand_observations_are_drawn_in_a_second(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.metric=saturated&p.torchsat.site=")
    (spent,) = driver.execute_async_script(LARGE)
    assert spent < 1000, f"{spent} ms of main-thread time"
    driver.execute_async_script("torchsat.change({fold: 'sites', order: 'flow'}).then(arguments[0])")
    for place, row in ((0, 0), (250, 500), (499, 999)):
        value = np.array([(7 * row + 13 * place) % 101 / 100], np.float32)
        worst = max((7 * each + 13 * place) % 101 for each in (row, row + 1, row - 1) if 0 <= each < 1000) / 100
        shown = [shades("heat")[int(shade(BY_NAME["saturated"], each, 0.0, 1.0)[0])] for each in (value, np.array([worst], np.float32))]
        assert pixel(driver, "one/torchsat", place, row, 1) in shown  # some observations share a pixel with a neighbour


def test_the_page_of_the_report_is_the_same_view(driver: Any, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    write(tmp_path / "a ~*run", snapshots(6, 8))
    with SummaryWriter(str(tmp_path / "a ~*run")) as writer:
        for step in range(6):
            writer.add_scalar("train/loss ~*", 3.0 - step / 4, step)
    path = tmp_path / "report.html"
    with path.open("w", encoding="utf-8") as file:
        report(tmp_path / "a ~*run", file, "html")
    driver.switch_to.default_content()
    driver.get(f"file://{path}")
    wait(driver, "return document.querySelectorAll('.detail .chart').length > 4")
    run = "a ~*run"
    value = from_snapshots("", snapshots(6, 8)).values["excess"][3:4, 4]
    assert pixel(driver, run, 4, 3) == shades("heat")[int(shade(BY_NAME["excess"], value, 0.0, 1.0)[0])]
    assert driver.find_element(By.CSS_SELECTOR, ".detail h2").text == "blocks.0.act"
    assert driver.find_element(By.CSS_SELECTOR, ".strip-said").text == "train/loss ~* 1.75 (1.75 to 3)\nlearning rate 0.1"
    assert len(driver.find_elements(By.CSS_SELECTOR, ".strip path.flag")) == 2
    assert driver.find_elements(By.CSS_SELECTOR, "img") == []
    assert [entry for entry in driver.get_log("browser") if "report.html" in entry["message"]] == []
    for metric, written in (("low", "#metric=low"), (None, "")):
        driver.execute_async_script("torchsat.change({metric: arguments[0]}).then(arguments[1])", metric)
        assert driver.execute_script("return location.hash") == written
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_zooming_five_hundred_sites_computes_no_colour_again(driver: Any, address: str) -> None:
    open_tab(driver, address, "&p.torchsat.metric=saturated&p.torchsat.site=&p.torchsat.fold=sites")
    driver.execute_async_script(LARGE)
    script = """const done = arguments[0], {heatmap} = torchsat.panels.get('one/torchsat'); let shaded = 0;
        const shade = heatmap.shade; heatmap.shade = function (value) { shaded += 1; return shade.call(this, value); };
        for (let turn = 0; turn < 10; turn++) { Object.assign(torchsat.view, {from: 100 * turn, to: 9000 - 100 * turn}); torchsat.fillMaps(); }
        done([shaded, heatmap.domain, heatmap.given.sites.length]);"""
    assert driver.execute_async_script(script) == [0, [900, 8100], 500]
