"""Networks whose trained weights were published: that they are measured right, and that benchmarks/published.py would notice if they were not.

The networks themselves are there only where their packages are installed: `pip install --no-deps g2p_en silero-vad facenet-pytorch`.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.truth import known

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/published.py, imported as when it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    import published

    yield published
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["g2p_en", "Silero VAD", "MTCNN O-Net"])
def test_a_small_network_is_measured_right(name: str, published: Any) -> None:
    (network,) = [each for each in published.NETWORKS if each.name == name]
    try:
        outcome = published.train(network, steps=3, every=1, sample=None)
    except published.NotInstalledError as error:
        pytest.skip(f"{name} is not installed: {error}")
    assert not outcome.anonymous
    assert not outcome.unaccounted
    assert not outcome.wrong
    assert not outcome.advises
    assert outcome.passed
    assert outcome.checked >= 10


def test_there_are_ten_networks_and_each_is_named_once(published: Any) -> None:
    assert len({network.name for network in published.NETWORKS}) == len(published.NETWORKS) == 10
    assert len({network.package for network in published.NETWORKS}) == 10


class Net(nn.Module):
    """Activations as modules, as functions and methods, in a GLU and in a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.rnn, self.head = nn.Linear(6, 12), nn.GELU(), nn.LSTM(6, 4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.glu(self.act(self.first(3 * x)), -1)
        x = torch.tanh(self.head(torch.relu(self.rnn(x)[0])))
        return torch.sigmoid(x.relu())


def observed(model: nn.Module, x: Tensor) -> torchsat.Snapshot:
    seen: list[torchsat.Snapshot] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, sinks=(seen.append,), errors="raise"):
        model(x).sum().backward()
        optimizer.step()
    return seen[0]


@pytest.fixture
def found(published: Any) -> Any:
    """A network that is seen whole: its outcome, its snapshot, and what was computed directly."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 7, 6)
    sites, softmaxes = published.direct(model, lambda twin: twin(published.doubled(x)))
    assert not softmaxes
    return published.Outcome(published.NETWORKS[0], None), observed(model, x), sites


def test_tails_are_those_of_the_closed_forms(published: Any) -> None:
    tails = sys.modules["published_direct"].tails
    # f' / peak is 1 / cosh(z)^2 of tanh, and 1 / cosh(z / 2)^2 of a sigmoid.
    edge = math.acosh(math.sqrt(20))
    assert tails("tanh") == pytest.approx((-edge, edge, 1.0), abs=1e-9)
    assert tails("sigmoid") == pytest.approx((-2 * edge, 2 * edge, 0.25), abs=1e-9)
    assert tails("relu") == pytest.approx((0.0, math.inf, 1.0), abs=1e-4)
    assert tails("softplus") == pytest.approx((-math.log(19), math.inf, 1.0), abs=1e-8)


def test_what_is_computed_directly_is_what_the_network_computes(published: Any) -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 7, 6, dtype=torch.float64)
    sites, _ = published.direct(model, lambda twin: twin(x))
    z = model.first(3 * x)
    assert sites["act/gelu"].elements == z.numel()
    density, below = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    assert sites["act/gelu"].mean == pytest.approx((below + z * density).abs().mean().item(), rel=1e-12)
    half = model.act(z).chunk(2, -1)[1].sigmoid()
    assert sites["/glu"].mean == pytest.approx((half * (1 - half)).mean().item(), rel=1e-12)
    # torch's own cell, run step by step, has the cell state that the hidden tanh is given.
    inner, cell = nn.functional.glu(model.act(z), -1), nn.LSTMCell(6, 4).double()
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(getattr(model.rnn, f"{name}_l0"))
    state, slopes = (torch.zeros(5, 4).double(), torch.zeros(5, 4).double()), []
    for step in range(7):
        state = cell(inner[:, step], state)
        slopes.append(1 - state[1].tanh().square())
    assert sites["rnn.l0/hidden"].mean == pytest.approx(torch.stack(slopes).mean().item(), rel=1e-12)
    assert sites["rnn.l1/hidden"].elements == sites["rnn.l0/hidden"].elements == 5 * 7 * 4


def test_a_network_that_is_measured_right_passes(published: Any, found: Any) -> None:
    outcome, snapshot, sites = found
    published.compare(outcome, snapshot, sites, set())
    assert outcome.passed, (outcome.anonymous, outcome.unaccounted, outcome.wrong)
    assert outcome.checked == len(sites) == 16


def test_each_fault_is_found(published: Any, found: Any) -> None:
    outcome, snapshot, sites = found
    first, *others = snapshot.records
    assert (first.site, first.saturated is None) == ("act", False)

    def faults(*records: torchsat.Record, unseen: tuple[tuple[str, str], ...] = ()) -> tuple[int, int, int]:
        fresh = replace(outcome, anonymous=[], unaccounted=[], wrong=[], unseen=unseen)
        published.compare(fresh, replace(snapshot, records=records), sites, set())
        assert fresh.passed is not any((fresh.anonymous, fresh.unaccounted, fresh.wrong))
        return len(fresh.anonymous), len(fresh.unaccounted), len(fresh.wrong)

    assert faults(first, *others) == (0, 0, 0)
    assert faults(replace(first, activation="GELUActivation"), *others) == (1, 0, 0)
    assert faults(*others) == (0, 1, 0)
    assert faults(*others, unseen=((first.site, "a reason"),)) == (0, 0, 0)
    assert faults(replace(first, saturated=known(first.saturated) + 0.01), *others) == (0, 0, 1)
    assert faults(replace(first, derivative=known(first.derivative) - 0.01), *others) == (0, 0, 1)
    assert faults(replace(first, saturated=None), *others) == (0, 0, 1)
    assert faults(replace(first, elements=first.elements - 1), *others) == (0, 0, 1)


def test_advice_to_draw_anew_is_found(published: Any, found: Any) -> None:
    outcome, _, _ = found
    alert = torchsat.Alert("act", "saturated", "warning", 1.0, 0.5, 0, 1, True, "act is bad")
    cause = torchsat.Cause("init_too_large", 1.0, "so it is", "nn.init.xavier_normal_(model.first.weight)")
    fails = replace(outcome, alerts=[replace(alert, causes=(cause,))])
    assert fails.advises == ["act: init_too_large: nn.init.xavier_normal_(model.first.weight)"]
    assert not fails.passed
    assert replace(outcome, alerts=[replace(alert, causes=(replace(cause, remedy="lower the learning rate"),))]).passed


def test_one_file_of_a_package_is_imported_without_the_rest(published: Any, tmp_path: Path) -> None:
    package = tmp_path / "made_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it needs much')")
    (package / "inner" / "__init__.py").write_text("from .part import VALUE")
    (package / "inner" / "part.py").write_text("VALUE = 7")
    (package / "model.py").write_text("from missing_package.deep import Thing\nfrom .inner import VALUE\nfrom made_package import Kind")
    with sys.modules["published_networks"].shell(package, "missing_package", "missing_package.deep") as load:
        module = load("made_package.model")
    assert (module.VALUE, isinstance(module.Thing, type), isinstance(module.Kind, type)) == (7, True, True)
    assert not [name for name in sys.modules if name.startswith(("made_package", "missing_package"))]
