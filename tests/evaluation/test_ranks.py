"""Bands and tests of ranks against scipy, brute force and their own promise."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.evaluation.ranks import (
    band,
    chi_square_p_values,
    holm,
    rank_counts,
    ranks_among,
    summed,
    symmetry_p_values,
    uniform_p_values,
)


def uniform(num: int, rows: int, num_draws: int, seed: int = 0) -> Tensor:
    """Rank counts of uniform ranks, ``(rows, L + 1)``."""
    random = np.random.default_rng(seed)
    cells = np.full(num_draws + 1, 1 / (num_draws + 1))
    return torch.from_numpy(random.multinomial(num, cells, size=rows))


def test_ranks_count_the_draws_below() -> None:
    value = torch.tensor([[0.5, 3.0], [2.5, -1.0]])
    draws = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [2.0, 1.0]], [[0.1, 2.0], [3.0, 2.0]]])
    assert ranks_among(value, draws).tolist() == [[2, 3], [2, 0]]


def test_ties_are_broken_evenly() -> None:
    ranks = ranks_among(torch.zeros(6000, 1), torch.zeros(3, 6000, 1))
    counts = rank_counts(ranks, 3)[0]
    assert counts.sum() == 6000
    assert stats.chisquare(counts).pvalue > 0.001
    half = ranks_among(
        torch.zeros(1000, 1), torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1).expand(3, 1000, 1)
    )
    assert set(half.unique().tolist()) == {1, 2}


def test_nan_has_no_rank() -> None:
    with pytest.raises(ValueError, match="must not be NaN"):
        ranks_among(torch.tensor([[float("nan")]]), torch.zeros(3, 1, 1))


def test_counts_and_sums_are_those_of_a_loop() -> None:
    ranks = torch.randint(0, 8, (50, 3))
    counts = rank_counts(ranks, 7)
    for q in range(3):
        column = ranks[:, q]
        assert counts[q].tolist() == [int((column == r).sum()) for r in range(8)]
        assert summed(counts, "ecdf")[q].tolist() == [int((column <= r).sum()) for r in range(7)]
        assert summed(counts, "histogram", 4)[q].tolist() == [int((column // 2 == b).sum()) for b in range(4)]
        central = [int(((column >= a) & (column <= 7 - a)).sum()) for a in range(4)]
        assert summed(counts, "central")[q].tolist() == central


@pytest.mark.parametrize(("sums", "num_bins"), [("ecdf", 1), ("histogram", 10), ("central", 1)])
def test_bands_hold_uniform_ranks_as_a_whole(sums: str, num_bins: int) -> None:
    low, high = band(200, 19, sums, num_bins)  # type: ignore[arg-type]
    found = summed(uniform(200, 4000, 19), sums, num_bins)  # type: ignore[arg-type]
    inside = ((found >= low) & (found <= high)).all(-1).double().mean()
    assert 0.935 < inside < 0.975  # counts are whole: a band is a little wider than its level
    pointwise = ((found >= low) & (found <= high)).double().mean(0)
    assert (pointwise > 0.97).all()


def test_p_values_are_uniform_and_see_departures() -> None:
    p = torch.cat([uniform_p_values(part) for part in uniform(300, 2000, 99, seed=1).split(50)])
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.001
    for level in (0.01, 0.05, 0.2):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=3 * (level / 2000) ** 0.5)
    random = np.random.default_rng(2)
    narrow = stats.norm.cdf(random.normal(size=(50, 300)) * 1.25)
    shifted = stats.norm.cdf(random.normal(size=(50, 300)) + 0.3)
    for u in (narrow, shifted):
        ranks = torch.from_numpy((u * 100).astype(np.int64)).T
        assert (uniform_p_values(rank_counts(ranks, 99)) < 0.05).double().mean() > 0.8


def test_one_departure_among_many_survives_the_correction() -> None:
    counts = uniform(100, 400, 19, seed=7)
    counts[17] = torch.tensor([50, *[0] * 18, 50])
    adjusted = holm(uniform_p_values(counts))
    assert adjusted[17] < 0.01
    assert (adjusted < 0.01).sum() == 1


def test_an_ecdf_inside_the_band_is_one_with_a_p_value_above_its_complement() -> None:
    counts = uniform(300, 2000, 99, seed=3)
    low, high = band(300, 99, "ecdf")
    inside = ((summed(counts, "ecdf") >= low) & (summed(counts, "ecdf") <= high)).all(-1)
    p = torch.cat([uniform_p_values(part) for part in counts.split(50)])
    agree = (inside == (p > 0.05)).double().mean()
    assert agree > 0.99


def test_chi_square_is_scipys() -> None:
    counts = uniform(300, 5, 99, seed=4)
    expected = [stats.chisquare(row.reshape(20, 5).sum(-1)).pvalue for row in counts.numpy()]
    assert chi_square_p_values(counts, 20).tolist() == pytest.approx(expected)


def test_symmetry_is_blind_to_width_and_sees_a_shift() -> None:
    p = symmetry_p_values(uniform(300, 150, 99, seed=5), seed=0)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.001
    random = np.random.default_rng(6)

    def tested(z: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
        ranks = torch.from_numpy((stats.norm.cdf(z) * 100).astype(np.int64))
        return symmetry_p_values(rank_counts(ranks, 99), seed=0)

    narrow = tested(2 * random.normal(size=(300, 60)))
    assert float((narrow < 0.05).double().mean()) < 0.15
    assert (tested(random.normal(size=(300, 20)) + 0.3) < 0.05).double().mean() > 0.9


def test_an_odd_number_of_ranks_has_one_in_the_middle() -> None:
    # L = 2: the middle rank is its own mirror image and says nothing.
    counts = torch.tensor([[0, 100, 0], [30, 0, 0]])
    p = symmetry_p_values(counts, seed=0)
    assert p[0] == 1
    assert p[1] < 0.01


def test_holm_is_the_step_down_procedure() -> None:
    p = torch.tensor([0.01, 0.04, 0.03, 0.005])
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(torch.tensor([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(torch.tensor([0.3])).tolist() == pytest.approx([0.3])
