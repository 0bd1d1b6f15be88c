"""How the rows of all ranks merge, and that a record names the rank on which a value is worst."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.models import linear_at
from tests.processes import Run, alone, assert_equal, batches, mlp, part, rank, train, watched


def windows() -> Any:
    model = mlp(8)
    with torch.no_grad():
        linear_at(model, 0).bias[:3] = 50.0
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters(), steps=40)
    monitor.close()
    reference = mlp(8)
    with torch.no_grad():
        linear_at(reference, 0).bias[:3] = 50.0
    return kept, alone(reference, steps=40)


def test_stuck_units_are_counted_over_the_samples_of_all_ranks(run: Run) -> None:
    kept, expected = run(windows)[0]
    assert [each["1"].stuck for each in kept] == [each["1"].stuck for each in expected]
    assert [each["1"].stuck_n for each in kept] == [each["1"].stuck_n for each in expected]
    # A step has 64 samples on all ranks together.
    assert kept[2]["1"].stuck is None
    assert [(each["1"].stuck, each["1"].stuck_n) for each in kept[3:16]] == [(3 / 8, 64 * step) for step in range(4, 17)]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 16)
        out: Tensor = self.head(self.lstm(self.attention(x, x, x)[0])[0])
        return out.flatten(0, 1)


def attentive() -> Any:
    wrapped = DistributedDataParallel(Attentive())
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters())
    monitor.close()
    return kept, alone(Attentive())


def test_heads_and_gates_merge_too(run: Run) -> None:
    kept, expected = run(attentive)[0]
    assert {"attention/softmax", "lstm.l0/forget"} <= {each.site for each in kept[0].records}
    assert len(kept[0]["attention/softmax"].heads or ()) == 4
    assert_equal(kept, expected)


def one_bad_rank() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters(), mine=lambda x: part(x) * (100 if rank() == 2 else 1))
    monitor.close()
    return kept, monitor.alerts


def test_an_alert_names_the_rank_where_it_is_worst(run: Run) -> None:
    answers = run(one_bad_rank)
    kept, alerts = answers[0]
    record = kept[0]["1"]
    assert record.worst_rank == 2
    assert record.worst is not None
    assert record.worst > 0.9 > (record.saturated or 0) + 0.1
    (alert,) = [each for each in alerts if each.site == "1"]
    assert alert.rank == 2
    assert "; worst on rank 2: 9" in alert.message
    assert all(other == alerts for _, other in answers)


def not_finite() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, _ = watched(wrapped)
    x = batches(1)[0]
    x[30] = torch.nan
    wrapped(part(x)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    monitor.close()
    return monitor.latest


def test_what_is_not_finite_is_traced_to_its_rank(run: Run) -> None:
    latest = run(not_finite)[0]
    assert latest["1"].nonfinite == 32
    assert latest["1"].nonfinite_rank == 2
    (alert,) = [each for each in latest.alerts if each.site == "1"]
    assert alert.rank == 2
    assert "most of them on rank 2" in alert.message


def sampled() -> Any:
    """Rank 0 has few rows, which are saturated, and the other ranks have many healthy rows."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
    wrapped = DistributedDataParallel(model)
    x = torch.randn(4100, 16)
    x[:100] *= 100
    mine = x[:100] if rank() == 0 else x[100:].chunk(3)[rank() - 1]
    monitor, kept = watched(wrapped, sample=4096)
    wrapped(mine).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    monitor.close()
    whole, exact = watched(model, sample=None, group=None)
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    whole.close()
    return kept, exact


def test_ranks_weigh_by_their_elements_not_by_what_is_read_of_them(run: Run) -> None:
    (found,), (exact,) = run(sampled)[0]
    record, expected = found["1"], exact["1"]
    assert record.elements == expected.elements == expected.n == 4100 * 64
    assert record.n < 4 * 4096 + 4
    # Three standard errors of a share of 2 %, given the 12288 elements that are read of the ranks with many rows.
    assert record.saturated == pytest.approx(expected.saturated, abs=0.005)
    assert record.z_std == pytest.approx(expected.z_std, rel=0.1)
    assert found.weights[0].input_rms == pytest.approx(exact.weights[0].input_rms, rel=0.1)
