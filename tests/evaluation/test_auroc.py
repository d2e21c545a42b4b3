"""The area under the ROC curve: scikit-learn's, with intervals that cover."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import auc as sklearn_auc
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from torch import Tensor

from pvae.evaluation import auroc, auroc_interval, roc_curve


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("digits", [12, 0])
@pytest.mark.parametrize(("n", "m"), [(40, 70), (1, 1), (200, 3)])
def test_it_is_scikit_learns_with_and_without_ties(n: int, m: int, digits: int) -> None:
    inside, outside = draws(n).round(decimals=digits), (draws(m, 1) + 0.7).round(decimals=digits)
    label = np.repeat([0, 1], [n, m])
    scores = torch.cat([inside, outside]).numpy()
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(label, scores), abs=1e-14)
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside), abs=1e-14)
    false, true = roc_curve(inside, outside)
    assert sklearn_auc(false, true) == pytest.approx(auroc(inside, outside), abs=1e-14)
    theirs = sklearn_roc_curve(label, scores, drop_intermediate=False)
    np.testing.assert_allclose(false, theirs[0], atol=1e-14)
    np.testing.assert_allclose(true, theirs[1], atol=1e-14)


def test_scores_may_be_infinite_and_of_any_type() -> None:
    inside = torch.tensor([-math.inf, 0.0, 1.0])
    assert auroc(inside, torch.tensor([math.inf, math.inf])) == 1
    assert auroc(inside, inside) == 0.5
    assert auroc(torch.tensor([0, 1]), torch.tensor([1, 2])) == pytest.approx(7 / 8)


def test_intervals_cover_the_area_of_two_normals() -> None:
    truth = scipy.stats.norm.cdf(1 / math.sqrt(2))
    covered = 0
    for repeat in range(120):
        inside, outside = draws(60, 2 * repeat), draws(40, 2 * repeat + 1) + 1
        found = auroc_interval(inside, outside, num_bootstrap=200, level=0.9, seed=repeat)
        assert found.value == auroc(inside, outside)
        covered += found.low < truth < found.high
    assert abs(covered / 120 - 0.9) < 0.09  # three binomial standard errors


def test_ends_are_percentiles_of_resamples_of_each_sample_by_itself() -> None:
    inside, outside = draws(30), draws(20, 1) + 0.5
    found = auroc_interval(inside, outside, num_bootstrap=2000, seed=3)
    generator = np.random.default_rng(0)
    a, b = inside.numpy(), outside.numpy()
    values = [(generator.choice(b, 20)[:, None] > generator.choice(a, 30)).mean() for _ in range(4000)]
    assert found.low == pytest.approx(np.quantile(values, 0.025), abs=0.012)
    assert found.high == pytest.approx(np.quantile(values, 0.975), abs=0.012)


def test_separated_samples_have_no_interval_to_speak_of() -> None:
    found = auroc_interval(draws(50).clamp(-1, 1), draws(50, 1).clamp(-1, 1) + 5, num_bootstrap=50)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert math.isnan(auroc_interval(draws(5), draws(5), num_bootstrap=0).low)


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside must have shape \(N,\) with N at least 1, got \(0,\)"):
        auroc(draws(5), draws(0))
    with pytest.raises(ValueError, match=r"inside must have shape \(N,\)"):
        roc_curve(draws(4).reshape(2, 2), draws(5))
    with pytest.raises(ValueError, match="inside must not be NaN, got 1 such scores"):
        auroc(torch.tensor([1.0, math.nan]), draws(5))
    with pytest.raises(ValueError, match="num_bootstrap must not be negative"):
        auroc_interval(draws(5), draws(5), num_bootstrap=-1)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        auroc_interval(draws(5), draws(5), level=1.0)
