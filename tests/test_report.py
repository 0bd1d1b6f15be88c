"""The report in its four formats, from event files alone."""

import base64
import gzip
import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

import torchsat
from tests.conftest import record
from tests.test_tensorboard import ALERT, offsets, snapshots, write
from torchsat import Cause, Snapshot
from torchsat.command import main
from torchsat.document import SCHEMA
from torchsat.experts import Experts
from torchsat.ledger import Entry, Kind, Ledger
from torchsat.number_formats import FormatUse
from torchsat.record import Nearest
from torchsat.report import FORMATS, report
from torchsat.sheets import sparkline
from torchsat.tensorboard.reader import read_runs
from torchsat.tensorboard.writer import TensorBoardWriter


def text(directory: Path) -> str:
    out = io.StringIO()
    report(directory, out)
    return out.getvalue()


def printed(directory: Path, form: str) -> str:
    out = io.StringIO()
    report(directory, out, form)  # type: ignore[arg-type]
    return out.getvalue()


def rows(printed: str, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    lines = printed.split(title, 1)[1].splitlines()[2:]
    end = next((index for index, line in enumerate(lines) if not line.strip()), len(lines))
    return [line.split() for line in lines[:end]]


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


def run(tmp_path: Path) -> Path:
    """A run in which `bad` closes while `good` stays open, and one alert fires and clears."""
    series = []
    for step, share in enumerate((0.0, 0.3, 0.6, 0.9, 1.0)):
        bad = record("bad", alert_level=min(1.0, share), saturated=share, low=share, high=0.0, relative_derivative=0.6 * (1 - share), stuck=0.25)
        output = record("zz.out", output=True, saturated=1.0, relative_derivative=0.0)
        series.append(Snapshot(step * 10, 0.0, (record("good", alert_level=0.0), bad, output), snapshots(1)[0].weights))
    fired = replace(ALERT, site="bad", since=10, step=20, message="bad (tanh) is saturated")
    series[2] = replace(series[2], alerts=(fired, replace(fired, site="good", severity="warning", since=20, message="good was odd")))
    series[4] = replace(series[4], alerts=(replace(fired, site="good", step=40, firing=False, message="good: no longer odd"),))
    write(tmp_path, series)
    return tmp_path


def test_the_worst_site_stands_first_and_outputs_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    table = rows(text(run(tmp_path)), "Sites at the last step, worst first")
    assert [cells[0] for cells in table] == ["bad", "good", "zz.out"]
    numbers = ["100.0", "%", "100.0", "%", "0.0", "%", "0.000", "25", "%", "0.68", "7.00e-04"]
    assert table[0][1:] == ["tanh", "critical", *numbers, "▁▃▅██"]
    assert table[2][1:4] == ["tanh", "(output)", "-"]


def test_the_report_begins_with_the_verdict(tmp_path: Path) -> None:
    printed = text(run(tmp_path / "digits"))
    assert printed.splitlines()[:7] == [
        "digits is critical: bad (tanh) is saturated, since step 10",
        "5 observations, steps 0 to 40, 3 sites, 2 alerts (1 firing at the end)",
        "",
        "What: bad (tanh) is saturated",
        "",
        "Why:  init_too_large: gain 8",
        "Try:  Xavier",
    ]
    assert "Alerts that are over\nsteps 20 to 40: warning: good was odd\n" in printed


def test_a_run_without_alerts_says_so(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record(),))])
    assert f"{tmp_path.name} is healthy: no alert was raised\n" in text(tmp_path)


def test_a_healthy_run_says_how_far_it_is_from_a_limit(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record(),), nearest=Nearest("act", "stuck_units", 0.31))])
    margin = "nearest to a limit: act (tanh), 31 % of the way to a warning (stuck units)"
    assert f"is healthy: no alert was raised; {margin}" in " ".join(text(tmp_path).split())
    for form in ("markdown", "html", "json"):
        assert margin in printed(tmp_path, form).replace("\\", "")


