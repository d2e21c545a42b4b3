"""PAk and k*-NN on data whose density is known: bias, errors, invariances, new points."""

import numpy as np
import pytest
import torch

from pvae.density import DensityEstimator, KStar, PAk

from .truths import Floats, mixture, normal_log_density, quality

# Few neighbours in few dimensions: the test below of the warnings is about that.
pytestmark = pytest.mark.filterwarnings(r"ignore:k\* is at its largest value")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixture_in_the_plane(seed: int) -> None:
    truth = mixture(seed)
    u = truth.draw(np.random.default_rng(seed), 20_000)
    fit = PAk(max_neighbors=100).fit(u)
    found = quality(fit, truth.log_density(u))
    assert 1.95 < fit.intrinsic_dim < 2.05
    assert abs(found.bias) < 0.08
    assert found.rmse < 0.27
    assert 0.93 < found.pull < 1.08
    assert found.corr > 0.96
    # New points have densities as good and errors as honest.
    new = truth.draw(np.random.default_rng(100 + seed), 5000)
    again = quality(fit.score(new), truth.log_density(new))
    assert abs(again.bias) < 0.1
    assert again.rmse < 0.27
    assert 0.93 < again.pull < 1.1


def test_the_mean_is_minus_the_entropy() -> None:
    u = np.random.default_rng(0).standard_normal((20_000, 2))
    fit = PAk(max_neighbors=100, dim="embedding").fit(u)
    assert -fit.log_density.mean() == pytest.approx(1 + np.log(2 * np.pi), abs=0.03)


# Bias, spread of the pulls and correlation at N = 5,000 and K = 100, where everything is somewhat worse than
# at N = 60,000: the error is honest up to 5 dimensions, and beyond 10 it is bias.
@pytest.mark.parametrize(
    ("dim", "intrinsic", "bias", "pull", "corr"),
    [
        (1, (0.95, 1.06), 0.15, (0.9, 1.15), 0.94),
        (2, (1.88, 2.1), 0.16, (0.92, 1.1), 0.96),
        (5, (4.7, 5.2), 0.2, (1.0, 1.25), 0.93),
        (10, (9.0, 10.3), 0.4, (1.2, 1.6), 0.88),
        (20, (15.5, 18.5), 2.0, (1.5, 2.1), 0.84),
    ],
)
def test_normals_in_1_to_20_dimensions(
    dim: int,
    intrinsic: tuple[float, float],
    bias: float,
    pull: tuple[float, float],
    corr: float,
) -> None:
    u = np.random.default_rng(dim).standard_normal((5000, dim))
    truth = normal_log_density(u)
    fit = PAk(max_neighbors=100).fit(u)
    found = quality(fit, truth)
    assert intrinsic[0] < fit.intrinsic_dim < intrinsic[1]
    assert abs(found.bias) < bias
    assert pull[0] < found.pull < pull[1]
    assert found.corr > corr
    plain = quality(KStar(max_neighbors=100).fit(u), truth)
    # Without its correction the estimate varies less, and ranks better.
    assert plain.corr > found.corr
    assert plain.rmse < found.rmse


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "bias", "rmse", "pull", "corr", "slope"),
    [
        (2, (-0.08, 0.08), 0.25, (0.93, 1.08), 0.96, (0.95, 1.02)),
        (5, (0.0, 0.2), 0.43, (0.95, 1.1), 0.96, (0.87, 0.96)),
        (20, (0.4, 0.9), 1.8, (1.5, 1.75), 0.88, (0.6, 0.71)),
    ],
)
def test_sixty_thousand_data(
    dim: int,
    bias: tuple[float, float],
    rmse: float,
    pull: tuple[float, float],
    corr: float,
    slope: tuple[float, float],
) -> None:
    u = np.random.default_rng(10 + dim).standard_normal((60_000, dim))
    found = quality(PAk(max_neighbors=100).fit(u), normal_log_density(u))
    assert bias[0] < found.bias < bias[1]
    assert found.rmse < rmse
    assert pull[0] < found.pull < pull[1]
    assert found.corr > corr
    assert slope[0] < found.slope < slope[1]


