"""Which units are stuck, compared with what the units were made to do."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_rows import row
from torchsat.rows import to_record
from torchsat.transport.windows import DORMANT_SCORE, LEAST_SAMPLES, UNIT_SAMPLES, UnitWindows


def block(samples: Sequence[float], saturated: Sequence[float], weight: float = 1.0) -> NDArray[np.float64]:
    """columns.BLOCK of one observation. `weight`: how many elements each sample stands for."""
    counts = np.array([samples, saturated, samples, samples], np.float64)
    return counts * [[weight], [weight], [1.0], [weight]]


def stuck(*phases: tuple[int, Sequence[float]], samples: int = 64) -> list[tuple[float | None, int | None]]:
    """(stuck, stuck_n) after each observation.

    Args:
        phases: for each, a number of observations, and the probability of each unit that a sample is saturated.
        samples: of each unit in one observation.
    """
    draw, windows, found = np.random.default_rng(0), UnitWindows(), []
    for observations, probabilities in phases:
        for _ in range(observations):
            saturated = draw.binomial(samples, np.array(probabilities))
            units = windows.add("act", block([samples] * len(probabilities), saturated.tolist()))
            record, _ = to_record(row(n=1.0, units=units), 1.0, None)
            found.append((record.stuck, record.stuck_n))
    return found


ALIVE, DEAD = [0.5] * 128, [1.0] * 70 + [0.5] * 58
SHARE = 70 / 128


def test_units_that_die_are_known_at_the_next_observation() -> None:
    found = stuck((3, ALIVE), (20, DEAD))
    assert found[:3] == [(0.0, 64), (0.0, 128), (0.0, 192)]
    assert found[3:] == [(SHARE, min(64 * (k + 1), UNIT_SAMPLES + 64)) for k in range(20)]


@pytest.mark.parametrize("samples", [4, 8, 16, 32])
def test_with_fewer_samples_the_share_is_unknown_until_it_is_right(samples: int) -> None:
    before, after = 200 // samples, 400 // samples
    values = [share for share, _ in stuck((before, ALIVE), (after, DEAD), samples=samples)][before:]
    wrong = [share for share in values if share is not None and abs(share - SHARE) > 0.03]
    # Half of the samples of a unit were active before: a run of a few samples is nothing unusual yet.
    assert wrong == [0.0] * len(wrong)
    assert len(wrong) <= 10 / samples
    assert values[-(-LEAST_SAMPLES // samples) :] == [SHARE] * (after - -(-LEAST_SAMPLES // samples))


def test_units_that_were_dead_from_the_start_are_known_after_200_samples() -> None:
    assert [share for share, _ in stuck((8, DEAD))] == [None] * 3 + [SHARE] * 5
    assert stuck((1, DEAD), samples=1000) == [(SHARE, 1000)]


@pytest.mark.parametrize("samples", [8, 64, 1000])
@pytest.mark.parametrize("lives", [0.0, 0.5, 0.8])
def test_units_that_revive_are_alive_at_once_however_long_they_were_dead(samples: int, lives: float) -> None:
    observations = 3000 // samples + 1
    values = [share for share, _ in stuck((observations, DEAD), (max(3, 128 // samples), [lives] * 128), samples=samples)]
    assert values[observations - 1] == SHARE
    assert values[-1] == pytest.approx(0.0, abs=0.05)


def test_units_that_die_and_revive_again_and_again_are_followed() -> None:
    found = stuck(*((5, phase) for phase in (ALIVE, DEAD, ALIVE, DEAD, ALIVE)))
    assert [share for share, _ in found] == [*[0.0] * 5, *[SHARE] * 5, *[0.0] * 5, *[SHARE] * 5, *[0.0] * 5]


@pytest.mark.parametrize("saturated", [0.0, 0.5, 0.9, 0.95])
def test_sparse_units_are_never_taken_for_stuck(saturated: float) -> None:
    values = [share for share, _ in stuck((200, [saturated] * 500))]
    known = [share for share in values if share is not None]
    assert len(known) > 195
    assert max(known) <= 0.004


def test_nearly_dead_units_are_stuck_where_99_percent_are_saturated() -> None:
    assert stuck((60, [0.997] * 200))[-1][0] == pytest.approx(1.0, abs=0.02)
    assert stuck((60, [0.97] * 200))[-1][0] == pytest.approx(0.0, abs=0.02)


def test_units_that_are_seldom_seen_keep_what_is_known_of_them() -> None:
    windows = UnitWindows()
    both, first = block([500, 500], [500, 250]), block([500, 0], [500, 0])
    assert windows.add("experts", both) == [2, 2, 1, 0, 500]
    assert windows.add("experts", first) == [2, 2, 1, 0, 1000]
    assert windows.add("experts", both[:, ::-1]) == [2, 2, 1, 0, 500]


def test_what_counts_are_the_samples_that_were_read_however_many_elements_they_stand_for() -> None:
    windows, weighed = UnitWindows(), UnitWindows()
    for saturated in ([100, 100, 50], [100, 99, 0], [100, 100, 100]):
        plain = windows.add("act", block([100] * 3, saturated))
        assert weighed.add("act", block([100] * 3, saturated, weight=1 / 3e5)) == plain


def test_what_is_kept_does_not_grow() -> None:
    windows = UnitWindows()
    for _ in range(50):
        windows.add("act", block([4000] * 3, [4000, 3990, 2000]))
    state = windows.get("act")
    assert state is not None
    assert state.shape == (4, 3)
    assert state[[0, 2]].max() <= UNIT_SAMPLES + 4000


def test_the_share_of_a_unit_is_weighed_by_its_calls_and_its_samples_are_those_read() -> None:
    windows = UnitWindows()
    # 500 samples were read, which stand for 2000; of these 1990 and 1900 are saturated.
    assert windows.add("act", np.array([[2000.0, 2000.0], [1990.0, 1900.0], [500.0, 500.0], [1.0, 1.0]])) == [2, 2, 1, 0, 500]


def test_a_unit_is_dormant_whose_mean_size_is_a_fortieth_of_that_of_its_layer() -> None:
    windows, counts = UnitWindows(), np.full(4, 400.0)
    assert windows.dormant("act") is None
    for score, expected in ((DORMANT_SCORE, 0.5), (1.001 * DORMANT_SCORE, 0.25)):
        # The mean over the units is 1, so that the sizes are the scores.
        sizes = np.array([2.0, score, 0.0, 2.0 - score])
        windows.add("act", np.stack([counts, 0 * counts, counts, sizes * counts]))
        assert windows.dormant("act") == expected


def test_the_dormant_share_waits_for_200_samples_of_each_unit_and_keeps_its_value_until_the_next_200() -> None:
    windows, found = UnitWindows(), []
    for quiet in (0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0):
        counts = np.array([64.0, 64.0])
        windows.add("act", np.stack([10 * counts, 0 * counts, counts, 10 * counts * [quiet, 2.0]]))
        found.append(windows.dormant("act"))
    assert found == [None, None, None, 0.5, 0.5, 0.5, 0.5]
    windows.add("act", np.stack([counts, 0 * counts, counts, counts * [5.0, 2.0]]))
    assert windows.dormant("act") == 0.0
    windows.add("act", np.zeros((4, 3)))
    assert windows.dormant("act") is None


def test_all_units_of_a_layer_without_any_activation_are_dormant() -> None:
    windows, counts = UnitWindows(), np.full(8, 500.0)
    windows.add("act", np.stack([counts, counts, counts, 0 * counts]))
    assert windows.dormant("act") == 1.0
