"""The public surface, who imports whom, and that the host half never loads torch."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import torchsat

PACKAGE = Path(torchsat.__file__).parent

# What each module imports, wherever the import stands: at the top, inside a function or for type checkers only.
ARROWS = {
    "__init__": {
        "activations",
        "cause",
        "coverage",
        "experts",
        "monitor",
        "number_formats",
        "plotting",
        "record",
        "remedies",
        "rules",
        "tensorboard.reader",
        "tensorboard.stock",
        "trial",
        "trials",
    },
    # The host half, which never loads torch.
    "shown": set(),
    "record": {"cause", "experts", "heads", "ledger", "number_formats", "shown"},
    "coverage": {"record", "shown"},
    "columns": {"record"},
    "rows": {"columns", "experts", "ledger", "number_formats", "record"},
    "percent": set(),
    "alerts": {"percent", "record"},
    "alert_level": {"rules", "shown"},
    "verdict": {"alerts", "percent", "record", "shown"},
    "start": {"experts", "record"},
    "flow": {"experts", "record", "start"},
    "loss_functions": {"record"},
    "harm": {"experts", "loss_functions", "record", "start"},
    "rules": {"experts", "flow", "harm", "number_formats", "percent", "record"},
    "judge": {"alert_level", "alerts", "experts", "percent", "record", "rules", "start"},
    "causes": {
        "cause",
        "causes.advice",
        "causes.ceiling",
        "causes.closed",
        "causes.gradient",
        "causes.outputs",
        "causes.rate",
        "causes.routing",
        "causes.scene",
        "causes.underflow",
        "record",
    },
    "causes.rate": {"causes.scene", "expressions"},
    "causes.scene": {"record", "start"},
    "causes.advice": {"cause", "causes.scene", "expressions", "record"},
    "causes.growth": {"causes.advice", "causes.rate", "causes.scene", "expressions", "percent", "record"},
    "causes.size": {"causes.advice", "causes.growth", "causes.scene", "expressions", "percent", "record"},
    "causes.closed": {"causes.advice", "causes.growth", "causes.scene", "causes.size", "expressions", "percent", "record"},
    "causes.gradient": {
        "causes.advice",
        "causes.closed",
        "causes.growth",
        "causes.scene",
        "causes.size",
        "causes.underflow",
        "expressions",
        "flow",
        "percent",
        "record",
    },
    "causes.underflow": {"causes.scene", "expressions", "number_formats", "percent", "record"},
    "causes.outputs": {
        *("causes.advice", "causes.ceiling", "causes.closed", "causes.growth", "causes.scene", "causes.size", "expressions", "loss_functions"),
        *("percent", "record"),
    },
    "causes.routing": {"causes.advice", "causes.growth", "causes.scene", "percent", "record"},
    "expressions": {"record"},
    "paths": {"record"},
    "groups": {"alerts", "paths", "record"},
    "placement": {"alerts", "groups", "paths", "record"},
    "damage": {"alerts", "groups", "record"},
    "diagnosis": {"alerts", "causes", "damage", "groups", "paths", "placement", "record"},
    "metrics": {"record"},
    "colours": {"metrics"},
    "grids": {"metrics"},
    "history": {"alerts", "grids", "metrics", "record", "verdict", "view"},
    "figures": {"alerts", "colours", "grids", "metrics", "record", "view"},
    "plotting": {"figures", "grids", "metrics", "record", "tensorboard.reader", "view"},
    "notebook": set(),
    "comparison": {"cards", "percent", "tables", "terminal"},
    "trials": {"cards", "comparison", "figures", "percent", "record", "shown", "tables", "terminal"},
    "cards": {"alerts", "coverage", "percent", "record", "shown", "verdict"},
    "definitions": set(),
    "view": {"alerts", "colours", "definitions", "grids", "ledger", "metrics", "percent", "record", "verdict"},
    "terminal": set(),
    "log_lines": {"alerts", "record", "terminal", "verdict"},
    "tables": {"terminal", "verdict"},
    "sheets": {"alerts", "experts", "forecast", "number_formats", "percent", "record", "shown", "tables", "tensorboard.reader", "verdict"},
    "text": {"alerts", "forecast", "percent", "record", "sheets", "tables", "tensorboard.reader", "terminal", "verdict"},
    "markdown": {"alerts", "cause", "forecast", "percent", "record", "sheets", "tables", "tensorboard.reader", "tensorboard.stock", "verdict"},
    "document": {"cause", "forecast", "sheets", "tensorboard.reader", "verdict", "view"},
    "page_head": {"alerts", "percent", "record", "sheets", "tables", "tensorboard.reader", "verdict"},
    "page": {"grids", "ledger", "page_head", "tensorboard", "tensorboard.reader", "tensorboard.scalars", "text", "view"},
    "report": {"document", "markdown", "page", "record", "tensorboard.reader", "text"},
    "command": {"__init__", "report", "sheets", "tensorboard.reader", "verdict"},
    "__main__": {"command"},
    "tensorboard": set(),
    "tensorboard.reader": {"experts", "ledger", "number_formats", "record", "tensorboard"},
    "tensorboard.stock": {"alerts", "flow", "metrics", "percent", "record", "shown", "verdict"},
    "tensorboard.heatmap": {"colours", "grids", "metrics", "record", "tensorboard.stock"},
    "tensorboard.writer": {"alerts", "ledger", "number_formats", "record", "tensorboard", "tensorboard.heatmap", "tensorboard.stock", "verdict"},
    "tensorboard.scalars": {"grids", "tensorboard", "tensorboard.reader"},
    "tensorboard.pages": {"definitions", "metrics"},
    "tensorboard.plugin": {
        "alerts",
        "grids",
        "ledger",
        "metrics",
        "record",
        "tensorboard",
        "tensorboard.pages",
        "tensorboard.reader",
        "tensorboard.scalars",
        "verdict",
        "view",
    },
    "tensorboard.loader": {"tensorboard", "tensorboard.plugin"},
    # What is measured.
    "internals": set(),
    "internals_distributed": {"internals"},
    "attributes": set(),
    "tensors": {"internals"},
    "numeric": set(),
    "activations": {"attributes", "internals", "numeric", "record", "tensors"},
    "functions": {"activations"},
    "handwritten": {"activations"},
    "curves": {"activations"},
    "recognise": {"activations", "functions", "handwritten"},
    "elementwise": set(),
    "sampling": {"kernels.cpu"},
    "kernels": {"kernels.cpu", "kernels.cuda"},
    "kernels.formulas": {"activations", "record"},
    "kernels.cpu": {"columns", "kernels.formulas"},
    "kernels.cuda_elements": {"sampling"},
    "kernels.cuda_gradients": {"columns", "kernels.cuda_elements"},
    "attention_masks": set(),
    "kernels.cuda_rows": {"columns", "kernels.cuda_elements", "kernels.formulas"},
    "kernels.cuda_logits": {"columns", "kernels.cuda_elements"},
    "kernels.cuda_sums": {"columns", "kernels.cuda_elements"},
    "kernels.cuda": {"columns", "kernels.cuda_gradients", "kernels.cuda_logits", "kernels.cuda_rows", "kernels.cuda_sums", "kernels.formulas"},
    "trust": {"columns", "kernels", "kernels.formulas", "sampling", "softmax", "statistics"},
    "statistics": {"activations", "columns", "kernels", "kernels.cpu", "kernels.formulas", "sampling"},
    "gram": {"sampling", "statistics"},
    "replay": {"attributes", "internals", "sampling", "sharding", "tensors"},
    "softmax": {"columns", "kernels.cpu", "statistics"},
    "attention": {"attention_masks", "kernels", "replay", "sampling", "softmax", "statistics"},
    "attention_gradient": {"attention", "internals", "statistics"},
    "sharding": {"internals_distributed", "tensors"},
    "optimizers": {"statistics"},
    "weights": {"attributes", "columns", "internals", "optimizers", "sampling", "sharding", "spectral", "statistics", "tensors"},
    "structure": {"activations", "internals", "internals_distributed", "weights"},
    "unregistered": set(),
    "parts": {"record"},
    "sites": {"activations", "coverage", "curves", "elementwise", "parts", "recognise", "record", "structure", "unregistered", "ways"},
    # One observation.
    "observe": set(),
    "observe.marks": {"internals"},
    "observe.nodes": {"internals"},
    "observe.graph": {"internals", "observe.marks", "observe.nodes"},
    "observe.tracing": {"internals"},
    "observe.feeders": {"internals", "observe.marks", "observe.tracing"},
    "observe.loss": {"observe.graph", "observe.marks", "observe.nodes"},
    "observe.lineage": {
        *("faults", "internals", "observe.feeders", "observe.graph", "observe.loss", "observe.marks", "observe.tracing", "sites"),
    },
    "observe.hooks": {"internals", "schedule"},
    "observe.saving": {"internals", "observe.hooks"},
    "observe.origins": {"internals"},
    "observe.gradients": {"internals", "sharding"},
    "observe.passes": {
        "faults",
        "internals",
        "internals_distributed",
        "observe.gradients",
        "observe.graph",
        "observe.hooks",
        "observe.observation",
        "ways",
        "parts",
        "statistics",
        "structure",
        "weights",
    },
    "observe.formats": {"columns", "formats", "number_formats", "observe.passes", "options", "parts", "sampling", "sharding", "tensors"},
    "observe.tallies": {"columns", "observe.passes", "parts", "sites"},
    "observe.meter": {
        "activations",
        "attention",
        "columns",
        "gram",
        "internals",
        "kernels",
        "kernels.formulas",
        "observe.feeders",
        "observe.formats",
        "observe.graph",
        "observe.hooks",
        "observe.lineage",
        "observe.passes",
        "observe.tracing",
        "options",
        "parts",
        "recognise",
        "sampling",
        "sharding",
        "sites",
        "softmax",
        "statistics",
        "tensors",
    },
    "observe.mode": {"internals", "observe.origins"},
    "observe.conditions": {"internals", "observe.marks", "observe.nodes"},
    "observe.functions": {
        *("activations", "functions", "internals", "observe.graph", "observe.meter", "observe.mode", "observe.nodes", "observe.observation", "sites"),
        "tensors",
    },
    "observe.forms": {
        *("activations", "internals", "observe.conditions", "observe.functions", "observe.graph", "observe.meter", "observe.mode", "observe.nodes"),
        *("observe.observation", "observe.own", "recognise", "sites", "tensors"),
    },
    "observe.outside": {"internals", "observe.graph", "observe.mode", "observe.nodes", "structure"},
    "observe.modules": {
        *("activations", "attributes", "internals", "observe.meter", "observe.nodes", "observe.observation", "sharding", "sites", "structure"),
    },
    "observe.own": {
        *("activations", "curves", "elementwise", "observe.graph", "observe.meter", "observe.observation", "recognise", "sampling", "sharding"),
        *("sites", "statistics", "structure", "tensors"),
    },
    "observe.glu": {
        *("observe.feeders", "observe.graph", "observe.meter", "observe.observation", "sampling", "sites", "statistics", "tensors"),
    },
    "observe.calls": {
        "activations",
        "faults",
        "internals",
        "observe.conditions",
        "observe.forms",
        "observe.functions",
        "observe.glu",
        "observe.graph",
        "observe.logits",
        "observe.meter",
        "observe.mode",
        "observe.nodes",
        "observe.observation",
        "observe.outside",
        "observe.routers",
        "observe.softmaxes",
        "sites",
        "structure",
        "tensors",
    },
    "observe.logits": {
        *("activations", "internals", "observe.graph", "observe.loss", "observe.marks", "observe.observation", "observe.passes", "sharding", "sites"),
        *("softmax", "structure", "tensors"),
    },
    "observe.softmaxes": {
        *("attention", "attention_gradient", "internals", "observe.graph", "observe.meter", "observe.nodes", "observe.observation", "replay"),
        *("sharding", "sites", "softmax", "tensors"),
    },
    "observe.recurrent": {
        *("expressions", "internals", "observe.graph", "observe.meter", "observe.observation", "replay", "sharding", "sites", "statistics"),
        "structure",
    },
    "observe.layers": {
        *(
            "columns",
            "observe.formats",
        ),
        *("observe.graph", "observe.modules", "observe.observation", "observe.recurrent", "optimizers", "parts", "record", "sharding", "sites"),
        "structure",
        "weights",
        *("attributes", "tensors"),
    },
    "observe.ingraph": {
        "attributes",
        "internals",
        "observe.hooks",
        "observe.meter",
        "observe.observation",
        "observe.saving",
        "sampling",
        "statistics",
        "structure",
        "weights",
    },
    "observe.observation": {
        "faults",
        "internals",
        "observe.calls",
        "observe.hooks",
        "observe.ingraph",
        "observe.layers",
        "observe.lineage",
        "observe.logits",
        "observe.meter",
        "observe.modules",
        "observe.own",
        "observe.passes",
        "observe.recurrent",
        "observe.saving",
        "observe.stream",
        "observe.tallies",
        "observe.way",
        "options",
        "parts",
        "schedule",
        "sites",
        "structure",
        "ways",
    },
    # The run.
    "options": {"activations", "record", "rules"},
    "faults": set(),
    "steps": {"internals"},
    "patience": set(),
    "schedule": set(),
    "compile_settings": {"internals"},
    "compiling": {"attributes", "compile_settings", "internals", "observe.ingraph", "observe.observation", "sites", "structure"},
    "transport": set(),
    "transport.layout": {"columns", "parts", "record"},
    "transport.windows": {"columns"},
    "transport.packing": {"columns", "parts", "rows", "statistics", "transport.layout", "transport.windows"},
    "transport.flight": {"transport.layout", "transport.packing"},
    "transport.local": {"parts", "transport.flight", "transport.layout", "transport.packing", "transport.windows"},
    "transport.meeting": set(),
    "transport.agreement": {"internals_distributed", "transport.layout", "transport.meeting", "transport.packing"},
    "transport.ranks": {
        *("internals_distributed", "parts", "transport.agreement", "transport.flight", "transport.layout", "transport.meeting", "transport.packing"),
        *("transport.parallel", "transport.windows"),
    },
    "transport.parallel": {"internals_distributed"},
    "transport.route": {
        *("parts", "record", "transport.flight", "transport.local", "transport.meeting", "transport.packing", "transport.parallel"),
        "transport.ranks",
    },
    "delivery": {
        "alerts",
        "coverage",
        "diagnosis",
        "faults",
        "history",
        "judge",
        "log_lines",
        "observe.observation",
        "options",
        "percent",
        "process",
        "record",
        "rows",
        "sites",
        "spectrum",
        "tensorboard",
        "tensorboard.reader",
        "tensorboard.writer",
        "transport.flight",
        "transport.meeting",
        "transport.packing",
        "transport.parallel",
        "transport.route",
    },
    "claims": {"options"},
    "process": {"claims", "compile_settings", "internals"},
    "observer": {
        *("compile_settings", "compiling", "delivery", "faults", "internals", "observe.observation", "observe.passes", "options", "parts"),
        *("internals_distributed", "schedule", "sites", "structure", "transport.meeting", "transport.parallel", "transport.route"),
    },
    "loop": {
        "claims",
        *("compiling", "internals", "observe.hooks", "observe.observation", "observe.passes", "observer", "options", "process", "schedule", "steps"),
        *("patience", "transport.meeting"),
    },
    "monitor": {
        "cards",
        "claims",
        "coverage",
        "internals",
        "loop",
        "notebook",
        "options",
        "percent",
        "plotting",
        "process",
        "record",
        "schedule",
        "structure",
        "trust",
        "verdict",
    },
    "remedies": {"internals", "record", "transport.windows", "weights"},
    "trial": {"internals", "monitor", "notebook", "options", "record", "remedies", "rules", "structure", "transport.windows", "trials", "weights"},
    # The libraries that train.
    "integrations": {"monitor"},
    "integrations.accelerate": {"monitor", "options", "record", "tensorboard.stock"},
    "integrations.lightning": {"integrations", "monitor", "options", "record", "tensorboard.stock"},
    "integrations.transformers": {"integrations", "internals", "monitor", "options", "record", "tensorboard.stock"},
    "ledger": set(),
    "ways": {"ledger"},
    "observe.route": {"internals", "ledger", "observe.nodes", "observe.spine"},
    "observe.spine": set(),
    "observe.stream": {"ledger", "observe.observation", "observe.route", "observe.way", "sharding", "statistics", "structure", "tensors"},
    "observe.way": {
        "internals",
        "ledger",
        "observe.feeders",
        "observe.nodes",
        "observe.observation",
        "observe.passes",
        "ways",
        "observe.route",
        "observe.spine",
        "parts",
        "sharding",
        "statistics",
        "structure",
        "tensors",
    },
    "cause": set(),
    "experts": set(),
    "observe.routers": {
        "activations",
        "columns",
        "internals",
        "observe.graph",
        "observe.mode",
        "observe.nodes",
        "observe.observation",
        "parts",
        "sampling",
        "statistics",
        "structure",
        "tensors",
    },
    "spectrum": {"columns", "record", "rows"},
    "forecast": {"number_formats", "percent"},
    "formats": {"columns", "number_formats", "sampling", "statistics"},
    "number_formats": set(),
    "causes.ceiling": {"causes.advice", "causes.closed", "causes.growth", "causes.scene", "expressions", "record"},
    "heads": set(),
    "spectral": {"statistics"},
}
HOST = [
    *(
        "record",
        "number_formats",
        "forecast",
        "columns",
        "rows",
        "percent",
        "alerts",
        "rules",
        "alert_level",
        "judge",
        "verdict",
        "causes",
        "causes.advice",
        "causes.rate",
        "expressions",
        "diagnosis",
    ),
    *("paths", "groups", "placement", "damage"),
    *("metrics", "colours", "grids", "definitions", "view", "tables", "sheets", "page", "report"),
    *(
        "ledger",
        "cause",
        "experts",
        "spectrum",
        "number_formats",
        "forecast",
        "shown",
        "coverage",
        "history",
        "cards",
        "plotting",
        "notebook",
        "comparison",
        "trials",
    ),
    *("terminal", "log_lines", "text", "markdown", "document", "page_head", "command", "__main__"),
    *("tensorboard", "tensorboard.reader", "tensorboard.stock", "tensorboard.heatmap", "tensorboard.writer"),
    *("tensorboard.scalars", "tensorboard.plugin", "tensorboard.loader"),
]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """The modules of torchsat that a file imports. `from package import name` imports a module where the name is one, else the package itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name.removeprefix("torchsat.") in known else node.module for name in full}
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    ours = {name for name in names if name.split(".")[0] == "torchsat"}
    return {name.removeprefix("torchsat").removeprefix(".") or "__init__" for name in ours}


def test_the_public_names_are_these() -> None:
    assert torchsat.__all__ == sorted(torchsat.__all__, key=lambda name: (not name.isupper(), name))
    assert torchsat.__all__ == [
        *("ACTIVATIONS", "REMEDIES", "RULES", "Activation", "Alert", "Cause", "Coverage", "Experts", "FormatUse", "Head", "Monitor"),
        *("Record", "Remedy", "Rule"),
        *("Snapshot", "Trial", "Trials", "Weight", "plot", "probe", "read", "scalars", "try_remedies", "watch"),
    ]
    for name in torchsat.__all__:
        assert getattr(torchsat, name) is not None
    assert set(torchsat.__all__) <= set(dir(torchsat))
    with pytest.raises(AttributeError, match="has no attribute 'wacth'; it has ACTIVATIONS, "):
        torchsat.wacth  # noqa: B018


def test_imports_are_those_of_the_table() -> None:
    found = modules()
    assert {name: imports(path, found) for name, path in found.items()} == ARROWS


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
    assert command.value == "torchsat.command:main"
    assert (PACKAGE / "py.typed").exists()