def test_errors_are_the_inverse_fisher_information() -> None:
    fit = PAk(max_neighbors=30).fit(_normal(600, 2))
    assert len(set(fit.k_star.tolist())) > 5
    for k, error in zip(fit.k_star.tolist(), fit.standard_error, strict=True):
        # Second derivatives of the likelihood in F and a at a = 0, where each shell holds one point.
        rank = np.arange(1, k + 1)
        information = np.array([[k, rank.sum()], [rank.sum(), (rank**2).sum()]])
        assert error == pytest.approx(np.sqrt(np.linalg.inv(information)[0, 0]), rel=1e-10)
    plain = KStar(max_neighbors=30).fit(_normal(600, 2))
    np.testing.assert_array_equal(plain.k_star, fit.k_star)
    np.testing.assert_allclose(plain.standard_error, fit.k_star**-0.5, rtol=1e-14)


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("kind", [PAk, KStar])
def test_invariances(kind: type[PAk], dim: int) -> None:
    rng = np.random.default_rng(0)
    u = _normal(800, dim)
    fit = kind(max_neighbors=60).fit(u)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    turned = kind(max_neighbors=60).fit(u @ rotation + 5)
    np.testing.assert_allclose(turned.log_density, fit.log_density, atol=1e-10)
    np.testing.assert_array_equal(turned.k_star, fit.k_star)
    order = rng.permutation(len(u))
    shuffled = kind(max_neighbors=60).fit(u[order])
    np.testing.assert_allclose(shuffled.log_density, fit.log_density[order], atol=1e-11)
    np.testing.assert_array_equal(shuffled.k_star, fit.k_star[order])
    scaled = kind(max_neighbors=60).fit(7.3 * u)
    assert scaled.intrinsic_dim == pytest.approx(fit.intrinsic_dim, abs=1e-10)
    shift = -fit.intrinsic_dim * np.log(7.3)
    np.testing.assert_allclose(scaled.log_density, fit.log_density + shift, atol=1e-9)
    np.testing.assert_array_equal(scaled.k_star, fit.k_star)
    np.testing.assert_array_equal(scaled.standard_error, fit.standard_error)


def test_the_dimension_is_the_unit() -> None:
    u = _normal(500, 3)
    by = {dim: KStar(max_neighbors=60, dim=dim).fit(u) for dim in ("twonn", "embedding", 3, 2.5)}
    assert by["embedding"].intrinsic_dim == by[3].intrinsic_dim == 3.0
    np.testing.assert_array_equal(by["embedding"].log_density, by[3].log_density)
    assert by[2.5].intrinsic_dim == 2.5
    assert by["twonn"].intrinsic_dim == pytest.approx(3, abs=0.4)
    assert by["twonn"].intrinsic_dim != 3
    # PAk with no correction is the other class.
    same = PAk(max_neighbors=60, dim=3, correction=False).fit(u)
    np.testing.assert_array_equal(same.log_density, by[3].log_density)


@pytest.mark.parametrize("kind", [PAk, KStar])
@pytest.mark.parametrize("dim", [2, 8])
def test_a_datum_scored_again_has_its_own_estimate(kind: type[PAk], dim: int) -> None:
    u = _normal(700, dim)
    fit = kind(max_neighbors=50).fit(u)
    mixed = np.concatenate([u[::7] + 1e-8, _normal(40, dim, seed=9), u[:3]])
    scored = fit.score(mixed)
    np.testing.assert_array_equal(scored.log_density[:100], fit.log_density[::7])
    np.testing.assert_array_equal(scored.standard_error[-3:], fit.standard_error[:3])
    # A new point's estimate does not depend on what else is scored.
    alone = fit.score(mixed[100:140])
    np.testing.assert_allclose(alone.log_density, scored.log_density[100:140], atol=1e-12)
    # It is that of a fit in which the datum took no part, up to the number of data.
    left_out = kind(max_neighbors=50, dim=fit.intrinsic_dim).fit(u[1:])
    gap = left_out.score(u[:1]).log_density[0] - fit.log_density[0]
    assert abs(gap) < 0.2
    assert fit.score(np.empty((0, dim))).log_density.shape == (0,)


