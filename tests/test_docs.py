"""Every example of README and docs runs, and every table is what the code says."""

import ast
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torchsat
from tests.conftest import RunExample
from tests.scripts import load
from torchsat.kernels import cpu

ROOT = Path(__file__).parent.parent
PACKAGE = Path(torchsat.__file__).parent
"""Where the package is installed, which need not be beside the tests."""
# Lightning gives its advice as warnings, and uses a name of torch that is deprecated.
LIGHTNING = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMING = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]
"""The pages that name parts of the code as `file` and `file::name`."""
CREATED = {("observe/losses.py", "")}
"""The files that a recipe creates."""
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_alert_that_the_readme_shows_is_the_one_you_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal, without its colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    log, terminal = logging.getLogger("torchsat"), Terminal()
    log.propagate = False
    log.addHandler(logging.StreamHandler(terminal))
    text = (ROOT / "README.md").read_text()
    (code, *_) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    (shown,) = re.findall(r"^    torchsat: step .*\n(?:    .*\n)*", text, re.MULTILINE)
    assert terminal.getvalue().rstrip() == textwrap.dedent(shown).rstrip()


def test_the_tables_are_what_the_code_says() -> None:
    tables = load("docs", "tables")
    for page, made in tables.TABLES.items():
        assert tables.filled(ROOT / "docs" / page, made) == (ROOT / "docs" / page).read_text(), f"{page} is old: run `python docs/tables.py`"


