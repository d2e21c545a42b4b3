"""PAk's likelihood: shells whose maximum is known, and the maximum itself by its definition and by SciPy."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import gammaln, softmax

from pvae.density.shells import corrected, log_shells, log_unit_ball, solve_tilt, uncorrected

from .truths import Floats


def log_ball(dim: float) -> float:
    return float(dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1))


def radii_of(log_volumes: Floats, dim: float) -> Floats:
    """Distances whose shells have given volumes."""
    radii: Floats = np.exp((np.log(np.cumsum(np.exp(log_volumes), -1)) - log_ball(dim)) / dim)
    return radii


def random_radii(size: int, count: int, dim: float, seed: int = 0) -> Floats:
    volumes = np.random.default_rng(seed).exponential(size=(size, count))
    return radii_of(np.log(volumes), dim)


@pytest.mark.parametrize("dim", [1.0, 2.0, 7.87, 20.0])
def test_shells_have_the_volumes_that_made_them(dim: float) -> None:
    assert log_unit_ball(dim) == pytest.approx(log_ball(dim), abs=1e-13)
    volumes = np.log(np.random.default_rng(1).exponential(size=(6, 40)))
    np.testing.assert_allclose(log_shells(radii_of(volumes, dim), dim), volumes, atol=1e-8)
    # Radii whose powers overflow, and neighbours equally far.
    far = log_shells(np.array([[1e200, 2e200, 2e200]]), dim)[0]
    assert far[0] == pytest.approx(log_ball(dim) + dim * np.log(1e200))
    assert far[1] == pytest.approx(far[0] + np.log(2.0**dim - 1))
    assert far[2] == -np.inf


@pytest.mark.parametrize("count", [3, 10, 99, 198])
@pytest.mark.parametrize("dim", [2.0, 7.87])
def test_equal_shells_have_their_density_and_no_tilt(count: int, dim: float) -> None:
    log_volume = 3.7
    radii = radii_of(np.full((1, count), log_volume), dim)
    counts = np.array([count])
    assert corrected(radii, counts, dim)[0] == pytest.approx(-log_volume, abs=1e-9)
    assert uncorrected(radii, counts, dim)[0] == pytest.approx(-log_volume, abs=1e-9)
    assert solve_tilt(np.full((1, count), log_volume), counts)[0] == 0


@pytest.mark.parametrize("count", [3, 10, 99, 198])
@pytest.mark.parametrize("product", [-10.0, -1.0, 0.3, 4.0, 10.0])
def test_geometric_shells_have_the_density_at_the_point(count: int, product: float) -> None:
    dim, rate = 5.0, product / count
    volumes: Floats = 1.3 - rate * np.arange(1.0, count + 1)[None]
    counts = np.array([count])
    assert solve_tilt(volumes, counts)[0] == pytest.approx(rate, abs=1e-9)
    assert corrected(radii_of(volumes, dim), counts, dim)[0] == pytest.approx(-1.3, abs=1e-9)


@pytest.mark.parametrize("count", [3, 12, 60])
def test_it_is_the_maximum_of_the_likelihood(count: int) -> None:
    dim, rng = 3.3, np.random.default_rng(0)
    radii = random_radii(40, count, dim)
    counts = np.full(40, count)
    volumes = np.exp(log_ball(dim)) * np.diff(radii**dim, prepend=0)
    free, tilt = corrected(radii, counts, dim), solve_tilt(np.log(volumes), counts)
    rank = np.arange(1, count + 1)

    def likelihood(f: Floats, a: Floats) -> Floats:
        value: Floats = (
            count * f
            + a * count * (count + 1) / 2
            - (volumes * np.exp(f[:, None] + a[:, None] * rank)).sum(1)
        )
        return value

    expected = volumes * np.exp(free[:, None] + tilt[:, None] * rank)
    assert np.abs(count - expected.sum(1)).max() < 1e-6 * count
    assert np.abs(count * (count + 1) / 2 - (rank * expected).sum(1)).max() < 1e-6 * count
    best = likelihood(free, tilt)
    for _ in range(50):
        step = rng.standard_normal((2, 40)) * 10.0 ** rng.uniform(-4, -1)
        assert (likelihood(free + step[0], tilt + step[1] / count) <= best + 1e-9).all()


def test_scipy_finds_the_same_maximum() -> None:
    dim, count = 6.2, 25
    radii = random_radii(12, count, dim, seed=3)
    found = corrected(radii, np.full(12, count), dim)
    rank = np.arange(1, count + 1) / count
    for i, row in enumerate(radii):
        volumes = np.exp(log_ball(dim)) * np.diff(row**dim, prepend=0)

        def loss(v: Floats, volumes: Floats = volumes) -> float:
            return float((volumes * np.exp(v[0] + v[1] * rank)).sum() - count * v[0] - v[1] * rank.sum())

        best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
        assert found[i] == pytest.approx(best.x[0], abs=1e-5)


def test_each_point_uses_its_own_count() -> None:
    dim = 4.0
    radii = random_radii(9000, 30, dim, seed=5)
    counts = np.random.default_rng(0).integers(3, 31, 9000)
    together = corrected(radii, counts, dim)
    plain = uncorrected(radii, counts, dim)
    for i in range(0, 9000, 600):
        alone = radii[i : i + 1, : counts[i]], counts[i : i + 1]
        assert together[i] == pytest.approx(corrected(*alone, dim)[0], abs=1e-10)
        assert plain[i] == pytest.approx(
            np.log(counts[i]) - log_ball(dim) - dim * np.log(radii[i, counts[i] - 1]), abs=1e-12
        )


def test_a_mean_rank_out_of_reach_has_no_tilt() -> None:
    volumes = np.array([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0.5, 1, 0, 0, 1e-9], [1, 1, 1, 1, 1]])
    with np.errstate(divide="ignore"):
        shells = np.log(volumes)
    tilt = solve_tilt(shells, np.full(4, 5))
    # The mean rank of 3 needs a shell beyond it.
    assert np.isnan(tilt).tolist() == [True, True, False, False]
    assert softmax(shells[2] + tilt[2] * np.arange(1, 6)) @ np.arange(1, 6) == pytest.approx(3, abs=1e-9)
    radii = np.array([[1.0, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    found = corrected(radii, np.array([5, 5]), 2.0)
    assert np.isnan(found).tolist() == [True, False]
