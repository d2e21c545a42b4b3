"""Classifier tests: at chance without a difference, at Bayes' rate with one, at the level they promise."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import C2ST, classifier_test, classifier_two_sample


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_classifier_is_at_chance_without_a_difference() -> None:
    test = classifier_two_sample(normal(500, 3), normal(500, 3, seed=1))
    assert abs(test.accuracy - 0.5) < 0.07
    assert test.num_points == 1000


def test_a_classifier_finds_what_can_be_found() -> None:
    a, b = normal(800, 2), normal(800, 2, seed=1)
    # Two unit normals, 2 apart: the best rule is right with probability Phi(1).
    shifted = classifier_two_sample(a, b + torch.tensor([2.0, 0.0]))
    assert shifted.accuracy == pytest.approx(scipy.stats.norm.cdf(1), abs=4 * shifted.standard_error)
    # No moment of single coordinates differs here, only their correlation.
    twisted = torch.stack([b[:, 0], 0.95 * b[:, 0] + math.sqrt(1 - 0.95**2) * b[:, 1]], -1)
    assert classifier_two_sample(a, twisted).accuracy > 0.7
    assert classifier_two_sample(1e5 + a, 1e5 + b + 50).accuracy == 1.0


def test_a_larger_sample_is_cut_to_the_smaller() -> None:
    test = classifier_two_sample(normal(900, 2), normal(100, 2, seed=1))
    assert test.num_points == 200
    assert abs(test.accuracy - 0.5) < 0.15  # 0.9 for whoever guesses the larger


def test_the_standard_error_is_binomial() -> None:
    assert C2ST(0.6, 400).standard_error == pytest.approx(scipy.stats.binom(400, 0.6).std() / 400)


def test_a_test_judges_the_half_it_has_not_seen() -> None:
    test = classifier_test(normal(500, 3), normal(300, 3, seed=1), classifier="logistic")
    assert (test.num_points, test.crossed) == (300, False)
    right = round(test.accuracy * 300)
    exact = scipy.stats.binomtest(right, 300, alternative="greater")
    assert test.p_value == pytest.approx(exact.pvalue, rel=1e-10)
    ends = scipy.stats.binomtest(right, 300).proportion_ci(method="exact")
    assert (test.interval.low, test.interval.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    assert f"p = {test.p_value:.2g}" in str(test)


def test_p_values_keep_their_level_where_those_of_crossed_points_would_not() -> None:
    p, held, crossed = [], [], []
    for i in range(150):
        a, b = normal(60, 2, seed=2 * i), normal(60, 2, seed=2 * i + 1)
        test = classifier_test(a, b, seed=i, classifier="logistic")
        both = classifier_two_sample(a, b, seed=i, folds=2, classifier="logistic")
        p.append(test.p_value)
        held.append((test.accuracy - 0.5) * 2 * 60**0.5)
        crossed.append((both.accuracy - 0.5) * 2 * 120**0.5)
    # Discrete, so that P(p <= t) is below t.
    for level in (0.05, 0.2, 0.5):
        assert scipy.stats.binom.sf((np.array(p) <= level).sum() - 1, 150, level) > 1e-3
    assert scipy.stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3
    assert np.mean(p) < 0.65
    # In units of what a binomial count varies by: 2 / pi more, as both halves err alike.
    assert np.var(held) < 1.35
    assert np.var(crossed) > 1.35
    assert math.isnan(both.p_value)


def test_a_shift_is_found_and_a_twist_only_by_the_network() -> None:
    a, b = normal(800, 2), normal(800, 2, seed=1)
    shifted = classifier_test(a, b + torch.tensor([2.0, 0.0]), classifier="logistic")
    assert shifted.accuracy == pytest.approx(scipy.stats.norm.cdf(1), abs=4 * shifted.standard_error)
    assert shifted.p_value < 1e-20
    twisted = torch.stack([b[:, 0], 0.95 * b[:, 0] + math.sqrt(1 - 0.95**2) * b[:, 1]], -1)
    assert classifier_test(a, twisted).p_value < 1e-10
    assert classifier_test(a, twisted, classifier="logistic").p_value > 1e-3


def test_classifiers_follow_their_seed_and_no_other() -> None:
    a, b = normal(60, 2), normal(60, 2, seed=1)
    np.random.seed(0)  # noqa: NPY002
    state: Any = np.random.get_state()  # noqa: NPY002
    first = classifier_two_sample(a, b, seed=1), classifier_test(a, b, seed=1)
    torch.randn(3)
    assert (classifier_two_sample(a, b, seed=1), classifier_test(a, b, seed=1)) == first
    after: Any = np.random.get_state()  # noqa: NPY002
    assert after[1].tolist() == state[1].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classifier_two_sample(torch.zeros(4, 2), torch.zeros(9, 2)), "N at least 5"),
        (lambda: classifier_two_sample(torch.zeros(9, 2), torch.zeros(9, 2), folds=1), "folds must be"),
        (
            lambda: classifier_test(torch.zeros(9, 2), torch.zeros(9, 2), classifier="tree"),  # type: ignore[arg-type]
            "classifier must be one of mlp, logistic, got 'tree'",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
