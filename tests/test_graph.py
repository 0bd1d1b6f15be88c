"""Activations that reach no hook, such as calls in torch.ops or in compiled functions, are found in the autograd graph and named in the coverage."""

import subprocess
import sys

import torch
from torch import Tensor, nn

import torchsat
from tests.models import Calling, Double


def test_what_is_compiled_is_neither_heard_nor_broken() -> None:
    inner = torch.compile(lambda x: torch.ops.aten.sigmoid(x) * 2, backend="aot_eager", fullgraph=True)

    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = inner(torch.tanh(self.layer(x)))
            return out

    model = Net(torch.tanh)
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(4):
        model(torch.randn(8, 16)).sum().backward()
        optimizer.step()
    assert monitor.coverage.seen == ("tanh",)
    assert monitor.coverage.unseen == (("compiled", "a compiled function: what is fused in it runs no hook"),)


def test_what_torch_tells_no_hook_of_is_found_in_the_graph() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Double.apply(torch.ops.aten.gelu(x + x.mean()))  # type: ignore[no-untyped-call]
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hidden = nn.Linear(4, 4), Hidden()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten.relu(self.hidden(torch.ops.aten.tanh(self.layer(x)))).softmax(-1)
            return out

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(8, 4)).sum().backward()
    assert monitor.coverage.seen == ("softmax",)
    seen = dict(monitor.coverage.unseen)
    assert set(seen) == {"Tanh", "hidden/Gelu", "hidden/Double", "Relu"}
    assert seen["hidden/Double"] == "a custom autograd.Function: what it computes is not known"
    assert "torch.ops" in seen["Tanh"]


def test_a_tensor_whose_history_cannot_be_had_raises_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            a, _ = z.unbind(1)[0:2]
            with torch.no_grad():
                z.mul_(2)
                torch.tanh(a)
            out: Tensor = self.layer(x)
            return out

    model = Net()
    monitor = torchsat.watch(model)
    model(torch.randn(3, 4)).sum().backward()
    monitor.step()


def test_a_deep_graph_is_not_walked_to_death() -> None:
    """Graph nodes that Python holds are freed recursively, so that walking 60,000 of them would overflow the C stack."""
    code = """
import torch, torchsat, torch.nn.functional as F
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, x):
        x = self.layer(x)
        for _ in range(250):
            for _ in range(240):
                x = x + 1
            x = torch.tanh(x)
        return x
torch.set_num_threads(1)
model = Net()
monitor = torchsat.watch(model, sample=16, errors="raise")
model(torch.randn(2, 4)).sum().backward()
monitor.step()
assert any("its graph has more than" in reason for _, reason in monitor.coverage.unseen), monitor.coverage
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
