"""The scikit-learn face: densities against exact ones, scikit-learn's own checks, pipelines and searches."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from pvae.evaluation import LikelihoodEstimate
from pvae.sklearn import VAEDensity
from tests.evaluation.traces import everything

QUICK: dict[str, Any] = {"epochs": 2, "hidden": (8,), "num_particles": 5, "random_state": 0}

_NOISE = "scores are Monte-Carlo estimates whose noise is seeded by a datum's place in the table"
_EXCLUDED = {
    "check_methods_sample_order_invariance": _NOISE,
    "check_methods_subset_invariance": _NOISE,
}


def table(num: int = 60, width: int = 4, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(num, width))


def factors(num: int, seed: int, latents: int = 2, width: int = 5) -> tuple[Any, Any]:
    """Draws of a factor analysis in uneven units, and its exact log-density at them."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    weight = fixed.normal(size=(width, latents)) * 2
    noise, loc = fixed.uniform(0.4, 1.0, width), 10 * fixed.normal(size=width)
    unit = 10.0 ** np.linspace(-2, 2, width)
    x = (rng.normal(size=(num, latents)) @ weight.T + loc + noise * rng.normal(size=(num, width))) * unit
    covariance = (weight @ weight.T + np.diag(noise**2)) * np.outer(unit, unit)
    return x, multivariate_normal(loc * unit, covariance).logpdf(x)


@parametrize_with_checks(
    [VAEDensity(**QUICK)],
    expected_failed_checks=lambda estimator: _EXCLUDED,
    xfail_strict=True,
)
def test_it_passes_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    with warnings.catch_warnings():
        # What an environment lacks is no matter of the estimator's.
        warnings.simplefilter("ignore", UserWarning)
        check(estimator)


def test_scores_reach_the_exact_density_of_gaussian_data() -> None:
    x, _ = factors(1500, seed=0)
    unseen, exact = factors(400, seed=1)
    linear = VAEDensity(2, hidden=(), lr=2e-2, random_state=0).fit(x)
    found = linear.score_samples(unseen)
    assert linear.score(unseen) == pytest.approx(exact.mean(), abs=0.1)
    assert linear.score(unseen) == pytest.approx(found.mean())
    assert np.corrcoef(found, exact)[0, 1] > 0.99
    # The gap to the fit of a Gaussian is what the model costs.
    best = multivariate_normal(x.mean(0), np.cov(x.T)).logpdf(unseen).mean()
    assert linear.score(unseen) == pytest.approx(best, abs=0.1)
    estimate = linear.log_likelihood(unseen)
    assert isinstance(estimate, LikelihoodEstimate)
    assert estimate.num_particles == 100
    assert estimate.elbo <= estimate.mean
    assert estimate.mean == pytest.approx(found.mean())


def test_a_density_of_one_column_integrates_to_one() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-30, 5, 300), rng.normal(40, 9, 300)])[:, None]
    estimator = VAEDensity(1, epochs=100, num_particles=300, lr=1e-2, random_state=0).fit(x)
    grid = np.linspace(-120, 150, 1000)[:, None]
    mass = np.exp(estimator.score_samples(grid)).sum() * (grid[1, 0] - grid[0, 0])
    assert mass == pytest.approx(1, abs=0.05)


