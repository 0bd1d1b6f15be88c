"""Every script of benchmarks/ and examples/ starts, and every benchmark runs in small.

What the examples find out is tested in test_docs.py and in the tests of the integrations. The benchmarks run here with tiny models and few steps, so
that a change of the library which breaks one is seen at once and not when the next figures are needed.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchsat import schedule

ROOT = Path(__file__).parent.parent
SCRIPTS = [(folder, path.stem) for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))]
NEEDS = {
    "accelerate_digits": ("accelerate", "sklearn"),
    "ddp": ("sklearn",),
    "digits": ("sklearn",),
    "entropy_collapse": ("sklearn",),
    "faults": ("sklearn",),
    "finetuning": ("sklearn",),
    "healthy": ("sklearn",),
    "lazy_neurons": ("sklearn",),
    "plasticity": ("sklearn",),
    "small_vit": ("sklearn",),
    "ignite_digits": ("ignite", "sklearn"),
    "lightning_digits": ("lightning", "sklearn"),
    "remedies": ("sklearn",),
    "sure_or_stuck": ("sklearn",),
    "try_remedies": ("sklearn",),
    "transformers_text": ("transformers",),
}
"""The packages that a script imports, beside those which torchsat itself needs. A script without them is skipped."""
WITHOUT_ARGUMENTS = ("dashboard", "healthy")
"""The scripts that read no command line."""
WITHOUT_MAIN = (
    *("audit_formats", "audit_grid", "audit_layers", "audit_rows", "audit_trainings", "audit_truth"),
    *("identity_cases", "identity_models", "other_rules", "workloads"),
    *("remedies_cases", "small_vit"),
    *("faults_adversaries", "faults_agents", "faults_outputs", "faults_probabilities", "faults_runs", "faults_scores", "faults_supervised"),
    *("published_direct", "published_matter", "published_networks", "published_sound", "published_text"),
    *("faults_depth", "faults_inputs", "faults_rates", "faults_sound", "faults_trainings"),
    *("faults_attention", "faults_finetuning", "faults_sequences", "faults_tasks"),
    *("faults_strange", "faults_strange_sound", "faults_stranger"),
    *("faults_losses", "faults_losses_sound"),
    *("faults_everyday", "faults_everyday_sound"),
)

Load = Callable[[str, str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script as Python does when it is run: its folder comes first on the path, and it imports its neighbours by their bare names."""

    def given(folder: str, name: str) -> ModuleType:
        for package in NEEDS.get(name, ()):
            pytest.importorskip(package, reason=f"{package} is not installed")
        monkeypatch.syspath_prepend(ROOT / folder)
        return importlib.import_module(name)

    yield given
    # The names are common ones, such as `ranks`; an import in another test must not find them.
    for _, name in SCRIPTS:
        sys.modules.pop(name, None)


def arguments(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *given])


@pytest.mark.parametrize(("folder", "name"), [pair for pair in SCRIPTS if pair[1] not in (*WITHOUT_ARGUMENTS, *WITHOUT_MAIN)])
def test_a_script_explains_its_arguments(
    folder: str, name: str, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load(folder, name)
    arguments(monkeypatch, "--help")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert script.__doc__ is not None
    assert script.__doc__.split()[0] in capsys.readouterr().out


def tiny(load: Load) -> Any:
    """One training so small that its steps take less than a millisecond."""

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(4, 8), torch.randint(10, (4,))

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))

    work = load("benchmarks", "workloads").Workload("tiny", "a tanh layer", model, batch, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))
    return lambda device: {"tiny": work}