def test_a_run_that_no_rule_has_judged_is_not_called_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "alone", [replace(each, alerts=(), judged=False) for each in snapshots(sites=20)])
    for form in FORMATS:
        told = printed(tmp_path / "alone", form)
        assert "no rules were given" in told
        assert not re.search(r"is healthy|healthy:|healthy site", told.partition("<script")[0].partition("</style>")[2] or told), form
    assert "alone is not judged: no rules were given\n" in text(tmp_path / "alone")
    assert '<p class="state not-judged"><b>not judged</b>: no rules were given</p>' in printed(tmp_path / "alone", "html")
    assert [main(["report", str(tmp_path / "alone"), *given]) for given in FAIL_ON] == [0, 0, 0]
    assert capsys.readouterr().err == ""
    write(tmp_path / "well", [replace(each, alerts=()) for each in snapshots()])
    assert text(tmp_path).startswith("1 of 2 runs is healthy, and 1 is not judged, since no rules were given.\n")
    write(tmp_path / "sick", [replace(each, alerts=(ALERT,) if each.step == 4 else ()) for each in snapshots()])
    found = json.loads(printed(tmp_path, "json"))["verdict"]
    assert (found["health"], found["sick"], found["unjudged"], found["runs"]) == ("critical", 1, 1, 3)
    assert found["sentence"].startswith("1 of 3 runs is sick, and 1 is not judged, since no rules were given. Worst: sick: critical:")


def test_damage_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, snapshots())
    path.write_bytes(path.read_bytes()[: offsets(path)[4] + 100])
    assert f"Damaged: {path.name}: read 4 records, stopped at byte" in " ".join(text(tmp_path).split())


def test_several_runs_are_compared_and_the_worst_is_told(tmp_path: Path) -> None:
    write(tmp_path / "well", snapshots(1))
    write(tmp_path / "sweep" / "lr 1", [replace(each, alerts=()) for each in snapshots(2)])
    broken = replace(ALERT, rule="nonfinite", site="a.act", since=2, message="a.act is nan")
    for name, alert in (("sick", ALERT), ("mild", replace(ALERT, severity="warning")), ("nan", broken)):
        write(tmp_path / name, [replace(each, alerts=(alert,) if each.step == 4 else ()) for each in snapshots()])
    lines = text(tmp_path).splitlines()
    assert lines[0].startswith("3 of 5 runs are sick. Worst: nan: not finite: a.act (tanh): non-finite")
    table = rows("\n".join(lines), "Runs, worst first")
    assert [each[0] for each in table] == ["nan", "sick", "mild", "sweep/lr", "well"]
    assert [" ".join(each[1:3]) for each in table[:3]] == ["not finite", "critical 5", "warning 5"]
    assert sum(line.startswith("What:") for line in lines) == 1
    assert lines[-2:] == [f"Any other run:  torchsat report {tmp_path}/sick", f"All of them:    torchsat report {tmp_path} --all"]
    assert str(tmp_path) not in "".join(lines[:-2])
    out = io.StringIO()
    report(tmp_path, out, everything=True)
    assert [line for line in out.getvalue().splitlines() if re.match(r"(nan|sick|mild|sweep/lr 1|well) (is|has) ", line)] == [
        "nan is not finite: a.act (tanh) is non-finite, since step 2",
        "sick is critical: b.act (tanh) is saturated, since step 1",
        "mild has a warning: b.act (tanh) is saturated, since step 1",
        "sweep/lr 1 is healthy: no alert was raised",
        "well is healthy: no alert was raised",
    ]


def test_a_run_is_named_by_the_directory_that_was_given_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs" / "exp", snapshots(1))
    monkeypatch.chdir(tmp_path / "runs" / "exp")
    for given in (".", "../exp", str(tmp_path / "runs" / "exp"), str(tmp_path / "runs" / "exp" / "torchsat")):
        assert [each.name for each in read_runs(given)] == ["exp"]
    assert [each.name for each in read_runs(tmp_path)] == ["runs/exp"]


