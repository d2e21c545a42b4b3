"""Gaussians fitted to each datum: their draws, their moves, and optima in closed form."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.evaluation.latents import latent_names
from pvae.evaluation.layout import Layout, layout_of
from pvae.evaluation.local_normal import (
    AdjustedGuide,
    Ascent,
    LocalNormal,
    family_of,
    fit_adjustment,
    fit_normal,
    moments,
)
from pvae.evaluation.weights import draw, log_weights
from pvae.guides import FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.nn import MLPEncoder

from .programs import Latent, Layers

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = Layout({"z": torch.Size([3])}, torch.float64)


def gaussians(num: int, dim: int, spread: float = 5.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means ``(num, dim)`` and covariances of some size and correlation."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(num, dim, dim, generator=generator)
    scale = 10.0 ** torch.linspace(0, spread, dim)
    covariance = scale[:, None] * (root @ root.mT + 0.5 * torch.eye(dim)) * scale
    return 5 * scale * torch.randn(num, dim, generator=generator), covariance


def log_density(loc: Tensor, covariance: Tensor) -> Any:
    return torch.distributions.MultivariateNormal(loc, covariance).log_prob


def kl(q: LocalNormal, loc: Tensor, covariance: Tensor) -> Tensor:
    tril = q.full().factor
    p = torch.distributions.MultivariateNormal(loc, covariance)
    return torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(q.loc, scale_tril=tril), p
    )


def test_draws_follow_the_density_they_come_with() -> None:
    loc, covariance = gaussians(2, 3, spread=1.0)
    for factor in (torch.linalg.cholesky(covariance), covariance.diagonal(dim1=1, dim2=2).sqrt()):
        q = LocalNormal(loc, factor)
        values, log_q = q.draw(PLAIN, 4000, seed=1)
        z = values["z"]
        for i in range(2):
            sigma = covariance[i] if factor.ndim == 3 else covariance[i].diagonal().diag()
            by_scipy = stats.multivariate_normal(loc[i], sigma).logpdf(z[:, i])
            torch.testing.assert_close(log_q[:, i], torch.from_numpy(by_scipy))
            white = torch.linalg.solve(torch.linalg.cholesky(sigma), (z[:, i] - loc[i]).T)
            assert (white.mean(-1).abs() < 0.07).all()
            torch.testing.assert_close(white @ white.T / 4000, torch.eye(3), rtol=0, atol=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_moves_are_made_in_whitened_coordinates(full: bool) -> None:
    loc, covariance = gaussians(2, 3)
    q = LocalNormal(loc, torch.linalg.cholesky(covariance))
    q = q if full else q.diagonalised()
    shift, stretch, mix = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3, 3) if full else None
    moved = q.moved(shift, stretch, mix)
    tril = q.full().factor
    unit = torch.eye(3) + (torch.zeros(2, 3, 3) if mix is None else mix.tril(-1))
    torch.testing.assert_close(moved.full().factor, tril @ unit @ torch.diag_embed(stretch.exp()))
    torch.testing.assert_close(moved.loc, loc + (tril @ shift.unsqueeze(-1)).squeeze(-1))


def test_the_best_full_gaussian_is_the_target() -> None:
    loc, covariance = gaussians(4, 3)
    start = LocalNormal(torch.zeros(4, 3), 10.0 ** torch.linspace(0, 5, 3).expand(4, 3)).full()
    found = fit_normal(log_density(loc, covariance), start, Ascent(400, 16, 0.2, seed=0))
    assert kl(found, loc, covariance).max() < 1e-6


def test_the_best_diagonal_gaussian_has_the_precisions_inverses() -> None:
    loc, covariance = gaussians(4, 3)
    start = LocalNormal(torch.zeros(4, 3), 10.0 ** torch.linspace(0, 5, 3).expand(4, 3))
    found = fit_normal(log_density(loc, covariance), start, Ascent(400, 16, 0.2, seed=0))
    precision = torch.linalg.inv(covariance).diagonal(dim1=1, dim2=2)
    best = LocalNormal(loc, precision**-0.5)
    assert (kl(found, loc, covariance) - kl(best, loc, covariance)).max() < 0.01
    assert found.factor.ndim == 2


def test_a_datum_moves_as_if_it_were_alone() -> None:
    loc, covariance = gaussians(4, 3)
    start, ascent = LocalNormal(torch.zeros(4, 3), torch.ones(4, 3)).full(), Ascent(20, 4, 0.1, seed=0)
    together = fit_normal(log_density(loc, covariance), start, ascent)
    alone = LocalNormal(start.loc[2:3], start.factor[2:3])
    alone = fit_normal(log_density(loc[2:3], covariance[2:3]), alone, ascent)
    torch.testing.assert_close(together.loc[2:3], alone.loc)
    torch.testing.assert_close(together.factor[2:3], alone.factor)


def test_a_datum_without_a_gradient_stands_still_and_spoils_no_other() -> None:
    loc, covariance = gaussians(2, 3)
    start = LocalNormal(torch.zeros(2, 3), torch.ones(2, 3))

    def score(z: Tensor) -> Tensor:
        broken = torch.tensor([math.nan, 1.0])
        return log_density(loc, covariance)(z) * broken

    found = fit_normal(score, start, Ascent(20, 4, 0.1, seed=0))
    assert torch.equal(found.loc[0], start.loc[0])
    assert found.loc[1].isfinite().all()
    assert not torch.equal(found.loc[1], start.loc[1])


def test_sites_stand_side_by_side_and_come_back() -> None:
    layout = layout_of(Layers(), torch.randn(4, 3), None)
    assert layout == Layout({"z_2": torch.Size([2]), "z_1": torch.Size()}, torch.float64)
    assert layout.size == 3
    z = torch.randn(5, 4, 3)
    values = layout.sites(z)
    assert values["z_2"].shape == (5, 4, 2)
    assert values["z_1"].shape == (5, 4)
    assert torch.equal(layout.vectors(values), z)
    assert (
        Layout({"z": torch.Size([2, 2])}, torch.float32).sites(torch.randn(6, 4))["z"].dtype == torch.float32
    )
    assert latent_names(Layers(), Layers(guide=True), torch.randn(4, 3), None) == tuple(layout.shapes)


@pytest.mark.parametrize("prior", [dist.Bernoulli(0.5), dist.LogNormal(0.0, 1.0)])
def test_a_latent_that_is_no_real_number_is_refused(prior: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="model site 'z' must be real"):
        layout_of(model, torch.randn(3), None)


def test_families_are_recognised() -> None:
    x = torch.rand(5, 1, 4, 4)

    def family(guide: Any, data: Tensor = x) -> Any:
        return family_of(guide, data, None)

    encoder = MLPEncoder((1, 4, 4), 3)
    for entropy in ("sampled", "analytic"):
        name, own = family(NormalGuide(encoder, entropy=entropy))
        assert name == "diagonal"
        torch.testing.assert_close(own.loc, encoder(x)[0])
        torch.testing.assert_close(own.factor, encoder(x)[1])
    guide = FullCovarianceGuide(encoder)
    torch.nn.init.normal_(guide.lower.weight)  # type: ignore[union-attr]
    name, own = family(guide)
    assert name == "full"
    h = encoder.features(x)
    torch.testing.assert_close(own.factor, guide.scale_tril(h, encoder.heads(h)[1]))
    assert family(FlowGuide(encoder)) == ("other", None)
    assert family(Layers(guide=True), torch.randn(5, 3)) == ("conditional", None)

    def heavy(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z_2", dist.Normal(x[..., :2], 1.0).to_event(1))
            pyro.sample("z_1", dist.StudentT(3.0, x[..., 2], 1.0))

    assert family(heavy, torch.randn(5, 3)) == ("other", None)
    # What is no normal cannot be shifted as one.
    layout = layout_of(Layers(), torch.randn(5, 3), None)
    with pytest.raises(ValueError, match="guide site 'z_1' must be normal for each datum, got StudentT"):
        AdjustedGuide.unchanged(heavy, layout, torch.randn(5, 3))(torch.randn(5, 3))


def test_moments_are_those_of_the_guide() -> None:
    x = torch.randn(4, 3)
    layout = layout_of(Layers(), x, None)
    found = moments(Layers(guide=True), x, None, layout, seed=0)
    mean = torch.cat([x[:, :2] / 2, x[:, 2:] / 2 + x[:, :2].sum(-1, keepdim=True) / 2], -1)
    covariance = 0.25 * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 3.0]])
    torch.testing.assert_close(found.loc, mean, rtol=0, atol=0.25)
    torch.testing.assert_close(found.factor @ found.factor.mT, covariance.expand(4, 3, 3), rtol=0, atol=0.25)


def test_an_unchanged_guide_is_the_guide() -> None:
    x = torch.randn(4, 3)
    layout = layout_of(Layers(), x, None)
    guide = Layers(guide=True)
    plain, log_plain = draw(guide, x, None, 7, seed=3)
    same, log_same = draw(AdjustedGuide.unchanged(guide, layout, x), x, None, 7, seed=3)
    torch.testing.assert_close(same["z_1"], plain["z_1"])
    torch.testing.assert_close(log_same, log_plain)


def test_conditionals_are_adjusted_to_their_optimum() -> None:
    """Joint Gaussian with the dependence of the guide, z_1 on z_2 by 1, where the posterior has 1/2."""
    x = torch.randn(6, 3)
    model, guide = Layers(), Layers(guide=True)
    layout = layout_of(model, x, None)
    start = AdjustedGuide.unchanged(guide, layout, x)
    found = fit_adjustment(model, start, x, None, Ascent(300, 16, 0.1, seed=0))
    # Precision of p(z | x): prior of z_2, z_1 given z_2, and unit noise on each.
    ones = torch.tensor([[1.0, 1.0, -1.0]])
    precision = torch.diag(torch.tensor([1.0, 1.0, 0.0])) + ones.T @ ones + torch.eye(3)
    dependence = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    variances = 1 / (dependence.T @ precision @ dependence).diagonal()
    loss = -0.5 * (precision.logdet() + variances.log().sum())
    covariance = torch.linalg.inv(torch.diag(torch.tensor([1.0, 1.0, 0.0])) + ones.T @ ones) + torch.eye(3)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    with torch.no_grad():
        drawn = draw(found, x, None, 20_000, seed=1)
        elbo = log_weights(model, x, None, [drawn], 20_000).mean(0)
    torch.testing.assert_close(elbo, log_p - loss, rtol=0, atol=0.03)
    assert loss > 0.05


def test_draws_of_a_scalar_latent_work() -> None:
    model = Latent(z_dim=1)
    layout = layout_of(model, torch.randn(3, 1), None)
    found = fit_normal(
        lambda z: -0.5 * ((z[..., 0] - 0.5) / 0.1).square(),
        LocalNormal(torch.zeros(3, 1), torch.ones(3, 1, 1)),
        Ascent(300, 4, 0.1, seed=0),
    )
    torch.testing.assert_close(found.loc, torch.full((3, 1), 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.factor, torch.full((3, 1, 1), 0.1), rtol=1e-2, atol=0)
    assert found.draw(layout, 5, 0)[0]["z"].shape == (5, 3, 1)
