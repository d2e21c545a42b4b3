"""A mixture in a plane of a larger space: both of its densities, its samples, and what each seed decides."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from pvae.data import Data, DataError, from_tensors, load

SETS: list[dict[str, Any]] = [
    {},
    {"num_components": 8, "law": 6032000},
    {"num_components": 12, "dim": 30, "law": 14082005},
    {"variant": "ring", "num_components": 5, "dim": 4},
    {"num_components": 1, "dim": 3, "law": 0},
]
sets = pytest.mark.parametrize("options", SETS)

Floats = NDArray[np.float64]


def make(**options: Any) -> Data:
    return load("embedded_mixture", **{"num_train": 50, "num_test": 50, "valid": 0, **options})


def density(data: Data, x: Tensor) -> Tensor:
    assert data.log_density is not None
    return data.log_density(x)


def intrinsic(data: Data, x: Tensor) -> Tensor:
    assert data.log_density_intrinsic is not None
    return data.log_density_intrinsic(x)


def embed(data: Data, u: Tensor, w: Tensor | None = None) -> Tensor:
    """The points of coordinates u in the plane ``(n, 2)`` and w across it ``(n, D - 2)``, by columns of R."""
    columns = data.truth.rotation.T
    x = u[:, :1] * columns[0] + u[:, 1:] * columns[1]
    return x if w is None else x + sum(w[:, j : j + 1] * columns[2 + j] for j in range(w.shape[1]))


def covariances(data: Data) -> Floats:
    """Of each component in the large space, ``(K, D, D)``."""
    rotation, dim = data.truth.rotation.numpy(), data.x_shape[0]
    variances = np.full((len(data.truth.stds), dim), 0.02**2)
    variances[:, :2] = data.truth.stds.numpy() ** 2
    return np.stack([rotation @ np.diag(variance) @ rotation.T for variance in variances])


@sets
def test_density_equals_scipy(options: dict[str, Any]) -> None:
    data = make(**options)
    means = embed(data, data.truth.means).numpy()
    generator = torch.Generator().manual_seed(3)
    near = data.train.x.double()
    # Also points off the plane and far from every component.
    off = near[:10] + 0.05 * torch.randn(10, *data.x_shape, generator=generator, dtype=torch.float64)
    x = torch.cat([near, off, 3 * near[:5]])
    each = [
        stats.multivariate_normal(mean, covariance).logpdf(x.numpy())
        for mean, covariance in zip(means, covariances(data), strict=True)
    ]
    expected = np.logaddexp.reduce(each, 0) - math.log(len(means))
    torch.testing.assert_close(density(data, x), torch.from_numpy(expected), atol=1e-6, rtol=1e-9)


@sets
def test_the_densities_differ_by_that_of_the_padding(options: dict[str, Any]) -> None:
    data = make(**options)
    x = data.train.x.double()
    padding = x.numpy() @ data.truth.rotation.numpy()[:, 2:]
    expected = stats.norm(scale=0.02).logpdf(padding).sum(1)
    difference = density(data, x) - intrinsic(data, x)
    torch.testing.assert_close(difference, torch.from_numpy(expected), atol=1e-9, rtol=1e-10)


@sets
def test_the_density_in_the_plane_has_mass_one(options: dict[str, Any]) -> None:
    data = make(**options)
    axis = torch.arange(-9, 9, 0.06, dtype=torch.float64)
    u = torch.cartesian_prod(axis, axis)
    assert float(intrinsic(data, embed(data, u)).exp().sum()) * 0.06**2 == pytest.approx(1, abs=1e-10)


def test_the_density_in_the_plane_is_the_integral_across_it() -> None:
    data = make(dim=3, num_components=3, law=7)
    w = torch.arange(-0.24, 0.24, 0.002, dtype=torch.float64).unsqueeze(-1)
    for u in data.truth.project(data.train.x[:5].double()):
        across = density(data, embed(data, u.expand(len(w), 2), w))
        marginal = float(across.logsumexp(0)) + math.log(0.002)
        at = embed(data, u.unsqueeze(0), torch.tensor([[0.7]], dtype=torch.float64))
        assert float(intrinsic(data, at)) == pytest.approx(marginal, abs=1e-10)


def test_the_plane_is_where_the_data_are() -> None:
    data = make(num_train=4000)
    x, rotation = data.train.x.double(), data.truth.rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(50, dtype=torch.float64), atol=1e-13, rtol=0)
    _, spread, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    # Cosines of the angles between the plane and the first two principal directions.
    cosines = torch.linalg.svdvals(directions[:2] @ rotation[:, :2])
    assert float(cosines.min()) > 1 - 1e-5
    assert float(spread[1]) > 20 * float(spread[2])
    torch.testing.assert_close(embed(data, data.truth.project(x)), x, atol=0.15, rtol=0)
    torch.testing.assert_close(data.truth.project(embed(data, x[:, :2])), x[:, :2])
    assert data.truth.project(data.train.x[:6].reshape(2, 3, 50)).shape == (2, 3, 2)
    assert data.truth.project(data.train.x).dtype == torch.float32


@pytest.mark.parametrize("options", [{"dim": 6}, {"dim": 6, "variant": "ring", "num_components": 7}])
def test_sample_moments(options: dict[str, Any]) -> None:
    num = 20_000
    data = make(num_train=num, **options)
    x = data.train.x.double().numpy()
    means = embed(data, data.truth.means).numpy()
    mean = means.mean(0)
    away = means - mean
    covariance = covariances(data).mean(0) + away.T @ away / len(means)
    assert (np.abs(x.mean(0) - mean) < 4 * np.sqrt(covariance.diagonal() / num)).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = products.std(0) / math.sqrt(num)
    assert (np.abs(products.mean(0) - covariance) < 4 * error).all()


def test_samples_are_normal_around_the_mean_of_their_label() -> None:
    data = make(num_train=20_000, dim=5, num_components=3, law=1)
    x, y = data.train.x.double().numpy(), data.train.y
    assert y is not None
    assert data.class_names == ("0", "1", "2")
    assert stats.chisquare(torch.bincount(y).numpy()).pvalue > 1e-3
    turned = x @ data.truth.rotation.numpy()
    plane = (turned[:, :2] - data.truth.means.numpy()[y]) / data.truth.stds.numpy()[y]
    for column in (*plane.T, *(turned[:, 2:] / 0.02).T):
        assert stats.kstest(column, "norm").pvalue > 1e-3
    # A padding of 0.021 would be seen.
    assert stats.kstest(turned[:, 2] / 0.021, "norm").pvalue < 1e-3


def test_the_law_hangs_on_its_own_seed_alone() -> None:
    data, other, another = make(seed=0), make(seed=1), make(law=3)
    for name in ("means", "stds", "rotation"):
        assert torch.equal(getattr(data.truth, name), getattr(other.truth, name))
        assert not torch.equal(getattr(data.truth, name), getattr(another.truth, name))
    assert not torch.equal(data.train.x, other.train.x)
    assert torch.equal(density(data, data.train.x), density(other, data.train.x))
    x = data.train.x.double()
    assert not torch.equal(data.train.x, another.train.x)
    assert float((density(data, x) - density(another, x)).min()) > 100  # another plane
    assert data.protocol.hash != other.protocol.hash
    # The plane is turned by the same seed in both variants.
    assert torch.equal(make(variant="ring").truth.rotation, data.truth.rotation)


def test_the_mixture_of_the_papers_code() -> None:
    truth = make().truth
    means = [[0.77023, -0.14458], [2.96965, -4.37120], [4.10547, 0.58461], [3.33489, -1.37638]]
    stds = [[0.50401, 0.51352], [0.47593, 0.52692], [0.48829, 0.48596], [0.52893, 0.48626]]
    torch.testing.assert_close(truth.means, torch.tensor(means, dtype=torch.float64), atol=6e-4, rtol=0)
    torch.testing.assert_close(truth.stds, torch.tensor(stds, dtype=torch.float64), atol=6e-4, rtol=0)
    assert (truth.stds.shape, truth.rotation.shape, truth.padding_std) == ((4, 2), (50, 50), 0.02)
    many = make(num_components=2000).truth
    assert float(many.means.abs().max()) == 5
    assert float((many.means.abs() == 5).double().mean()) == pytest.approx(2 * stats.norm.sf(1.25), abs=0.03)
    free = many.means[many.means.abs() < 5]
    assert stats.kstest(free.numpy(), stats.truncnorm(-1.25, 1.25, scale=4).cdf).pvalue > 1e-3
    assert float(many.stds.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(many.stds.std()) == pytest.approx(0.02, abs=2e-3)
    assert 0.4 <= float(many.stds.min()) < float(many.stds.max()) <= 0.6


def test_a_ring() -> None:
    truth = make(variant="ring", num_components=4).truth
    means = torch.tensor([[2.5, 0.0], [0.0, 2.5], [-2.5, 0.0], [0.0, -2.5]], dtype=torch.float64)
    torch.testing.assert_close(truth.means, means, atol=1e-12, rtol=0)
    assert (truth.stds == 0.25).all()


def test_who_has_a_density_in_the_plane() -> None:
    data = make()
    assert data.to("cpu").log_density_intrinsic == data.log_density_intrinsic is not None
    x = data.train.x
    single = intrinsic(data, x[:6].reshape(2, 3, 50))
    assert (single.shape, single.dtype) == ((2, 3), torch.float32)
    assert intrinsic(data, x[0]).shape == ()
    points = x[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: intrinsic(data, t), points)
    assert load("gaussian_mixture", num_train=2).log_density_intrinsic is None
    assert from_tensors(x, scale="real").log_density_intrinsic is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 2}, r"dim must lie in 3 \.\.\. 4096, got 2"),
        ({"num_components": 0}, "num_components must be positive, got 0"),
        ({"variant": "rings"}, "variant must be 'random' or 'ring', got 'rings'"),
        ({"num_test": 0}, "num_test must be positive, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**options)


def test_points_of_another_space_are_refused() -> None:
    data = make()
    for function in (data.log_density, data.log_density_intrinsic, data.truth.project):
        assert function is not None
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 50\), got \(4, 2\)"):
            function(torch.zeros(4, 2))