@pytest.mark.parametrize("far", [30.0, 1000.0])
def test_far_from_the_data_it_falls_without_end_but_too_slowly(far: float) -> None:
    fit = PAk(max_neighbors=50, dim="embedding").fit(_normal(2000, 2))
    scored = fit.score(np.array([[0.0, 0.0], [far, 0.0]]))
    assert scored.log_density[1] < scored.log_density[0] - 2 * np.log(far) + 3
    assert scored.log_density[1] > -(far**2) / 2


@pytest.mark.parametrize("estimator", [PAk(max_neighbors=40), KStar(max_neighbors=40)])
def test_duplicates_count_with_their_number(estimator: DensityEstimator) -> None:
    u = _normal(1000, 2)
    unique = type(estimator)(max_neighbors=40).fit(u)  # type: ignore[call-arg]
    doubled = np.concatenate([u, u[:6], u[:2]])
    fit = estimator.fit(doubled)
    assert fit.num_duplicates == 8
    times = np.ones(1008)
    times[[0, 1, 1000, 1001, 1006, 1007]] = 3
    times[[2, 3, 4, 5, 1002, 1003, 1004, 1005]] = 2
    base = np.concatenate([unique.log_density, unique.log_density[:6], unique.log_density[:2]])
    np.testing.assert_allclose(fit.log_density, base + np.log(times * 1000 / 1008), atol=1e-10)
    assert fit.k_star.shape == (1008,)  # type: ignore[attr-defined]
    np.testing.assert_allclose(fit.score(u[:8]).log_density, fit.log_density[:8], atol=1e-12)
    new = _normal(5, 2, seed=3)
    np.testing.assert_allclose(
        fit.score(new).log_density, unique.score(new).log_density + np.log(1000 / 1008), atol=1e-10
    )


def test_quantised_data_are_refused_and_jitter_mends_them() -> None:
    truth = mixture()
    u = truth.draw(np.random.default_rng(0), 5000)
    grid = np.round(u, 1)
    with pytest.raises(
        ValueError, match=r"at most 1% repeated rows, got \d+ of 5000: .*quantised; pass jitter"
    ):
        PAk(max_neighbors=60).fit(grid)
    fit = PAk(max_neighbors=60, jitter=0.1).fit(grid)
    assert np.abs(fit.points - grid).max() <= 0.05 + 1e-12
    # The noise of a step's width is small beside the components' 0.5.
    assert abs(quality(fit, truth.log_density(u)).bias) < 0.25
    np.testing.assert_array_equal(PAk(max_neighbors=60, jitter=0.1).fit(grid).log_density, fit.log_density)
    assert (PAk(max_neighbors=60, jitter=0.1, seed=1).fit(grid).points != fit.points).any()


def test_a_grid_of_different_points_says_so() -> None:
    side = np.arange(20.0)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    with pytest.raises(ValueError, match=r"first and second neighbours at different distances.*grid"):
        PAk(max_neighbors=30).fit(grid)
    # Corners and middles of a star of equal arms: every neighbour at one distance.
    with pytest.warns(UserWarning, match=r"\d+ of 8 points have neighbours equally far.*jitter"):
        fit = PAk(max_neighbors=6, dim=8).fit(np.eye(8))
    assert fit.num_uncorrected == 8
    plain = KStar(max_neighbors=6, dim=8)
    with pytest.warns(UserWarning, match="largest value"):
        plain.fit(np.eye(8))
    np.testing.assert_array_equal(fit.log_density, plain.log_density)


