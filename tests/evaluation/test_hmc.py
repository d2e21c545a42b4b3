"""Transitions leave what they are said to leave invariant, step by step and in any units."""

import math

import pytest
import torch
from torch import Tensor

from pvae.evaluation.hmc import Noise, Point, transition

pytestmark = pytest.mark.usefixtures("float64")

# f_0 = N(0, 1) in each of two dimensions, f_1 = N(m, C) up to a factor, with correlation.
MEAN = torch.tensor([1.0, -0.5]).double()
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()


def density(z: Tensor) -> Point:
    precision = torch.linalg.inv(COVARIANCE)
    away = z - MEAN
    return Point(
        z,
        -0.5 * z.square().sum(-1),
        -0.5 * (away @ precision * away).sum(-1) + 3.0,
        -z,
        -away @ precision,
    )


def moments(beta: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of f_0^(1 - beta) f_1^beta, a product of normals."""
    precision = (1 - beta) * torch.eye(2) + beta * torch.linalg.inv(COVARIANCE)
    covariance = torch.linalg.inv(precision)
    return beta * covariance @ torch.linalg.inv(COVARIANCE) @ MEAN, covariance


def noise(num_chains: int, num_data: int, seed: int = 0) -> Noise:
    seeds = [seed + 100 * i for i in range(math.ceil(num_data / 4))]
    return Noise(seeds, num_chains, 4, num_data, torch.zeros(1).double())


def check_moments(z: Tensor, beta: float) -> None:
    """Compare means and second moments with a normal's, at 4.5 standard errors."""
    mean, covariance = moments(beta)
    z = z.reshape(-1, 2)
    error = (covariance.diagonal() / len(z)).sqrt()
    assert ((z.mean(0) - mean).abs() < 4.5 * error).all()
    products = (z - mean).unsqueeze(-1) * (z - mean).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / math.sqrt(len(z))).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("step", "num_leapfrog"), [(0.7, 1), (0.3, 4), (0.8, 3)])
def test_exact_draws_stay_exact(beta: float, step: float, num_leapfrog: int) -> None:
    mean, covariance = moments(beta)
    start = torch.randn(5000, 4, 2) @ torch.linalg.cholesky(covariance).T + mean
    point, random, accepted = density(start), noise(5000, 4), []
    steps = step * torch.tensor([[1.0, 0.6]]).expand(4, 2)
    for _ in range(4):
        point, probability = transition(density, point, beta, steps, num_leapfrog, random)
        accepted.append(probability.mean())
    assert 0.1 < torch.stack(accepted).mean() <= 1
    check_moments(point.z, beta)
    assert (point.z != start).any(-1).double().mean() > 0.2


def test_chains_find_the_target_from_anywhere() -> None:
    point, random = density(torch.full((1000, 4, 2), 3.0)), noise(1000, 4)
    for _ in range(60):
        point, _ = transition(density, point, 0.8, torch.full((4, 2), 0.4), 3, random)
    check_moments(point.z, 0.8)


def test_the_state_carries_its_own_densities() -> None:
    point, random = density(torch.randn(50, 4, 2)), noise(50, 4)
    for _ in range(3):
        point, _ = transition(density, point, 0.5, torch.full((4, 2), 0.9), 2, random)
    again = density(point.z)
    for name in vars(point):
        assert torch.equal(getattr(point, name), getattr(again, name))


def test_a_trajectory_into_nothing_is_not_taken() -> None:
    def cliff(z: Tensor) -> Point:
        point = density(z)
        outside = z[..., 0] > 1
        return Point(
            z,
            point.log_start,
            point.log_end.masked_fill(outside, math.nan),
            point.grad_start,
            point.grad_end.masked_fill(outside.unsqueeze(-1), math.nan),
        )

    point, random = cliff(torch.rand(200, 4, 2)), noise(200, 4)
    for _ in range(10):
        point, probability = transition(cliff, point, 0.5, torch.full((4, 2), 1.0), 3, random)
        assert ((probability >= 0) & (probability <= 1)).all()
    assert point.z.isfinite().all()
    assert (point.z[..., 0] <= 1).all()


def test_noise_of_a_datum_is_that_of_its_block() -> None:
    whole, part = noise(3, 10), noise(3, 5)
    for _ in range(2):
        assert torch.equal(whole.normal(2)[:, :5], part.normal(2))
        assert torch.equal(whole.uniform()[:, :5], part.uniform())
    assert (whole.normal(2)[:, :4] != whole.normal(2)[:, 4:8]).all()
