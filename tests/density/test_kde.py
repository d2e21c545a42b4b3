"""Kernel densities by hand, by scikit-learn and SciPy, and their errors by drawing the data again."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde, norm
from sklearn.neighbors import KernelDensity

from pvae.density import KDE

from .truths import Floats, mixture, normal_log_density, quality


def test_three_points_by_hand() -> None:
    fit = KDE(bandwidth=1.0).fit(np.array([[0.0], [1.0], [3.0]]))
    for row, distances in enumerate([(1, 3), (1, 2), (3, 2)]):
        kernel = norm.pdf(distances)
        assert fit.log_density[row] == pytest.approx(np.log(kernel.mean()), abs=1e-13)
        share = (kernel**2).sum() / kernel.sum() ** 2
        assert fit.standard_error[row] == pytest.approx(np.sqrt(share - 1 / 2), abs=1e-12)
    scored = fit.score(np.array([[2.0]]))
    kernel = norm.pdf([2, 1, 1])
    assert scored.log_density[0] == pytest.approx(np.log(kernel.mean()), abs=1e-13)
    assert scored.standard_error[0] == pytest.approx(
        np.sqrt((kernel**2).sum() / kernel.sum() ** 2 - 1 / 3), abs=1e-12
    )
    assert fit.intrinsic_dim == 1


@pytest.mark.parametrize("dim", [1, 4])
def test_it_is_that_of_scikit_learn(dim: int) -> None:
    u, new = 100 + _normal(120, dim), 100 + _normal(30, dim, seed=1)
    fit = KDE(bandwidth=0.4).fit(u)
    other = KernelDensity(bandwidth=0.4).fit(u)
    np.testing.assert_allclose(fit.score(new).log_density, other.score_samples(new), atol=1e-9)
    for row in (0, 50, 119):
        left_out = KernelDensity(bandwidth=0.4).fit(np.delete(u, row, 0))
        assert fit.log_density[row] == pytest.approx(left_out.score_samples(u[row : row + 1])[0], abs=1e-9)
    # A datum scored again is left out again.
    np.testing.assert_array_equal(fit.score(u[::3]).log_density, fit.log_density[::3])


def test_the_error_is_the_spread_over_samples() -> None:
    points = np.array([[-1.5], [0.0], [0.7], [2.5]])
    rng = np.random.default_rng(0)
    scored = [KDE(bandwidth=0.3).fit(rng.standard_normal((200, 1))).score(points) for _ in range(500)]
    spread = np.std([s.log_density for s in scored], axis=0)
    said = np.sqrt(np.mean([np.square(s.standard_error) for s in scored], axis=0))
    assert ((said / spread > 0.85) & (said / spread < 1.15)).all()


def test_cross_validation_finds_the_left_out_optimum() -> None:
    u = _normal(400, 2) * [1, 0.3]
    fit = KDE().fit(u)

    def left_out(width: float) -> float:
        return float(KDE(bandwidth=width).fit(u).log_density.mean())

    widths = fit.h * np.linspace(0.6, 1.6, 41)
    best = widths[np.argmax([left_out(width) for width in widths])]
    assert fit.h == pytest.approx(best, rel=0.08)
    assert fit.state == {"intrinsic_dim": 2.0, "bandwidth": fit.h}
    np.testing.assert_array_equal(KDE().fit(u).log_density, fit.log_density)


def test_scott_is_that_of_scipy_for_equal_columns_and_smooths_modes_away() -> None:
    u = _normal(500, 3)
    u = (u - u.mean(0)) / u.std(0)
    factor = gaussian_kde(u.T).factor
    assert KDE(bandwidth="scott").fit(u).h == pytest.approx(factor, rel=1e-12)
    truth = mixture()
    points = truth.draw(np.random.default_rng(0), 2000)
    chosen, scott = KDE().fit(points), KDE(bandwidth="scott").fit(points)
    assert chosen.h < 0.5 * scott.h
    good, bad = (quality(fit, truth.log_density(points)) for fit in (chosen, scott))
    assert good.rmse < 0.5 * bad.rmse
    assert good.pull < 0.5 * bad.pull
    assert abs(good.slope - 1) < 0.5 * abs(bad.slope - 1)


@pytest.mark.parametrize(
    ("dim", "rmse", "corr"), [(1, 0.1, 0.99), (2, 0.2, 0.98), (5, 0.5, 0.96), (10, 1.0, 0.95)]
)
def test_normals(dim: int, rmse: float, corr: float) -> None:
    u = _normal(1500, dim, seed=dim)
    found = quality(KDE().fit(u), normal_log_density(u))
    assert found.rmse < rmse
    assert found.corr > corr


def test_kernels_on_some_of_the_data() -> None:
    u = _normal(900, 2)
    fit = KDE(bandwidth=0.4, subsample=300, seed=3).fit(u)
    whole = KDE(bandwidth=0.4).fit(u)
    assert fit.diagnostics() == {"bandwidth": 0.4, "num_kernels": 300.0}
    assert fit.log_density.shape == (900,)
    gap = fit.log_density - whole.log_density
    assert 0 < np.abs(gap).mean() < 0.2
    # Those without a kernel see 300 of them, those with one 299: by scikit-learn on the kernels.
    own = np.array([np.isclose(fit._centres + fit._loc, row).all(1).any() for row in u])
    assert own.sum() == 300
    kernels = u[own]
    others = KernelDensity(bandwidth=0.4).fit(kernels).score_samples(u[~own])
    np.testing.assert_allclose(fit.log_density[~own], others, atol=1e-9)
    first = KernelDensity(bandwidth=0.4).fit(kernels[1:]).score_samples(kernels[:1])
    np.testing.assert_allclose(fit.log_density[own][:1], first, atol=1e-9)


def test_duplicates_count_with_their_number() -> None:
    u = _normal(400, 2)
    fit, unique = KDE(bandwidth=0.3).fit(np.concatenate([u, u[:2]])), KDE(bandwidth=0.3).fit(u)
    assert fit.num_duplicates == 2
    np.testing.assert_allclose(
        fit.log_density[:2], unique.log_density[:2] + np.log(2 * 400 / 402), atol=1e-12
    )
    np.testing.assert_array_equal(fit.log_density[400:], fit.log_density[:2])


def test_equal_kernels_have_a_positive_error() -> None:
    fit = KDE(bandwidth=1.0).fit(np.eye(3) * 0.5 + _normal(3, 3) * 0)
    assert (fit.standard_error > 0).all()
    assert (fit.standard_error < 1e-6).all()


def test_what_it_says() -> None:
    for options, said in (
        ({"bandwidth": "silverman"}, "bandwidth must be 'cv', 'scott' or a positive number, got 'silverman'"),
        ({"bandwidth": 0.0}, "positive number, got 0.0"),
        ({"subsample": 2}, "subsample must be at least 3, got 2"),
    ):
        with pytest.raises(ValueError, match=said):
            KDE(**options)
    with pytest.raises(ValueError, match="u must have at least 3 different rows, got 2"):
        KDE().fit(np.eye(2))
    with pytest.raises(ValueError, match=r"u must have at most 100000 rows, .* got 100001: pass subsample"):
        KDE().fit(_normal(100_001, 1))
    # Twins: the closer to zero the bandwidth, the likelier is each by the other.
    twins = np.repeat(_normal(100, 2), 2, 0) + np.tile([[0.0, 0], [0, 1e-9]], (100, 1))
    with pytest.warns(UserWarning, match=r"the bandwidth .* lies at an end of the range tried, 0.0156 to 2"):
        KDE().fit(twins)


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    KDE().fit(_normal(1500, 1), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (2500, 2500)
    seen.clear()
    KDE(bandwidth=0.1).fit(_normal(50, 1), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (50, 50)


def _normal(size: int, dim: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((size, dim))