def large(tmp_path: Path, sites: int = 500, sick: int = 40, path: str = "model.decoder.layers.{}.self_attn") -> Path:
    """A large network of which some sites are critical."""
    records = [record(f"{path.format(at)}.act", alert_level=float(at < sick), saturated=0.9 if at < sick else 0.03) for at in range(sites)]
    also = tuple(each.site for each in records[1:sick])
    alert = replace(
        ALERT, site=records[0].site, also=also, step=0, since=0, message=f"{sick} of {sites} tanh layers are saturated " + "and so on " * 9
    )
    write(tmp_path, [Snapshot(step, 0.0, tuple(records), (), (alert,) if not step else ()) for step in range(3)])
    return tmp_path


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_cut(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    printed = text(large(tmp_path / "a_run_of_a_long_name_that_says_little", sites=30))
    assert max(map(len, printed.splitlines())) <= width
    words = set(re.findall(r"[\w%.]+", "".join(printed.split("Sites")[0])))
    assert {"saturated", "layers", "critical"} <= words
    table = printed.split("worst first", 1)[1]
    assert len(re.findall(r"\b90 %", table)) == 24
    assert len(re.findall(r"critical", table)) == 24


def test_a_large_network_is_summed_up(tmp_path: Path) -> None:
    lines = text(large(tmp_path, sick=40)).splitlines()
    assert len(lines) < 70
    assert lines[-1] == "and 476 more sites; --all shows them"
    assert any("and 33 more" in line for line in lines)
    out = io.StringIO()
    report(tmp_path, out, everything=True)
    assert out.getvalue().count(" healthy ") == 460
    (tmp_path / "well").mkdir()
    assert text(large(tmp_path / "well", sick=0)).splitlines()[-1] == "and 497 more healthy sites; --all shows them"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_colours_and_the_user_may_forbid_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    given = run(tmp_path)
    plain, coloured = text(given), Terminal()
    report(given, coloured)
    assert "\033" not in plain
    assert f"\033[1;31m{tmp_path.name} is critical: bad (tanh) is saturated, since step\033[0m" in coloured.getvalue()
    assert re.sub(r"\033\[[\d;]*m", "", coloured.getvalue()) == plain
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            out = Terminal()
            report(given, out)
            assert out.getvalue() == plain


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record("[red]x[/red]", activation="[bold]"),), alerts=(replace(ALERT, step=0, message="[link=x]m[/]"),))])
    printed = text(tmp_path)
    assert "[red]x[/red]" in printed
    assert "[bold]" in printed
    assert "[link=x]m[/]" in printed


def test_long_names_are_folded_where_their_parts_meet(tmp_path: Path) -> None:
    name = ".".join(f"block{k}" for k in range(30))
    write(tmp_path, [Snapshot(0, 0.0, (record(name),))])
    lines = text(tmp_path).split("Sites at the last step")[1].splitlines()[2:]
    pieces = [line[:1] + line[1:].split("  ")[0].strip() for line in lines if line.strip()]
    assert "".join(piece.strip() for piece in pieces) == name
    assert all(piece.endswith(".") for piece in pieces[:-1])


def test_an_encoding_without_bars_gets_plain_ones(tmp_path: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    report(run(tmp_path), out)
    out.flush()
    assert rows(out.buffer.getvalue().decode("ascii"), "Sites at the last step")[0][-1] == ":=##"


def test_the_sparkline_keeps_both_ends() -> None:
    assert sparkline([0.0, 0.5, None, 1.0]) == "▁▅ █"
    assert sparkline([index / 999 for index in range(1000)], width=8) == "▁▂▃▄▅▆▇█"


def test_markdown_holds_the_same_cells(tmp_path: Path) -> None:
    out = io.StringIO()
    report(run(tmp_path), out, "markdown")
    lines = out.getvalue().splitlines()
    assert lines[0] == f"## {tmp_path.name}: critical: bad (tanh): saturated (init_too_large), since step 10".replace("_", "\\_")
    assert lines[2] == "5 observations, steps 0 to 40, 3 sites, 2 alerts (1 firing at the end)"
    table = lines[next(at for at, line in enumerate(lines) if line.startswith("### Sites")) + 2 :][:5]
    assert table[1] == "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | :-- |"
    assert table[2] == "| bad | tanh | critical | 100.0 % | 100.0 % | 0.0 % | - | - | 0.000 | 25 % | 0.68 | 7.00e-04 | ▁▃▅██ |"
    assert table[0].count(" | ") == table[2].count(" | ")


def test_markdown_escapes_names(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(0, 0.0, (record("a|b<img src=x>*c*"),))])
    out = io.StringIO()
    report(tmp_path, out, "markdown")
    assert "| a\\|b\\<img src=x\\>\\*c\\* | tanh |" in out.getvalue()


def test_json_holds_every_metric_over_time(tmp_path: Path) -> None:
    out = io.StringIO()
    report(run(tmp_path), out, "json")
    (found,) = json.loads(out.getvalue())["runs"]
    assert found["steps"] == [0, 10, 20, 30, 40]
    assert found["over_time"]["saturated"]["bad"] == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0])
    assert found["over_time"]["entropy_min"]["bad"] == [None] * 5
    assert [(alert["site"], alert["fired"], alert["cleared"]) for alert in found["alerts"]] == [("bad", 20, None), ("good", 20, 40)]
    assert [each["site"] for each in found["last"]["records"]] == ["good", "bad", "zz.out"]


KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float, str),
    "boolean": bool,
    "object": dict,
    "null": type(None),
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a document by their path; of the numbers over time, of the sites and of the layers only the objects themselves."""
    if isinstance(value, dict) and not re.search(r"records\[\]|weights\[\]|formats\[\]|experts\[\]|over_time|nearest|ledger", path):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, f"{path}[]")
    else:
        yield path, value


def test_the_json_is_what_the_documentation_says(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    table = page.partition("<!-- schema -->")[2].partition("<!-- /schema -->")[0]
    documented = {key: tuple(kinds.split(" or ")) for key, kinds in re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", table, re.MULTILINE)}
    rich = replace(ALERT, also=("a.act",), causes=(Cause("init_too_large", 1.0, "gain 8", "draw:\n    x = 1"),))
    write(tmp_path / "sick", [replace(each, alerts=(rich,) if each.step == 4 else ()) for each in snapshots()])
    write(tmp_path / "cleared", [replace(each, nearest=Nearest("a.act", "saturated", 0.25)) for each in snapshots()])
    use = FormatUse("a.act", "grad_z", "nvfp4", False, 4096, 0.0, 0.12, 0.0, 0.2, 0.2)
    experts = Experts("experts", 2, 128, (0.25, 0.75), 0.9, 0.1)
    ledger = Ledger((Entry("a", Kind.LAYER, 0, None, 1.0, 0.5),))
    write(tmp_path / "later", snapshots(6))
    write(tmp_path / "later", [replace(snapshot, time=2000.0, formats=(use,), experts=(experts,), ledger=ledger) for snapshot in snapshots(2)])
    path = next((tmp_path / "cleared" / "torchsat").glob("*"))
    path.write_bytes(path.read_bytes()[:-9])
    out = io.StringIO()
    report(tmp_path, out, "json")
    found = json.loads(out.getvalue())
    assert (next(iter(found)), next(iter(found["runs"][0])), found["schema"]) == ("verdict", "verdict", SCHEMA)
    met = set()
    for key, value in leaves(found):
        assert key in documented, key
        assert any(isinstance(value, KINDS[kind]) for kind in documented[key]), (key, value)
        met.add(key)
    assert met == set(documented)
    assert found["verdict"] == {**found["verdict"], "health": "critical", "worst": "sick", "sick": 1, "runs": 3}
    verdict = found["runs"][0]["verdict"]
    assert (verdict["where"], verdict["advice"], verdict["code"], verdict["since"]) == ("b.act (tanh) and 1 more place", "draw", "x = 1", 1)


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
    assert data[f"run?{urlencode({'run': tmp_path.name})}"]["sites"][0]["site"] == name
    assert not re.search(r"^(import|export) ", page, re.MULTILINE)


def grid_of(answer: dict[str, str]) -> tuple[list[float], list[float]]:
    """The steps and the values of a packed grid of one name."""
    data = gzip.decompress(base64.b64decode(answer["gzip"]))
    (length,) = struct.unpack_from("<I", data)
    count = json.loads(data[4 : 4 + length])["count"]
    return list(struct.unpack_from(f"<{count}d", data, 4 + length)), list(struct.unpack_from(f"<{count}f", data, 4 + length + 8 * count))


@pytest.mark.parametrize("through", ["a directory", "a writer"])
def test_the_page_has_the_loss_and_the_rate_of_the_run(through: str, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as user:
        for step in range(2500):
            for tag, value in (("val/loss", 9.0), ("train/loss", 2500.0 - step), ("lr-Adam~1", 0.5)):
                user.add_scalar(tag, value, step, new_style=tag == "train/loss")
        ours = TensorBoardWriter(writer=user) if through == "a writer" else TensorBoardWriter(tmp_path / "run")
        for each in snapshots():
            ours(each)
        ours.close()
    data = json.loads(printed(tmp_path, "html").split('id="torchsat-data">')[1].split("</script>")[0])
    assert data["scalars?run=run"] == {"tags": ["train/loss", "lr-Adam~1"], "loss": "train/loss", "rate": "lr-Adam~1"}
    steps, values = grid_of(data["scalar?run=run&tag=train%2Floss"])
    assert (len(steps), steps[0], steps[-1], values[0], values[-1]) == (1000, 0, 2499, 2500, 1)
    assert [step + value for step, value in zip(steps, values, strict=True)] == [2500.0] * 1000
    assert set(grid_of(data["scalar?run=run&tag=lr-Adam%7E1"])[1]) == {0.5}
    assert not [key for key in data if "val" in key.partition("?tag=")[2]]


@pytest.mark.parametrize("user", ["nothing", "no scalars", "no event file"])
def test_a_page_without_a_loss_has_none(user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "run", snapshots())
    if user == "no event file":
        (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"no event at all" * 99)
    elif user == "no scalars":
        from torch.utils.tensorboard import SummaryWriter

        SummaryWriter(str(tmp_path / "run")).close()
        monkeypatch.setattr("torchsat.tensorboard.scalars.frames", None)  # whatever fails in reading
    page = printed(tmp_path, "html")
    data = json.loads(page.split('id="torchsat-data">')[1].split("</script>")[0])
    assert data["scalars?run=run"] == {"tags": [], "loss": None, "rate": None}
    assert not [key for key in data if key.startswith("scalar?")]
    assert ("cannot be read and are left out" in caplog.text) == (user == "no scalars")


def test_the_page_begins_with_the_verdict_and_needs_no_scripts_for_it(tmp_path: Path) -> None:
    coded = replace(ALERT, also=tuple(f"s{k}" for k in range(9)), causes=(Cause("init_too_large", 1.0, "gain <8>", "draw anew:\n    a = b < c"),))
    write(tmp_path / "sick", [replace(each, alerts=(coded,) if each.step == 4 else ()) for each in snapshots()])
    out = io.StringIO()
    report(tmp_path / "sick", out, "html")
    before, after = out.getvalue().split('<div id="torchsat"></div>')
    head = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", before.split("<body>")[1]))
    assert head.startswith(
        " sick Last observation: 1970-01-01 00:16 UTC. 6 observations, steps 0 to 5, 2 sites, 1 alert (1 firing at the end) critical : "
    )
    for told in (
        "b.act (tanh) and 9 more places: saturated",
        "since step 1",
        "s5 and 3 more",
        "Why: init_too_large",
        "gain &lt;8&gt;",
        "Try: draw anew:",
        "a = b &lt; c",
    ):
        assert told in head
    assert str(tmp_path) not in before + after
    assert after.count("<details") == 1
    assert "Why:  init_too_large: gain &lt;8&gt;" in after
    write(tmp_path / "well", [replace(each, alerts=()) for each in snapshots()])
    out = io.StringIO()
    report(tmp_path, out, "html")
    head = out.getvalue().split('<div id="torchsat"></div>')[0]
    assert re.findall(r'<td class="(?:critical|healthy)">(\w+)</td>', head) == ["critical", "healthy"]
    assert "<title>torchsat: 2 runs: sick, well</title>" in head
    assert "1 of 2 runs is sick. Worst: sick: critical" in head


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
    assert main([]) == 2
    assert "report" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"torchsat {torchsat.__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        main(["report"])


def test_a_sick_run_fails_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, alert in (
        ("well", replace(ALERT, firing=False)),
        ("mild", replace(ALERT, severity="warning")),
        ("sick", ALERT),
        ("nan", replace(ALERT, rule="nonfinite")),
    ):
        write(tmp_path / name, [replace(each, alerts=(alert,) if each.step == 4 else ()) for each in snapshots()])
    found = {name: tuple(main(["report", str(tmp_path / name), *given]) for given in FAIL_ON) for name in ("well", "mild", "sick", "nan")}
    assert found == {"well": (0, 0, 0), "mild": (0, 3, 0), "sick": (0, 3, 3), "nan": (0, 3, 3)}
    assert "torchsat: sick: critical: b.act (tanh): saturated (init_too_large), since step 1\n" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--fail-on", "critical", "--json", "-o", str(tmp_path / "all.json")]) == 3
    assert json.loads((tmp_path / "all.json").read_text())["verdict"]["worst"] == "nan"
    assert main(["report", str(tmp_path / "nowhere"), "--fail-on", "critical"]) == 1


FAIL_ON: tuple[list[str], ...] = ([], ["--fail-on", "warning"], ["--fail-on", "critical"])


def test_the_report_needs_no_import_of_its_own() -> None:
    code = "import sys, torchsat; print(torchsat.report.report.__module__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "torchsat.report False\n"


def test_the_command_is_installed_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    command = f"{sys.executable} -m torchsat report {run(tmp_path)} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"{tmp_path.name} is critical")
    assert "Traceback" not in done.stderr
