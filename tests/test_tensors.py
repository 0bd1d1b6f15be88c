"""Which tensors of a user are read. Subclasses of Tensor that hold plain data give the same records as plain tensors, and no code of theirs runs."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import torchsat
from tests.truth import known
from torchsat.tensors import plain, why_unread


class Picture(Tensor):
    """A tensor that only has another type."""


class Volume(Tensor):
    """A tensor that carries something with it, and whose methods are not those of a tensor."""

    ran = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Volume.ran += 1
        made = super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(made, Volume):
            made.affine = next((each.affine for each in args if hasattr(each, "affine")), None)  # type: ignore[attr-defined]
        return made

    def clone(self, **given: Any) -> Tensor:
        raise RuntimeError("a volume has no clone")

    def detach(self) -> Tensor:
        raise RuntimeError("a volume cannot be detached")


class Weight(nn.Parameter):
    """A parameter of another type."""


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Net(nn.Module):
    """A site of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.prelu, self.own = nn.Linear(16, 16), nn.ReLU(), nn.PReLU(6), Own()
        self.lstm, self.cell, self.glu, self.b = nn.LSTM(16, 16, batch_first=True), nn.GRUCell(16, 16), nn.GLU(), nn.Linear(8, 16)
        self.soft, self.attention = nn.Softmax(-1), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.own(self.prelu(self.relu(self.a(x)))))[0]
        x = F.silu(F.gelu(self.b(self.glu(x)))).tanh().sigmoid()
        x = F.scaled_dot_product_attention(x, x, x)
        x = self.soft(x) * x.softmax(-1)
        out: Tensor = self.cell(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def _trained(kind: type[Tensor] | None, of_weights: type[Tensor] | None, watched: bool) -> tuple[list[float], int, torchsat.Monitor | None]:
    torch.manual_seed(0)
    model, losses = Net(), []
    for module in model.modules() if of_weights is not None else ():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = value.detach().as_subclass(known(of_weights)).requires_grad_()  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Volume.ran = 0
    monitor = torchsat.watch(model, every=1, budget=None) if watched else None
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 6, 16)
        loss = model(x if kind is None else x.as_subclass(kind)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if monitor is not None:
        monitor.close()
    return losses, Volume.ran, monitor


@pytest.mark.parametrize(("kind", "of_weights"), [(Picture, None), (Volume, None), (None, Weight), (Picture, Picture), (Volume, Volume)])
def test_subclasses_that_hold_plain_data_are_read(kind: type[Tensor] | None, of_weights: type[Tensor] | None) -> None:
    reference = known(_trained(None, None, True)[2])
    losses, ran, monitor = _trained(kind, of_weights, True)
    assert (losses, ran) == _trained(kind, of_weights, False)[:2]
    assert len(reference.coverage.seen) == 20
    assert known(monitor).coverage == reference.coverage
    given, expected = known(known(monitor).latest), known(reference.latest)
    made, right = ([*map(astuple, each.records), *map(astuple, each.weights)] for each in (given, expected))
    for row, expected_row in zip(made, right, strict=True):
        for one, other in zip(row, expected_row, strict=True):
            assert one == (pytest.approx(other, rel=1e-6, nan_ok=True) if isinstance(other, float) else other)


def test_a_plain_tensor_is_read_as_it_is() -> None:
    for tensor in (torch.ones(3), nn.Parameter(torch.ones(3))):
        assert plain(tensor) is tensor
    picture = torch.ones(3).as_subclass(Picture)
    assert type(plain(picture)) is Tensor
    assert plain(picture).data_ptr() == picture.data_ptr()


@pytest.mark.filterwarnings("ignore")
def test_what_holds_no_real_numbers_is_named() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with FakeTensorMode():
        fake = torch.ones(3)
    reasons = {
        "complex": torch.ones(3, dtype=torch.complex64),
        "integers": torch.ones(3, dtype=torch.int8),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta device": torch.ones(3, device="meta"),
        "sparse": torch.ones(3).to_sparse(),
        "nested": nested,
        "fake": fake,
        "does not exist yet": nn.LazyLinear(3).weight,
    }
    for word, tensor in reasons.items():
        assert word in known(why_unread(plain(tensor)))

    def transformed(each: Tensor) -> Tensor:
        assert "inside a transform" in known(why_unread(plain(each)))
        return each

    torch.func.vmap(transformed)(torch.ones(3))
    assert why_unread(torch.ones(3, dtype=torch.float8_e5m2)) is None
    assert why_unread(torch.ones(3, requires_grad=True)) is None
