"""The flow of data between modules: which layers feed a site, which sites make the output of the model, and which sites are gates."""

from collections import deque, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.models import Block, Calling
from tests.training import loop_of
from tests.truth import known, one_step


def test_outputs_of_the_model_are_told_from_hidden_sites() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()
            self.left, self.right, self.sigmoid, self.tanh = nn.Linear(8, 1), nn.Linear(8, 2), nn.Sigmoid(), nn.Tanh()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x)
            left = self.sigmoid(self.left(h)).squeeze(-1)
            return {"left": left, "right": self.tanh(self.right(h)), "hidden": F.linear(h, torch.eye(8, requires_grad=True))}

    snapshot = one_step(TwoHeads(), lambda m: sum(value.sum() for value in m(torch.randn(4, 8)).values()))
    assert {record.site: record.output for record in snapshot.records} == {"body.act": False, "sigmoid": True, "tanh": True}


def test_the_feeding_layers_are_found_along_the_flow_of_data() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.unused = nn.Linear(8, 8)
            self.conv2, self.norm, self.shortcut = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.act(self.norm(self.conv2(x)) + self.shortcut(x)).mean((2, 3)))
            return result

    weights = one_step(Residual(), x=torch.randn(2, 3, 6, 6)).weights
    assert {weight.name: weight.feeds for weight in weights} == {"conv2": ("act",), "shortcut": ("act",)}


def test_a_shared_activation_knows_every_layer_that_feeds_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head, self.act = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 1), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(layer(x))
            out: Tensor = self.act(self.head(x))
            return out

    snapshot = one_step(Shared(), x=torch.randn(4, 8))
    assert [weight.name for weight in snapshot.weights] == ["layers.0", "layers.1", "layers.2", "head"]
    # The site makes the output of the model, but hidden activations too. It therefore counts as hidden and is judged.
    assert snapshot["act"].output is False


def test_hidden_features_that_are_also_returned_stay_hidden() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Block(), nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.head(h), h

    snapshot = one_step(Features(), lambda m: m(torch.randn(4, 8))[0])
    assert {record.site: record.output for record in snapshot.records} == {"body.act": False, "head.1": True}


class Slots:
    __slots__ = ("p",)

    def __init__(self, p: object) -> None:
        self.p = p


@dataclass(slots=True)
class Data:
    p: object


class Hostile:
    """An object that holds itself, and whose every method raises."""

    def __init__(self, p: object) -> None:
        vars(self).update(p=p, me=self)

    @property
    def bad(self) -> None:
        raise AssertionError

    def __getattribute__(self, name: str) -> Any:
        if name != "__dict__":
            raise AssertionError(name)
        return object.__getattribute__(self, name)


class Listed(list[Any]):
    def __iter__(self) -> Any:
        raise AssertionError


Pair = namedtuple("Pair", "first second")

HOLDERS: Mapping[str, Callable[[Tensor], object]] = {
    "object in a list": lambda p: [Hostile(p)],
    "slots": lambda p: {"out": Slots(p)},
    "dataclass in a dataclass": lambda p: Data([Data(p)]),
    "named tuple": lambda p: Pair(1, {2: p}),
    "list of the user's": lambda p: Listed([p]),
    "deque": lambda p: deque([p]),
    "namespaces": lambda p: SimpleNamespace(a=SimpleNamespace(b=(p,))),
    "distribution": lambda p: torch.distributions.Bernoulli(probs=p),
    "deep": lambda p: [[[[[[Slots(p)]]]]]],
    "closure": lambda p: lambda: p,
}


