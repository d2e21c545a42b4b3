"""FIVE and its kin as Pyro programs: engines, objectives, evaluation, resumption, labels, refusals."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae.guides import FiveGuide, LaplaceGuide
from pvae.inference import ELBO, registered
from pvae.likelihoods import Bernoulli, Normal, Poisson
from pvae.models import VAE, ConditionalVAE
from pvae.nn import ConvDecoder, ConvEncoder, LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal
from tests.guides.five import Affine, Linear, data, linear_pair, single, small
from tests.oracles import LinearGaussianVAE

pytestmark = pytest.mark.usefixtures("float64")

GUIDES: dict[str, dict[str, Any]] = {
    "latent": {},
    "data": {"probe": "data"},
    "rademacher": {"directions": "rademacher", "num_probes": 3},
    "pinv": {"logdet": "pinv"},
    "exact": {"logdet": "exact"},
    "fif": {"objective": "fif"},
}


@pytest.mark.parametrize(
    ("options", "sigma", "channels"),
    [(options, "learned", None) for options in GUIDES.values()] + [({}, "learned", 1), ({}, "batch", None)],
)
def test_the_graph_engine_takes_the_eager_steps(options: Any, sigma: Any, channels: int | None) -> None:
    rows = []
    for engine in ("eager", "graph"):
        model, guide = single(sigma=sigma, channels=channels, **options)
        settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "num_particles": 2, "lr": 0.01}
        run = pvae.fit(model, guide, data(12), engine=engine, compile=False, **settings)
        rows.append((run.history[-1]["loss"], [p.detach().clone() for p in guide.parameters()]))
    assert rows[0][0] == pytest.approx(rows[1][0], rel=1e-5)
    torch.testing.assert_close(rows[1][1], rows[0][1], rtol=1e-3, atol=1e-4)


def test_only_the_rows_of_the_location_are_trained() -> None:
    model, guide = single()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    decoder = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = pvae.fit(model, guide, data(12), steps=3, batch_size=4, lr=0.01)
    after = dict(guide.named_parameters())
    assert set(after) == {f"encoder.{name}" for name, _ in guide.encoder.named_parameters()}
    assert torch.equal(after["encoder.head.weight"][2:], before["encoder.head.weight"][2:])
    assert not torch.equal(after["encoder.head.weight"][:2], before["encoder.head.weight"][:2])
    assert all(not torch.equal(p, decoder[name]) for name, p in model.named_parameters())
    assert run.history[-1]["surrogate/z"] == pytest.approx(0, abs=1.5)


def test_evaluation_mode_is_exact() -> None:
    model, guide = small()
    x = data()
    guide.eval()
    node = poutine.trace(guide).get_trace(x).nodes["z"]
    assert isinstance(node["fn"], pyro.distributions.MultivariateNormal)
    torch.testing.assert_close(node["fn"].covariance_matrix, guide.posterior(x).exact().covariance_matrix)
    loss = ELBO("elbo", 4000).loss(model, guide, x)
    estimate = pvae.log_likelihood(model, guide.train(), x, num_particles=4000)
    assert guide.training
    assert loss == pytest.approx(-5 * estimate.elbo, rel=0.05)


def test_a_replayed_guide_is_scored_exactly() -> None:
    _, guide = small()
    x = data()
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(x)
    replayed.compute_score_parts()
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(replayed.nodes["z"]["score_parts"].log_prob, guide.posterior(x).log_prob(z))


@pytest.mark.parametrize("options", GUIDES.values(), ids=GUIDES)
def test_it_runs_under_stock_pyro(options: Any) -> None:
    model, guide = small(**options)
    x = data(16)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.clear_param_store()
        svi = SVI(
            poutine.scale(registered(model, "model"), 0.5),
            poutine.scale(registered(guide, "guide"), 0.5),
            pyro.optim.Adam({"lr": 0.01}),
            elbo(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        )
        losses = [svi.step(x) for _ in range(25)]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True)(x)
    assert draws["z"].shape == (6, 16, 2)


def test_iwae_takes_the_exact_density_and_refuses_what_has_none() -> None:
    model, guide = small()
    x = data()
    torch.manual_seed(1)
    terms = ELBO("iwae", 5).terms(model, guide, x)
    torch.manual_seed(1)
    q = guide.posterior(x).expand((5, 5))
    z = q.rsample()
    log_x = model.decode(z).log_prob(x)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    wanted = (log_x + log_p - guide.posterior(x).exact().log_prob(z)).logsumexp(0) - math.log(5)
    torch.testing.assert_close(terms.bound, wanted)
    with pytest.raises(ValueError, match="objective 'dreg' needs a guide with parameters of its own alone"):
        ELBO("dreg", 2).terms(model, guide, x)
    with pytest.raises(ValueError, match="LaplaceGuide depends on the model's"):
        ELBO("dreg", 2).terms(model, LaplaceGuide(guide.encoder, model.decoder, model.likelihood), x)
    with pytest.raises(ValueError, match="objective 'iwae' needs a density of guide site 'z'"):
        ELBO("iwae", 2).terms(*small(objective="fif"), x)
    encoder, decoder = MLPEncoder((80,), 65, (8,), "silu"), MLPDecoder(65, (80,), (8,), "silu")
    likelihood = Normal("fixed", 0.4).double()
    large = VAE(StandardNormal(65), decoder, likelihood), FiveGuide(encoder, decoder, likelihood)
    with pytest.raises(ValueError, match="there must be at most 64, got 65"):
        ELBO("iwae", 2).terms(*large, torch.randn(3, 80))


def test_a_resumed_run_is_the_same_to_the_bit_and_so_is_a_reloaded_guide(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(run: Any, row: dict[str, float]) -> None:
        if row["step"] >= 4:
            raise Stop

    settings: dict[str, Any] = {"steps": 8, "batch_size": 4, "log_every": 2, "checkpoint_every": 0.0}
    model, guide = single(num_probes=2)
    pvae.fit(model, guide, data(12), out=tmp_path / "whole", **settings)
    broken_model, broken = single(num_probes=2)
    with pytest.raises(Stop):
        pvae.fit(broken_model, broken, data(12), out=tmp_path / "parts", callbacks=[stop], **settings)
    other_model, other = single(num_probes=2)
    pvae.fit(other_model, other, data(12), out=tmp_path / "parts", resume=True, **settings)
    for a, b in zip(
        [*model.parameters(), *guide.parameters()],
        [*other_model.parameters(), *other.parameters()],
        strict=True,
    ):
        assert torch.equal(a, b)
    fresh_model, fresh = single(num_probes=2)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(guide.state_dict())
    z, x = torch.randn(5, 2).float(), data().float()
    assert torch.equal(fresh.posterior(x).log_prob(z), guide.posterior(x).log_prob(z))
    twin_model, twin = copy.deepcopy((model, guide))
    assert twin._model[0] is twin_model.decoder
    assert torch.equal(twin.posterior(x).log_prob(z), guide.posterior(x).log_prob(z))


def test_both_proposals_of_a_trained_model_are_scored() -> None:
    model, guide = single()
    pvae.fit(model, guide, data(40), steps=40, batch_size=20, lr=0.02)
    estimates = [
        pvae.log_likelihood(model, guide.proposal(kind), data(4).float(), num_particles=2000)
        for kind in ("five", "laplace")
    ]
    torch.testing.assert_close(estimates[0].log_prob, estimates[1].log_prob, rtol=0, atol=0.5)
    assert guide.proposal("five") is guide
    assert dict(guide.proposal("laplace").named_parameters()).keys() == dict(guide.named_parameters()).keys()
    with pytest.raises(ValueError, match="kind must be 'five' or 'laplace', got 'normal'"):
        guide.proposal("normal")


def test_labels_reach_both_networks() -> None:
    def labels() -> LabelEmbedding:
        return LabelEmbedding(LabelSpace("class", 3), 4)

    encoder = ConvEncoder((1, 6, 6), 2, (4,), 8, labels=labels())
    decoder = ConvDecoder(2, (1, 6, 6), (4,), 8, labels=labels())
    likelihood = Normal("learned", 0.5)
    model = ConditionalVAE(StandardNormal(2), decoder, likelihood)
    guide = FiveGuide(encoder, decoder, likelihood)
    x, y = torch.randn(6, 1, 6, 6), torch.arange(6) % 3
    ELBO("elbo", 2).differentiable_loss(model, guide, x, y).backward()
    assert all(p.grad is not None for p in model.parameters())
    alone = guide.posterior(x[4:5], y[4:5])
    torch.testing.assert_close(guide.posterior(x, y).exact().scale_tril[4], alone.exact().scale_tril[0])
    other = guide.posterior(x[4:5], y[5:6]).exact()
    assert not torch.allclose(other.scale_tril, alone.exact().scale_tril)
    for kind in ("five", "laplace"):
        proposal = guide.proposal(kind)
        assert pvae.log_likelihood(model, proposal, x, y, num_particles=20).log_prob.isfinite().all()


def test_a_prior_that_is_no_normal_trains() -> None:
    model, guide = single()
    model.prior = GaussianMixture(2, 3).float()
    run = pvae.fit(model, guide, data(12), steps=4, batch_size=4, log_every=2)
    assert all(math.isfinite(row["loss"]) for row in run.history)


def test_the_noise_is_the_likelihoods() -> None:
    x = data()
    model, guide = small(sigma="learned")
    assert torch.equal(guide.noise(x), model.likelihood.sigma)
    (gradient,) = torch.autograd.grad(guide.posterior(x).rsample().sum(), model.likelihood.log_sigma)
    assert gradient != 0
    model, guide = small(sigma="learned", channels=1)
    assert guide.noise(x).shape == (1, 1, 1)
    model, guide = single(sigma="batch")
    x = x.float()
    pvae.fit(model, guide, data(12), steps=4, batch_size=4)
    assert torch.equal(guide.noise(x), model.likelihood.measured_sigma)
    assert not guide.noise(x).requires_grad


def test_bits_of_linear_logits_have_the_covariance_of_the_derivation() -> None:
    torch.manual_seed(0)
    weight = 0.8 * torch.randn(10, 2)
    decoder = Linear(2, 10, 2)
    with torch.no_grad():
        decoder.weight.copy_(weight)
    z = torch.randn(2)
    p = torch.sigmoid(weight @ z)
    v = p * (1 - p)
    hessian = torch.eye(2) + weight.T @ v.diag() @ weight
    x = torch.rand(10)
    guide = FiveGuide(Affine(x, z, torch.linalg.solve(hessian, weight.T)), decoder, Bernoulli())
    q = guide.posterior(x.unsqueeze(0))
    inverse = torch.linalg.inv(hessian)
    torch.testing.assert_close(q.laplace().covariance_matrix[0], inverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        q.exact().covariance_matrix[0], inverse - inverse @ inverse, rtol=1e-9, atol=1e-12
    )
    saturated = Linear(2, 10, 2)
    torch.nn.init.constant_(saturated.weight, 100.0)
    noise = FiveGuide(Affine(x, z.abs() + 1, torch.eye(10)[:2]), saturated, Bernoulli()).noise(x.unsqueeze(0))
    assert (noise == 0.1).all()


def test_laplace_guide_is_exact_at_the_linear_optimum_and_trains_both_networks() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5, bias=torch.zeros(4))
    w, x = oracle.model.weight.detach(), oracle.model.sample(5)
    _, covariance = oracle.posterior(x)
    parts = linear_pair(covariance @ w.T / 0.25, w, 0.5)
    model, guide = VAE(StandardNormal(2), parts[1], parts[2]), LaplaceGuide(*parts)
    estimate = pvae.log_likelihood(model, guide, x, num_particles=5)
    torch.testing.assert_close(estimate.log_prob, oracle.log_prob(x), rtol=1e-9, atol=1e-9)
    leaves = [parts[0].weight, parts[1].weight, parts[2].log_sigma]

    def entropy(a: Tensor, w: Tensor, log_sigma: Tensor) -> Tensor:
        return -0.5 * torch.logdet(torch.eye(2) + w.T @ w / torch.exp(2 * log_sigma))

    ours = torch.autograd.grad(guide.posterior(x).entropy()[0], leaves, allow_unused=True)
    wanted = torch.autograd.grad(entropy(*leaves), leaves, allow_unused=True)
    assert ours[0] is None or not ours[0].any()
    torch.testing.assert_close(ours[1:], wanted[1:])


# Refusals -----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    encoder, decoder = MLPEncoder((4,), 2), MLPDecoder(2, (4,))
    for likelihood in (Poisson(), nn.Identity()):
        with pytest.raises(TypeError, match="likelihood must be Normal, or Bernoulli as an approximation"):
            FiveGuide(encoder, decoder, likelihood)
    with pytest.raises(ValueError, match=r"encoder and decoder must have the same z_dim, got \[2, 3\]"):
        FiveGuide(encoder, MLPDecoder(3, (4,)), Normal())
    with pytest.raises(ValueError, match="encoder and decoder must have the same z_dim, got none"):
        FiveGuide(nn.Linear(4, 2), nn.Linear(2, 4), Normal())
    with pytest.raises(ValueError, match="objective must be 'five' or 'fif', got 'elbo'"):
        FiveGuide(encoder, decoder, Normal(), objective="elbo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_probes must be at most z_dim = 2"):
        FiveGuide(encoder, decoder, Normal(), num_probes=3)
    with pytest.raises(
        ValueError, match=r"prior_scale must be positive, a number or of shape \(2,\), got -1"
    ):
        LaplaceGuide(encoder, decoder, Normal(), prior_scale=-1.0)


def test_layers_with_wrong_derivatives_are_refused_by_name() -> None:
    def with_layer(layer: nn.Module) -> Any:
        encoder = MLPEncoder((4,), 2, (6,), "silu")
        encoder.hidden.append(layer)
        return encoder

    decoder = MLPDecoder(2, (4,), (6,))
    for layer in (nn.LayerNorm(6), nn.BatchNorm1d(6)):
        with pytest.raises(
            ValueError, match=rf"encoder must not hold {type(layer).__name__} \(layer 'hidden.2'\)"
        ):
            FiveGuide(with_layer(layer), decoder, Normal())
        # The encoder's derivative is no part of Laplace's covariance.
        LaplaceGuide(with_layer(layer), decoder, Normal())
    decoder.mlp.hidden.append(nn.LayerNorm(6))
    FiveGuide(MLPEncoder((4,), 2), decoder, Normal())
    with pytest.raises(ValueError, match="decoder must not hold LayerNorm"):
        LaplaceGuide(MLPEncoder((4,), 2), decoder, Normal())


def test_the_loss_says_what_it_is() -> None:
    assert small()[1].training_loss == "surrogate of minus the ELBO"
    assert small(logdet="exact")[1].training_loss == "minus the ELBO"
    assert small(objective="fif")[1].training_loss == "free-form loss (no bound)"
