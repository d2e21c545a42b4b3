"""A model's sampler follows the density it scores, or the check says where it does not."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.likelihoods import Bernoulli, Likelihood, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder
from pvae.priors import GaussianMixture, StandardNormal
from pvae.testing import DiscreteModel, ExactnessError, LinearGaussianVAE, QuadratureModel, check_sampler
from tests.testing.faults import ForgetfulFlow


class FlowPrior(nn.Module):
    """A prior whose flow may forget its inverse when sampled."""

    z_dim = 2

    def __init__(self, forgetful: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.7], dtype=torch.float64))
        self.forgetful = forgetful

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        return ForgetfulFlow(self.weight, self.forgetful)


def vae(prior: nn.Module, likelihood: Likelihood) -> VAE:
    shape = likelihood.param_shape((3,))
    return VAE(prior, MLPDecoder(2, shape, hidden=(8,)), likelihood).double()


@pytest.mark.parametrize("oracle", [LinearGaussianVAE(), DiscreteModel(), QuadratureModel()], ids=repr)
def test_exact_models_pass(oracle: Any) -> None:
    report = check_sampler(oracle.model)
    assert {"score", "sample"} <= set(report.applied)


def test_labels_are_passed_on() -> None:
    oracle = LinearGaussianVAE(y_dim=1)
    report = check_sampler(oracle.model, y=torch.ones(1, 1, dtype=torch.float64))
    assert report.applied == ("sites", "score", "sample")


@pytest.mark.parametrize("prior", [StandardNormal(2), GaussianMixture(2, 3), FlowPrior(forgetful=False)])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal("learned")])
def test_our_models_pass(prior: nn.Module, likelihood: Likelihood) -> None:
    assert check_sampler(vae(prior, likelihood)).applied == ("sites", "score", "sample")


def test_a_prior_that_ignores_its_inverse_is_named() -> None:
    with pytest.raises(ExactnessError, match="at site 'z' Stein's identity") as caught:
        check_sampler(vae(FlowPrior(forgetful=True), Normal()))
    assert caught.value.check == "sites"


class CarelessBernoulli(dist.Bernoulli):
    """Draws with the wrong probability."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return (torch.rand(shape, dtype=self.probs.dtype) < 0.9 * self.probs).to(self.probs.dtype)


class CarelessLikelihood(Bernoulli):
    def forward(self, params: Tensor) -> dist.TorchDistribution:
        return CarelessBernoulli(logits=params).to_event(1)


def test_a_discrete_likelihood_with_a_wrong_sampler_is_named() -> None:
    with pytest.raises(ExactnessError, match="gradient of log p") as caught:
        check_sampler(vae(StandardNormal(2), CarelessLikelihood()))
    assert caught.value.check == "score"


class OwnSampler(VAE):
    """A model whose ``sample`` draws from a wider prior than it scores."""

    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        with torch.no_grad():
            return self.decode(1.3 * self.prior(y).sample((n,))).sample()


def test_a_sample_method_of_its_own_kind_is_named() -> None:
    model = OwnSampler(StandardNormal(2), MLPDecoder(2, (3,), hidden=(8,)), Normal(value=0.1)).double()
    with pytest.raises(ExactnessError, match=r"model\.sample and the program draw x differently") as caught:
        check_sampler(model)
    assert caught.value.check == "sample"


class Bare(nn.Module):
    """A program without a method ``sample`` and without parameters, with a factor and a training flag."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.factor("alignment", -z)
            scale = 1.0 if not self.training else 5.0
            return pyro.sample(
                "x", dist.Normal(z.unsqueeze(-1), scale).expand([len(x), 2]).to_event(1), obs=x
            )


def test_a_bare_program_needs_data() -> None:
    program = Bare()
    with pytest.raises(ValueError, match="x must be given for a model without a method sample"):
        check_sampler(program)
    report = check_sampler(program, torch.zeros(1, 2, dtype=torch.float64))
    assert report.applied == ("sites",)
    assert program.training


def test_refuses_to_skip_what_is_no_check() -> None:
    with pytest.raises(ValueError, match=r"skip must name checks .* got \['x'\]"):
        check_sampler(LinearGaussianVAE().model, skip=["x"])


def test_checks_can_be_skipped() -> None:
    report = check_sampler(LinearGaussianVAE().model, skip=["score"])
    assert report.applied == ("sites", "sample")


def test_leaves_the_generators_alone() -> None:
    before = torch.random.get_rng_state()
    check_sampler(LinearGaussianVAE().model, num_samples=1000)
    assert torch.equal(torch.random.get_rng_state(), before)
