"""Known densities: equal to an independent computation, of mass one, and followed by the samples."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor

from pvae.data import Data, DataError, load

PLANAR: list[tuple[str, dict[str, Any]]] = [
    ("gaussian_mixture", {}),
    ("gaussian_mixture", {"components": 3, "layout": "random", "radius": 1.5, "std": 0.3}),
    ("two_moons", {}),
    ("two_moons", {"noise": 0.25}),
    ("manifold", {}),
    ("manifold", {"noise": 0.4}),
]
planar = pytest.mark.parametrize(("name", "options"), PLANAR)

Curve = Callable[[float], tuple[float, float]]

CURVES: dict[str, list[tuple[Curve, Callable[[float], float], float, float]]] = {
    # Curve, weight of the parameter, and its range.
    "two_moons": [
        (lambda t: (math.cos(t), math.sin(t)), lambda t: 0.5 / math.pi, 0.0, math.pi),
        (lambda t: (1 - math.cos(t), 0.5 - math.sin(t)), lambda t: 0.5 / math.pi, 0.0, math.pi),
    ],
    "manifold": [(lambda t: (t, math.sin(math.pi * t / 2)), lambda t: float(stats.norm.pdf(t)), -12.0, 12.0)],
}


def log_density(data: Data, x: Tensor) -> Tensor:
    assert data.log_density is not None
    return data.log_density(x)


def grid(step: float = 0.08, reach: float = 8.0) -> tuple[Tensor, float]:
    """Centres of square cells, ``(n, n, 2)``, and their area."""
    axis = torch.arange(-reach, reach, step, dtype=torch.float64) + step / 2
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1), step**2


@planar
def test_integrates_to_one(name: str, options: dict[str, Any]) -> None:
    points, area = grid()
    mass = float(log_density(load(name, num_train=10, **options), points).exp().sum()) * area
    assert mass == pytest.approx(1.0, abs=1e-9)


def quadrature(
    point: list[float], curve: Curve, weight: Callable[[float], float], low: float, high: float, noise: float
) -> float:
    """Logarithm of the integral of weight times exp(-squared distance / 2 noise^2) along a curve, by SciPy.

    The integrand is scaled by its peak and cut into short pieces, so that no narrow peak is missed.
    """

    def exponent(t: float) -> float:
        u, v = curve(t)
        return -((point[0] - u) ** 2 + (point[1] - v) ** 2) / (2 * noise**2)

    peak = max(exponent(float(t)) for t in np.linspace(low, high, 4000))
    total = 0.0
    for a, b in itertools.pairwise(np.linspace(low, high, 400).tolist()):
        if max(exponent(a), exponent(b), exponent((a + b) / 2)) > peak - 60:
            total += integrate.quad(
                lambda t: weight(t) * math.exp(exponent(t) - peak), a, b, epsabs=0, epsrel=1e-10
            )[0]
    return peak + math.log(total)


@pytest.mark.parametrize(("name", "noise"), [(n, s) for n in CURVES for s in (0.03, 0.1, 0.5)])
def test_curves_equal_adaptive_quadrature(name: str, noise: float) -> None:
    data = load(name, noise=noise, num_train=50)
    far = torch.tensor([[3.0, 3.0], [-4.0, 0.5], [0.5, -5.0], [2.0, 0.0]], dtype=torch.float64)
    x = torch.cat([data.train.x.to(torch.float64)[:6], far])
    constant = math.log(2 * math.pi * noise**2)
    for point, value in zip(x.tolist(), log_density(data, x).tolist(), strict=True):
        pieces = [quadrature(point, *branch, noise) for branch in CURVES[name]]
        assert value == pytest.approx(float(np.logaddexp.reduce(pieces)) - constant, abs=1e-8)


def summed(
    decode: Callable[..., list[NDArray[Any]]], axes: list[NDArray[Any]], x: list[float], noise: float
) -> tuple[float, NDArray[Any], NDArray[Any]]:
    """Log p(x), mean and covariance of p(z | x), by sums over a fine grid of all latents."""
    z = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(len(axes), -1)
    squares = sum((coordinate - g) ** 2 for coordinate, g in zip(x, decode(*z), strict=True))
    log_joint = -0.5 * (z**2).sum(0) - 0.5 * squares / noise**2
    log_joint += sum(math.log(axis[1] - axis[0]) for axis in axes)
    log_joint -= 0.5 * (len(z) + len(x)) * math.log(2 * math.pi) + len(x) * math.log(noise)
    weights = np.exp(log_joint - log_joint.max())
    log_density = math.log(weights.sum()) + float(log_joint.max())
    return log_density, np.average(z, axis=1, weights=weights), np.cov(z, aweights=weights, ddof=0)


@pytest.mark.parametrize(
    ("curvature", "noise", "z"),
    [(1.0, 0.1, (1.0, 1.0)), (2.0, 0.1, (1.0, 1.0)), (1.0, 0.3, (1.0, 1.0)), (1.0, 0.1, (1.0, -0.5))],
)
def test_saddle_equals_a_sum_over_both_latents(
    curvature: float, noise: float, z: tuple[float, float]
) -> None:
    data = load("saddle", curvature=curvature, noise=noise, num_train=2)
    on_surface = data.truth.decode(torch.tensor([z], dtype=torch.float64))
    x = torch.cat([on_surface, data.train.x.double(), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    values = log_density(data, x)
    means, covariances = data.truth.posterior(x)
    for i, point in enumerate(x.tolist()):
        # Where the last point lies off the surface, both latents may have either sign.
        reach = max(9 * noise, 2.0 if i == 3 else 0.0)
        axes = [np.linspace(point[j] - reach, point[j] + reach, 701) for j in range(2)]
        expected = summed(lambda a, b: [a, b, curvature * a * b], axes, point, noise)
        assert float(values[i]) == pytest.approx(expected[0], abs=1e-9)
        np.testing.assert_allclose(means[i], expected[1], atol=1e-9)
        np.testing.assert_allclose(covariances[i], expected[2], atol=1e-9)
    assert math.copysign(1.0, float(covariances[0, 0, 1])) == -math.copysign(1.0, z[0] * z[1])


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_posteriors_on_the_sine_equal_sums(noise: float) -> None:
    data = load("manifold", noise=noise, num_train=4)
    x = torch.cat([data.train.x.double(), torch.tensor([[0.2, 3.0], [2.0, -0.7]], dtype=torch.float64)])
    means, covariances = data.truth.posterior(x)
    axis = np.linspace(-9.0, 9.0, 200_001)
    for point, mean, covariance in zip(x.tolist(), means, covariances, strict=True):
        expected = summed(lambda t: [t, np.sin(np.pi * t / 2)], [axis], point, noise)
        np.testing.assert_allclose(mean, expected[1], atol=1e-9)
        np.testing.assert_allclose(covariance, expected[2].reshape(1, 1), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"), [("saddle", {"curvature": 1.5, "noise": 0.4}), ("manifold", {})]
)
def test_posteriors_of_samples_make_up_the_prior(name: str, options: dict[str, Any]) -> None:
    data = load(name, num_train=2000, **options)
    means, covariances = data.truth.posterior(data.train.x.double())
    assert (means.shape[1], means.dtype) == (data.truth.z_dim, torch.float64)
    total = covariances.mean(0) + torch.cov(means.T).reshape(covariances.shape[1:])
    torch.testing.assert_close(total, torch.eye(len(total), dtype=torch.float64), atol=0.1, rtol=0)
    assert means.mean(0).abs().max() < 0.08
    single = data.truth.posterior(data.train.x[:6].reshape(2, 3, -1))
    assert [tuple(part.shape[:2]) for part in single] == [(2, 3), (2, 3)]
    torch.testing.assert_close(single[1].double().flatten(0, 1), covariances[:6], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, \d\), got \(4, 7\)"):
        data.truth.posterior(torch.zeros(4, 7))


def test_saddle_samples_lie_around_the_surface() -> None:
    data = load("saddle", curvature=0.7, noise=0.2, num_train=20_000)
    x = data.train.x.double()
    off = x[:, 2] - 0.7 * x[:, 0] * x[:, 1]
    # The noise of the third coordinate, and of the other two times the slope there: a^2 (2 + s^2) s^2.
    assert float(off.square().mean()) == pytest.approx(0.04 + 0.49 * (2 + 0.04) * 0.04, rel=0.05)
    assert float(x[:, 0].var()) == pytest.approx(1.04, rel=0.04)
    assert float(x[:, 2].var()) == pytest.approx(0.49 + 0.04, rel=0.06)
    with pytest.raises(DataError, match=r"curvature must be positive, got -1\.0"):
        load("saddle", curvature=-1.0)


@pytest.mark.parametrize("options", [{}, {"components": 3, "layout": "random", "std": 0.4}])
def test_mixture_equals_scipy(options: dict[str, Any]) -> None:
    data = load("gaussian_mixture", num_train=50, **options)
    centres, std = data.truth.centres.numpy(), data.truth.std
    x = data.train.x.to(torch.float64)
    each = [stats.multivariate_normal(c, std**2 * np.eye(2)).pdf(x.numpy()) for c in centres]
    expected = torch.from_numpy(np.log(np.mean(each, 0)))
    torch.testing.assert_close(log_density(data, x), expected, atol=1e-10, rtol=0)


def test_ring_of_centres() -> None:
    centres = load("gaussian_mixture", components=4, radius=2.0, num_train=1).truth.centres
    expected = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(centres, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("x_dim", "z_dim"), [(1, 1), (5, 2), (3, 4), (40, 6)])
def test_ppca_equals_scipy(x_dim: int, z_dim: int) -> None:
    data = load("ppca", x_dim=x_dim, z_dim=z_dim, noise=0.7, num_train=20)
    truth = data.truth
    assert (truth.W.shape, truth.b.shape, data.x_shape) == ((x_dim, z_dim), (x_dim,), (x_dim,))
    x = data.train.x.to(torch.float64)
    covariance = (truth.W @ truth.W.T).numpy() + 0.49 * np.eye(x_dim)
    expected = stats.multivariate_normal(truth.b.numpy(), covariance).logpdf(x.numpy())
    torch.testing.assert_close(log_density(data, x), torch.from_numpy(expected), atol=1e-9, rtol=0)


@planar
def test_samples_follow_the_density(name: str, options: dict[str, Any]) -> None:
    data = load(name, num_train=20_000, **options)
    # Chi-square over coarse cells, whose probabilities are integrals of the density over fine ones.
    points, area = grid()
    mass = log_density(data, points).exp() * area
    coarse = 5
    n = mass.shape[0] // coarse
    expected = mass.reshape(n, coarse, n, coarse).sum((1, 3)).flatten().numpy() * 20_000
    edges = np.linspace(-8.0, 8.0, n + 1)
    x = data.train.x.double().numpy()
    observed = np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))[0].flatten()
    assert pvalue(observed, expected) > 1e-3
    # A sampler with a little less noise would fail: the same test sees it.
    other: NDArray[np.float64] = x + 0.2 * (x - x.mean(0))
    moved = np.histogram2d(other[:, 0], other[:, 1], bins=(edges, edges))[0].flatten()
    assert pvalue(moved, expected) < 1e-6


def pvalue(observed: NDArray[Any], expected: NDArray[Any]) -> float:
    """Of Pearson's test, with all cells of fewer than five expected data in one."""
    few = expected < 5
    o = np.append(observed[~few], observed[few].sum())
    e = np.append(expected[~few], expected[few].sum())
    return float(stats.chi2.sf(((o - e) ** 2 / e).sum(), len(o) - 1))