def test_audit(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The small grid reaches every field, and every figure agrees. The clock runs, since the overhead is a figure too; it need only be a share."""
    monkeypatch.setattr(schedule, "CLOCK", schedule.Clock())
    arguments(monkeypatch, "--small")
    status = load("benchmarks", "audit").main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "| Record.saturated | " in printed


def test_identity(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every training of the zoo is bit for bit what it is without torchsat."""
    arguments(monkeypatch)
    status = load("benchmarks", "identity").main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "\n0 of " in printed


def test_bandwidth(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments(monkeypatch, "--megabytes", "1", "--turns", "2")
    load("benchmarks", "bandwidth").main()
    assert capsys.readouterr().out.count("| forward, tanh | ") == 2


@pytest.mark.slow
def test_budget(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments(monkeypatch, "--budgets", "0.02", "--steps", "600")
    load("benchmarks", "budget").main()
    printed = capsys.readouterr().out
    assert "| nothing watched | " in printed
    assert "| 0.02 | " in printed


def test_dashboard(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "dashboard")
    monkeypatch.setattr(script, "STEPS", 2)
    script.main()
    assert " 200 sites: training thread " in capsys.readouterr().out


def test_faults(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "faults")
    assert len(script.BY_NAME) == len(script.SCENARIOS) >= 190
    assert all(scenario.source and scenario.kind for scenario in script.SCENARIOS)
    runs = [script.one(job) for job in script.jobs([script.BY_NAME["randn_tanh"]], (0,), 40)]
    assert [each.faulty for each in runs] == [False, True]
    assert script.verdicts(runs[0].often) == script.verdicts(runs[0].seldom) == []
    for snapshots in (runs[1].often, runs[1].seldom):
        first = script.verdicts(snapshots)[0]
        assert (first.rule, first.step, first.causes[0].name) == ("saturated", 2, "init_too_large")
    script.show(runs)
    scored = [replace(each, score=1.0 - each.faulty) for each in runs]
    script.evaluate(scored)
    table = script.markdown(scored)
    assert "| initialisation | - | - | - | - | - | - | - | - | 1 | 1.000 | 1.000 | 1.000 |" in table
    assert "| healthy | - | - | - | - | - | - | - | - | 1 | 0.000 | 0.000 |  |" in table
    printed = capsys.readouterr().out
    assert re.search(r"^initialisation +1 +1.000 +1.000 +2$", printed, re.MULTILINE)
    assert re.search(r"^healthy +1 +0.000$", printed, re.MULTILINE)
    for rules in script.OTHERS:
        assert rules in printed


def test_flat(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory and open files are read from /proc, which this system does not have")
    arguments(monkeypatch, "--steps", "10")
    load("benchmarks", "flat").main()
    assert "\nclosed: " in capsys.readouterr().out


def test_healthy(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "healthy")
    monkeypatch.setattr(script, "ACTIVATIONS", (nn.Tanh,))
    monkeypatch.setattr(script, "OPTIMIZERS", {"SGD 0.05": script.OPTIMIZERS["SGD 0.05"]})
    script.main()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Tanh ")
    assert line.endswith(" 0")


def test_overhead(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "overhead")
    monkeypatch.setattr(script, "workloads", tiny(load))
    arguments(monkeypatch, "--modes", "eager", "--pairs", "2")
    script.main()
    assert "| tiny | eager | " in capsys.readouterr().out


def test_peers(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "peers")
    monkeypatch.setattr(script, "workloads", tiny(load))
    arguments(monkeypatch, "--peers", "torchsat,TensorBoard,Composer,nothing", "--pairs", "2", "--whole", "2")
    script.main()
    printed = capsys.readouterr().out
    assert "Error" not in printed.partition("Composer is not measured")[0]
    assert "Composer is not measured: " in printed


def test_published(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A network that is made here stands for the published ones, which test_published.py runs where they are installed."""
    script = load("benchmarks", "published")
    made = load("benchmarks", "published_networks")

    def task(folder: Path) -> Any:
        assert (folder / "rules.py").exists()
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))
        batch = torch.randn(4, 8)
        return made.Task(model, "it was made here", lambda step: batch, lambda model, given: model(given).square().mean(), made.adamw(model, 1e-3))

    here = made.Network("here", "torchsat-monitor", "torchsat", task)
    arguments(monkeypatch, "--steps", "3", "HERE")
    with pytest.raises(SystemExit) as ended:
        script.main((here, made.Network("away", "no-such-package", "no_such_package", task)))
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    assert "here (torchsat-monitor): it was made here; 3 steps" in printed
    assert "\n| here | 162 | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 2, 0 off | 0.0000 | 0.0000 |\n" in printed
    arguments(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        script.main((made.Network("away", "no-such-package", "no_such_package", task),))
    assert ended.value.code == 1
    assert "to install what is missing: pip install --no-deps no-such-package" in capsys.readouterr().out


def test_ranks(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "ranks")
    monkeypatch.setattr(script, "NETWORKS", ((3, 8),))
    arguments(monkeypatch, "--ranks", "5", "--sites", "4")
    script.main()
    assert "5 ranks x 4 sites, simulated: 0 of 8 counts differ" in capsys.readouterr().out


def test_ceiling(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a tiny size the exact numbers are right, and those of a sample are not."""
    script = load("benchmarks", "ceiling")
    monkeypatch.setattr(script, "SAMPLE", 500)
    arguments(monkeypatch, "--length", "128", "--turns", "1")
    script.main(replace(kind, batch=1, heads=2, groups=min(2, kind.groups)) for kind in script.KINDS[1:4])
    printed = capsys.readouterr().out
    errors = {
        (kind, way): [float(each) for each in (logit, entropy, first)]
        for kind, way, logit, entropy, first in re.findall(
            r"^\| ([^|]+) \| (sample|exact) \| ([\d.e+-]+) \| ([\d.e+-]+) \| ([\d.e+-]+) \|$", printed, re.MULTILINE
        )
    }
    assert {kind for kind, _ in errors} == {"causal", "causal, 2 groups of keys", "ALiBi"}
    assert all(max(found) < 2e-6 for (_, way), found in errors.items() if way == "exact")
    assert all(min(found) > 1e-3 for (_, way), found in errors.items() if way == "sample")
    assert "| causal | whole matrix | " in printed


REMEDIES = (
    *("tanh, inputs shifted by 20", "relu, raw pixels from 0 to 255", "tanh, a feature in thousands", "sigmoid, weights from N(0, 1)"),
    *("relu, biases of -10", "tanh, Adam at a rate of 0.3", "12 sigmoids", "relu, weights of 0.01", "inf and nan in the inputs"),
    *("attention, Adam at a rate of 0.3", "relu, SGD with weight decay of 1"),
)


@pytest.mark.parametrize("name", REMEDIES)
def test_remedies(name: str, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One training for each cause, at its full length: the code of each remedy is pasted, and none makes it worse."""
    script = load("benchmarks", "remedies")
    arguments(monkeypatch, "--seeds", "0")
    script.main([case for case in script.CASES if case.name == name])
    printed = capsys.readouterr().out
    assert f"| {name} | " in printed
    assert "1 better, 0 equal, 0 worse" in printed or "2 better, 0 equal, 0 worse" in printed


def test_every_training_of_remedies_starts(load: Load) -> None:
    script = load("benchmarks", "remedies")
    assert {cause for case in script.CASES for cause in case.causes} == {
        *("inputs_uncentred", "inputs_unscaled", "init_too_large", "init_too_small", "weight_growth", "weight_decay", "activation_choice"),
        *("dead_units", "numeric_range", "softmax_logits"),
    }
    for case in script.CASES:
        script.train(case, 0, 2)


def test_scale(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("benchmarks", "scale")
    for name in ("SITES", "WIDTHS", "LENGTHS"):
        monkeypatch.setattr(script, name, (4,))
    arguments(monkeypatch, "--pairs", "1")
    script.main()
    assert "| sequence length | sites | " in capsys.readouterr().out


def test_workloads(load: Load) -> None:
    script = load("benchmarks", "workloads")
    device = torch.device("cpu")
    for work in script.workloads(device).values():
        assert script.Training(work, next(script.twins(work, device)), device).step(work.batch()) > 0


@pytest.mark.parametrize(
    ("page", "name"), [("cost", "budget"), ("cost", "overhead-cpu"), ("cost", "peers-cpu"), ("cost", "scale-cpu"), ("distributed", "ranks")]
)
def test_a_table_is_put_between_its_marks(page: str, name: str, load: Load, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    copy = tmp_path / "page.md"
    copy.write_text(text)
    load("benchmarks", "overhead").put("a table", name, copy)
    head, _, rest = text.partition(f"<!-- {name} -->")
    assert copy.read_text() == f"{head}<!-- {name} -->\na table\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}"
