"""The Laplace proposal around any guide: exact for normal posteriors, and with the scale of every prior."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform

import pvae
from pvae.guides import (
    FiveGuide,
    FlowGuide,
    FullCovarianceGuide,
    LaplaceGuide,
    NormalGuide,
    laplace_proposal,
)
from pvae.likelihoods import Bernoulli, Likelihood, Normal, Poisson
from pvae.models import VAE, ConditionalVAE
from pvae.nn import (
    Encoder,
    LabelEmbedding,
    LabelSpace,
    MLPDecoder,
    MLPEncoder,
    WhitenedDecoder,
    WhitenedEncoder,
)
from pvae.priors import ConditionalFlowPrior, CouplingFlow, GaussianMixture, StandardNormal, VampPrior
from tests.guides.five import Linear

pytestmark = pytest.mark.usefixtures("float64")


class Prior(nn.Module):
    """Any distribution as a prior."""

    conditional = False

    def __init__(self, p: dist.TorchDistribution) -> None:
        super().__init__()
        self.p = p

    def forward(self) -> dist.TorchDistribution:
        return self.p


class AnyPrior(Prior):
    """The same, called with labels that it passes over."""

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        return self.p


class Affine(Encoder):
    """An encoder whose location is affine in x."""

    def __init__(self, a: Tensor) -> None:
        super().__init__((a.shape[1],), a.shape[0], a.shape[1])
        with torch.no_grad():
            self.head.weight[: self.z_dim] = a
            self.head.bias.zero_()

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class Own(nn.Module):
    """A user's own guide."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Laplace(self.encoder(x)[0], 1.0).to_event(1))


def parts(likelihood: Likelihood | None = None) -> tuple[MLPEncoder, MLPDecoder, Likelihood]:
    torch.manual_seed(0)
    encoder, decoder = MLPEncoder((6,), 2, (8,), "silu"), MLPDecoder(2, (6,), (8,), "silu")
    return encoder, decoder, likelihood or Normal("learned", 0.4).double()


GUIDES: dict[str, Callable[..., nn.Module]] = {
    "normal": lambda encoder, *_: NormalGuide(encoder),
    "full": lambda encoder, *_: FullCovarianceGuide(encoder),
    "five": FiveGuide,
    "fif": lambda *rest: FiveGuide(*rest, objective="fif"),
    "laplace": LaplaceGuide,
    "own": lambda encoder, *_: Own(encoder),
}


@pytest.mark.parametrize("kind", GUIDES)
def test_around_any_guide_it_is_exact_for_a_linear_model_and_a_normal_prior(kind: str) -> None:
    torch.manual_seed(1)
    w, sigma, tau = torch.randn(5, 3), 0.3, torch.tensor([0.5, 1.0, 2.0])
    decoder = Linear(3, 5, 3)
    with torch.no_grad():
        decoder.weight.copy_(w)
    covariance = torch.linalg.inv(torch.diag(tau**-2) + w.T @ w / sigma**2)
    networks = Affine(covariance @ w.T / sigma**2), decoder, Normal("fixed", sigma).double()
    prior = AnyPrior(dist.Normal(torch.zeros(3), tau).to_event(1))
    model, guide = VAE(prior, *networks[1:]), GUIDES[kind](*networks)
    proposal = laplace_proposal(model, guide)
    assert torch.equal(proposal.prior_scale, tau)
    x = torch.randn(4, 5)
    torch.testing.assert_close(proposal.posterior(x).covariance_matrix[2], covariance)
    # Weights of the exact posterior are all p(x), whatever the draws.
    estimate = pvae.log_likelihood(model, proposal, x, num_particles=3)
    marginal = scipy.stats.multivariate_normal(
        torch.zeros(5).numpy(), (w @ torch.diag(tau**2) @ w.T + sigma**2 * torch.eye(5)).numpy()
    )
    torch.testing.assert_close(estimate.log_prob, torch.from_numpy(marginal.logpdf(x.numpy())))
    assert estimate.proposal == "laplace"


