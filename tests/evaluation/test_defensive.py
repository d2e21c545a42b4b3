"""A mixture of prior and guide: its density, its bounded weights, and programs of several latents."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from pvae.evaluation import DefensiveGuide, annealed_likelihood, log_likelihood
from pvae.evaluation.defensive import _Either
from pvae.evaluation.weights import draw, log_weights
from pvae.guides import LaplaceGuide
from pvae.inference.isolation import evaluating
from pvae.inference.program import SiteRecorder, particle_plate
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import LadderSpec, MLPDecoder, MLPEncoder
from pvae.priors import DiffusionPrior, StandardNormal
from pvae.testing import check_distribution, check_likelihood_estimator
from tests.evaluation.programs import Encoding, Latent, Layers
from tests.evaluation.test_annealing import Zero, layers_log_prob
from tests.ladders import jolted, ladder
from tests.oracles import LinearGaussianVAE

pytestmark = pytest.mark.usefixtures("float64")


def layers_densities(x: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-densities of the latents of ``Layers`` under prior and guide, by SciPy."""
    log_normal = scipy.stats.norm.logpdf
    total = above.sum(-1)
    log_p = log_normal(above).sum(-1) + log_normal(below, total)
    log_q = log_normal(above, x[:, :2] / 2, 0.5).sum(-1) + log_normal(below, x[:, 2] / 2 + total, 0.5)
    return torch.from_numpy(log_p), torch.from_numpy(log_q)


@pytest.mark.parametrize("alpha", [0.02, 0.6])
def test_the_density_is_that_of_the_mixture_of_joints(alpha: float) -> None:
    x, guide = torch.randn(5, 3), DefensiveGuide(Layers(), Layers(guide=True), alpha)
    values, log_q = draw(guide, x, None, 40, seed=0)
    assert [(name, tuple(v.shape)) for name, v in values.items()] == [("z_2", (40, 5, 2)), ("z_1", (40, 5))]
    log_p, log_guide = layers_densities(x, values["z_2"], values["z_1"])
    torch.testing.assert_close(
        log_q, torch.logaddexp(log_p + math.log(alpha), log_guide + math.log1p(-alpha))
    )
    # And at values that are not its own.
    other = {name: 2 * torch.randn_like(value) for name, value in values.items()}
    with SiteRecorder(other) as q, particle_plate(40):
        guide(x)
    log_p, log_guide = layers_densities(x, other["z_2"], other["z_1"])
    torch.testing.assert_close(
        sum(site.log_prob() for site in q.sites.values()),
        torch.logaddexp(log_p + math.log(alpha), log_guide + math.log1p(-alpha)),
    )


def test_all_latents_of_a_draw_are_of_one_kind() -> None:
    class Far(nn.Module):
        """Two latents at 100, where the prior never is."""

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z_2", dist.Normal(x[:, :2] * 0 + 100, 0.1).to_event(1))
                pyro.sample("z_1", dist.Normal(x[:, 0] * 0 + 100, 0.1))

    values, _ = draw(DefensiveGuide(Layers(), Far(), 0.3), torch.randn(4, 3), None, 2000, seed=1)
    far = values["z_2"][..., 0] > 50
    assert torch.equal(far, values["z_1"] > 50)
    assert far.double().mean().item() == pytest.approx(0.7, abs=0.02)


def test_weights_are_bounded() -> None:
    model, x, alpha = Latent(), 2 * torch.randn(6, 3), 0.2
    guide = DefensiveGuide(model, Encoding(scale=0.01, shift=1.0), alpha)
    drawn = draw(guide, x, None, 500, seed=0)
    with torch.no_grad():
        log_w = log_weights(model, x, None, [drawn], rows=10_000)
        log_x = dist.Normal(drawn[0]["z"], 0.5).to_event(1).log_prob(x)
    assert (log_w <= log_x - math.log(alpha) + 1e-9).all()
    assert log_w.max() <= -3 * math.log(0.5 * math.sqrt(2 * math.pi)) - math.log(alpha) + 1e-9


def test_a_guide_that_misses_mass_is_mended() -> None:
    model, x = Latent(z_dim=1), torch.randn(24, 1)
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum(-1)
    # Above all the posterior, and with a tail that never gets there.
    narrow = Encoding(shift=1.2, scale=0.1)
    plain = log_likelihood(model, narrow, x, num_particles=2000)
    mended = log_likelihood(model, DefensiveGuide(model, narrow, 0.5), x, num_particles=2000)
    gap = mended.log_prob - exact
    assert abs(gap.mean()) < 4 * mended.monte_carlo_error + 0.01
    assert (plain.log_prob - exact).mean() < -0.5
    assert mended.khat_share < 0.1 < plain.khat_share
    assert mended.proposal == "defensive"
    assert "proposal defensive" in str(mended)


def test_two_levels_as_a_proposal_and_as_a_start() -> None:
    x = 1.5 * torch.randn(24, 3)
    exact = layers_log_prob(x)
    guide = DefensiveGuide(Layers(), Layers(guide=True), 0.3)
    estimate = log_likelihood(Layers(), guide, x, num_particles=4000)
    assert abs((estimate.log_prob - exact).mean()) < 4 * estimate.monte_carlo_error + 0.005
    annealed = annealed_likelihood(Layers(), guide, x, num_steps=100)
    assert abs((annealed.log_prob - exact).mean()) < 4 * annealed.monte_carlo_error + 0.01
    assert annealed.proposal == "defensive"


