"""Neighbours against all distances by SciPy, where a product of matrices is exact and where it is not."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pvae.density import NeighbourSearch


@pytest.mark.parametrize("dim", [1, 3, 6, 7, 20])
def test_they_are_the_nearest_other_points(dim: int) -> None:
    points = np.random.default_rng(0).standard_normal((5000, dim)) if dim == 3 else normal(300, dim)
    near = NeighbourSearch(points).among(12)
    some = slice(0, len(points), 17)
    distances = cdist(points[some], points)
    own = np.arange(len(points))[some]
    distances[np.arange(len(own)), own] = np.inf
    order = np.argsort(distances, 1)[:, :12]
    np.testing.assert_array_equal(near.index[some], order)
    np.testing.assert_allclose(near.radii[some], np.take_along_axis(distances, order, 1), rtol=1e-13)
    assert near.radii.dtype == np.float64
    assert near.index.dtype == np.int32


@pytest.mark.parametrize("dim", [2, 9])
def test_queries_see_every_point(dim: int) -> None:
    points, queries = normal(200, dim), normal(5000, dim, seed=1)
    near = NeighbourSearch(points)(queries, 4)
    distances = cdist(queries, points)
    np.testing.assert_array_equal(near.index, np.argsort(distances, 1)[:, :4])
    np.testing.assert_allclose(near.radii, np.sort(distances, 1)[:, :4], rtol=1e-13)
    again = NeighbourSearch(points)(points, 1)
    np.testing.assert_array_equal(again.index[:, 0], np.arange(200))
    assert (again.radii == 0).all()


@pytest.mark.parametrize("dim", [2, 9])
def test_close_pairs_far_from_the_origin_keep_their_distance(dim: int) -> None:
    # Twins 1e-7 apart, 10 away from the mean: the squares that a product of matrices subtracts are 1e16 times
    # the result.
    points = 10 * normal(200, dim)
    points[1::2] = points[::2]
    points[1::2, 0] += 1e-7
    near = NeighbourSearch(1e3 + points).among(3)
    exact = np.abs((1e3 + points)[1::2, 0] - (1e3 + points)[::2, 0])
    np.testing.assert_array_equal(near.index[:, 0], np.arange(200) ^ 1)
    np.testing.assert_allclose(near.radii[::2, 0], exact, rtol=1e-6)
    assert (np.diff(near.radii) >= 0).all()


def test_no_point_is_its_own_neighbour_where_rounding_hides_it() -> None:
    # Sixty points within rounding of one another, seen from 1e3 away: each has many at distance "zero".
    cloud = 1e-10 * normal(60, 9)
    points = np.concatenate([normal(60, 9) + 1e3, cloud - 1e3])
    near = NeighbourSearch(points).among(5)
    assert (near.index != np.arange(120)[:, None]).all()
    assert all(len(set(row)) == 5 for row in near.index.tolist())
    assert (near.index[60:] >= 60).all()
    assert (np.diff(near.radii) >= 0).all()
    gaps = points[near.index] - points[:, None]
    np.testing.assert_allclose(near.radii, np.sqrt((gaps**2).sum(-1)), rtol=1e-2)


def test_progress_counts_rows() -> None:
    seen: list[int] = []
    NeighbourSearch(normal(9000, 1)).among(2, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 9000
    assert len(seen) > 1


def normal(size: int, dim: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).standard_normal((size, dim))
