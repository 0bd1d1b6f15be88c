"""What the Saturation tab shows first and how it is used, in a real browser: the verdict, the zoom, blocks, scalars, the difference of two runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.browsing import browser, chromium, hover, open_tab, pixel, serving, settled, wait
from tests.conftest import record
from tests.test_tensorboard import ALERT, snapshots, write
from torchsat import Cause, Snapshot
from torchsat.colours import shades
from torchsat.record import Nearest

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium with its driver: apt-get install chromium chromium-driver")

RUNS = ("calm", "warned", "sick", "broken")


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Four runs, of which the worst is neither the newest nor the first: a model of 24 blocks of two sites, a loss, and alerts."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("ward")
    for index, name in enumerate(RUNS):
        made = []
        for step in range(0, 200, 10):
            beyond = name in ("sick", "broken") and step >= 50
            records = [
                record(
                    f"blocks.{k}.act{part}",
                    alert_level=1.0 if beyond and k == 7 else 0.0,
                    nonfinite=3 if name == "broken" and beyond and k == 7 and part == 1 else 0,
                    saturated=0.9 if beyond and k == 7 else 0.1,
                )
                for k in range(24)
                for part in (1, 2)
            ]
            rule = {"warned": "stuck_units", "sick": "saturated", "broken": "nonfinite"}.get(name, "")
            cause = Cause("init_too_large", 1.0, "gain 8", "draw the weights anew:\n    nn.init.xavier_normal_(model.fc.weight)\n    pass")
            severity: Any = "warning" if name == "warned" else "critical"
            raised = replace(
                ALERT, site="blocks.7.act1", also=("blocks.7.act2",), rule=rule, severity=severity, since=50, step=70, firing=True, causes=(cause,)
            )
            made.append(Snapshot(step, 1000.0 - 100 * index + step, tuple(records), (), (raised,) if rule and step == 70 else ()))
        write(folder / name, made)
    with SummaryWriter(str(folder / "sick")) as writer:
        for step in range(200):
            writer.add_scalar("train/loss", 1 / (1 + step), step)
            writer.add_scalar("lr", 0.5, step)
    with serving(folder) as found:
        yield found


def shown(driver: Any, run: str) -> list[str]:
    found: list[str] = driver.execute_script("return torchsat.panels.get(arguments[0]).heatmap.given.sites", f"{run}/torchsat")
    return found


def test_the_verdict_comes_first_and_the_worst_run_is_open(driver: Any, ward: str) -> None:
    open_tab(driver, ward)
    settled(driver)
    head = driver.find_element(By.CSS_SELECTOR, ".verdict").text.splitlines()
    assert head[0] == "3 of 4 runs are sick. The worst first:"
    where = "blocks.7.act1 (tanh) and 1 more place \N{EM DASH} non-finite, since step 50. Cause: weights that began too large."
    assert head[1] == f"broken \N{HEAVY MULTIPLICATION X} not finite: {where}"
    assert head[2] == "Try: draw the weights anew copy the code"
    assert head[3].startswith("sick \N{BLACK CIRCLE} critical: blocks.7.act1 (tanh) and 1 more place \N{EM DASH} saturated, since step 50.")
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["broken", "sick"]
    assert driver.find_element(By.CSS_SELECTOR, ".detail h2").text == "blocks.7.act1"
    badges = [each.text.split(maxsplit=2) for each in driver.find_elements(By.CSS_SELECTOR, ".run-badge")]
    assert [(name, word) for name, _, word in badges] == [("broken", "not finite"), ("sick", "critical"), ("warned", "warnings"), ("calm", "healthy")]
    dots = driver.find_elements(By.CSS_SELECTOR, ".run-badge .dot")
    assert [each.is_displayed() for each in dots] == [True, True, False, False]  # those that are shown have the colour of their lines
    for at, then in ((2, ["broken", "sick", "warned"]), (0, ["sick", "warned"]), (1, ["warned"]), (2, ["warned"])):
        driver.find_elements(By.CSS_SELECTOR, ".run-badge")[at].click()
        settled(driver)
        assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == then
    driver.find_element(By.CSS_SELECTOR, ".verdict .link").click()
    settled(driver)
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["broken"]


def test_a_run_without_rules_is_not_called_healthy_and_a_healthy_one_says_how_far_it_is(driver: Any, tmp_path: Path) -> None:
    calm = [replace(each, alerts=()) for each in snapshots(4)]
    write(tmp_path / "free", [replace(each, judged=False) for each in calm])
    with serving(tmp_path) as address:
        open_tab(driver, address)
        settled(driver)
        assert driver.find_element(By.CSS_SELECTOR, ".verdict").text == "free is not judged: no rules were given."
        assert driver.find_element(By.CSS_SELECTOR, ".heading .badge").text == "\N{EN DASH} not judged"
    write(tmp_path / "well", [replace(each, nearest=Nearest("a.act", "saturated", 0.31)) for each in calm])
    with serving(tmp_path) as address:
        open_tab(driver, address)
        settled(driver)
        said = driver.find_element(By.CSS_SELECTOR, ".verdict h1").text
        assert said == "1 of 2 runs is healthy, and 1 is not judged, since no rules were given."
    with serving(tmp_path / "well") as address:
        open_tab(driver, address)
        settled(driver)
        said = driver.find_element(By.CSS_SELECTOR, ".verdict").text
        assert said.split("\n", 1)[1] == "Nearest to a limit: a.act (tanh), 31 % of the way to a warning (saturated)."


def test_what_is_healthy_has_the_colour_of_the_page_and_what_is_not_finite_is_hatched(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=&p.torchsat.fold=sites&p.torchsat.runs=broken%2Ftorchsat&p.torchsat.runs=sick%2Ftorchsat")
    assert Select(driver.find_element(By.CSS_SELECTOR, "[data-control=metric]")).first_selected_option.text == "Health"
    run = "sick/torchsat"
    assert pixel(driver, run, 0, 10) == shades("heat")[0]
    assert pixel(driver, run, 15, 10) == shades("heat")[-1]  # blocks.7.act2, which has no mark of the alert
    stripes = {pixel(driver, "broken/torchsat", 14, 15, down) for down in range(1, 8)}
    assert stripes & {(197, 34, 31)}  # the colour of what is critical
    assert stripes <= {(197, 34, 31), (255, 255, 255)}


def test_a_frame_zooms_in_on_steps_and_rows_in_all_charts(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.fold=sites&p.torchsat.runs=sick%2Ftorchsat")
    settled(driver)
    script = """const map = torchsat.panels.get('sick/torchsat').heatmap; map.canvas.scrollIntoView({block: 'center'});
        const [one, two] = [map.box(10, 5), map.box(19, 14)], at = map.canvas.getBoundingClientRect();
        return [one.x + 2 - at.width / 2, one.y + 2 - at.height / 2, two.x - one.x, two.y + two.height / 2 - one.y - 2];"""
    x, y, across, down = driver.execute_script(script)
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-run='sick/torchsat'] canvas.heat")
    ActionChains(driver).move_to_element_with_offset(canvas, round(x), round(y)).click_and_hold().move_by_offset(
        round(across), round(down)
    ).release().perform()
    wait(driver, "return torchsat.view.from !== null && torchsat.view.top !== null")
    settled(driver)
    view = driver.execute_script("return [torchsat.view.from, torchsat.view.to, torchsat.view.top, torchsat.view.bottom]")
    assert 48 <= view[0] <= 54
    assert 138 <= view[1] <= 146
    assert view[2:] == ["blocks.5.act1", "blocks.9.act2"]
    assert len(shown(driver, "sick")) == 10
    assert driver.execute_script("return torchsat.panels.get('sick/torchsat').heatmap.domain") == view[:2]
    assert driver.execute_script("return torchsat.panels.get('sick/torchsat').strip.given.domain") == view[:2]
    driver.switch_to.default_content()
    assert f"p.torchsat.from={view[0]}" in driver.current_url
    driver.switch_to.frame(driver.find_element(By.CSS_SELECTOR, "iframe"))
    driver.execute_script("document.querySelector('[data-control=reset]').click()")
    settled(driver)
    assert len(shown(driver, "sick")) == 48
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-run='sick/torchsat'] canvas.heat")
    driver.execute_script("arguments[0].focus()", canvas)
    canvas.send_keys("+")
    wait(driver, "return torchsat.view.from !== null")
    canvas.send_keys("0")
    wait(driver, "return torchsat.view.from === null && torchsat.view.to === null")


def test_a_step_is_marked_in_all_charts(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.fold=sites&p.torchsat.runs=sick%2Ftorchsat&p.torchsat.site=blocks.0.act1")
    wait(driver, "return document.querySelectorAll('.detail .chart').length > 2")
    hover(driver, "sick/torchsat", 3, 9)
    assert driver.execute_script("return torchsat.hovered") == pytest.approx(95, abs=3)
    lines = driver.execute_script(
        "return Array.from(document.querySelectorAll('.detail .crossed .cross, .strip .cross'), (each) => each.getAttribute('visibility'))"
    )
    assert len(lines) > 2
    assert set(lines) == {"visible"}
    step = int(driver.execute_script("return torchsat.hovered"))
    assert driver.find_element(By.CSS_SELECTOR, ".strip-said").text == f"train/loss {1 / (1 + step):.3g} (0.005 to 1, log)\nlr 0.5"


def test_blocks_are_folded_and_show_the_worst_of_their_sites(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=&p.torchsat.runs=sick%2Ftorchsat")
    assert shown(driver, "sick") == [f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} blocks.{k}" for k in range(24)]
    assert pixel(driver, "sick/torchsat", 7, 15, 2) == shades("heat")[-1]
    script = "const map = torchsat.panels.get('sick/torchsat').heatmap; map.choose(map.given.sites[7], null)"
    driver.execute_script(script)
    wait(driver, "return torchsat.view.unfolded.size === 1")
    settled(driver)
    assert shown(driver, "sick")[6:11] == [
        *("\N{BLACK RIGHT-POINTING SMALL TRIANGLE} blocks.6", "\N{BLACK DOWN-POINTING SMALL TRIANGLE} blocks.7", "blocks.7.act1", "blocks.7.act2"),
        "\N{BLACK RIGHT-POINTING SMALL TRIANGLE} blocks.8",
    ]
    driver.execute_script(script)
    wait(driver, "return torchsat.view.unfolded.size === 0")


def test_the_filter_takes_regular_expressions(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=&p.torchsat.runs=sick%2Ftorchsat&p.torchsat.fold=sites")
    field = driver.find_element(By.CSS_SELECTOR, "[data-control=filter]")
    field.send_keys(r"/blocks\.1\d\.act2/")
    settled(driver)
    assert shown(driver, "sick") == [f"blocks.{k}.act2" for k in range(10, 20)]
    field.clear()
    field.send_keys("/[/")
    settled(driver)
    assert len(shown(driver, "sick")) == 48
    assert "cannot be used" in field.get_attribute("title")
    driver.execute_async_script("torchsat.change({filter: 'nothing'}).then(arguments[0])")
    assert driver.execute_script("return document.querySelector('.heatmap').dataset.why") == "The filter leaves no site."


def test_an_alert_leads_to_its_metric_its_site_and_its_step(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=")
    assert driver.find_element(By.CSS_SELECTOR, ".alerts summary").text == "Alerts (2) 2 critical"
    driver.find_element(By.CSS_SELECTOR, ".alerts summary").click()  # folded, since the verdict tells both
    rows = driver.find_elements(By.CSS_SELECTOR, ".alerts tbody tr")
    assert [row.text.split()[:2] for row in rows] == [["critical", "broken"], ["critical", "sick"]]
    rows[1].find_element(By.CSS_SELECTOR, "button.link").click()
    wait(driver, "return document.querySelector('.detail h2')?.textContent === 'blocks.7.act1'")
    assert driver.execute_script("return [torchsat.view.run, torchsat.view.metric, torchsat.view.step]") == ["sick/torchsat", "excess", 70]
    driver.execute_async_script("torchsat.change({site: '', metric: null, step: null}).then(arguments[0])")
    driver.execute_script(
        "document.querySelectorAll('[data-run=\"sick/torchsat\"] .flag')[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    wait(driver, "return torchsat.view.metric === 'excess' && torchsat.view.step === 70")


def test_a_chosen_step_is_left_for_the_latest(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=&p.torchsat.step=70")
    slider = driver.find_element(By.CSS_SELECTOR, "[data-control=step]")
    assert slider.get_attribute("aria-valuetext") == "step 70"
    slider.send_keys(Keys.END)
    settled(driver)
    assert driver.execute_script("return torchsat.view.step") is None
    assert driver.find_element(By.CSS_SELECTOR, ".depth output").text == "step 190 (latest)"


def test_the_difference_of_two_runs_has_a_picture_of_its_own(driver: Any, ward: str) -> None:
    open_tab(
        driver,
        ward,
        "&p.torchsat.site=&p.torchsat.runs=sick%2Ftorchsat&p.torchsat.runs=calm%2Ftorchsat&p.torchsat.fold=sites&p.torchsat.metric=saturated",
    )
    driver.find_element(By.CSS_SELECTOR, "[data-control=difference]").click()
    settled(driver)
    assert [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")] == ["sick", "calm", "sick \N{MINUS SIGN} calm"]
    script = (
        "const {grid, metric} = torchsat.panels.get('difference').heatmap.given; return [grid.at(15, 14), grid.at(0, 14), metric.high, metric.low]"
    )
    assert driver.execute_script(script) == pytest.approx([0.8, 0.0, 0.8, -0.8], abs=1e-6)
    assert pixel(driver, "difference", 14, 15) == shades("balance")[-1]


def test_words_are_defined_where_they_stand(driver: Any, ward: str) -> None:
    open_tab(driver, ward)
    driver.find_element(By.CSS_SELECTOR, ".controls .ask").click()
    dialog = driver.find_element(By.CSS_SELECTOR, "dialog.help")
    assert dialog.is_displayed()
    assert dialog.find_element(By.CSS_SELECTOR, ".asked").text.startswith("Health\nHow near a site")
    dialog.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    groups = [each.get_attribute("label") for each in driver.find_elements(By.CSS_SELECTOR, "[data-control=metric] optgroup")]
    assert groups == ["health", "saturation", "gradients", "pre-activations"]  # the rest was not measured here


@pytest.mark.parametrize(
    ("kind", "name", "heading"),
    [("metric", "trapped", "Trapped demand (trapped)"), ("rule", "stuck_units", "stuck_units"), ("cause", "init_too_large", "init_too_large")],
)
def test_a_definition_leads_to_its_page(driver: Any, ward: str, kind: str, name: str, heading: str) -> None:
    open_tab(driver, ward)
    tab = driver.current_window_handle
    driver.execute_script("torchsat.help.open(arguments[0], arguments[1])", kind, name)
    driver.find_element(By.CSS_SELECTOR, ".definition.asked a").click()
    (page,) = set(driver.window_handles) - {tab}
    driver.switch_to.window(page)
    try:
        target = wait(driver, "return document.querySelector('h3:target')")
        assert target.text.removesuffix("#").strip() == heading
        assert 0 <= target.location["y"] - driver.execute_script("return window.scrollY") < 200
        assert driver.execute_script("return [document.documentElement.className, document.styleSheets.length]") == ["light", 1]
        driver.find_element(By.CSS_SELECTOR, "nav .back").click()
        wait(driver, "return location.hash === '#torchsat'")
    finally:
        driver.close()
        driver.switch_to.window(tab)


def test_lists_close_by_escape_and_by_a_click_outside(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=")
    summary = driver.find_element(By.CSS_SELECTOR, ".runs summary")
    for by_key in (True, False):
        summary.click()
        assert driver.execute_script("return document.querySelector('.runs').open") is True
        if by_key:
            driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        else:
            driver.find_element(By.CSS_SELECTOR, ".alerts h2").click()
        assert driver.execute_script("return document.querySelector('.runs').open") is False
    summary.click()
    driver.find_element(By.CSS_SELECTOR, "[data-control='search runs']").send_keys("bro")
    names = [each.text.split()[0] for each in driver.find_elements(By.CSS_SELECTOR, ".runs label") if each.is_displayed()]
    assert names == ["broken"]


def test_what_is_shown_is_saved_as_a_table_and_a_remedy_is_copied(driver: Any, ward: str) -> None:
    open_tab(
        driver, ward, "&p.torchsat.runs=sick%2Ftorchsat&p.torchsat.metric=saturated&p.torchsat.filter=blocks.7&p.torchsat.from=60&p.torchsat.to=80"
    )
    settled(driver)
    saved = """const done = arguments[0], url = URL.createObjectURL; URL.createObjectURL = (blob) => { blob.text().then(done); return url(blob); };
        document.querySelector('[data-run="sick/torchsat"] [title="save the numbers of this picture"]').click(); URL.createObjectURL = url;"""
    share = float(np.float32(0.9))
    assert driver.execute_async_script(saved).splitlines() == [
        "step,blocks.7.act1,blocks.7.act2",
        *(f"{step},{share},{share}" for step in (60, 70, 80)),
    ]
    picture = """const done = arguments[0], url = URL.createObjectURL;
        URL.createObjectURL = (blob) => { done([blob.type, blob.size]); return url(blob); };
        document.querySelector('[data-run="sick/torchsat"] [title="save this picture"]').click();"""
    kind, size = driver.execute_async_script(picture)
    assert kind == "image/png"
    assert size > 1000
    driver.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => (window.copied = text)}, configurable: true})"
    )
    driver.find_element(By.CSS_SELECTOR, ".detail .remedy .copy").click()
    assert wait(driver, "return window.copied") == "nn.init.xavier_normal_(model.fc.weight)\npass"


def test_the_lines_of_runs_have_the_colours_of_tensorboard_and_can_be_seen(driver: Any, ward: str) -> None:
    open_tab(driver, ward, "&p.torchsat.site=")
    script = """const done = arguments[0]; import(new URL('./palette.js', document.baseURI)).then((own) => done([
        Array.from({length: 8}, (_, place) => own.runColour(place, {name: 'light', page: '#ffffff'})),
        Array.from({length: 8}, (_, place) => own.runColour(place, {name: 'dark', page: '#202124'}))]));"""
    light, dark = driver.execute_async_script(script)

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert light[0] == light[7] == "#425066"
    assert light[2] == "#e52592"
    for colours, page in ((light, "#ffffff"), (dark, "#202124")):
        for colour in colours:
            high, low = sorted((luminance(colour), luminance(page)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 2.95


def test_on_a_narrow_page_a_site_opens_where_it_is_seen(ward: str) -> None:
    with browser(900, 700) as narrow:
        open_tab(narrow, ward, "&p.torchsat.site=&p.torchsat.runs=sick%2Ftorchsat")
        hover(narrow, "sick/torchsat", 7, 15, click=True)
        wait(narrow, "return document.querySelectorAll('.detail .chart').length > 2")
        top, height = narrow.execute_script("return [document.querySelector('.detail').getBoundingClientRect().top, window.innerHeight]")
        assert -5 <= top <= height - 100


def test_new_data_are_followed(driver: Any, tmp_path: Path) -> None:
    from torchsat.tensorboard.writer import TensorBoardWriter

    given = snapshots(9, sites=3)
    writer = TensorBoardWriter(tmp_path / "live")
    for snapshot in given[:4]:
        writer(snapshot)
    writer.flush()
    with serving(tmp_path, "--reload_interval=1") as found:
        open_tab(driver, found, "&p.torchsat.step=10&p.torchsat.site=")
        assert "TensorBoard's reload is off" in driver.find_element(By.CSS_SELECTOR, ".switches").text
        driver.find_element(By.CSS_SELECTOR, "[data-control=follow]").click()
        for snapshot in given[4:]:
            writer(snapshot)
        writer.flush()
        WebDriverWait(driver, 30).until(lambda page: page.execute_script("return torchsat.grids.get('live/torchsat').steps.length === 9"))
        assert driver.execute_script("return torchsat.view.step") is None
        driver.find_element(By.CSS_SELECTOR, "[data-control=follow]").click()
        assert driver.execute_script("return torchsat.following") is None
    writer.close()


def test_what_is_in_use_stays_when_new_data_come(driver: Any, tmp_path: Path) -> None:
    """The step and the rows that are zoomed in on, what is unfolded, scrolled and focused, while a training writes."""
    from torchsat.tensorboard.writer import TensorBoardWriter

    made = [Snapshot(step, 1000.0 + step, tuple(record(f"s{k}.act") for k in range(3))) for step in range(12)]
    made[1] = replace(made[1], alerts=(replace(ALERT, site="s0.act", also=("s1.act", "s2.act"), step=1, since=0),))
    writer = TensorBoardWriter(tmp_path / "live")
    for snapshot in made[:6]:
        writer(snapshot)
    writer.flush()
    with serving(tmp_path, "--reload_interval=1") as found:
        open_tab(driver, found, "&p.torchsat.from=1&p.torchsat.to=3")
        wait(driver, "return document.querySelectorAll('.detail .chart').length > 2")
        driver.execute_script("document.querySelector('.detail').scrollTop = 60; document.scrollingElement.scrollTop = 40")
        driver.execute_script("document.querySelector('.alerts summary').click(); document.querySelector('.detail .alert details').open = true")
        driver.execute_script("document.querySelector('.flag, .detail .alert details li button').focus({preventScroll: true})")
        before = driver.execute_script(IN_USE)
        driver.execute_script("torchsat.follow(true); torchsat.view.to = 3")
        for snapshot in made[6:]:
            writer(snapshot)
        writer.flush()
        WebDriverWait(driver, 30).until(lambda page: page.execute_script("return torchsat.grids.get('live/torchsat').steps.length === 12"))
        settled(driver)
        assert driver.execute_script(IN_USE) == before
        assert driver.execute_script("return document.querySelector('.detail').textContent.includes('At step 11')")
        driver.execute_script("torchsat.follow(false)")
    writer.close()


IN_USE = """const focused = document.activeElement;
return [document.querySelector('.detail').scrollTop, document.scrollingElement.scrollTop, document.querySelector('.detail .alert details').open,
    document.querySelector('.alerts details').open, focused.tagName, focused.textContent, torchsat.view.from, torchsat.view.to];"""


def test_a_list_of_alerts_is_folded_where_it_is_long_or_said_above(driver: Any, ward: str) -> None:
    folded = "return [document.querySelectorAll('.alerts tbody tr').length, document.querySelector('.alerts details').open]"
    for runs, count, open_at_first in (("broken sick", 2, False), ("broken sick warned", 3, False)):
        view = "".join(f"&p.torchsat.runs={run}%2Ftorchsat" for run in runs.split())
        open_tab(driver, ward, f"&p.torchsat.site={view}")
        assert driver.execute_script(folded) == [count, open_at_first]
    top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    assert driver.execute_script(top, ".verdict") < driver.execute_script(top, ".alerts") < driver.execute_script(top, ".maps")


def test_panels_side_by_side_begin_at_one_height_and_leave_no_hole(driver: Any, tmp_path: Path) -> None:
    write(tmp_path / "few", [Snapshot(step, 1.0 + step, (record("a.act"),)) for step in range(5)])
    write(tmp_path / "more", [Snapshot(step, 1.0 + step, tuple(record(f"s{k}.act") for k in range(4))) for step in range(5)])
    write(tmp_path / "tall", [Snapshot(step, 1.0 + step, tuple(record(f"s{k}.act") for k in range(30))) for step in range(5)])
    script = """return arguments[0].map((run) => { const box = torchsat.panels.get(`${run}/torchsat`).heatmap.canvas.getBoundingClientRect();
        return [Math.round(box.left), Math.round(box.top), Math.round(box.width)]; });"""
    with serving(tmp_path) as found:
        open_tab(driver, found, "&p.torchsat.site=&p.torchsat.runs=few%2Ftorchsat&p.torchsat.runs=more%2Ftorchsat")
        few, more = driver.execute_script(script, ["few", "more"])
        assert few[1] == more[1]
        assert few[0] != more[0]
        driver.execute_async_script("torchsat.change({runs: ['few/torchsat', 'tall/torchsat']}).then(arguments[0])")
        few, tall = driver.execute_script(script, ["few", "tall"])
        assert few[0] == tall[0]
        assert few[2] == tall[2]
        assert few[1] != tall[1]


def test_a_loss_that_is_not_finite_is_told(driver: Any, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    values = {"falls": (1.0, 0.5, float("nan")), "nan": (float("nan"),) * 3, "negative": (-3.0, -4.0, -5.0), "decades": (1e5, 1.0, 1e-5), "none": ()}
    for name, losses in values.items():
        write(tmp_path / name, [Snapshot(step, 1.0 + step, (record("a.act"),)) for step in range(3)])
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("accuracy", 0.5, 0)
            for step, loss in enumerate(losses):
                writer.add_scalar("loss", loss, step)
    with serving(tmp_path) as found:
        open_tab(driver, found, "&p.torchsat.site=" + "".join(f"&p.torchsat.runs={name}%2Ftorchsat" for name in values))
        settled(driver)
        said = {
            name: driver.find_element(By.CSS_SELECTOR, f"[data-run='{name}/torchsat'] .strip-said").get_attribute("textContent") for name in values
        }
        assert said == {
            "falls": "loss not finite (0.5 to 1)",
            "nan": "loss not finite",
            "negative": "loss -5 (-5 to -3)",
            "decades": "loss 1.00e-5 (1.00e-5 to 1.00e+5, log)",
            "none": "no scalar of this run is named like a loss",
        }
        ticks = "return Array.from(document.querySelectorAll(`[data-run='${arguments[0]}/torchsat'] .strip-picture path[d*=v4]`)).length"
        assert [driver.execute_script(ticks, name) for name in ("falls", "nan", "negative")] == [1, 1, 0]


def test_names_are_shown_as_they_are_and_fit_the_page(driver: Any, tmp_path: Path) -> None:
    names = ["<img src=x onerror=document.title='attacked'>", "\"quoted\" 'run'", "x" * 200, "λ-訓練", "a b%20c#d?e=f&g"]
    for name in names:
        write(tmp_path / name, [Snapshot(step, 1.0 + step, (record("layer." * 20 + "act"), record("b.act"))) for step in range(3)])
    with serving(tmp_path) as found:
        open_tab(driver, found)
        driver.execute_async_script("torchsat.change({runs: arguments[0], site: 'b.act'}).then(arguments[1])", [f"{name}/torchsat" for name in names])
        driver.execute_script("document.querySelector('.runs').open = true")
        assert {each.text for each in driver.find_elements(By.CSS_SELECTOR, ".heading h2")} == set(names)
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert driver.find_elements(By.CSS_SELECTOR, "img") == []
        assert driver.execute_script("return torchsat.message.textContent") == ""
        driver.execute_script("torchsat.change({runs: []})")


def test_where_there_is_nothing_the_tab_says_so_and_is_there_behind_a_prefix(driver: Any, tmp_path: Path) -> None:
    with serving(tmp_path, "--path_prefix=/some/where", "--reload_interval=1") as found:
        driver.switch_to.default_content()
        driver.get("about:blank")
        driver.get(f"{found.removesuffix('/some/where')}/some/where/#torchsat")
        WebDriverWait(driver, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "iframe"))
        driver.switch_to.frame(driver.find_element(By.CSS_SELECTOR, "iframe"))
        wait(driver, "return document.querySelector('.message')?.textContent.startsWith('No run here holds torchsat data yet.')")
        assert not driver.find_element(By.CSS_SELECTOR, ".controls").is_displayed()
        write(tmp_path / "late", snapshots(3, sites=2))
        WebDriverWait(driver, 30).until(lambda page: page.execute_script("return torchsat.panels.size === 1"))
        driver.execute_script("torchsat.help.open('metric', 'gain')")
        link = driver.find_element(By.CSS_SELECTOR, ".definition.asked a").get_attribute("href")
        assert "/some/where/data/plugin/torchsat/docs/metrics?theme=light#weight-gain-gain" in link


def test_a_run_whose_alert_still_waits_is_in_doubt(driver: Any, tmp_path: Path) -> None:
    made = [Snapshot(step, 1.0 + step, (record("a.act"), record("b.act"))) for step in range(2)]
    write(tmp_path / "young", [*made[:1], replace(made[1], nearest=Nearest("a.act", "stuck_units", 1.0))])
    write(tmp_path / "calm", [*made[:1], replace(made[1], nearest=Nearest("a.act", "stuck_units", 0.4))])
    why = "a.act (tanh) is beyond the limit of a warning, but not for long enough to be told (stuck units)"
    with serving(tmp_path) as found:
        open_tab(driver, found, "&p.torchsat.site=&p.torchsat.metric=saturated")
        settled(driver)
        assert driver.find_element(By.CSS_SELECTOR, ".verdict h1").text == "1 of 2 runs is healthy, and 1 is in doubt."
        heading = {name: driver.find_element(By.CSS_SELECTOR, f"[data-run='{name}/torchsat'] .heading").text for name in ("young", "calm")}
        assert "? in doubt" in heading["young"]
        assert f"{why}." in heading["young"]
        assert "healthy" in heading["calm"]
        assert "limit" not in heading["calm"]
