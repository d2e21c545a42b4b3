"""The ladder as a Pyro program: its joint density by hand, its samples, its evidence where that is known."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from scipy import stats

import pvae
from pvae.likelihoods import Bernoulli, DiscretizedLogisticMixture, Normal
from pvae.models import Ladder
from pvae.nn import LadderSpec, MLPDenoiser, TopDown
from pvae.priors import DiffusionPrior

from ..ladders import ByHand, GaussianU, LinearU, jolted, ladder, linear_

pytestmark = pytest.mark.usefixtures("float64")

SPEC = LadderSpec((1, 8, 8), ((4, 2), (2, 1)), channels=4)
_SIGMA = 1.0
COLOUR = LadderSpec((2, 8, 8), ((8, 1), (4, 1), (2, 2)), channels=5, z_channels=3, bottleneck=0.6)
SHAPES = [(SPEC, None, True), (SPEC, 2, True), (SPEC, 2, False), (COLOUR, 4, True), (COLOUR, None, False)]


@pytest.mark.parametrize(("spec", "u", "aggregate"), SHAPES)
@pytest.mark.parametrize("postprocess", [0, 1])
def test_its_joint_density_is_that_of_a_replay_by_hand(
    spec: LadderSpec, u: int | None, aggregate: bool, postprocess: int
) -> None:
    torch.manual_seed(0)
    model, _ = ladder(spec, u=u, aggregate=aggregate, postprocess=postprocess)
    jolted(model)
    x = (torch.rand(3, *spec.x_shape) < 0.5).double()
    trace = poutine.trace(model).get_trace(x)
    sites = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n not in ("data", "_INPUT")]
    assert sites == [*(["u"] if u else []), *spec.names, "x"]
    by_hand = ByHand(model)
    for i in range(len(x)):
        z = {name: trace.nodes[name]["value"][i].detach().numpy() for name in spec.names}
        image, wanted = None, 0.0
        if u:
            assert isinstance(model.prior, GaussianU)
            drawn = trace.nodes["u"]["value"][i].detach().numpy()
            image = np.kron(drawn, np.ones((8 // u, 8 // u)))
            wanted += stats.norm.logpdf(drawn, model.prior.loc.detach().numpy(), 0.8).sum()
        priors, logits = by_hand.walk(z, image)
        assert list(priors) == list(spec.names)
        for name, (loc, log_var) in priors.items():
            wanted += stats.norm.logpdf(z[name], loc, np.exp(0.5 * log_var)).sum()
        wanted += stats.bernoulli.logpmf(x[i].numpy(), 1 / (1 + np.exp(-logits))).sum()
        ours = sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"])[i] for name in sites)
        assert ours.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("aggregate", [True, False])
def test_dependences_are_those_of_the_plate_diagram(aggregate: bool) -> None:
    model, _ = ladder(SPEC, aggregate=aggregate)
    relations = get_model_relations(model, (torch.zeros(2, 1, 8, 8),))["sample_sample"]
    assert relations["u"] == []
    assert relations["z_3"] == ["u"]
    assert sorted(relations["z_1"]) == ["u", "z_2", "z_3"]
    # u reaches x through the latents alone, where these are all that p(x | z) sees.
    assert sorted(relations["x"]) == [*([] if aggregate else ["u"]), "z_1", "z_2", "z_3"]


def affine(model: Ladder, u_side: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of x, and its derivative by the standardised latents (u first), for a linear ladder, by hand."""
    spec, by_hand = model.spec, ByHand(model)
    sizes = {"u": (1, u_side, u_side)} if u_side else {}
    sizes |= spec.z_shapes
    total = sum(int(np.prod(shape)) for shape in sizes.values())
    zero = {name: np.zeros(shape) for name, shape in sizes.items()}

    def mean(noise: NDArray[np.float64]) -> NDArray[np.float64]:
        parts, at = {}, 0
        for name, shape in sizes.items():
            parts[name] = noise[at : at + int(np.prod(shape))].reshape(shape)
            at += parts[name].size
        image = None
        if u_side:
            assert isinstance(model.prior, GaussianU)
            u = model.prior.loc.detach().numpy() + 0.8 * parts["u"]
            image = np.kron(u, np.ones((spec.x_shape[1] // u_side,) * 2))
        z = dict(zero)
        for name in spec.names:  # each prior sees the latents above, which are final by then
            loc, log_var = by_hand.walk(z, image)[0][name]
            z[name] = loc + np.exp(0.5 * log_var) * parts[name]
        return by_hand.walk(z, image)[1].ravel()

    start = mean(np.zeros(total))
    return start, np.stack([mean(row) - start for row in np.eye(total)], 1)


def linear_ladder(u: int | None, aggregate: bool = True) -> tuple[Ladder, Any]:
    torch.manual_seed(3)
    spec = LadderSpec((1, 4, 4), ((2, 1), (1, 2)), channels=3)
    likelihood = Normal(sigma="fixed", value=_SIGMA)
    model, guide = ladder(spec, u=u, likelihood=likelihood, aggregate=aggregate, log_variance=0.0)
    jolted(model, guide, size=0.2)
    linear_(model, guide)
    return model, guide


@pytest.mark.parametrize(("u", "aggregate"), [(None, True), (1, True), (2, False)])
def test_samples_of_a_linear_ladder_have_its_mean_and_covariance(u: int | None, aggregate: bool) -> None:
    model, _ = linear_ladder(u, aggregate)
    start, by_noise = affine(model, u)
    x = model.sample(20_000).flatten(1)
    covariance = torch.from_numpy(by_noise @ by_noise.T + _SIGMA**2 * np.eye(16))
    torch.testing.assert_close(x.mean(0), torch.from_numpy(start), atol=0.04, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.05, rtol=0.05)
    means = model.sample(20_000, mean=True).flatten(1)
    torch.testing.assert_close(means.T.cov(), covariance - _SIGMA**2 * torch.eye(16), atol=0.05, rtol=0.05)


def test_images_of_a_given_pseudoinput_have_the_conditional_mean_and_covariance() -> None:
    model, _ = linear_ladder(1)
    assert isinstance(model.prior, GaussianU)
    start, by_noise = affine(model, 1)
    u = torch.tensor([-0.4, 1.3]).reshape(2, 1, 1, 1)
    x = model.sample_given(u, 20_000).flatten(2)
    assert x.shape == (2, 20_000, 16)
    covariance = torch.from_numpy(by_noise[:, 1:] @ by_noise[:, 1:].T + _SIGMA**2 * np.eye(16))
    for given, images in zip(u.flatten().tolist(), x, strict=True):
        wanted = start + by_noise[:, 0] * (given - 0.2) / 0.8
        torch.testing.assert_close(images.mean(0), torch.from_numpy(wanted), atol=0.03, rtol=0)
        torch.testing.assert_close(images.T.cov(), covariance, atol=0.03, rtol=0.04)


def test_a_temperature_scales_the_variances_of_the_latents() -> None:
    model, _ = linear_ladder(None)
    _, by_noise = affine(model, None)
    means = model.sample(20_000, mean=True, temperature=0.25).flatten(1)
    torch.testing.assert_close(
        means.T.cov(), 0.25 * torch.from_numpy(by_noise @ by_noise.T), atol=0.02, rtol=0.03
    )
    cold = model.sample(3, mean=True, temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))


@pytest.mark.parametrize(("u", "aggregate"), [(None, True), (1, True), (2, False)])
def test_importance_weighting_of_a_linear_ladder_tends_to_its_evidence_from_below(
    u: int | None, aggregate: bool
) -> None:
    model, guide = linear_ladder(u, aggregate)
    start, by_noise = affine(model, u)
    x = model.sample(8)
    exact = stats.multivariate_normal(start, by_noise @ by_noise.T + _SIGMA**2 * np.eye(16)).logpdf(
        x.flatten(1).numpy()
    )
    gaps = [
        pvae.log_likelihood(model, guide, x, num_particles=k, progress=False).log_prob
        - torch.from_numpy(exact)
        for k in (1, 400, 4000)
    ]
    assert gaps[0].mean() < -0.4
    assert gaps[1].mean() < 0.1  # of 8 data, each with a standard error of at most 0.15
    assert gaps[2].abs().max() < 0.15
    assert gaps[2].mean().abs() < 0.05


@pytest.mark.parametrize(("spec", "u", "aggregate"), SHAPES)
def test_decoding_gives_the_distribution_of_the_program(
    spec: LadderSpec, u: int | None, aggregate: bool
) -> None:
    model, _ = ladder(spec, u=u, aggregate=aggregate)
    jolted(model)
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(torch.zeros(3, *spec.x_shape))
    latents = {name: trace.nodes[name]["value"] for name in ["u"] * bool(u) + list(spec.names)}
    ours = model.decode(latents)
    assert (ours.batch_shape, ours.event_shape) == ((3,), spec.x_shape)
    x = (torch.rand(3, *spec.x_shape) < 0.5).double()
    torch.testing.assert_close(ours.log_prob(x), trace.nodes["x"]["fn"].log_prob(x))
    del latents[spec.names[-1]]
    with pytest.raises(ValueError, match=r"latents must hold .*, 'z_1' is missing"):
        model.decode(latents)


def test_a_likelihood_of_several_planes_has_them() -> None:
    spec = LadderSpec((3, 8, 8), ((4, 1), (2, 1)), channels=4)
    model, _ = ladder(spec, likelihood=DiscretizedLogisticMixture(3, levels=256))
    x = model.sample(5)
    assert x.shape == (5, 3, 8, 8)
    torch.testing.assert_close(x * 255, (x * 255).round())
    assert poutine.trace(model).get_trace(x).nodes["x"]["fn"].log_prob(x).shape == (5,)


def test_it_samples_under_a_diffusion_prior_at_any_temperature() -> None:
    u_shape = (1, 2, 2)
    prior = DiffusionPrior(MLPDenoiser(u_shape, 16, 1), u_shape, num_steps=5)
    model, _ = ladder(SPEC, u=2, prior=prior)
    jolted(model, size=0.1)
    assert model.sample(4).shape == (4, 1, 8, 8)
    assert model.sample(4, temperature=0.7).shape == (4, 1, 8, 8)
    cold = model.sample(4, mean=True, temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    assert model.z_dim == 36


def test_parts_and_requests_that_do_not_fit_are_refused() -> None:
    with_u, without = TopDown(SPEC, SPEC.x_shape), TopDown(SPEC, SPEC.x_shape, context=False)
    pseudoinput = LinearU(SPEC.x_shape, 2)
    prior = GaussianU(pseudoinput.u_shape)
    with pytest.raises(ValueError, match="must come together, got a prior and no pseudoinput"):
        Ladder(with_u, Bernoulli(), prior)
    with pytest.raises(ValueError, match="must come together, got a pseudoinput and no prior"):
        Ladder(with_u, Bernoulli(), None, pseudoinput)
    with pytest.raises(ValueError, match="context=False where there is no prior of u"):
        Ladder(with_u, Bernoulli())
    with pytest.raises(ValueError, match="context=True where there is a prior of u"):
        Ladder(without, Bernoulli(), prior, pseudoinput)
    with pytest.raises(ValueError, match=r"pseudoinput must be that of images of shape \(1, 8, 8\)"):
        Ladder(with_u, Bernoulli(), prior, LinearU((1, 4, 4), 2))
    model = Ladder(with_u, Bernoulli(), prior, pseudoinput)
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match="temperature must be a finite number of at least 0, got -1"):
        model.sample(1, temperature=-1.0)
    with pytest.raises(
        ValueError, match="temperature must be 1 under a prior of u that has none, Independent"
    ):
        model.sample(1, temperature=0.5)
    assert model.sample_given(torch.zeros(1, 1, 2, 2), 3, temperature=0.5).shape == (1, 3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"u must have shape \(M, 1, 2, 2\), got \(1, 2, 2\)"):
        model.sample_given(torch.zeros(1, 2, 2), 3)
    with pytest.raises(ValueError, match="n_each must be positive, got 0"):
        model.sample_given(torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="no pseudoinput to be given"):
        Ladder(without, Bernoulli()).sample_given(torch.zeros(1, 1, 2, 2), 3)