def test_ppca_samples_follow_the_density() -> None:
    data = load("ppca", num_train=20_000)
    truth = data.truth
    covariance = truth.W @ truth.W.T + truth.noise**2 * torch.eye(10, dtype=torch.float64)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (data.train.x.double() - truth.b).T, upper=False
    ).T
    for column in white.T.numpy():
        assert stats.kstest(column, "norm").pvalue > 1e-4
    assert stats.kstest(white.square().sum(1).numpy(), "chi2", args=(10,)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *PLANAR,
        ("saddle", {}),
        ("saddle", {"curvature": 2.0, "noise": 0.3}),
        ("ppca", {}),
        ("embedded_mixture", {}),
    ],
)
def test_density_keeps_shape_type_and_gradient(name: str, options: dict[str, Any]) -> None:
    data = load(name, num_train=6, **options)
    x = data.train.x.double()
    value = log_density(data, x)
    assert value.dtype == torch.float64
    single = log_density(data, x.float().reshape(2, 3, -1))
    assert (single.shape, single.dtype) == ((2, 3), torch.float32)
    torch.testing.assert_close(single.flatten().double(), value, atol=2e-4, rtol=1e-4)
    assert log_density(data, x[0]).shape == ()
    assert log_density(data, x[:0]).shape == (0,)
    assert torch.autograd.gradcheck(lambda t: log_density(data, t), x[:3].requires_grad_())
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, \d+\), got \(4, 7\)"):
        log_density(data, torch.zeros(4, 7))