def test_the_readme_is_short_and_sends_nobody_to_the_other_project() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert "pip install torchsat\n" not in text
    assert "pip install torchsat " not in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def names_in(path: Path) -> set[str]:
    """The names that a file defines, as `name` and `Class.name`. Of other files than Python's, the words in it and the same behind a dot."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))
    found: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")
                elif prefix:
                    attributes = (each for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store))
                    found.update(prefix + each.attr for each in attributes if ast.unparse(each.value) == "self")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return found


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.stem)
def test_every_file_and_name_that_a_page_states_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    quoted = set(re.findall(r"`([\w./-]+\.(?:py|c|js|md|toml)|[\w/-]+/)(?:::([\w.]+))?`", text))
    assert len(quoted) > 10
    missing = []
    for file, name in quoted - CREATED:
        path = next((each for each in (ROOT / file, PACKAGE / file, PACKAGE.parent / file) if each.exists()), None)
        if path is None or (name and name not in names_in(path)):
            missing.append(f"{file}::{name}" if name else file)
    assert not missing
    for name in re.findall(r"`(Observation|Meter)\.(\w+)`", text):
        source = {"Observation": "observation.py", "Meter": "meter.py"}[name[0]]
        assert ".".join(name) in names_in(PACKAGE / "observe" / source)


def imported_by(path: Path) -> Iterator[str]:
    """The parts of torchsat that a file imports when it runs, without what only type checkers import."""
    tree = ast.parse(path.read_text())
    guarded = [each for each in ast.walk(tree) if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING"]
    skipped = {id(each) for guard in guarded for statement in guard.body for each in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").split(".")[0] == "torchsat":
            inside = (node.module or "").split(".")[1:2]
            yield from inside or (each.name for each in node.names)


def test_imports_point_the_way_that_the_architecture_draws() -> None:
    (drawn,) = re.findall(r"^```\n(front .*?)^```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [re.sub(r" {4,}the .*", "", line).split()[1:] for line in drawn.splitlines() if not line.startswith("-")]
    height = {name: -at for at, line in enumerate(lines) for name in line}
    assert len(height) == sum(map(len, lines)), "a part stands on two lines"
    package = PACKAGE
    files = {path: path.relative_to(package).with_suffix("").parts[0] for path in package.rglob("*.py")}
    assert set(height) == set(files.values())
    upwards = {(part, other) for path, part in files.items() for other in imported_by(path) if height[other] > height[part]}
    assert not upwards
    host = {name for line in lines[-3:] for name in line}
    assert not {(part, other) for path, part in files.items() if part in host for other in imported_by(path) if other not in host}


def apply(change: str, folder: Path) -> None:
    """Apply a diff without line numbers: in the file that `+++` names, the old lines of each hunk, which stand there once, become the new ones."""
    for part in re.split(r"^\+\+\+ ", change, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        text = (folder / name).read_text()
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
            assert text.count(f"\n{before}") == 1, f"{name} has these lines {text.count(before)} times:\n{before}"
            text = text.replace(f"\n{before}", f"\n{after}")
        (folder / name).write_text(text)


@pytest.mark.slow
def test_the_recipes_for_a_column_a_metric_and_a_source_work(tmp_path: Path) -> None:
    """Applied to a copy of the package, in which their tests run."""
    shutil.copytree(PACKAGE, tmp_path / "torchsat", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("### A column\n")[2]
    for change in re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        apply(change, tmp_path)
    codes = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (source,) = (code for code in codes if "def attach" in code)
    (tmp_path / "torchsat" / "observe" / "losses.py").write_text(source)
    tests = [code for code in codes if "def test_" in code]
    assert len(tests) == 3
    for index, code in enumerate(tests):
        (tmp_path / f"test_recipe_{index}.py").write_text(code)
    for kernels in (True, False):
        # Where the C of the recipe does not compile, plain torch would pass in its place.
        expected = kernels and cpu.reads()
        check = f"from torchsat.kernels import cpu\n\n\ndef test_kernels():\n    assert cpu.reads() is {expected}\n"
        (tmp_path / "test_kernels.py").write_text(check)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHSAT_KERNELS": str(int(kernels)), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "5 passed" in done.stdout


def test_the_digits_example_alerts_and_its_sane_twin_does_not(tmp_path: Path) -> None:
    digits = load("examples", "digits")
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
        pytest.param(
            "fully_shard", marks=[pytest.mark.slow, pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 does not run on a CPU")]
        ),
        pytest.param(
            "pipeline", marks=[pytest.mark.slow, pytest.mark.skipif(torch.__version__ < "2.8", reason="1F1B of torch 2.6 and 2.7 hangs over gloo")]
        ),
    ],
)
def test_the_example_of_many_processes_records_what_one_process_does(kind: str) -> None:
    given = [] if kind == "ddp" else [f"--{kind.replace('_', '-')}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "examples" / "ddp.py"), *given]
    done = subprocess.run([*command, "--steps", "25"], capture_output=True, text=True, timeout=120, check=True)
    assert f"{kind}, 2 processes: 8 observations, " in done.stdout
    (wrong, largest) = re.findall(r"counts that differ: (\d+); largest relative difference of the others: (\S+)", done.stdout)[0]
    assert wrong == "0"
    assert float(largest) < 1e-10


@pytest.mark.slow
def test_the_table_of_families_is_what_the_code_says() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    families = load("docs", "families")
    page = (ROOT / "docs" / "families.md").read_text()
    if families.versions() not in page:
        pytest.skip(f"the page was not made with {families.versions()}")
    assert families.filled(families.PAGE, {"families": families.table}) == page, "docs/families.md is old: run `python docs/families.py`"


@pytest.mark.slow
def test_the_remedies_example_measures_what_the_mathematics_says(run_example: RunExample) -> None:
    """In a deep stack of sigmoids Xavier and LayerNorm do not help; another activation and BatchNorm do."""
    printed = run_example("try_remedies", "--steps", "150")
    for remedy in ("ReLU", "GELU", "BatchNorm"):
        assert f"{remedy} helps: " in printed
    for remedy in ("Xavier init", "LayerNorm"):
        assert f"{remedy} helps: " not in printed


@pytest.mark.parametrize(
    ("name", "steps", "verdict"),
    [
        ("transformer", 33, "critical: blocks.0/softmax"),
        ("rl_agent", 5, "critical: body.1 (tanh): saturated (inputs_unscaled), since step 0"),
        ("finetuning", 5, "critical: 2 (tanh): saturated (inputs_unscaled), since step 0"),
    ],
)
def test_an_example_says_what_is_wrong_and_its_sane_twin_is_healthy(name: str, steps: int, verdict: str, run_example: RunExample) -> None:
    printed = run_example(name, "--steps", str(steps))
    assert f"the verdict: {verdict}" in printed
    assert "\ntry: " in printed
    assert "the verdict: healthy: no alert was raised" in run_example(name, "--sane", "--steps", str(steps))


def test_the_plasticity_example_measures_and_draws(tmp_path: Path, run_example: RunExample) -> None:
    printed = run_example("plasticity", "--tasks", "2", "--steps", "40", "--rate", "0.01", "--picture", "plasticity.png")
    rows = [line.split() for line in printed.splitlines() if line.count("%") == 2]
    first, second = ([row for row in rows if row[-4] == task] for task in "12")
    # Both runs learn the first task alike, and then the units of one are recycled.
    assert len({tuple(row[-3:]) for row in first}) == 1
    assert len({tuple(row[-3:]) for row in second}) == 2
    assert all(0 < float(row[-2].strip("%")) < 100 and 1 < float(row[-1]) < 64 for row in rows)
    assert (tmp_path / "plasticity.png").stat().st_size > 10_000


def test_the_example_of_lazy_neurons_counts_and_draws(tmp_path: Path, run_example: RunExample) -> None:
    """Half of the rectifiers are on at the start, whatever the data are."""
    printed = run_example("lazy_neurons", "--steps", "4", "--picture", "lazy.png")
    rows = {line[:14].strip(): [float(share) for share in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines() if line.count("%") == 7}
    assert list(rows) == ["digits", "random labels", "random pixels"]
    for _, first, last, *blocks in rows.values():
        assert first == pytest.approx(50, abs=4)
        assert last == pytest.approx(sum(blocks) / 4, abs=0.11)
    assert (tmp_path / "lazy.png").stat().st_size > 10_000


def test_the_example_of_squared_relu_measures_the_zeros_that_it_asks_for(tmp_path: Path, run_example: RunExample) -> None:
    printed = run_example("squared_relu", "--steps", "2", "--given", "0.95", "--picture", "sparse.png")
    rows = re.findall(r"^(.+?) +([\d.]+)% +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    zeros = {name: float(share) for name, share, _, _ in rows}
    assert zeros["GELU"] < 1
    assert all(30 < zeros[name] < 60 for name in ("ReLU", "ReLU^2", "clipped ReLU^2"))
    given = {name: share for name, share in zeros.items() if "given" in name}
    assert len(given) == 1
    assert all(share == pytest.approx(float(name[6:8]), abs=1) for name, share in given.items())
    spikes = {name: float(spike) for name, _, _, spike in rows}
    assert spikes["ReLU^2"] > 1.5 * spikes["ReLU"]
    assert (tmp_path / "sparse.png").stat().st_size > 10_000


def test_the_example_of_entropy_collapse_follows_the_entropy_and_bounds_the_weights(tmp_path: Path, run_example: RunExample) -> None:
    printed = run_example("entropy_collapse", "--steps", "4", "--depth", "2", "--picture", "entropy.png")
    rows = [re.findall(r"[\d.]+", line)[-2:] for line in printed.splitlines() if re.match(r"(the rate|twice)", line)]
    assert len(rows) == 3
    assert all(0 < float(each) <= 1 for row in rows for each in row)
    assert (tmp_path / "entropy.png").stat().st_size > 10_000
    weight = torch.randn(12, 5)
    bounded = load("examples", "entropy_collapse").SigmaReparametrisation(weight)(weight)
    assert torch.linalg.matrix_norm(bounded, 2).item() == pytest.approx(1, rel=1e-5)


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
    assert "4 of 4 sigmoid layers are saturated since step 0" in printed
    assert "tensorboard --logdir runs" in printed
