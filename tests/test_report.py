"""The report in its four formats, from event files alone."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.conftest import record
from tests.test_tensorboard import ALERT, offsets, snapshots, write
from torchsat import Snapshot
from torchsat.report import FORMATS, main, report
from torchsat.sheets import sparkline


def text(directory: Path) -> str:
    out = io.StringIO()
    report(directory, out)
    return out.getvalue()


def rows(printed: str, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    lines = printed.split(title, 1)[1].splitlines()[2:]
    end = next((index for index, line in enumerate(lines) if not line.strip()), len(lines))
    return [line.split() for line in lines[:end]]


def run(tmp_path: Path) -> Path:
    """A run in which `bad` closes while `good` stays open, and one alert fires and clears."""
    series = []
    for step, share in enumerate((0.0, 0.3, 0.6, 0.9, 1.0)):
        bad = record("bad", saturated=share, low=share, high=0.0, relative_derivative=0.6 * (1 - share), stuck=0.25)
        output = record("zz.out", output=True, saturated=1.0, relative_derivative=0.0)
        series.append(Snapshot(step * 10, 0.0, (record("good"), bad, output), snapshots(1)[0].weights))
    fired = replace(ALERT, site="bad", since=10, step=20, message="bad (tanh) is saturated")
    series[2] = replace(series[2], alerts=(fired, replace(fired, site="good", severity="warning", since=20, message="good was odd")))
    series[4] = replace(series[4], alerts=(replace(fired, site="good", step=40, firing=False, message="good: no longer odd"),))
    write(tmp_path, series)
    return tmp_path


def test_the_worst_site_stands_first_and_outputs_last(tmp_path: Path) -> None:
    table = rows(text(run(tmp_path)), "Sites, worst first")
    assert [cells[0] for cells in table] == ["bad", "good", "zz.out"]
    assert table[0][1:] == ["tanh", "100.0", "%", "100.0", "%", "0.0", "%", "-", "-", "0.000", "25", "%", "0.68", "7.00e-04", "▁▃▅██"]
    assert table[2][1:3] == ["tanh", "(output)"]


def test_alerts_have_their_first_and_last_step(tmp_path: Path) -> None:
    printed = text(run(tmp_path))
    assert printed.startswith(f"{tmp_path}: 5 observations, steps 0 to 40, 3 sites, 2 alerts (1 firing at the end)\n")
    table = rows(printed, "Alerts")
    assert " ".join(table[0]) == "critical saturated 10 40, still firing bad (tanh) is saturated"
    assert " ".join(table[1]) == "why: init_too_large (50 %): gain 8"
    assert " ".join(table[2]) == "try: Xavier"
    assert " ".join(table[3]) == "warning saturated 20 40 good was odd"


def test_a_run_without_alerts_says_so(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record(),))])
    assert "\nno alerts\n" in text(tmp_path)


def test_damage_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, snapshots())
    path.write_bytes(path.read_bytes()[: offsets(path)[4] + 100])
    assert f"damaged: {path.name}: read 4 records, stopped at byte" in " ".join(text(tmp_path).split())


def test_several_runs_are_reported_one_after_the_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, snapshots(1))
    printed = text(tmp_path)
    assert printed.index("one: 1 observations") < printed.index("two: 1 observations")


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record("[red]x[/red]", activation="[bold]"),), alerts=(replace(ALERT, step=0, message="[link=x]m[/]"),))])
    printed = text(tmp_path)
    assert "[red]x[/red]" in printed
    assert "[bold]" in printed
    assert "[link=x]m[/]" in printed


def test_long_names_are_not_cut(tmp_path: Path) -> None:
    name = ".".join(f"block{k}" for k in range(30))
    write(tmp_path, [Snapshot(0, 0.0, (record(name),))])
    printed = text(tmp_path)
    cells = [line.split()[0] for line in printed.split("Sites, worst first")[1].splitlines()[2:] if line.strip()]
    assert "".join(cells) == name
    assert "…" not in printed


def test_an_encoding_without_bars_gets_plain_ones(tmp_path: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    report(run(tmp_path), out)
    out.flush()
    assert rows(out.buffer.getvalue().decode("ascii"), "Sites, worst first")[0][-1] == ":=##"


def test_the_sparkline_keeps_both_ends() -> None:
    assert sparkline([0.0, 0.5, None, 1.0]) == "▁▅ █"
    assert sparkline([index / 999 for index in range(1000)], width=8) == "▁▂▃▄▅▆▇█"


def test_markdown_holds_the_same_cells(tmp_path: Path) -> None:
    out = io.StringIO()
    report(run(tmp_path), out, "markdown")
    lines = out.getvalue().splitlines()
    assert lines[0] == f"## {tmp_path}: 5 observations, steps 0 to 40, 3 sites, 2 alerts (1 firing at the end)".replace("_", "\\_")
    table = lines[lines.index("### Sites, worst first, at the last step") + 2 :][:5]
    assert table[1] == "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | :-- |"
    assert table[2] == "| bad | tanh | 100.0 % | 100.0 % | 0.0 % | - | - | 0.000 | 25 % | 0.68 | 7.00e-04 | ▁▃▅██ |"
    assert table[0].count(" | ") == table[2].count(" | ")


def test_markdown_escapes_names(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record("a|b<img src=x>*c*"),))])
    out = io.StringIO()
    report(tmp_path, out, "markdown")
    assert "| a\\|b\\<img src=x\\>\\*c\\* | tanh |" in out.getvalue()


def test_json_holds_every_metric_over_time(tmp_path: Path) -> None:
    out = io.StringIO()
    report(run(tmp_path), out, "json")
    (found,) = json.loads(out.getvalue())
    assert found["steps"] == [0, 10, 20, 30, 40]
    assert found["over_time"]["saturated"]["bad"] == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0])
    assert found["over_time"]["entropy_min"]["bad"] == [None] * 5
    assert [(alert["site"], alert["fired"], alert["cleared"]) for alert in found["alerts"]] == [("bad", 20, None), ("good", 20, 40)]
    assert [each["site"] for each in found["last"]["records"]] == ["good", "bad", "zz.out"]


def test_the_page_holds_names_as_data(tmp_path: Path) -> None:
    name = "</script><img src=x>"
    write(tmp_path, [Snapshot(0, 0.0, (record(name),))])
    out = io.StringIO()
    report(tmp_path, out, "html")
    page = out.getvalue()
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "src=" not in page.replace("<img src=x>".replace("<", "\\u003c"), "").replace("&lt;img src=x&gt;", "")
    data = json.loads(page.split('id="torchsat-data">')[1].split("</script>")[0])
    assert data[f"run?{urlencode({'run': str(tmp_path)})}"]["sites"][0]["site"] == name
    assert not re.search(r"^(import|export) ", page, re.MULTILINE)


def test_a_snapshot_is_reported_in_every_format() -> None:
    for kind in FORMATS:
        out = io.StringIO()
        report(snapshots(1)[0], out, kind)
        assert "b.act" in out.getvalue()
    with pytest.raises(ValueError, match="format is 'pdf'; allowed are text, markdown, json, html"):
        report(snapshots(1)[0], io.StringIO(), "pdf")  # type: ignore[arg-type]


def test_a_file_is_written_only_where_there_is_something_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    target.write_text("kept")
    assert main(["report", str(tmp_path / "nowhere"), "--format", "html", "-o", str(target)]) == 1
    assert target.read_text() == "kept"
    assert main(["report", str(run(tmp_path / "run")), "--format", "html", "-o", str(target)]) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "no" / "such" / "file")]) == 1
    assert "torchsat: " in capsys.readouterr().err


def test_the_command_prints_and_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run(tmp_path))]) == 0
    assert "worst first" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("torchsat: ")
    assert "is not a directory" in captured.err
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_the_command_is_installed_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    command = f"{sys.executable} -m torchsat.report report {run(tmp_path)} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(str(tmp_path))
    assert "Traceback" not in done.stderr
