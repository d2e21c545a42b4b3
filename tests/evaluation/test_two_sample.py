"""Two-sample statistics against the sums written out, SciPy and closed forms; their errors against chance."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import (
    gaussian_w2,
    mmd2,
    mmd_interval,
    mmd_permutation,
)
from pvae.evaluation.two_sample import Kernel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(a: Tensor, b: Tensor, scales: tuple[float, ...]) -> float:
    """The unbiased MMD by loops over pairs of points."""
    points = [*a.tolist(), *b.tolist()]

    def square(s: list[float], t: list[float]) -> float:
        return sum((u - v) ** 2 for u, v in zip(s, t, strict=True))

    pairs = [square(s, t) for i, s in enumerate(points) for t in points[:i]]
    width = sorted(pairs)[(len(pairs) - 1) // 2]

    def kernel(s: list[float], t: list[float]) -> float:
        return sum(math.exp(-square(s, t) / (2 * c * width)) for c in scales) / len(scales)

    first, second = a.tolist(), b.tolist()
    total = 0.0
    for sample in (first, second):
        size = len(sample)
        for i in range(size):
            for j in range(size):
                if i != j:
                    total += kernel(sample[i], sample[j]) / (size * (size - 1))
    for s in first:
        for t in second:
            total -= 2 * kernel(s, t) / (len(first) * len(second))
    return total


@pytest.mark.parametrize(("n", "m"), [(2, 2), (7, 5), (12, 20)])
def test_mmd_is_the_sum_over_pairs(n: int, m: int) -> None:
    a, b = normal(n, 3), 0.3 + 2 * normal(m, 3, seed=1)
    assert mmd2(a, b) == pytest.approx(written_out(a, b, (0.25, 0.5, 1, 2, 4)), abs=1e-12)
    assert mmd2(a, b, scales=(1.5,)) == pytest.approx(written_out(a, b, (1.5,)), abs=1e-12)
    assert mmd2(b, a) == pytest.approx(mmd2(a, b), abs=1e-12)


def test_mmd_has_mean_zero_without_a_difference_and_grows_with_one() -> None:
    # The biased estimate, which keeps the pairs of a point with itself, is positive every time.
    values = torch.tensor(
        [mmd2(normal(30, 2, seed=2 * i), normal(30, 2, seed=2 * i + 1)) for i in range(300)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(300)
    assert 0.2 < float((values < 0).double().mean()) < 0.8
    a, b = normal(400, 2), normal(400, 2, seed=1)
    assert mmd2(a, b + 0.5) > mmd2(a, b + 0.25) > mmd2(a, b) + 1e-3


def test_mmd_of_two_normals_is_the_closed_form() -> None:
    a, b = normal(900, 3), 0.7 + 1.4 * normal(800, 3, seed=1)
    points = torch.cat([a, b])
    width = float(torch.pdist(points).square().median())

    def kernel(shift: float, variance: float) -> float:
        """E exp(-|s - t|^2 / (2 h)) for s - t of N(shift, variance I)."""
        wide = width + variance
        return float((width / wide) ** 1.5 * math.exp(-3 * shift**2 / (2 * wide)))

    exact = kernel(0, 2) + kernel(0, 2 * 1.96) - 2 * kernel(0.7, 1 + 1.96)
    interval = mmd_interval(a, b, scales=(1.0,))
    assert interval.low < exact < interval.high
    assert interval.value == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("kernel", ["laplace", "imq"])
def test_other_kernels_are_what_they_are_said_to_be(kernel: Kernel) -> None:
    a, b = normal(7, 2), 1 + normal(6, 2, seed=1)
    points = torch.cat([a, b]).numpy()
    square = scipy.spatial.distance.cdist(points, points, "sqeuclidean")
    width = np.sort(scipy.spatial.distance.pdist(points, "sqeuclidean"))[(13 * 12 // 2 - 1) // 2]
    gram = np.exp(-np.sqrt(square / width)) if kernel == "laplace" else (1 + square / width) ** -0.5
    np.fill_diagonal(gram, 0)
    cross = gram[:7, 7:].mean()
    expected = gram[:7, :7].sum() / 42 + gram[7:, 7:].sum() / 30 - 2 * cross
    assert mmd2(a, b, scales=(1.0,), kernel=kernel) == pytest.approx(expected, rel=1e-10)
    assert mmd_permutation(a, b, 10, scales=(1.0,), kernel=kernel).mmd2 == pytest.approx(expected, rel=1e-9)
    assert mmd_interval(a, b, 0, scales=(1.0,), kernel=kernel).value == pytest.approx(expected, rel=1e-9)


def test_mmd_does_not_feel_a_common_shift_or_scale() -> None:
    a, b = normal(50, 4), 1.5 * normal(40, 4, seed=1)
    assert mmd2(1e4 + 7 * a, 1e4 + 7 * b) == pytest.approx(mmd2(a, b), abs=1e-9)


def test_points_that_all_coincide_have_no_mmd() -> None:
    assert mmd2(torch.ones(5, 2), torch.ones(6, 2)) == pytest.approx(0, abs=1e-12)
    mostly = torch.cat([torch.ones(9, 2), torch.zeros(1, 2)])
    assert math.isfinite(mmd2(mostly, mostly))


def test_the_permutation_null_is_that_of_relabelled_points() -> None:
    a, b = normal(15, 2), normal(11, 2, seed=1)
    test = mmd_permutation(a, b, num_permutations=40, seed=3)
    assert test.mmd2 == pytest.approx(mmd2(a, b), abs=1e-12)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(26) < 15
    points = torch.cat([a, b])
    for value in test.null.tolist():
        relabelled = labels[torch.randperm(26, generator=generator)]
        assert value == pytest.approx(mmd2(points[relabelled], points[~relabelled]), abs=1e-12)
    assert test.quantile(1.0) == pytest.approx(float(test.null.max()))


def test_p_values_are_uniform_without_a_difference_and_small_with_one() -> None:
    p = [
        mmd_permutation(normal(25, 2, seed=2 * i), normal(25, 2, seed=2 * i + 1), 99).p_value
        for i in range(200)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    assert mmd_permutation(normal(100, 2), 1 + normal(100, 2, seed=1), 99).p_value == pytest.approx(0.01)


def test_the_interval_of_mmd_widens_as_samples_shrink() -> None:
    a, b = normal(200, 2), 0.5 + normal(200, 2, seed=1)
    few, many = (mmd_interval(a[:n], b[:n], num_bootstrap=100) for n in (25, 200))
    assert many.value == pytest.approx(mmd2(a, b), abs=1e-12)
    assert many.low < many.value < many.high
    assert few.high - few.low > 2 * (many.high - many.low)
    # The estimate's spread over new samples, which the interval stands for.
    fresh = [mmd2(normal(200, 2, seed=2 * i), 0.5 + normal(200, 2, seed=2 * i + 1)) for i in range(60)]
    assert (many.high - many.low) / (2 * 1.96) == pytest.approx(float(np.std(fresh)), rel=0.3)
    assert math.isnan(mmd_interval(a, b, num_bootstrap=0).low)


def test_resampling_pairs_no_point_with_its_copy() -> None:
    # Two far clusters of single points: with its copies counted, a resample would look less alike inside.
    a, b = 100 * normal(30, 2), 100 * normal(30, 2, seed=1)
    interval = mmd_interval(a, b, num_bootstrap=400, seed=5)
    assert abs(interval.low + interval.high - 2 * interval.value) < interval.high - interval.low


def test_two_sample_tests_follow_their_seed_and_no_other() -> None:
    a, b = normal(60, 2), normal(60, 2, seed=1)
    np.random.seed(0)  # noqa: NPY002
    state: Any = np.random.get_state()  # noqa: NPY002
    first = mmd_permutation(a, b, 20, seed=1).null
    torch.randn(3)
    assert torch.equal(first, mmd_permutation(a, b, 20, seed=1).null)
    assert not torch.equal(first, mmd_permutation(a, b, 20, seed=2).null)
    after: Any = np.random.get_state()  # noqa: NPY002
    assert after[1].tolist() == state[1].tolist()


def test_w2_of_samples_is_that_of_their_moments() -> None:
    a = normal(40, 4) @ normal(4, 4, seed=2) + 1
    b = normal(25, 4, seed=1) @ normal(4, 4, seed=3)
    first, second = (np.cov(z.numpy().T) for z in (a, b))
    root = scipy.linalg.sqrtm(first)
    cross = scipy.linalg.sqrtm(root @ second @ root).real
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    assert gaussian_w2(a, b) == pytest.approx(gap + np.trace(first + second - 2 * cross), rel=1e-10)
    assert gaussian_w2(b, a) == pytest.approx(gaussian_w2(a, b), rel=1e-10)
    assert gaussian_w2(a.float(), b.float()) == pytest.approx(gaussian_w2(a, b), rel=1e-5)


def test_w2_has_its_closed_form_for_shifts_and_scales() -> None:
    a = normal(50, 3)
    assert gaussian_w2(a, a) == pytest.approx(0, abs=1e-12)
    assert gaussian_w2(a, a + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25, rel=1e-10)
    # Commuting covariances: the distance of their roots.
    variance = a.var(0).sum().item()
    assert gaussian_w2(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * variance, rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd2(torch.zeros(1, 2), torch.zeros(3, 2)), r"a must have shape \(N, d\) with N at least 2"),
        (lambda: mmd2(torch.zeros(3, 2), torch.zeros(3)), r"b must have shape \(N, d\)"),
        (lambda: mmd2(torch.zeros(3, 2), torch.zeros(3, 3)), "the same width, got 2 and 3"),
        (lambda: mmd2(torch.zeros(3, 2), torch.full((3, 2), math.nan)), "b must be finite, got 6"),
        (lambda: mmd2(torch.zeros(3, 2), torch.zeros(3, 2), scales=(0.0,)), "scales must be positive"),
        (
            lambda: mmd_permutation(torch.zeros(3, 2), torch.zeros(3, 2), 0),
            "num_permutations must be positive",
        ),
        (lambda: mmd2(torch.zeros(3, 2), torch.zeros(3, 2), kernel="cubic"), "kernel must be one of rbf"),  # type: ignore[arg-type]
        (lambda: gaussian_w2(torch.zeros(2, 2), torch.zeros(1, 2)), "b must have shape"),
    ],
)
def test_bad_samples_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
