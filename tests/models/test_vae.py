"""The VAE as a Pyro program and as a sampler."""

import pytest
import torch
from pyro import poutine
from torch import nn

from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder
from pvae.priors import GaussianMixture, StandardNormal


def test_its_sites_are_the_plate_diagram() -> None:
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    x = torch.zeros(6, 1, 4, 4)
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    assert trace.stochastic_nodes == ["data", "z"] or trace.stochastic_nodes == ["z"]
    assert trace.observation_nodes == ["x"]
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (6,)
    assert [f.name for f in trace.nodes["x"]["cond_indep_stack"]] == ["data"]


def test_samples_follow_the_joint_density(float64: None) -> None:
    torch.manual_seed(0)
    likelihood = Normal(sigma="fixed", value=0.5)
    decoder = nn.Linear(2, 3)
    model = VAE(StandardNormal(2), decoder, likelihood)
    x = model.sample(60_000)
    covariance = decoder.weight @ decoder.weight.T + 0.25 * torch.eye(3)
    torch.testing.assert_close(x.mean(0), decoder.bias.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance.detach(), atol=0.03, rtol=0)
    means = model.sample(60_000, mean=True)
    torch.testing.assert_close(means.T.cov(), (covariance - 0.25 * torch.eye(3)).detach(), atol=0.03, rtol=0)


def test_sampling_and_decoding_have_the_shapes_of_the_data() -> None:
    model = VAE(GaussianMixture(2, 3), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    assert model.sample(5).shape == (5, 1, 4, 4)
    assert set(model.sample(5).unique().tolist()) <= {0.0, 1.0}
    assert model.decode(torch.zeros(7, 5, 2)).batch_shape == (7, 5)
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        model.sample(0)


def test_the_decoder_tells_the_likelihood_what_one_datum_is() -> None:
    model = VAE(StandardNormal(2), MLPDecoder(2, (4,)), Bernoulli())
    fn = model.decode(torch.zeros(6, 5, 3, 2))
    assert (fn.batch_shape, fn.event_shape) == ((6, 5, 3), (4,))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="prior and decoder must have the same z_dim, got 2 and 3"):
        VAE(StandardNormal(2), MLPDecoder(3, (4,)), Bernoulli())