def test_it_is_a_bound_in_its_own_right_and_leaves_everything_as_it_was() -> None:
    encoder, decoder, likelihood = parts()
    model, guide = VAE(StandardNormal(2).double(), decoder, likelihood), NormalGuide(encoder)
    state, x = torch.get_rng_state(), torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    proposal = laplace_proposal(model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    assert proposal.encoder is guide.encoder
    assert {name: p for name, p in proposal.named_parameters() if "encoder" not in name} == {}
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    axis = torch.linspace(-7, 7, 501)
    z = torch.cartesian_prod(axis, axis)
    joint = model.decode(z.unsqueeze(1)).log_prob(x) - 0.5 * z.square().sum(-1, keepdim=True)
    wanted = joint.detach().logsumexp(0) - math.log(2 * math.pi) + 2 * math.log(14 / 500)
    for program in (guide, proposal):
        found = pvae.log_likelihood(model, program, x, num_particles=20_000)
        torch.testing.assert_close(found.log_prob, wanted, rtol=0, atol=0.05)


def test_networks_in_whitened_units_give_the_same_bound() -> None:
    encoder, decoder, likelihood = parts()
    loc, scale = torch.tensor([3.0, -1.0]), torch.tensor([0.2, 5.0])
    white = WhitenedEncoder(encoder), WhitenedDecoder(decoder)
    for network in white:
        network.set_(loc, scale)
    models = (
        VAE(StandardNormal(2).double(), decoder, likelihood),
        VAE(AnyPrior(dist.Normal(loc, scale).to_event(1)), white[1], likelihood),
    )
    x = torch.randn(5, 6)
    plain, whitened = (
        pvae.log_likelihood(model, laplace_proposal(model, NormalGuide(network)), x, num_particles=20)
        for model, network in zip(models, (encoder, white[0]), strict=True)
    )
    torch.testing.assert_close(whitened.log_prob, plain.log_prob, rtol=1e-9, atol=1e-9)


def test_pixels_of_a_bernoulli_work_too() -> None:
    encoder, decoder, likelihood = parts(Bernoulli())
    model = VAE(StandardNormal(2).double(), decoder, likelihood)
    x = torch.bernoulli(torch.full((4, 6), 0.5))
    own, laplace = (
        pvae.log_likelihood(model, guide, x, num_particles=5000)
        for guide in (NormalGuide(encoder), laplace_proposal(model, NormalGuide(encoder)))
    )
    torch.testing.assert_close(laplace.log_prob, own.log_prob, rtol=0, atol=0.05)


# The scale of the prior ---------------------------------------------------------------------------------


def scale_under(prior: nn.Module, conditional: bool = False) -> Tensor:
    encoder, decoder, likelihood = parts()
    model = (ConditionalVAE if conditional else VAE)(prior, decoder, likelihood)
    state = torch.get_rng_state()
    scale = laplace_proposal(model, NormalGuide(encoder)).prior_scale
    assert torch.equal(torch.get_rng_state(), state)
    return scale


def test_mixtures_have_their_standard_deviation() -> None:
    torch.manual_seed(0)
    prior = GaussianMixture(2, 3).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        prior.raw_scale.mul_(2.0)
    draws = prior().sample((200_000,))
    torch.testing.assert_close(scale_under(prior), draws.std(0), rtol=0.02, atol=0)
    encoder = parts()[0]
    vamp = VampPrior(encoder, torch.rand(4, 6))
    draws = vamp().sample((200_000,))
    torch.testing.assert_close(scale_under(vamp), draws.std(0), rtol=0.02, atol=0)


class Doubling(nn.Module):
    """A flow with u = z / 2."""

    z_dim = 2

    def condition(self, context: Tensor | None) -> AffineTransform:
        return AffineTransform(0.0, 0.5, event_dim=1)


@pytest.mark.parametrize("kind", ["class", "attributes"])
@pytest.mark.parametrize("flow", [False, True])
def test_priors_given_labels_have_the_root_mean_square_over_them(kind: Any, flow: bool) -> None:
    torch.manual_seed(0)
    labels = LabelEmbedding(LabelSpace(kind, 3), 4)
    prior = ConditionalFlowPrior(2, labels, Doubling() if flow else None)
    with torch.no_grad():
        prior.heads.out.weight.normal_(std=0.7)
    if kind == "class":
        values = torch.arange(3)
    else:
        values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    spread = prior.base(values).variance.mean(0).sqrt() * (2 if flow else 1)
    found = scale_under(prior, conditional=True)
    exact = kind == "class" and not flow
    torch.testing.assert_close(found, spread.detach(), rtol=1e-12 if exact else 0.1, atol=0)


def test_an_unconditional_flow_and_a_heavy_tail_are_drawn_from() -> None:
    base = dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1)
    flow = CouplingFlow(2, 2)
    transformed = dist.TransformedDistribution(base, flow.condition(None).parts)
    torch.testing.assert_close(
        scale_under(AnyPrior(transformed)), torch.tensor([1.0, 3.0]), rtol=0.05, atol=0
    )
    heavy = dist.StudentT(2.0, torch.zeros(2), torch.ones(2)).to_event(1)
    found = scale_under(AnyPrior(heavy))
    assert heavy.variance.isinf().all()
    assert ((found > 1) & (found < 30)).all()


