"""The effective rank of features, compared with the singular values of the same features."""

import math

import pytest
import torch
from torch import Tensor, nn

import torchsat
from torchsat.gram import FEATURES, SAMPLES, gram
from torchsat.spectrum import Spectrum, spectrum


def ranks(features: Tensor) -> tuple[float, int]:
    """The effective rank and srank, by their definitions, of [samples, features]."""
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum()
    srank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= 0.99 * values.sum())
    return math.exp(-float(torch.special.xlogy(shares, shares).sum())), srank


def of_features(features: Tensor, seed: int = 0) -> Spectrum:
    found = spectrum(gram(features, 1, seed)[0].tolist())
    assert found is not None
    return found


@pytest.mark.parametrize(("samples", "width", "rank"), [(200, 32, 32), (200, 32, 5), (20, 64, 64), (300, 1, 1)])
def test_both_ranks_are_those_of_the_singular_values(samples: int, width: int, rank: int) -> None:
    features = torch.randn(samples, rank) @ torch.randn(rank, width)
    effective, srank = ranks(features)
    found = of_features(features, 3)
    assert (found.srank, found.limit) == (srank, min(samples, width))
    assert found.effective_rank == pytest.approx(effective, rel=1e-5)
    assert found.effective_rank <= rank + 1e-3


def test_ranks_that_are_known_by_hand() -> None:
    def of(*values: float) -> tuple[float, int, int]:
        found = of_features(torch.diag(torch.tensor(values)))
        return round(found.effective_rank, 4), found.srank, found.limit

    assert of(2.0, 2.0, 2.0, 2.0) == (4.0, 4, 4)
    assert of(3.0, 0.0, 0.0, 0.0) == (1.0, 1, 4)
    assert of(0.0, 0.0, 0.0) == (0.0, 0, 3)
    # 0.9 ln 0.9 + 0.1 ln 0.1 = -0.32508; 99 % of the sum takes both.
    assert of(9.0, 1.0) == (round(math.exp(0.325083), 4), 2, 2)
    # 0.995 of the sum is in the first one.
    assert of(199.0, 1.0) == (round(math.exp(0.031479), 4), 1, 2)


@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 9), 2), ((6, 9, 5), 1), ((3, 9, 4, 5), 1), ((40, 9), 1)])
def test_the_features_lie_along_the_axis_of_the_units(shape: tuple[int, ...], axis: int) -> None:
    a = torch.randn(shape)
    features = a.movedim(axis, -1).reshape(-1, 9)
    for each in (a, a.transpose(0, -1).contiguous().transpose(0, -1)):
        assert torch.allclose(gram(each, axis, 1).view(10, 10)[:9, :9], features.double().T @ features.double(), rtol=1e-12)


def test_of_many_samples_and_features_some_are_read_and_the_features_are_the_same_in_every_call() -> None:
    a = torch.arange(300.0).repeat(2000, 1)
    (one, other) = (gram(a, 1, seed).view(FEATURES + 1, FEATURES + 1) for seed in (1, 2))
    assert torch.equal(one, other)
    assert one[-1, -1] == SAMPLES
    assert (one[-1, :-1] / SAMPLES).tolist() == [300 * k // FEATURES for k in range(FEATURES)]


def test_samples_that_are_not_finite_are_left_out() -> None:
    a = torch.randn(50, 4)
    a[7, 2], a[9, 0] = math.nan, math.inf
    kept = a[torch.isfinite(a).all(1)]
    found = spectrum(gram(a, 1, 0)[0].tolist())
    assert found is not None
    assert found.effective_rank == pytest.approx(ranks(kept)[0])
    assert spectrum(gram(torch.full((3, 4), math.nan), 1, 0)[0].tolist()) is None


def test_a_record_has_the_rank_of_all_micro_batches_together() -> None:
    model, batches = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1)), torch.randn(3, 6, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, extras="rank", errors="raise") as monitor:
        for batch in batches:
            model(batch).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    record = monitor.latest["1"]
    effective, srank = ranks(model[:2](batches.reshape(18, 8)).detach())
    assert record.rank_limit == 12
    assert record.effective_rank == pytest.approx(effective / 12, rel=1e-5)
    assert record.srank == srank / 12


def test_without_extras_no_rank_is_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, errors="raise") as monitor:
        model(torch.randn(16, 8)).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    assert all(record.effective_rank is record.srank is record.rank_limit is None for record in monitor.latest)


def test_two_towers_with_one_direction_have_a_low_rank_and_written_files_tell_it(tmp_path: object) -> None:
    layer = nn.Linear(8, 16)
    model = nn.Sequential(layer, nn.Tanh())
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.randn(16), torch.randn(8)) / 8)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, str(tmp_path), extras=("rank",), errors="raise") as monitor:
        model(torch.randn(64, 8)).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    read = torchsat.read(str(tmp_path))[-1]["1"]
    assert read.rank_limit == monitor.latest["1"].rank_limit == 16
    assert read.effective_rank == monitor.latest["1"].effective_rank
    assert read.effective_rank is not None
    assert read.effective_rank < 0.2
