"""Every example of README and docs runs, and every table is what the code says."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import RunExample

ROOT = Path(__file__).parent.parent
# Lightning gives its advice as warnings, and uses a name of torch that is deprecated.
LIGHTNING = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{index}", marks=LIGHTNING if "import lightning" in code else ())
    for page in PAGES
    for index, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_an_example_of_the_docs_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for library in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        pytest.importorskip(library)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_the_alert_that_the_readme_shows_is_the_one_you_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    (code, *_) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    (shown,) = re.findall(r"^    (torchsat: step .*)$", text, re.MULTILINE)
    assert caplog.messages == [shown]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_code_says() -> None:
    tables = load(ROOT / "docs" / "tables.py")
    for page in tables.TABLES:
        assert tables.filled(page) == (ROOT / "docs" / page).read_text(), f"{page} is old: run `python docs/tables.py`"


def test_the_readme_is_short_and_sends_nobody_to_the_other_project() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert "pip install torchsat\n" not in text
    assert "pip install torchsat " not in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_digits_example_alerts_and_its_sane_twin_does_not(tmp_path: Path) -> None:
    digits = load(ROOT / "examples" / "digits.py")
    accuracy, monitor = digits.train(str(tmp_path), steps=400)
    (alert,) = monitor.alerts
    assert (alert.site, alert.rule, alert.since) == ("hidden1.act", "saturated", 0)
    assert alert.also == ("hidden2.act", "hidden3.act", "hidden4.act")
    assert {cause.name for cause in alert.causes} == {"init_too_large", "inputs_unscaled", "inputs_uncentred"}
    healthy, sane = digits.train(None, sane=True, steps=400)
    assert sane.alerts == ()
    assert healthy > accuracy


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param("fully_shard", marks=pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 does not run on a CPU")),
        pytest.param("pipeline", marks=pytest.mark.skipif(torch.__version__ < "2.8", reason="1F1B of torch 2.6 and 2.7 hangs over gloo")),
    ],
)
def test_the_example_of_many_processes_records_what_one_process_does(kind: str) -> None:
    given = [] if kind == "ddp" else [f"--{kind.replace('_', '-')}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "examples" / "ddp.py"), *given]
    done = subprocess.run([*command, "--steps", "25"], capture_output=True, text=True, timeout=120, check=True)
    assert f"{kind}, 2 processes: 7 observations, " in done.stdout
    (wrong, largest) = re.findall(r"counts that differ: (\d+); largest relative difference of the others: (\S+)", done.stdout)[0]
    assert wrong == "0"
    assert float(largest) < 1e-10


def test_the_table_of_families_is_what_the_code_says() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    families = load(ROOT / "docs" / "families.py")
    page = (ROOT / "docs" / "families.md").read_text()
    if families.versions() not in page:
        pytest.skip(f"the page was not made with {families.versions()}")
    assert families.filled() == page, "docs/families.md is old: run `python docs/families.py`"


def test_the_remedies_example_measures_what_the_mathematics_says(run_example: RunExample) -> None:
    """In a deep stack of sigmoids Xavier and LayerNorm do not help; another activation and BatchNorm do."""
    printed = run_example("remedies", "--steps", "150")
    for remedy in ("ReLU", "GELU", "BatchNorm"):
        assert f"{remedy} helps: " in printed
    for remedy in ("Xavier init", "LayerNorm"):
        assert f"{remedy} helps: " not in printed


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gates_example_learns_and_draws(cell: str, tmp_path: Path, run_example: RunExample) -> None:
    printed = run_example("lstm_gates", "--steps", "21", "--cell", cell, "--picture", "gates.png")
    first, last = (float(line.split()[2]) for line in printed.splitlines() if line.startswith("step "))
    assert last < first - 1
    gates = {"lstm": 10, "gru": 6}[cell]
    assert f"{gates} sites ({gates} gates) seen; nothing is known to be unseen" in printed
    assert (tmp_path / "gates.png").stat().st_size > 10_000


def test_the_digits_example_runs_as_a_command(run_example: RunExample) -> None:
    printed = run_example("digits", "--steps", "20")
    assert "hidden1.act (sigmoid) is saturated" in printed
    assert "tensorboard --logdir runs" in printed
