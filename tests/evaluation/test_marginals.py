"""Marginal divergences against closed forms and quadrature: of one site, of several, of mixtures."""

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor, nn

from pvae.distributions import CodeMixture, NormalMixture
from pvae.evaluation import Marginals, prior_match
from pvae.evaluation.latents import draw_posterior, draw_prior, shared_latents
from pvae.evaluation.marginals import _kernel, _log_marginals, match_marginals
from pvae.inference.isolation import evaluating

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginals(model: Any, guide: Any, x: Tensor, y: Tensor | None = None, seed: int = 0) -> Marginals:
    with evaluating(model, guide):
        names = shared_latents(model, guide, x, y)
        q = draw_posterior(model, guide, x, y, names, 1000 + seed)
        p = draw_prior(model, x, y, names, len(x), 2000 + seed)
        return match_marginals(model, guide, x, y, names, q, p, 600, seed)


class Prior(nn.Module):
    """Any prior of a latent of two dimensions, x ~ N(z, 1)."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.fn)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Only(dist.TorchDistribution):
    """A standard normal of two dimensions that can only be drawn from."""

    has_rsample = False
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, batch_shape: Any = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([2]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Only":
        return Only(batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, *self.batch_shape, 2, dtype=torch.float64)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


def normal_kl(loc: float, variance: float) -> float:
    return 0.5 * (variance + loc**2 - 1 - math.log(variance))


def test_the_divergence_of_normals_is_enclosed(float64: None) -> None:
    # z_j = a x_j + 0.3 + e / 2 against N(0, 1).
    kl = normal_kl(0.3, 0.8**2 + 0.25)
    found = [marginals(Latent(), Encoding(0.8, 0.3, 0.5), draws(400, 3, seed=i), seed=i) for i in range(8)]
    high, low = (torch.stack([getattr(each, name) for each in found]).mean() for name in ("high", "low"))
    error = 4 * float(torch.stack([each.high for each in found]).std()) / 24**0.5
    assert low - error < kl < high + error
    assert high == pytest.approx(kl, abs=error)
    first = found[0]
    assert bool(first.exact.all())
    assert not bool(first.estimated.any())
    assert not bool(first.saturated.any())
    assert first.mean_gap == pytest.approx([0.3] * 3, abs=0.3)
    assert first.log_std_ratio == pytest.approx([0.5 * math.log(0.89)] * 3, abs=0.2)
    information = torch.stack([each.information for each in found]).mean()
    assert information == pytest.approx(0.5 * math.log(1 + 0.64 / 0.25), abs=0.1)


def test_narrow_posteriors_saturate_and_say_so(float64: None) -> None:
    found = marginals(Latent(), Encoding(scale=1e-6), draws(60, 3))
    assert bool(found.saturated.all())
    assert found.information.tolist() == pytest.approx([math.log(60)] * 3, abs=1e-3)
    assert found.ceiling == pytest.approx(math.log(60))
    assert "3 saturated" in str(found)
    # What is left is the rate less the ceiling, and far from the truth, 0.
    assert float(found.high.min()) > 5
    assert float(found.low.max()) < 0


def test_sites_below_others_are_averaged_over_the_draws_above(float64: None) -> None:
    # z_2 of N(0, 1/2) against N(0, 1); z_1 of variance 1/2 + 1 against 3.
    found = [marginals(Layers(), Layers(guide=True), draws(500, 3, seed=i), seed=i) for i in range(4)]
    high, low = (torch.stack([getattr(each, name) for each in found]).mean(0) for name in ("high", "low"))
    expected = [normal_kl(0, 0.5), normal_kl(0, 0.5), normal_kl(0, 0.5)]
    assert high.tolist() == pytest.approx(expected, abs=0.06)
    assert low.tolist() == pytest.approx(expected, abs=0.06)
    assert found[0].exact.tolist() == [True, True, False]
    assert not bool(found[0].estimated.any())


def mixtures() -> list[Any]:
    logits, loc = torch.tensor([0.0, 1.0]), torch.tensor([[-1.0, 0.5], [1.5, 0.0]])
    scale = torch.tensor([[0.5, 1.0], [0.8, 0.3]])
    tril = torch.tensor([[[0.5, 0.0], [0.4, 0.6]], [[0.8, 0.0], [-0.5, 0.3]]])
    parts = dist.Categorical(logits=logits)
    return [
        NormalMixture(logits, loc, scale),
        CodeMixture(logits, loc, scale),
        CodeMixture(logits, loc, scale_tril=tril),
        dist.MixtureSameFamily(parts, dist.Normal(loc, scale).to_event(1)),
        dist.MixtureSameFamily(parts, dist.MultivariateNormal(loc, scale_tril=tril)),
        dist.MultivariateNormal(loc[0], scale_tril=tril[0]),
        dist.Normal(loc[0], scale[0]).to_event(1),
    ]


@pytest.mark.parametrize("which", range(7))
def test_marginals_of_known_distributions_integrate_the_other_number_out(which: int, float64: None) -> None:
    fn = mixtures()[which]
    other = torch.linspace(-8, 8, 4001)
    at = torch.tensor([[0.3, -0.2], [-1.1, 0.8]])
    found = _log_marginals(fn, at)
    assert found is not None
    for i in range(2):
        for j in range(2):
            points = torch.stack([torch.full_like(other, float(at[i, j])), other], -1)
            density = fn.log_prob(points if j == 0 else points.flip(-1)).exp()
            whole = scipy.integrate.simpson(density.numpy(), x=other.numpy())
            assert float(found[i, j].exp()) == pytest.approx(whole, rel=1e-6)


def test_a_mixture_prior_is_in_closed_form(float64: None) -> None:
    prior = mixtures()[0]
    model, guide = Prior(prior), Encoding(0.5, 0.0, 0.7)
    found = [marginals(model, guide, draws(500, 2, seed=i), seed=i) for i in range(10)]
    high = torch.stack([each.high for each in found])
    assert bool(found[0].exact.all())
    grid = torch.linspace(-12, 12, 6001)
    q = scipy.stats.norm(0, math.sqrt(0.25 + 0.49)).pdf(grid.numpy())
    log_p = _log_marginals(prior, torch.stack([grid, grid], -1))
    assert log_p is not None
    for j in range(2):
        kl = scipy.integrate.simpson(q * (np.log(q + 1e-300) - log_p[:, j].numpy()), x=grid.numpy())
        assert float(high[:, j].mean()) == pytest.approx(kl, abs=4 * float(high[:, j].std()) / 10**0.5)


def test_a_prior_that_can_only_be_drawn_from_is_estimated(float64: None) -> None:
    match = prior_match(Prior(Only()), Encoding(0.8, 0.5, 0.5), draws(600, 2), num_bootstrap=0)
    found = match.marginals
    assert bool(found.estimated.all())
    assert not bool(found.exact.any())
    assert found.high.tolist() == pytest.approx([normal_kl(0.5, 0.89)] * 2, abs=0.1)
    assert "2 by kernel estimates" in str(found)
    assert match.information.rate is None
    assert match.information.kl_high is None
    assert match.information.high is not None


def test_the_kernel_estimate_is_scipys_of_the_same_width() -> None:
    sample, at = draws(80, 2), draws(9, 2, seed=1)
    found = _kernel(at, sample)
    for j in range(2):
        column = sample[:, j].numpy()
        spread = min(column.std(ddof=1), scipy.stats.iqr(column) / 1.34)
        kde = scipy.stats.gaussian_kde(column, bw_method=0.9 * spread * 80**-0.2 / column.std(ddof=1))
        assert found[:, j].numpy() == pytest.approx(kde.logpdf(at[:, j].numpy()), rel=1e-9)
    apart = _kernel(sample, sample, apart=True)
    own = math.log(79 / 80)
    assert bool((apart + own <= _kernel(sample, sample)).all())


def test_labels_are_averaged_over(float64: None) -> None:
    y = torch.arange(300) % 2
    x = 4.0 * y.unsqueeze(-1) + 0.8 * draws(300, 1)
    found = marginals(Latent(1, label_weight=4.0), Encoding(1.0, 0.0, 0.6), x, y)
    assert found.high.item() == pytest.approx(0, abs=0.05)
    assert found.exact.tolist() == [False]


def test_histograms_are_those_of_numpy(float64: None) -> None:
    found = marginals(Latent(), Encoding(0.2, 0.0, 0.1), draws(200, 3) * torch.tensor([1.0, 1.0, 8.0]))
    assert found.shown[-1].item() == 2  # the only dimension that matches
    assert found.codes.sum(-1).tolist() == pytest.approx([1.0] * 3)
    assert found.prior.sum(-1).tolist() == pytest.approx([1.0] * 3)
    match = prior_match(Latent(), Encoding(0.2), draws(200, 3), num_bootstrap=0, max_points=600)
    edges = match.marginals.edges
    assert edges.shape == (3, 41)
    assert bool((edges.diff(dim=-1) > 0).all())
    # Narrow codes fill few bins, the prior all of them.
    assert float((match.marginals.codes > 0).double().mean()) < 0.6
    assert float((match.marginals.prior > 0).double().mean()) > 0.8
    record = json.loads(json.dumps(match.marginals.to_dict(), allow_nan=False))
    assert record["histograms"]["shown"] == match.marginals.shown.tolist()