def test_warnings_of_k_star() -> None:
    flat = np.random.default_rng(0).random((3000, 2))
    with pytest.warns(
        UserWarning, match=r"k\* is at its largest value 19 for \d+% of the data: a larger max_n"
    ):
        fit = PAk(max_neighbors=20).fit(flat)
    seen = fit.diagnostics()
    assert seen["share_k_star_cap"] == (fit.k_star == 19).mean() > 0.9
    assert seen["k_star_median"] == 19
    with pytest.warns(UserWarning, match=r"k\* is 3 for \d+% of the data: the density changes within three"):
        PAk(max_neighbors=50, alpha=0.9).fit(flat)
    with pytest.warns(UserWarning, match="u has 21 dimensions: above 20 the error .* is mostly bias"):
        PAk(max_neighbors=20).fit(_normal(300, 21))


@pytest.mark.parametrize(
    ("u", "said"),
    [
        (np.zeros(5), r"u must have shape \(N, d\) with d at least 1, got \(5,\)"),
        (np.zeros((5, 0)), r"got \(5, 0\)"),
        (
            np.array([[1.0, 2], [np.nan, 1], [np.inf, 3]]),
            "u must be finite, got nan or inf in 2 of 3 rows, first in 1",
        ),
        (
            np.stack([np.arange(300.0), np.ones(300)], 1),
            "got 1 constant of 2, the first number 1: leave them out",
        ),
        (np.empty((0, 2)), "got 2 constant of 2"),
        (
            np.random.default_rng(0).random((199, 2)),
            "more than max_neighbors = 199 different rows, got 199: lower",
        ),
    ],
)
def test_data_it_refuses(u: Floats, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PAk().fit(u)


def test_other_errors() -> None:
    for options, said in (
        ({"max_neighbors": 3}, "max_neighbors must be at least 4, got 3"),
        ({"alpha": 0}, "alpha must lie between 0 and 1, got 0"),
        ({"dim": "pca"}, "dim must be 'twonn', 'embedding' or a positive number, got 'pca'"),
        ({"dim": -1}, "or a positive number, got -1"),
        ({"jitter": -0.1}, "jitter must not be negative, got -0.1"),
    ):
        with pytest.raises(ValueError, match=said):
            PAk(**options)
    with pytest.raises(RuntimeError, match="PAk must be fitted before it scores"):
        PAk().score(np.zeros((2, 2)))
    fit = PAk(max_neighbors=30).fit(_normal(100, 3))
    with pytest.raises(ValueError, match="u_new must have 3 columns, got 2"):
        fit.score(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="u_new must be finite"):
        fit.score(np.full((2, 3), np.nan))


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    fit = PAk(max_neighbors=30).fit(_normal(5000, 2), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (10_000, 10_000)
    assert len(seen) == 3
    seen.clear()
    fit.score(_normal(300, 2, seed=1), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (600, 600)


def test_fits_repeat_and_tensors_and_integers_are_data_too() -> None:
    u = _normal(300, 2)
    fit = PAk(max_neighbors=30).fit(u)
    np.testing.assert_array_equal(PAk(max_neighbors=30).fit(u).log_density, fit.log_density)
    np.testing.assert_array_equal(PAk(max_neighbors=30).fit(torch.from_numpy(u)).log_density, fit.log_density)
    whole = np.random.default_rng(0).integers(0, 10**6, (300, 2))
    as_float = PAk(max_neighbors=30).fit(whole.astype(float))
    np.testing.assert_array_equal(PAk(max_neighbors=30).fit(whole).log_density, as_float.log_density)
    assert fit.describe() == PAk(max_neighbors=30).describe() != KStar(max_neighbors=30).describe()
    assert repr(KStar(max_neighbors=30)).startswith(
        "KStar(max_neighbors=30, alpha=1e-06, dim='twonn', jitter"
    )


def _normal(size: int, dim: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((size, dim))
