"""What a real kernel shows: cards, figures, progress, a card that follows the training, and the tour."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchsat
from torchsat.notebook import is_kernel

ROOT = Path(__file__).parent.parent
needs_a_kernel = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")), reason="no kernel is installed: pip install nbclient ipykernel"
)
SETUP = """
import logging, warnings
warnings.simplefilter("error")
import torch, torchsat
from torch import nn
def network():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer[0].weight, 0, 2)
    return nn.Sequential(*layers, nn.Linear(16, 3))
def train(model, steps=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 16)).square().mean().backward()
        optimizer.step()
"""


class Kernel:
    """A kernel that runs cells one after the other."""

    def __init__(self, folder: Path) -> None:
        import nbformat
        from nbclient import NotebookClient

        self._new: Any = nbformat.v4.new_code_cell
        self.notebook: Any = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
        self.client: Any = NotebookClient(self.notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})

    def run(self, code: str) -> list[Any]:
        """The outputs of a cell."""
        self.notebook.cells.append(self._new(code))
        return list(self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1).outputs)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    pytest.importorskip("matplotlib")
    found = Kernel(tmp_path_factory.mktemp("notebook"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with found.client.setup_kernel():
            found.run(SETUP)
            yield found


def text(outputs: list[Any]) -> str:
    return "".join(each.get("text", "") + each.get("data", {}).get("text/plain", "") for each in outputs)


@needs_a_kernel
def test_every_value_is_one_small_output(kernel: Kernel) -> None:
    assert kernel.run("model = network(); monitor = torchsat.watch(model, 'run', every=1, budget=None); train(model); monitor.flush()") is not None
    for value in ("monitor", "monitor.latest", "monitor.latest.records[0]", "monitor.latest.weights[0]", "monitor.alerts[0]", "monitor.coverage"):
        (output,) = kernel.run(value)
        assert output["output_type"] == "execute_result"
        assert len(output["data"]["text/html"]) < 15_000
        assert len(output["data"]["text/plain"]) < 250
    (output,) = kernel.run("monitor")
    assert ">critical</span>" in output["data"]["text/html"]


@needs_a_kernel
def test_a_figure_is_shown_once_with_and_without_pyplot(kernel: Kernel) -> None:
    """Also after `trials.picture`, which once switched the inline figures of the whole notebook off."""
    assert "False" in text(kernel.run("import sys; print('matplotlib.pyplot' in sys.modules)"))
    for code in (
        "monitor.plot()",
        "torchsat.plot('run', 'saturated')",
        "monitor.plot(site='0.1')",
        "import matplotlib.pyplot as plt\nmonitor.plot()",
    ):
        (output,) = kernel.run(code)
        assert "image/png" in output["data"]
    kernel.run("def loss(model, x):\n    return model(x).square().mean()")
    kernel.run("trials = torchsat.try_remedies(network(), [torch.randn(8, 16)], loss, steps=2, remedies=torchsat.REMEDIES[:2])")
    assert kernel.run("trials.picture('trials.png')") == []
    (output,) = kernel.run("plt.plot([1, 2]);")
    assert "image/png" in output["data"]
    (output,) = kernel.run("trials.plot()")
    assert "image/png" in output["data"]


@needs_a_kernel
def test_trials_show_a_bar_and_then_a_small_table(kernel: Kernel) -> None:
    code = "trials = torchsat.try_remedies(network(), [torch.randn(8, 16)], lambda m, x: m(x).square().mean(), steps=3)"
    (bar,) = kernel.run(code)
    assert bar["output_type"] == "display_data"
    assert bar["data"] == {"text/html": "", "text/plain": ""}
    assert kernel.run(code.replace("steps=3", "steps=3, progress=False")) == []
    (output,) = kernel.run("trials")
    assert len(output["data"]["text/html"]) < 15_000
    assert len(output["data"]["text/plain"]) < 250
    printed = text(kernel.run("print(trials)"))
    assert "as it is" in printed
    assert len(printed) < 6000


@needs_a_kernel
def test_a_report_is_written_into_its_file(kernel: Kernel) -> None:
    """rich shows in the cell what it is told to print, unless it is told not to."""
    code = """
import io
from torchsat.report import report
found = {}
for kind in ("text", "markdown", "json", "html"):
    out = io.StringIO()
    report("run", out, kind)
    found[kind] = out.getvalue()
"""
    assert kernel.run(code) == []
    sizes = text(kernel.run("print({kind: len(written) for kind, written in found.items()}, '0.1' in found['text'], '<pre></pre>' in found['html'])"))
    assert all(int(size) > 500 for size in re.findall(r": (\d+)", sizes))
    assert sizes.strip().endswith("True False")


@needs_a_kernel
def test_a_cell_that_is_run_again_has_one_monitor(kernel: Kernel) -> None:
    code = "monitor = torchsat.watch(model, 'again', every=1, budget=None)\ntrain(model)"
    kernel.run(code)
    assert "the same Sequential is watched anew" in text(kernel.run(code))
    kernel.run("monitor.close()")
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in text(kernel.run("print([snapshot.step for snapshot in torchsat.read('again')])"))


@needs_a_kernel
def test_a_card_follows_the_training(kernel: Kernel) -> None:
    code = "model = network(); monitor = torchsat.watch(model, every=1, budget=None)\nmonitor.live()\ntrain(model, 4)\nmonitor.close()"
    cards = [output for output in kernel.run(code) if output["output_type"] == "display_data"]
    assert len(cards) == 1
    assert "step 4, closed" in cards[0]["data"]["text/html"]
    assert ">critical</span>" in cards[0]["data"]["text/html"]


def test_outside_a_notebook_nothing_is_shown_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    from torch import nn

    assert not is_kernel()
    with torchsat.watch(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) as monitor:
        monitor.live()
    assert "monitor.live() shows nothing here, since this is no notebook" in caplog.text


@needs_a_kernel
def test_the_tour_runs_from_its_beginning_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    pytest.importorskip("sklearn")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    cells = notebook.cells
    assert len(cells) <= 15
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells), "strip the outputs before you commit"
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output["data"] for cell in cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 4
    assert sum("text/html" in data for data in shown) >= 3
    assert any(">healthy</span>" in data.get("text/html", "") for data in shown)
    assert any(">critical</span>" in data.get("text/html", "") for data in shown)
    assert sys.getsizeof(str(notebook)) < 3_000_000
