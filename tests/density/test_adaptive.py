"""The neighbour count k*: the test's statistic by its volumes, and the search by a loop over points."""

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import chi2

from pvae.density import NeighbourSearch, adaptive_counts
from pvae.density.adaptive import likelihood_ratio


@pytest.mark.parametrize("dim", [1, 2.5, 12])
def test_the_statistic_is_that_of_the_volumes(dim: float) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.lognormal(size=(2, 500))
    log_unit = dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1)
    one, other = np.exp(log_unit) * first**dim, np.exp(log_unit) * second**dim
    for count in (3, 50):
        by_volumes = 2 * count * (2 * np.log((one + other) / 2) - np.log(one) - np.log(other))
        found = likelihood_ratio(np.log(first) - np.log(second), count, dim)
        np.testing.assert_allclose(found, by_volumes, rtol=1e-10, atol=1e-10)


def test_the_statistic_of_equal_distances_is_zero_and_that_of_any_is_finite() -> None:
    found = likelihood_ratio(np.array([0.0, 1e-8, 300.0, -300.0]), 10, 50.0)
    assert found[0] == 0
    assert found[1] == pytest.approx(4 * 10 * (25e-8) ** 2 / 2, rel=1e-3, abs=1e-14)
    assert found[2] == found[3] == pytest.approx(40 * (7500 - np.log(2)))


def test_the_statistic_has_its_law_where_densities_are_equal() -> None:
    # The volume of k neighbours of a point of a Poisson process is a sum of k exponentials; here of two
    # independent ones. Wilks' law holds as k grows.
    rng = np.random.default_rng(0)
    volumes = rng.gamma(60, size=(2, 100_000))
    found = likelihood_ratio(np.log(volumes[0]) - np.log(volumes[1]), 60, 1.0)
    for level in (0.5, 0.1, 0.01):
        assert (found > chi2.isf(level, 1)).mean() == pytest.approx(level, rel=0.1)


@pytest.mark.parametrize("threshold", [1e-3, 2.0, 23.928, 1e4])
def test_it_is_the_first_count_that_fails(threshold: float) -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((400, 3)) * [1, 1, 0.2]
    queries = rng.standard_normal((50, 3))
    most, dim = 30, 2.7
    search = NeighbourSearch(points)
    among = search.among(most)
    for near in (among, search(queries, most)):
        wanted = []
        for radii, index in zip(near.radii, near.index, strict=True):
            for k in range(3, most - 1):
                one, other = radii[k - 1] ** dim, among.radii[index[k], k - 1] ** dim
                if 2 * k * (2 * np.log((one + other) / 2) - np.log(one) - np.log(other)) > threshold:
                    break
            else:
                k = most - 1
            wanted.append(k)
        found = adaptive_counts(near, np.log(among.radii), dim, threshold)
        np.testing.assert_array_equal(found, wanted)


def test_its_range() -> None:
    points = np.random.default_rng(0).standard_normal((100, 2))
    near = NeighbourSearch(points).among(20)
    log_radii = np.log(near.radii)
    assert (adaptive_counts(near, log_radii, 2.0, np.inf) == 19).all()
    assert (adaptive_counts(near, log_radii, 2.0, -1.0) == 3).all()
    few = NeighbourSearch(points).among(4)
    assert (adaptive_counts(few, np.log(few.radii), 2.0, -1.0) == 3).all()
