"""Frechet distances against SciPy's matrix root, and where that fails; neighbours by loops."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import torch
from torch import Tensor

from pvae.evaluation import frechet_distance, frechet_interval, mean_pairwise_distance, nearest_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_equals_the_usual_formula() -> None:
    a, b = normal(300, 20) @ normal(20, 20, seed=2), 0.5 + normal(200, 20, seed=1)
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(first @ second).real
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    usual = gap + np.trace(first) + np.trace(second) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(usual, rel=1e-9)


def test_features_that_do_not_span_their_space_are_exact() -> None:
    # In orthogonal planes the covariances have no common direction, so that their product is zero.
    flat = torch.zeros(50, 6, dtype=torch.float64)
    a, b = flat.clone(), flat.clone()
    a[:, :2], b[:, 3:5] = normal(50, 2), normal(50, 2, seed=1)
    traces = (a.var(0).sum() + b.var(0).sum() + (a.mean(0) - b.mean(0)).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(traces, rel=1e-12)
    # Fewer points than features, rotated: the distance is that in the points' own plane.
    rotation = torch.linalg.qr(normal(64, 64, seed=5)).Q
    small, other = normal(10, 3), 2 * normal(9, 3, seed=1) + 1
    wide, wider = (torch.nn.functional.pad(z, (0, 61)) @ rotation for z in (small, other))
    assert frechet_distance(wide, wider) == pytest.approx(frechet_distance(small, other), rel=1e-12)
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-12)


def test_a_sample_is_farther_from_its_source_the_fewer_its_points() -> None:
    whole = normal(5000, 8)
    values = [
        np.mean([frechet_distance(normal(n, 8, seed=10 + i), whole) for i in range(10)])
        for n in (40, 160, 640)
    ]
    assert values[0] > 2 * values[1] > 4 * values[2] > 0


def test_the_interval_has_the_spread_of_new_samples() -> None:
    b = normal(500, 4, seed=1)
    interval = frechet_interval(normal(500, 4) + 0.5, b, num_bootstrap=100)
    fresh = [
        frechet_distance(normal(500, 4, seed=100 + i) + 0.5, normal(500, 4, seed=200 + i)) for i in range(60)
    ]
    assert interval.value == frechet_distance(normal(500, 4) + 0.5, b)
    assert interval.low < interval.value < interval.high
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(float(np.std(fresh)), rel=0.35)
    assert frechet_interval(b, b, num_bootstrap=20).low == 0
    assert math.isnan(frechet_interval(b, b, num_bootstrap=0).high)


def test_nearest_neighbours_are_the_nearest() -> None:
    a, b = normal(1100, 3), normal(37, 3, seed=1)
    expected = scipy.spatial.distance.cdist(a.numpy(), b.numpy()).min(-1)
    np.testing.assert_allclose(nearest_distance(a, b).numpy(), expected, rtol=1e-12)
    # A copy far from the origin is at distance zero, not at the rounding of two large squares.
    assert nearest_distance(1e6 + a[:5], 1e6 + a).abs().max() == 0


def test_pairwise_distances_are_those_of_different_rows() -> None:
    a = normal(30, 3)
    expected = scipy.spatial.distance.pdist(a.numpy()).mean()
    assert mean_pairwise_distance(a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("attributes", [False, True])
def test_pairwise_distances_within_labels(attributes: bool) -> None:
    a = normal(30, 3)
    y = torch.arange(30) % 4
    y[0] = 9  # a label of its own makes no pair
    pairs = [float((a[i] - a[j]).norm()) for i in range(30) for j in range(i) if int(y[i]) == int(y[j])]
    labels = torch.stack([y % 2, y // 2], -1).float() if attributes else y
    assert mean_pairwise_distance(a, labels) == pytest.approx(float(np.mean(pairs)), rel=1e-12)
    assert math.isnan(mean_pairwise_distance(a, torch.arange(30)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "a must have shape"),
        (lambda: nearest_distance(torch.zeros(1, 2), torch.zeros(3, 4)), r"got \(1, 2\) and \(3, 4\)"),
        (
            lambda: nearest_distance(torch.zeros(1, 2), torch.zeros(0, 2)),
            "reference must have at least one row",
        ),
        (lambda: mean_pairwise_distance(torch.zeros(1, 2)), r"features must have shape \(N, F\)"),
        (
            lambda: mean_pairwise_distance(torch.zeros(3, 2), torch.zeros(2)),
            "y must have one row for each of the 3",
        ),
    ],
)
def test_bad_features_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