def test_standardising_changes_the_density_by_the_units_alone() -> None:
    x = table(80, 3)
    scale = np.array([100.0, 0.01, 3.0])
    plain, scaled = VAEDensity(**QUICK).fit(x), VAEDensity(**QUICK).fit(5 + scale * x)
    np.testing.assert_allclose(
        scaled.score_samples(5 + scale * x), plain.score_samples(x) - np.log(scale).sum(), atol=1e-3
    )
    np.testing.assert_allclose(scaled.transform(5 + scale * x), plain.transform(x), atol=1e-4)
    codes = plain.transform(x)
    np.testing.assert_allclose(
        scaled.inverse_transform(codes), 5 + scale * plain.inverse_transform(codes), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(scaled.sample(9, 1), 5 + scale * plain.sample(9, 1), rtol=1e-3, atol=1e-3)
    bare = VAEDensity(standardise=False, **QUICK).fit(x)
    np.testing.assert_array_equal(bare.scale_, np.ones(3))


def test_a_constant_column_keeps_its_units() -> None:
    x = table(40, 3)
    x[:, 1] = 7e5 + 0.1
    estimator = VAEDensity(**QUICK).fit(x)
    assert estimator.scale_[1] == 1
    assert np.isfinite(estimator.score_samples(x)).all()


def test_a_search_finds_the_number_of_factors() -> None:
    x, _ = factors(500, seed=0, latents=2, width=6)
    search = GridSearchCV(
        VAEDensity(hidden=(), lr=2e-2, epochs=100, batch_size=64, random_state=0), {"z_dim": [1, 2, 3]}, cv=2
    )
    search.fit(x)
    one, two, _ = search.cv_results_["mean_test_score"]
    assert two > one + 0.15
    assert search.best_params_["z_dim"] in (2, 3)
    assert search.best_estimator_.transform(x).shape == (500, search.best_params_["z_dim"])


def test_it_stands_in_pipelines() -> None:
    x = table(90)
    y = (x[:, 0] > 0).astype(int)
    density = make_pipeline(StandardScaler(), VAEDensity(**QUICK)).fit(x)
    assert density.score(x) == pytest.approx(density.score_samples(x).mean())
    classifier = make_pipeline(VAEDensity(z_dim=3, random_state=0, epochs=30), LogisticRegression())
    assert classifier.fit(x, y).score(x, y) > 0.6
    named = make_pipeline(VAEDensity(**QUICK)).set_output(transform="pandas")
    frame = pytest.importorskip("pandas").DataFrame(x, columns=list("abcd"))
    assert list(named.fit_transform(frame).columns) == ["vaedensity0", "vaedensity1"]
    assert list(named[0].feature_names_in_) == list("abcd")


def test_parameters_are_flat_and_copied() -> None:
    estimator = VAEDensity(4, prior="vamp", hidden=(16, 8))
    copy = clone(estimator).set_params(z_dim=5)
    assert copy.get_params() == estimator.get_params() | {"z_dim": 5}
    assert not any("__" in name for name in estimator.get_params(deep=True))


def test_a_stored_estimator_is_the_same() -> None:
    x = table()
    estimator = VAEDensity(prior="vamp", components=5, posterior="flow", **QUICK).fit(x)
    loaded = pickle.loads(pickle.dumps(estimator))
    for method in ("score_samples", "transform"):
        np.testing.assert_array_equal(getattr(loaded, method)(x), getattr(estimator, method)(x))
    np.testing.assert_array_equal(loaded.sample(4, 0), estimator.sample(4, 0))
    # Prior and guide still share their encoder.
    assert loaded.model_.prior._encoder[0] is loaded.guide_.encoder


def test_the_random_state_decides_everything() -> None:
    x = table()
    first, again, other = (
        VAEDensity(**QUICK | {"random_state": state}).fit(x) for state in (0, 0, np.random.RandomState(1))
    )
    np.testing.assert_array_equal(first.score_samples(x), again.score_samples(x))
    np.testing.assert_array_equal(first.score_samples(x), first.score_samples(x))
    assert not np.allclose(first.score_samples(x), other.score_samples(x))
    np.testing.assert_array_equal(first.sample(3, 5), again.sample(3, 5))
    assert not np.array_equal(first.sample(3, 5), first.sample(3, 6))
    assert not np.array_equal(first.sample(3), first.sample(3))


def test_training_and_scoring_leave_the_process_as_it_was(float64: None) -> None:
    x = table()
    # Double precision as torch's default changes nothing.
    before = everything()
    estimator = VAEDensity(prior="mixture", **QUICK).fit(x)
    assert everything() == before
    assert all(p.dtype == torch.float32 for p in estimator.model_.parameters())
    before = everything(estimator.model_, estimator.guide_)
    estimator.score(x), estimator.transform(x), estimator.inverse_transform(np.zeros((2, 2)))
    estimator.sample(3, 0)
    assert everything(estimator.model_, estimator.guide_) == before


@pytest.mark.parametrize("posterior", ["normal", "full_covariance", "flow", "five", "laplace"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp"])
def test_every_prior_goes_with_every_posterior(prior: Any, posterior: Any) -> None:
    x = table(30)
    estimator = VAEDensity(prior=prior, posterior=posterior, components=4, **QUICK).fit(x)
    assert np.isfinite(estimator.score_samples(x)).all()
    assert estimator.transform(x).shape == (30, 2)
    assert estimator.sample(3, 0).shape == (3, 4)


@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        ("bernoulli", (table() > 0).astype(float)),
        ("continuous_bernoulli", 1 / (1 + np.exp(-table()))),
        ("poisson", np.random.default_rng(0).poisson(3, (60, 4))),
        ("negative_binomial", np.random.default_rng(0).poisson(3, (60, 4))),
    ],
)
@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_data_with_units_of_their_own_are_not_standardised(likelihood: Any, x: Any, prior: Any) -> None:
    estimator = VAEDensity(likelihood=likelihood, prior=prior, components=4, **QUICK).fit(x)
    np.testing.assert_array_equal(estimator.scale_, np.ones(4))
    assert np.isfinite(estimator.score(x))
    draws = estimator.sample(50, 0)
    assert draws.min() >= 0
    if likelihood != "continuous_bernoulli":
        np.testing.assert_array_equal(draws, draws.round())
        assert estimator.score(x) < 0  # a probability
    with pytest.raises(ValueError, match="needs x in"):
        clone(estimator).fit(x - 0.5)
    with pytest.raises(ValueError, match="needs x in"):
        estimator.score(x - 0.5)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_images_come_as_images_or_as_rows(network: Any) -> None:
    images = np.random.default_rng(0).uniform(size=(30, 2, 6, 4))
    images[:, 1] = 1000 * images[:, 1] + 5
    options = QUICK | {"hidden": (4, 8), "network": network}
    shaped = VAEDensity(**options).fit(images)
    rows = VAEDensity(x_shape=(2, 6, 4), **options).fit(images.reshape(30, -1))
    assert shaped.x_shape_ == rows.x_shape_ == (2, 6, 4)
    assert shaped.n_features_in_ == rows.n_features_in_ == 48
    np.testing.assert_array_equal(shaped.score_samples(images), rows.score_samples(images.reshape(30, -1)))
    np.testing.assert_array_equal(shaped.score_samples(images.reshape(30, -1)), rows.score_samples(images))
    assert shaped.sample(3, 0).shape == (3, 2, 6, 4)
    np.testing.assert_array_equal(rows.sample(3, 0), shaped.sample(3, 0).reshape(3, -1))
    codes = shaped.transform(images)
    np.testing.assert_array_equal(
        rows.inverse_transform(codes), shaped.inverse_transform(codes).reshape(30, -1)
    )
    # One unit for each channel.
    scales = shaped.scale_.reshape(2, 24)
    np.testing.assert_allclose(scales, images.std((0, 2, 3))[:, None].repeat(24, 1))


def test_codes_are_the_means_of_the_guide() -> None:
    x = table()
    estimator: Any = VAEDensity(standardise=False, **QUICK).fit(x)
    with torch.no_grad():
        loc, _ = estimator.guide_.encoder(torch.from_numpy(x).float())
    np.testing.assert_allclose(estimator.transform(x), loc.numpy(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        decoded = estimator.model_.decoder(loc)
    np.testing.assert_allclose(
        estimator.inverse_transform(loc.numpy()), decoded.numpy(), rtol=1e-5, atol=1e-6
    )


def test_data_held_back_stop_the_training() -> None:
    x = table(100)
    options = QUICK | {"epochs": 200, "lr": 0.05}
    early = VAEDensity(validation_fraction=0.2, patience=2, batch_size=20, **options).fit(x)
    assert "valid_loss" in early.history_[-1]
    assert early.history_[-1]["epoch"] < 200
    assert "valid_loss" not in VAEDensity(**QUICK).fit(x).history_[-1]


@pytest.mark.parametrize(("num", "batch_size"), [(2, 128), (13, 5), (40, 40)])
def test_partial_batches_are_no_obstacle(num: int, batch_size: int) -> None:
    x = table(num)
    estimator = VAEDensity(batch_size=batch_size, **QUICK).fit(x)
    assert estimator.score_samples(x).shape == (num,)
    assert estimator.score_samples(x[:1]).shape == (1,)


@pytest.mark.parametrize(("least", "epochs"), [(150, 30), (50, 20)])
def test_a_small_table_is_seen_often(monkeypatch: pytest.MonkeyPatch, least: int, epochs: int) -> None:
    monkeypatch.setattr("pvae.sklearn._STEPS", least)
    estimator = VAEDensity(**QUICK | {"epochs": None, "batch_size": 10, "hidden": ()}).fit(table(50, 2))
    assert estimator.history_[-1]["step"] == 5 * epochs
    assert estimator.history_[-1]["epoch"] == epochs


def test_missing_values_are_refused() -> None:
    x = table()
    estimator = VAEDensity(**QUICK).fit(x)
    x[3, 1] = np.nan
    for call in (clone(estimator).fit, estimator.score, estimator.transform):
        with pytest.raises(ValueError, match="Input X contains NaN"):
            call(x)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        clone(estimator).fit(x.reshape(60, 1, 2, 2))


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({"network": "rnn"}, table(), "network must be one of mlp, conv, got 'rnn'"),
        ({"prior": "flat"}, table(), "prior must be one of normal, mixture, vamp, got 'flat'"),
        (
            {"posterior": "point"},
            table(),
            "posterior must be one of normal, full_covariance, flow, five, laplace",
        ),
        ({"likelihood": "cauchy"}, table(), "likelihood must be one of normal, bernoulli"),
        ({"network": "conv"}, table(), r"network 'conv' needs images \(n, C, H, W\)"),
        (
            {"posterior": "five", "likelihood": "poisson"},
            table(),
            "posterior 'five' needs likelihood 'normal'",
        ),
        (
            {"prior": "vamp", "components": 61},
            table(),
            "components must lie between 1 and the 60 training data",
        ),
        ({"x_shape": (1, 2, 3)}, table(), r"x_shape must have 4 entries as \(C, H, W\), got \(1, 2, 3\)"),
        (
            {"x_shape": (1, 4, 1)},
            table().reshape(60, 1, 2, 2),
            r"that of the images, \(1, 2, 2\), got \(1, 4, 1\)",
        ),
        ({}, table().reshape(60, 2, 2), r"X must have shape \(n, d\) or \(n, C, H, W\), got \(60, 2, 2\)"),
        ({"validation_fraction": 1.0}, table(), r"validation_fraction must lie in \[0, 1\), got 1.0"),
        ({"validation_fraction": 1e-3}, table(), "validation_fraction must leave data on both sides of 60"),
        ({"patience": 3}, table(), "validation_fraction must be positive where patience is set, got 0"),
        ({"z_dim": 0}, table(), "z_dim must be positive, got 0"),
        ({"batch_size": 0}, table(), "batch_size must lie between 1 and the 60 training data, got 0"),
        ({"epochs": 0}, table(), "epochs must be positive, got 0"),
        ({"lr": -1.0}, table(), "lr must be positive"),
        ({"objective": "mse"}, table(), "mse"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEDensity(**QUICK | options).fit(x)


def test_codes_of_another_width_are_refused() -> None:
    estimator = VAEDensity(**QUICK).fit(table())
    with pytest.raises(ValueError, match="X must have 2 latent columns, got 3"):
        estimator.inverse_transform(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        estimator.sample(0)