def test_a_model_of_labels_may_have_a_prior_without_them() -> None:
    normal = dist.Normal(torch.zeros(2), torch.full((2,), 3.0)).to_event(1)
    assert scale_under(Prior(normal), conditional=True).tolist() == [3.0, 3.0]


def test_a_scale_that_is_given_holds() -> None:
    encoder, decoder, likelihood = parts()
    model = nn.Module()
    model.decoder, model.likelihood = decoder, likelihood
    assert laplace_proposal(model, NormalGuide(encoder), 0.5).prior_scale == 0.5
    with pytest.raises(TypeError, match="model must have a prior, or prior_scale be given, got Module"):
        laplace_proposal(model, NormalGuide(encoder))


# Names and refusals -------------------------------------------------------------------------------------


def test_guides_with_a_proposal_are_named() -> None:
    networks = parts()
    model, x = VAE(StandardNormal(2).double(), *networks[1:]), torch.randn(3, 6)
    names = {
        kind: pvae.log_likelihood(model, guide(*networks), x, num_particles=2).proposal
        for kind, guide in GUIDES.items()
    }
    assert names == {
        "normal": None,
        "full": None,
        "five": "five",
        "fif": "five",
        "laplace": "laplace",
        "own": None,
    }


def test_what_has_no_such_proposal_is_refused_in_one_sentence() -> None:
    encoder, decoder, likelihood = parts()
    model = VAE(StandardNormal(2), decoder, likelihood)
    guide = NormalGuide(encoder)
    for other in (FlowGuide(encoder, 2), nn.Identity()):
        with pytest.raises(TypeError, match=f"guide must have an encoder .* got {type(other).__name__}$"):
            laplace_proposal(model, other)
    with pytest.raises(TypeError, match="model must have a decoder and a likelihood, such as VAE, got Ident"):
        laplace_proposal(nn.Identity(), guide)
    with pytest.raises(TypeError, match=r"likelihood must be Normal, or Bernoulli .* got Poisson"):
        laplace_proposal(VAE(StandardNormal(2), decoder, Poisson()), guide)
    point = dist.Delta(torch.zeros(2), event_dim=1)
    with pytest.raises(ValueError, match="prior must have a finite positive scale, or prior_scale be given"):
        laplace_proposal(VAE(AnyPrior(point), decoder, likelihood), guide)
    nameless = AnyPrior(point)
    nameless.conditional = True
    with pytest.raises(ValueError, match="embedding of its labels, or prior_scale be given, got AnyPrior"):
        laplace_proposal(ConditionalVAE(nameless, decoder, likelihood), guide)