def test_density_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("two_moons", num_train=100)
    x = data.train.x.double()
    whole = log_density(data, x)
    monkeypatch.setattr("pvae.data._synthetic._BUDGET", 1)
    torch.testing.assert_close(log_density(data, x), whole, atol=1e-13, rtol=0)


def test_labels() -> None:
    moons = load("two_moons", noise=0.01)
    assert moons.train.y is not None
    x = moons.train.x
    upper = ((x - torch.tensor([0.0, 0.0])).norm(dim=1) - 1).abs() < 0.06
    lower = ((x - torch.tensor([1.0, 0.5])).norm(dim=1) - 1).abs() < 0.06
    assert bool(upper[moons.train.y == 0].all())
    assert bool(lower[moons.train.y == 1].all())
    assert float(moons.train.y.double().mean()) == pytest.approx(0.5, abs=0.02)
    mixture = load("gaussian_mixture")
    assert mixture.train.y is not None
    nearest = torch.cdist(mixture.train.x.double(), mixture.truth.centres).argmin(1)
    assert float((nearest == mixture.train.y).double().mean()) > 0.99
    assert load("manifold").train.y is load("saddle").train.y is None


@pytest.mark.parametrize(
    "name", ["gaussian_mixture", "embedded_mixture", "two_moons", "manifold", "saddle", "ppca"]
)
def test_parts_are_pure_functions_of_the_seed(name: str) -> None:
    data = load(name)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # to show that nothing reads it
    again, larger, other = load(name), load(name, num_train=11_000, valid=0), load(name, seed=1)
    assert torch.equal(again.train.x, data.train.x)
    assert again.protocol == data.protocol
    assert torch.equal(larger.test.x, data.test.x)
    assert larger.parts == ("train", "test")
    assert not torch.equal(other.test.x, data.test.x)
    assert other.protocol.hash != data.protocol.hash != larger.protocol.hash
    assert not torch.equal(data.train.x[:2000], data.valid.x)
    # Values of few bits, so that digests do not hang on the last digits of a machine's sine.
    assert torch.equal(data.train.x.double() * 2**20, (data.train.x.double() * 2**20).round())
