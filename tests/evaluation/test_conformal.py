"""Conformal p-values keep their promise exactly: every arrangement of a multiset of scores is looked at."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import benjamini_hochberg, conformal_p_values, conformal_test

MULTISETS = [
    [1, 2, 3, 4, 5, 6],
    [1, 1, 1, 1, 1],
    [0, 0, 1, 1, 2, 2],
    [3, 1, 1, 1, 9],
    [-1, 0],
    [2, 2, 2, 5, 5, 7, 8],
]


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scores", MULTISETS, ids=str)
def test_p_values_of_exchangeable_scores_are_super_uniform(scores: list[int]) -> None:
    # Exchangeable: given the multiset, each of its entries is the new one equally often.
    n = len(scores) - 1
    found = []
    for new in range(n + 1):
        calibration = torch.tensor([score for i, score in enumerate(scores) if i != new])
        found.append(float(conformal_p_values(calibration, torch.tensor(scores[new : new + 1]))))
    for k in range(1, n + 2):
        alpha = k / (n + 1)
        assert Fraction(sum(p <= alpha for p in found), n + 1) <= Fraction(k, n + 1)
    if len(set(scores)) == n + 1:
        assert sorted(found) == [k / (n + 1) for k in range(1, n + 2)]  # exactly uniform


def test_it_is_the_definition() -> None:
    calibration, scores = draws(37).round(decimals=1), draws(50, 1).round(decimals=1)
    found = conformal_p_values(calibration, scores)
    for p, s in zip(found.tolist(), scores.tolist(), strict=True):
        assert p == (1 + sum(c >= s for c in calibration.tolist())) / 38
    assert conformal_p_values(torch.tensor([1.0]), torch.tensor([math.inf, -math.inf])).tolist() == [0.5, 1]


@pytest.mark.parametrize("level", [0.05, 0.2, 0.5])
def test_discoveries_are_scipys(level: float) -> None:
    for seed in range(20):
        p = scipy.stats.norm.sf(draws(40, seed).numpy() + 2 * (np.arange(40) < 10)).round(2)
        expected = scipy.stats.false_discovery_control(p) <= level + 1e-12
        assert benjamini_hochberg(torch.from_numpy(p), level).tolist() == expected.tolist()
    assert not benjamini_hochberg(torch.ones(5), level).any()
    assert benjamini_hochberg(torch.zeros(5), level).all()
    assert benjamini_hochberg(torch.ones(0), level).shape == (0,)


def test_the_false_discovery_rate_is_kept_with_one_calibration_set_for_all() -> None:
    shares = []
    for seed in range(200):
        inside, outside = draws(60, 3 * seed + 1), draws(20, 3 * seed + 2) + 3
        found = conformal_test(draws(200, 3 * seed), inside, outside, fdr=0.2)
        assert found.discoveries >= found.false_discoveries
        shares.append(found.false_discovery_proportion)
    mean, error = float(np.mean(shares)), float(np.std(shares)) / math.sqrt(200)
    assert mean < 0.2 * 60 / 80 + 3 * error
    assert mean > 0.05  # it does discover


def test_rates_have_the_binomial_interval_of_scipy() -> None:
    found = conformal_test(draws(400), draws(300, 1), draws(100, 2) + 2)
    assert [level.alpha for level in found.levels] == [0.01, 0.05, 0.1]
    for level in found.levels:
        for rate, p in ((level.false_alarms, found.p_inside), (level.detections, found.p_outside)):
            count = int((p <= level.alpha).sum())
            theirs = scipy.stats.binomtest(count, len(p)).proportion_ci(method="exact")
            assert rate.value == count / len(p)
            assert (rate.low, rate.high) == pytest.approx((theirs.low, theirs.high))
        assert level.holds
    none = conformal_test(draws(400), draws(50) - 100, draws(50) + 100).levels[0]
    assert (none.false_alarms.low, none.detections.high) == (0, 1)
    assert none.p_value == 1


def test_the_chance_of_false_alarms_is_that_of_all_arrangements() -> None:
    # Ranks of 4 calibration data and 3 others: all ways to choose which are which are equally likely.
    alpha, counts = 0.4, []
    for chosen in itertools.combinations(range(7), 4):
        calibration = torch.tensor(chosen).double()
        inside = torch.tensor([i for i in range(7) if i not in chosen]).double()
        counts.append(int((conformal_p_values(calibration, inside) <= alpha).sum()))
    for alarms in range(4):
        chance = sum(count >= alarms for count in counts) / len(counts)
        inside = torch.tensor([10.0] * alarms + [-10.0] * (3 - alarms))
        found = conformal_test(torch.arange(4), inside, inside, levels=[alpha]).levels[0]
        assert found.p_value == pytest.approx(chance, abs=1e-12)


def test_false_alarms_stay_at_their_level_and_a_shift_is_noticed() -> None:
    rates = []
    for seed in range(200):
        found = conformal_test(draws(99, 2 * seed), draws(50, 2 * seed + 1), draws(1), levels=[0.1])
        rates.append(found.levels[0].false_alarms.value)
        assert seed > 20 or found.levels[0].p_value > 1e-4
    assert np.mean(rates) == pytest.approx(0.1, abs=3 * float(np.std(rates)) / math.sqrt(200))
    shifted = conformal_test(draws(400), draws(400, 1) + 0.6, draws(5))
    assert not shifted.levels[1].holds
    assert "too many false alarms" in str(shifted)


def test_levels_below_the_smallest_p_value_detect_nothing() -> None:
    found = conformal_test(draws(50), draws(50, 1), draws(50) + 100, levels=[0.01, 0.1])
    assert found.levels[0].detections.value == 0
    assert found.levels[1].detections.value == 1
    assert float(found.p_outside.min()) == 1 / 51


def test_what_it_says() -> None:
    found = conformal_test(draws(50), draws(60, 1), draws(70) + 5, fdr=0.1)
    record = json.loads(json.dumps(found.to_dict()))
    assert (record["num_calibration"], record["num_inside"], record["num_outside"]) == (50, 60, 70)
    assert record["levels"][2]["detections"]["value"] > 0.9
    assert record["benjamini_hochberg"]["discoveries"] == found.discoveries
    assert "alpha 0.05: " in str(found)
    assert "discoveries" in str(found)
    assert "benjamini_hochberg" not in conformal_test(draws(5), draws(5), draws(5)).to_dict()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration must hold at least one score"):
        conformal_p_values(draws(0), draws(5))
    with pytest.raises(ValueError, match=r"scores must have shape \(N,\), got \(\)"):
        conformal_p_values(draws(5), torch.tensor(1.0))
    with pytest.raises(ValueError, match="calibration must not be NaN, got 1 such entries"):
        conformal_p_values(torch.tensor([math.nan, 1.0]), draws(5))
    with pytest.raises(ValueError, match="outside must hold at least one score"):
        conformal_test(draws(5), draws(5), draws(0))
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="a level must lie between 0 and 1"):
            conformal_test(draws(5), draws(5), draws(5), levels=[level])
        with pytest.raises(ValueError, match="a level must lie between 0 and 1"):
            benjamini_hochberg(torch.ones(3), level)
    with pytest.raises(ValueError, match="p_values must lie between 0 and 1"):
        benjamini_hochberg(torch.tensor([0.5, 1.5]), 0.1)
