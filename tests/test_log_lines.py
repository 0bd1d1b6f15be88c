"""An alert in the log: three lines for a person at a terminal, one line elsewhere; and the last line of a run."""

import io
import logging
import logging.handlers
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchsat
from tests.test_tensorboard import ALERT
from torchsat import Cause
from torchsat.log_lines import Form, alert_line, end_line, form_for, tell, tell_end
from torchsat.verdict import Health, Verdict

SICK = replace(
    ALERT,
    site="hidden1",
    message="2 of 4 tanh layers are saturated since step 0, worst hidden2 (tanh): 90 % of its inputs lie on a plateau",
    worst="hidden2",
    also=("hidden2",),
    causes=(Cause("init_too_large", 0.6, "gain 8", "draw them anew:\n    nn.init.xavier_normal_(w)"), Cause("weight_growth", 0.4, "", "wait")),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """A logger below one that has no handlers and hands nothing on."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    above, found = logging.getLogger("a_test"), logging.getLogger("a_test.torchsat")
    above.propagate = False
    yield found
    found.propagate = True
    above.handlers.clear()
    found.handlers.clear()


def handler(stream: Any, level: int = logging.NOTSET) -> logging.Handler:
    made = logging.StreamHandler(stream)
    made.setLevel(level)
    return made


def test_an_alert_is_three_lines_without_code_or_one_line() -> None:
    what = "torchsat: step 4: critical: 2 of 4 tanh layers are saturated since step 0, worst hidden2 (tanh): 90 % of its inputs lie on a plateau"
    why, remedy = "Why: init_too_large 60 %, weight_growth 40 %: gain 8", "Try: draw them anew"
    assert alert_line(SICK, Form.PARAGRAPH, 200).splitlines() == [what, f"    {why}", f"    {remedy}"]
    assert alert_line(SICK, Form.LINE, 40) == f"{what}. {why}. {remedy}"
    coloured = alert_line(SICK, Form.COLOURED, 200).splitlines()
    assert coloured[0].startswith("torchsat: step 4: \033[1;31mcritical\033[0m: 2 of 4 tanh layers")
    assert "worst \033[1mhidden2\033[0m (tanh)" in coloured[0]
    assert coloured[2] == "    \033[1mTry:\033[0m draw them anew"
    assert "\033[1;33mwarning\033[0m" in alert_line(replace(SICK, severity="warning"), Form.COLOURED, 80)
    assert alert_line(replace(SICK, firing=False, message="hidden1 is no longer saturated"), Form.COLOURED, 80) == (
        "torchsat: step 4: hidden1 is no longer saturated"
    )


def test_lines_are_broken_between_words_where_the_terminal_is_narrow(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert alert_line(SICK, Form.PARAGRAPH, 60).splitlines() == [
        "torchsat: step 4: critical: 2 of 4 tanh layers are saturated",
        "    since step 0, worst hidden2 (tanh): 90 % of its inputs",
        "    lie on a plateau",
        "    Why: init_too_large 60 %, weight_growth 40 %: gain 8",
        "    Try: draw them anew",
    ]
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    logger.handlers[:], logger.propagate = [handler(out)], False
    tell(logger, SICK)
    tell_end(logger, Verdict(Health.CRITICAL, SICK, 3), "runs/exp")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 50
    assert " ".join(line.strip() for line in lines).endswith("2 more alerts. More: torchsat report runs/exp")


def test_the_form_is_that_which_suits_every_handler(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    above = logger.parent
    assert above is not None

    def form(*handlers: logging.Handler) -> Form:
        above.handlers[:] = handlers
        return form_for(logger, logging.WARNING)[0]

    assert form(handler(Terminal())) is Form.COLOURED
    assert form(handler(io.StringIO())) is Form.LINE
    assert form(handler(Terminal()), handler(io.StringIO())) is Form.LINE
    assert form(handler(Terminal()), handler(io.StringIO(), logging.CRITICAL)) is Form.COLOURED  # it writes no warnings
    assert form(handler(Terminal()), logging.NullHandler()) is Form.COLOURED
    assert form(logging.NullHandler()) is Form.LINE
    assert form(handler(Terminal()), logging.handlers.MemoryHandler(8)) is Form.LINE  # nobody knows where it leads
    with monkeypatch.context() as patched:  # Python's last resort is standard error
        patched.setattr("sys.stderr", Terminal())
        assert form() is Form.COLOURED
        patched.setattr("sys.stderr", None)
        assert form() is Form.LINE
    closed = Terminal()
    closed.isatty = lambda: closed.getvalue() == ""  # type: ignore[method-assign]
    closed.close()
    assert form(handler(closed)) is Form.LINE
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert form(handler(Terminal())) is Form.PARAGRAPH
    logger.addHandler(handler(io.StringIO()))
    assert form(handler(Terminal())) is Form.LINE
    logger.propagate = False
    logger.handlers[:] = [handler(Terminal())]
    assert form(handler(io.StringIO())) is Form.COLOURED


def test_a_notebook_gets_three_lines(logger: logging.Logger) -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    logger.handlers[:], logger.propagate = [handler(stream)], False
    form, width = form_for(logger, logging.ERROR)
    assert (form, width > 1000) == (Form.PARAGRAPH, True)


def test_the_end_of_a_run_is_a_warning_only_where_it_is_sick() -> None:
    assert end_line(Verdict(Health.HEALTHY, over=2), "runs/exp") == (logging.INFO, "torchsat: the run ends healthy: its 2 alerts have cleared")
    sick = Verdict(Health.CRITICAL, SICK, 3)
    told = "torchsat: the run ends critical: hidden1 and 1 more place: saturated (init_too_large), since step 1; 2 more alerts. More: "
    assert end_line(sick, "runs/exp 1") == (logging.WARNING, f"{told}torchsat report 'runs/exp 1'")
    assert end_line(sick, None) == (logging.WARNING, f"{told}monitor.alerts")


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_run_ends_with_one_line(scale: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchsat")
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = torchsat.watch(model, tmp_path / "exp", every=1, errors="raise")
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(scale * torch.randn(32, 16)), torch.randint(0, 4, (32,))).backward()
        optimizer.step()
    monitor.close()
    monitor.close()
    (last,) = [each for each in caplog.records if "the run ends" in each.message]
    assert last is caplog.records[-1]
    if scale > 1:
        assert last.levelno == logging.WARNING
        assert last.message.startswith("torchsat: the run ends critical: 1 (tanh): saturated (inputs_unscaled), since step 0")
        assert last.message.endswith(f"More: torchsat report {tmp_path / 'exp'}")
    else:
        assert last.levelno == logging.INFO
        assert re.fullmatch(
            r"torchsat: the run ends healthy: no alert was raised; nearest to a limit: 1 \(tanh\), [\d.]+ % of the way to a warning \(saturated\)",
            last.message,
        )


def test_a_run_without_rules_does_not_end_healthy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchsat")
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with torchsat.watch(model, rules=(), errors="raise") as monitor:
        model(torch.randn(8, 16)).sum().backward()
        monitor.step()
    assert caplog.records[-1].message == "torchsat: the run ends not judged: no rules were given"
    assert caplog.records[-1].levelno == logging.INFO


def test_a_monitor_that_has_observed_nothing_says_nothing_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchsat")
    torchsat.watch(nn.Sequential(nn.Tanh()), errors="raise").close()
    assert [each for each in caplog.messages if "ends" in each] == []
