"""The public surface, who imports whom, and that the host half never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchsat

PACKAGE = Path(torchsat.__file__).parent

# Who may import whom; a file not named here may import nothing of ours.
ARROWS = {
    "__init__": {"activations", "monitor", "record", "remedies", "rules", "tensorboard.reader", "tensorboard.stock", "trial"},
    "record": set(),
    "percent": set(),
    "alerts": {"record"},
    "rules": {"percent", "record"},
    "judge": {"alerts", "percent", "record", "rules"},
    "expressions": {"record"},
    "causes": {"expressions", "percent", "record", "rules"},
    "diagnosis": {"alerts", "causes", "record"},
    "metrics": {"record"},
    "colours": {"metrics"},
    "grids": {"metrics"},
    "view": {"alerts", "colours", "grids", "metrics", "percent", "record"},
    "sheets": {"alerts", "percent", "record", "tensorboard", "tensorboard.reader"},
    "page": {"grids", "sheets", "tensorboard", "tensorboard.reader", "view"},
    "report": {"page", "record", "sheets", "tensorboard.reader", "view"},
    "tensorboard": set(),
    "tensorboard.reader": {"record", "tensorboard"},
    "tensorboard.stock": {"percent", "record", "rules"},
    "tensorboard.heatmap": {"colours", "grids", "metrics", "record"},
    "tensorboard.writer": {"alerts", "record", "tensorboard", "tensorboard.heatmap", "tensorboard.stock"},
    "tensorboard.loader": {"tensorboard", "tensorboard.plugin"},
    "tensorboard.plugin": {"grids", "metrics", "record", "tensorboard", "view"},
    "activations": {"record"},
    "kernels": {"kernels"},
    "kernels.cpu": {"kernels.formulas", "record"},
    "kernels.cuda": {"kernels.formulas", "record"},
    "kernels.formulas": {"activations", "record"},
    "statistics": {"activations", "kernels", "kernels.formulas", "record"},
    "ranks": {"record", "statistics", "weights"},
    "schedule": set(),
    "ingraph": {"taps"},
    "weights": {"record", "statistics"},
    "calls": set(),
    "graph": set(),
    "compile_settings": {"internals"},
    "process": {"compile_settings"},
    "replay": set(),
    "taps": {"activations", "calls", "graph", "kernels", "kernels.formulas", "record", "replay", "statistics", "weights"},
    "remedies": {"internals", "record", "weights"},
    "picture": set(),
    "trial": {"internals", "monitor", "picture", "record", "remedies", "report", "rules", "taps"},
    "monitor": {
        *("__init__", "activations", "alerts", "calls", "diagnosis", "ingraph", "judge", "process", "ranks", "record", "rules", "schedule"),
        *("statistics", "taps", "tensorboard", "tensorboard.reader", "tensorboard.writer", "weights"),
    },
    "integrations": {"monitor"},
    "integrations.accelerate": {"integrations", "monitor", "record", "tensorboard.stock"},
    "integrations.lightning": {"integrations", "monitor", "record", "tensorboard.stock"},
    "integrations.transformers": {"integrations", "internals", "monitor", "record", "tensorboard.stock"},
}
HOST = [
    *("record", "percent", "alerts", "rules", "judge", "expressions", "causes", "diagnosis"),
    *("metrics", "colours", "grids", "view", "sheets", "page", "report"),
    *("tensorboard", "tensorboard.heatmap", "tensorboard.loader", "tensorboard.plugin"),
    *("tensorboard.reader", "tensorboard.stock", "tensorboard.writer"),
]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def test_the_public_names_are_these() -> None:
    assert torchsat.__all__ == sorted(torchsat.__all__, key=lambda name: (not name.isupper(), name))
    assert torchsat.__all__ == [
        *("ACTIVATIONS", "REMEDIES", "RULES", "Activation", "Alert", "Cause", "Coverage", "Head", "Monitor", "Record", "Remedy", "Rule"),
        *("Snapshot", "Trial", "Trials", "Weight", "probe", "read", "scalars", "try_remedies", "watch"),
    ]
    for name in torchsat.__all__:
        assert getattr(torchsat, name) is not None
    assert set(torchsat.__all__) <= set(dir(torchsat))
    with pytest.raises(AttributeError, match="has no attribute 'wacth'; it has ACTIVATIONS, "):
        torchsat.wacth  # noqa: B018


def test_imports_point_one_way() -> None:
    found = modules()
    assert set(found) == set(ARROWS)
    for name, path in found.items():
        ours = {each.removeprefix("torchsat").removeprefix(".") or "__init__" for each in imports(path) if each.split(".")[0] == "torchsat"}
        assert ours <= ARROWS[name], name


def loads_torch(statement: str) -> bool:
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode == 1


def test_the_host_half_never_loads_torch() -> None:
    assert not loads_torch("import torchsat; torchsat.read; torchsat.Record; " + "; ".join(f"import torchsat.{name}" for name in HOST))


def test_the_test_above_can_fail() -> None:
    assert loads_torch("import torchsat; torchsat.watch")


def test_the_installed_distribution_has_its_name_and_command() -> None:
    from importlib import metadata

    assert metadata.version("torchsat-monitor") == torchsat.__version__
    (command,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "torchsat")
    assert command.value == "torchsat.report:main"
    assert (PACKAGE / "py.typed").exists()
