"""The text report, from event files alone."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import record
from tests.test_tensorboard import ALERT, offsets, snapshots, write
from torchsat import Snapshot
from torchsat.report import main, report, sparkline


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
    assert table[0][1:] == ["tanh", "100.0", "%", "100.0", "%", "0.0", "%", "0.000", "25", "%", "0.68", "7.00e-04", "▁▃▅██"]
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
    assert rows(out.buffer.getvalue().decode("ascii"), "Sites, worst first")[0][-1] == ":=##"  # type: ignore[attr-defined]


def test_the_sparkline_keeps_both_ends() -> None:
    assert sparkline([0.0, 0.5, None, 1.0]) == "▁▅ █"
    assert sparkline([index / 999 for index in range(1000)], width=8) == "▁▂▃▄▅▆▇█"


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
