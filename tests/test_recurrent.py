"""The gates of recurrent layers and cells are sites, with the layers that feed them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchsat
from tests.truth import check, one_step
from torchsat.replay import rnn_gates


def test_recurrent_gates_are_sites() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell, self.head = nn.LSTM(6, 7, 2, dropout=0.3), nn.GRUCell(7, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = None
            for step in self.rnn(x)[0]:
                h = self.cell(step, h)
            out: Tensor = self.head(h)
            return out

    model, x = Net(), 3 * torch.randn(5, 3, 6)
    state = torch.get_rng_state()
    plain = model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    snapshot = one_step(model, forward=lambda m: m(x))
    assert torch.equal(torch.get_rng_state(), after)
    gates = ("input", "forget", "cell", "output", "hidden")
    expected = [f"rnn.l{k}/{gate}" for k in (0, 1) for gate in gates] + [f"cell/{gate}" for gate in ("reset", "update", "new")]
    assert [record.site for record in snapshot.records] == expected
    assert plain.shape == (3, 1)
    forget = snapshot["rnn.l0/forget"]
    z = next(gate.z for gate in rnn_gates(model.rnn, x, None, state) if gate.name == "forget")
    values = torch.sigmoid(z.double())
    check(forget, {"n": 105, "z_std": z.std(correction=0).item(), "derivative": (values * (1 - values)).mean().item()})
    assert forget.gate_left == pytest.approx((values < 0.1).double().mean().item())
    assert forget.gate_right == pytest.approx((values > 0.9).double().mean().item())
    assert (forget.gate, forget.units, forget.attenuation) == (True, 7, None)
    assert (snapshot["rnn.l0/cell"].gate, snapshot["rnn.l0/hidden"].gate, snapshot["rnn.l0/cell"].gate_left) == (True, True, None)
    assert one_step(nn.RNN(6, 7), lambda m: m(x)[0])["rnn.l0/hidden"].gate is False
    weights = {weight.name: weight for weight in snapshot.weights}
    first, second = weights["rnn.weight_ih_l0"], weights["rnn.weight_hh_l1"]
    assert first.feeds == tuple(f"rnn.l0/{gate}" for gate in gates)
    assert (first.fan_in, first.data, second.fan_in, second.data) == (6, True, 7, False)
    assert first.input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    assert second.gain == pytest.approx(model.rnn.get_parameter("weight_hh_l1").norm().item() / 28**0.5, rel=1e-5)
    assert second.input_rms is None


class Drop(nn.Module):
    """Drops half of a weight at random, and keeps what it returned last."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        dropped = F.dropout(weight, 0.5, self.training)
        self.last = [dropped.detach()]
        return dropped


class Steps(nn.Module):
    """A recurrent layer or cell that runs over a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.r, self.head = layer, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.r, nn.RNNBase):
            state = self.r(x)[0][-1]
        else:
            state, given = x.new_zeros(x.shape[1], 8), None
            for step in x:
                given = self.r(step, given)
                state = given[0] if isinstance(given, tuple) else given
        out: Tensor = self.head(state)
        return out


def _old_style_drop(layer: nn.Module, name: str) -> nn.Module:
    """Weight drop as fastai does it: a hook puts the dropped weight where the parameter was."""
    raw = layer._parameters.pop(name)
    layer.register_parameter(f"{name}_raw", raw)
    assert raw is not None
    setattr(layer, name, raw.detach().clone())
    layer.register_forward_pre_hook(lambda module, args: setattr(module, name, F.dropout(raw, 0.5, module.training)))
    return layer


COMPUTED: dict[str, Callable[[nn.Module, str], object]] = {
    "spectral": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "drop": lambda layer, name: parametrize.register_parametrization(layer, name, Drop()),
    "orthogonal": parametrizations.orthogonal,
    "old spectral": nn.utils.spectral_norm,
    "old drop": _old_style_drop,
    "pruned": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_weight_that_is_computed_is_not_computed_by_us(kind: str, layer: type[nn.Module]) -> None:
    """Training is the same bit for bit, the random numbers included, and the gates are measured or named."""

    def trained(watched: bool) -> tuple[list[float], list[int]]:
        torch.manual_seed(0)
        model = Steps(layer(6, 8))
        COMPUTED[kind](model.r, "weight_hh" if issubclass(layer, nn.RNNCellBase) else "weight_hh_l0")
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        monitor = torchsat.watch(model, every=1, budget=None) if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 5, 6)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if monitor is not None:
            monitor.close()
            measured = [place for place in monitor.coverage.seen if place.startswith("r")]
            named = [place for place, reason in monitor.coverage.unseen if place == "r" and "computed from others" in reason]
            assert bool(measured) != bool(named)
            assert bool(measured) or issubclass(layer, nn.RNNCellBase)
        return losses, torch.get_rng_state().tolist()

    assert trained(False) == trained(True)


def test_gates_are_those_of_the_weight_that_forward_has_used() -> None:
    drop, x = Drop(), 3 * torch.randn(5, 16, 6)
    model = Steps(nn.LSTM(6, 8))
    lstm = model.r
    parametrize.register_parametrization(lstm, "weight_hh_l0", drop)
    weight_ih, bias = (
        lstm.get_parameter("weight_ih_l0").detach().double(),
        sum(lstm.get_parameter(f"bias_{of}_l0").detach().double() for of in ("ih", "hh")),
    )
    used: list[Tensor] = []
    lstm.register_forward_hook(lambda module, args, output: used.extend(drop.last))
    snapshot = one_step(model, forward=lambda m: m(x))
    h = c = torch.zeros(16, 8, dtype=torch.float64)
    forget = []
    for step in x.double():
        i, f, g, o = (step @ weight_ih.T + h @ used[0].double().T + bias).chunk(4, -1)
        forget.append(f)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    slope = torch.stack(forget).sigmoid()
    check(snapshot["r.l0/forget"], {"n": 640, "derivative": (slope * (1 - slope)).mean().item(), "z_mean": torch.stack(forget).mean().item()})
    # The parameter that the weight is computed from is no layer that feeds a gate.
    assert {weight.whole or weight.name for weight in snapshot.weights} == {"r.weight_ih_l0"}