@pytest.mark.parametrize("holder", [*HOLDERS, "kept on the model", "beside the logits"])
def test_an_output_is_one_wherever_it_is_kept(holder: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.sigmoid = Block(), nn.Linear(8, 1), nn.Sigmoid()

        def forward(self, x: Tensor) -> object:
            z = self.head(self.body(x))
            self.kept = [self.sigmoid(z)]
            if holder == "beside the logits":
                return {"logits": z, "p": self.kept[0]}
            return None if holder == "kept on the model" else HOLDERS[holder](self.kept[0])

    model = Net()

    def forward(m: Any) -> Tensor:
        m(torch.randn(4, 8))
        p: Tensor = m.kept.pop()
        return p

    snapshot = one_step(model, forward)
    assert {record.site: record.output for record in snapshot.records} == {"body.act": False, "sigmoid": True}


def test_a_site_that_anything_of_the_model_uses_is_no_output_where_the_output_is_not_found() -> None:
    """Used by a parameter, by a recurrent layer, and by another activation; only the last site of each is one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.rnn, self.w = nn.Linear(8, 8), nn.GRU(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> object:
            x = torch.relu(self.one(x))
            y, _ = self.rnn(torch.tanh(x) + 1)
            return lambda: (F.elu(y) @ self.w).sigmoid()

    snapshot = one_step(Net(), lambda m: m(torch.randn(4, 3, 8))())
    outputs = {record.site: record.output for record in snapshot.records if record.kind != "recurrent"}
    assert outputs == {"relu": False, "tanh": False}


def test_outputs_are_found_where_the_root_is_never_called() -> None:
    model = nn.ModuleDict({"encoder": Block(), "head": nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())})
    snapshot = one_step(model, lambda m: m["head"](m["encoder"](torch.randn(4, 8))))
    assert {record.site: record.output for record in snapshot.records} == {"encoder.act": False, "head.1": True}


def test_a_weight_that_dies_leaves_its_address_to_no_other() -> None:
    """FSDP2 replaces parameters. A new parameter that Python happens to put at the address of an old one must not be taken for it."""
    lineage = known(loop_of(torchsat.watch(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))).observer.observation).lineage
    weight = nn.Parameter(torch.randn(2, 2))
    key = id(weight)
    lineage.know(weight, "layer")
    assert lineage._weights[key] == "layer"
    del weight
    assert key not in lineage._weights


def test_a_sigmoid_that_multiplies_is_a_gate() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.down, self.up, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)
            self.hidden = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.hidden(self.conv(x))
            scale = torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))
            return torch.sigmoid(self.head((x * scale).mean((2, 3))))

    snapshot = one_step(SqueezeExcite(), x=torch.randn(4, 3, 6, 6))
    assert {record.site: (record.gate, record.output) for record in snapshot.records} == {
        "hidden": (False, False),
        "tanh": (False, False),
        "sigmoid": (True, False),
        "sigmoid_1": (False, True),
    }


def test_gates_of_parts_called_one_by_one_and_products_that_are_none() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.scale = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.value(x) * torch.sigmoid(self.scale(x))
            return out

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.layer(x))
            return h * torch.rsqrt((h * h).mean(-1, keepdim=True)) * self.gain.exp()

    x = torch.randn(16, 8)
    parts = nn.ModuleDict({"gate": Gate(), "head": nn.Linear(8, 1)})
    assert one_step(parts, lambda m: m["head"](m["gate"](x)))["gate/sigmoid"].gate
    assert not one_step(nn.Sequential(Norm(), nn.Linear(8, 1)), x=x)["0/sigmoid"].gate


def test_a_call_that_comes_late_is_decided_then() -> None:
    class Net(Calling):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(torch.tanh(self.layer(x)))
            return torch.sigmoid(x) if self.late else x

    model = Net(torch.tanh)
    model.layer = nn.Linear(16, 16)
    monitor = torchsat.watch(model, every=1, errors="raise")
    for step in range(4):
        model.late = step > 0
        model(torch.randn(8, 16)).sum().backward()
        monitor.step()
    monitor.flush()
    assert {record.site: record.output for record in known(monitor.latest).records} == {"tanh": False, "sigmoid": True}


def test_what_comes_into_the_model_is_not_the_models() -> None:
    backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sigmoid())
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    monitor = torchsat.watch(head, errors="raise")
    head(backbone(torch.randn(4, 8))).sum().backward()
    assert monitor.coverage.unseen == ()
    assert monitor.coverage.seen == ("1",)
