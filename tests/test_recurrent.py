"""The gates of recurrent layers and cells are sites, with the layers that feed them."""

import pytest
import torch
from torch import Tensor, nn

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