def test_the_kit_finds_nothing() -> None:
    def defensive(model: Any, guide: Any, x: Tensor, y: Any = None, **settings: Any) -> Any:
        return log_likelihood(model, DefensiveGuide(model, guide), x, y, **settings)

    # An exact posterior mixed with the prior is exact no more, and the ELBO is that of the mixture.
    report = check_likelihood_estimator(
        defensive, num_particles=(1, 30), skip=("exact guide", "tightens with K", "datum independence")
    )
    assert {"lower bound", "side effects", "batch size", "labels", "known tail"} <= set(report.applied)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_distribution_of_a_site(share: float) -> None:
    p = dist.Normal(torch.zeros(2, 1), 1.0).to_event(1)
    q = dist.Normal(torch.tensor([[1.5], [-0.5]]), 0.4).to_event(1)
    weights = torch.tensor([share, 1 - share]).log().expand(2, 2)
    report = check_distribution(_Either(p, q, weights))
    assert {"shapes", "integrates to 1", "sampler follows density"} <= set(report.applied)


def test_a_ladder_with_a_pseudoinput() -> None:
    spec = LadderSpec((1, 8, 8), scales=((4, 1), (2, 1)), channels=4, z_channels=1)
    model, guide = ladder(spec, u=2)
    jolted(model, guide, size=0.1)
    x = (torch.rand(4, 1, 8, 8) < 0.5).double()
    defensive = DefensiveGuide(model, guide)
    with evaluating(model, defensive):
        values, log_q = draw(defensive, x, None, 50, seed=0)
        log_w = log_weights(model, x, None, [(values, log_q)], rows=1000)
        with SiteRecorder(values) as q, particle_plate(50):
            guide(x)
        with SiteRecorder(values) as p, particle_plate(50):
            model(x)
    assert list(values) == ["u", *spec.names]
    log_prior = torch.stack([p.sites[name].log_prob() for name in values]).sum(0)
    log_guide = torch.stack([q.sites[name].log_prob() for name in values]).sum(0)
    torch.testing.assert_close(log_q, torch.logaddexp(log_prior + math.log(0.1), log_guide + math.log(0.9)))
    torch.testing.assert_close(log_w, log_prior + p.sites["x"].log_prob() - log_q)


def test_the_decoder_does_not_run_for_the_mixture() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rows = nn.Linear(2, 5), 0

        def forward(self, z: Tensor) -> Tensor:
            self.rows += z[..., 0].numel()
            return self.net(z)

    decoder = Counting()
    model = VAE(StandardNormal(2), decoder, Normal())
    draw(DefensiveGuide(model, LaplaceFree()), torch.randn(3, 5), None, 4, seed=0)
    assert decoder.rows == 0


class LaplaceFree(nn.Module):
    """A guide that sees nothing."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 0.5).to_event(1))


def test_functions_and_masks_are_programs_too() -> None:
    oracle = LinearGaussianVAE()
    x = oracle.model.sample(5)

    def model(x: Tensor) -> Any:
        return oracle.model(x)

    def guide(x: Tensor) -> Any:
        return oracle.mean_field_guide(x)

    plain = log_likelihood(oracle.model, DefensiveGuide(oracle.model, oracle.mean_field_guide), x)
    torch.testing.assert_close(
        log_likelihood(model, DefensiveGuide(model, guide), x).log_prob, plain.log_prob
    )
    masked = pyro.poutine.mask(guide, mask=torch.tensor(True))
    torch.testing.assert_close(
        log_likelihood(model, DefensiveGuide(model, masked), x).log_prob, plain.log_prob
    )


def test_training_flags_come_back() -> None:
    model, guide = Latent(), Encoding()
    defensive = DefensiveGuide(model, guide)
    guide.train()
    log_likelihood(model, defensive, torch.randn(4, 3), num_particles=5)
    assert guide.training
    assert guide.dropout.training
    assert [name for name, _ in defensive.named_parameters()] == []


def test_another_order_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            below = pyro.sample("z_1", dist.Normal(x[:, 2], 1.0))
            pyro.sample("z_2", dist.Normal(below.unsqueeze(-1).expand(*below.shape, 2), 1.0).to_event(1))

    message = "latents in the same order, got model site 'z_2' in the place of 'z_1'"
    with pytest.raises(ValueError, match=message):
        log_likelihood(Layers(), DefensiveGuide(Layers(), guide), torch.randn(4, 3))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents of the same shape, got \(3,\) and \(2,\)"):
        DefensiveGuide(Latent(z_dim=3), LaplaceFree())(torch.randn(4, 3))


def test_an_estimate_of_a_density_is_refused() -> None:
    model = VAE(DiffusionPrior(Zero(), (2,), num_steps=4), MLPDecoder(2, (5,)), Normal())
    with pytest.raises(ValueError, match="model site 'z' has only an estimate of its density"):
        log_likelihood(model, DefensiveGuide(model, LaplaceFree()), torch.randn(4, 5))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_a_share_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must lie between 0 and 1, got {alpha}"):
        DefensiveGuide(Latent(), Encoding(), alpha)


def test_around_a_laplace_proposal() -> None:
    likelihood, decoder = Normal(value=0.5), MLPDecoder(2, (5,), hidden=(8,), activation="tanh")
    model = VAE(StandardNormal(2), decoder, likelihood)
    guide = LaplaceGuide(MLPEncoder((5,), 2, hidden=(8,)), decoder, likelihood, trained=False)
    x = torch.randn(6, 5)
    plain = log_likelihood(model, guide, x, num_particles=3000)
    mixed = log_likelihood(model, DefensiveGuide(model, guide), x, num_particles=3000)
    error = math.hypot(plain.monte_carlo_error, mixed.monte_carlo_error)
    assert abs(plain.mean - mixed.mean) < 4 * error + 0.01
