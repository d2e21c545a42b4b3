"""The evaluator's mechanics: what it counts, what it refuses, and that it leaves nothing behind.

That its numbers are right is shown on models with exact answers in tests/testing.
"""

import json
import math
import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.evaluation import log_likelihood
from pvae.evaluation.blocks import PASS_ROWS
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal
from tests.inference.programs import LinearGuide, LinearModel


class Counting(nn.Module):
    """Counts the rows a network is shown."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, x: Tensor) -> Any:
        self.rows += math.prod(x.shape[:-1])
        return self.net(x)


@pytest.mark.parametrize("num_particles", [1, 30])
def test_it_is_the_log_mean_of_the_weights_written_out(float64: None, num_particles: int) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(32, 5)
    estimate = log_likelihood(model, guide, x, num_particles=num_particles, seed=3)
    with torch.no_grad():
        torch.manual_seed(3 * 1_000_003)
        loc, log_scale = guide.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.normal(torch.zeros(num_particles, 32, 3), torch.ones(()))
        log_w = (
            -0.5 * (x - model.decoder(z)).square().sum(-1)
            - 2.5 * math.log(2 * math.pi)
            - 0.5 * z.square().sum(-1)
            + 0.5 * ((z - loc) / log_scale.exp()).square().sum(-1)
            + log_scale.sum(-1)
        )
    w = log_w.exp()
    torch.testing.assert_close(estimate.log_prob, w.mean(0).log())
    torch.testing.assert_close(estimate.elbo_values, log_w.mean(0))
    torch.testing.assert_close(estimate.ess, w.sum(0) ** 2 / w.square().sum(0))
    if num_particles > 1:
        error = w.std(0) / math.sqrt(num_particles) / w.mean(0)
        torch.testing.assert_close(estimate.particle_error, error)
        assert estimate.monte_carlo_error == pytest.approx(error.square().sum().sqrt().item() / 32)
    assert estimate.standard_error == pytest.approx(estimate.log_prob.std().item() / math.sqrt(32))


def test_the_proposal_is_named_where_the_guide_has_a_name(float64: None) -> None:
    class Named(LinearGuide):
        proposal_name = "wide"

    model, x = LinearModel(), torch.randn(3, 5)
    plain, named = (log_likelihood(model, guide, x, num_particles=30) for guide in (LinearGuide(), Named()))
    assert plain.proposal is None
    assert plain.to_dict()["proposal"] is None
    assert "proposal" not in str(plain)
    assert named.to_dict()["proposal"] == "wide"
    assert "on 3 data, proposal wide, Monte-Carlo error" in str(named)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 64, 1000])
def test_estimates_and_khats_do_not_depend_on_batches(float64: None, batch_size: int) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(70, 5)
    reference = log_likelihood(model, guide, x, num_particles=50)
    other = log_likelihood(model, guide, x, num_particles=50, batch_size=batch_size)
    torch.testing.assert_close(other.log_prob, reference.log_prob, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.pareto_k, reference.pareto_k, rtol=0, atol=1e-9)


def test_a_datum_does_not_feel_its_companions(float64: None) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(50, 5)
    changed = x.clone()
    changed[:9], changed[10:] = torch.randn(9, 5), torch.randn(40, 5)
    a, b = (log_likelihood(model, guide, d, num_particles=40) for d in (x, changed))
    c = log_likelihood(model, guide, x[:10], num_particles=40)
    assert a.log_prob[9] == b.log_prob[9] == c.log_prob[9]
    assert a.pareto_k[9] == b.pareto_k[9] == c.pareto_k[9]


def test_chunks_of_particles_change_nothing(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(40, 5)
    reference = log_likelihood(model, guide, x, num_particles=100)
    monkeypatch.setitem(PASS_ROWS, "cpu", 33)
    chunked = log_likelihood(model, guide, x, num_particles=100)
    torch.testing.assert_close(chunked.log_prob, reference.log_prob, rtol=0, atol=1e-12)


def test_the_encoder_sees_each_datum_once_and_the_decoder_each_draw_once() -> None:
    encoder, decoder = Counting(nn.Linear(5, 6)), Counting(nn.Linear(3, 5))
    model, guide = LinearModel(), LinearGuide()
    model.decoder, guide.encoder = decoder, encoder  # type: ignore[assignment]
    log_likelihood(model, guide, torch.randn(64, 5), num_particles=100)
    # One more of each: the check at the door.
    assert encoder.rows == 64 + 1
    assert decoder.rows == 64 * 100 + 1


def test_factors_and_scales_do_not_count(float64: None) -> None:
    x = torch.randn(9, 5)
    torch.manual_seed(0)
    model, guide = LinearModel(), LinearGuide()
    reference = log_likelihood(model, guide, x, num_particles=30)
    model.factor = 2.0
    scaled = pyro.poutine.scale(model, 7.0), pyro.poutine.scale(guide, 0.1)
    torch.testing.assert_close(log_likelihood(*scaled, x, num_particles=30).log_prob, reference.log_prob)


def test_masked_data_do_not_count(float64: None) -> None:
    model, x = LinearModel(), torch.randn(4, 5)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    masked = pyro.poutine.mask(model, mask=torch.tensor(False))
    estimate = log_likelihood(masked, pyro.poutine.mask(guide, mask=torch.tensor(True)), x, num_particles=30)
    # Neither p(x | z) nor p(z) is left: the weights are 1 / q(z).
    torch.manual_seed(0)
    assert estimate.log_prob.min() > 0
    observed = log_likelihood(model, guide, x, num_particles=30)
    assert (observed.log_prob < 0).all()


def test_it_leaves_no_trace() -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(9, 5)
    model.train()
    guide.eval()
    pyro.param("mine", torch.ones(2))
    pyro.module("guide", guide)

    def everything() -> list[Any]:
        numpy_state: Any = np.random.get_state()  # noqa: NPY002
        return [
            [p.detach().clone().tolist() for p in (*model.parameters(), *guide.parameters())],
            [p.grad for p in (*model.parameters(), *guide.parameters())],
            [p.requires_grad for p in (*model.parameters(), *guide.parameters())],
            [m.training for m in (*model.modules(), *guide.modules())],
            {k: v.tolist() for k, v in pyro.get_param_store().items()},
            torch.get_rng_state().tolist(),
            numpy_state[1].tolist(),
            random.getstate(),
            pyro.settings.get("validate_poutine"),
            torch.is_grad_enabled(),
        ]

    before = everything()
    log_likelihood(model, guide, x, num_particles=10)
    assert everything() == before
    model.decoder.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        log_likelihood(model, guide, x, num_particles=10)
    assert model.training


def test_the_programs_run_in_evaluation_mode() -> None:
    model, guide = LinearModel(), LinearGuide()
    model.decoder = nn.Sequential(nn.Dropout(0.9), model.decoder)  # type: ignore[assignment]
    model.train()
    x = torch.randn(9, 5)
    noisy = log_likelihood(model, guide, x, num_particles=10)
    model.decoder = model.decoder[1]  # type: ignore[index]
    torch.testing.assert_close(noisy.log_prob, log_likelihood(model, guide, x, num_particles=10).log_prob)


def test_a_sigma_fitted_to_batches_is_refused_until_it_is_measured() -> None:
    likelihood = Normal("batch")
    model = VAE(StandardNormal(2), MLPDecoder(2, (5,)), likelihood)
    guide, x = NormalGuide(MLPEncoder((5,), 2)), torch.randn(9, 5)
    message = r"sigma = 'batch' is fitted to each training batch and must be measured before held-out data"
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, guide, x, num_particles=10)
    likelihood.freeze(0.5)
    # In training mode or not, together or alone: the stored sigma.
    estimate = log_likelihood(model.train(), guide, x, num_particles=10)
    assert torch.equal(log_likelihood(model.eval(), guide, x, num_particles=10).log_prob, estimate.log_prob)
    alone = log_likelihood(model, guide, x[:1], num_particles=10)
    torch.testing.assert_close(alone.log_prob, estimate.log_prob[:1])
    model.likelihood = Normal(value=0.5)
    torch.testing.assert_close(
        log_likelihood(model, guide, x, num_particles=10).log_prob, estimate.log_prob, rtol=1e-6, atol=1e-6
    )


def test_an_analytic_entropy_changes_no_likelihood() -> None:
    model, x = VAE(StandardNormal(2), MLPDecoder(2, (5,)), Normal()), torch.randn(9, 5)
    encoder = MLPEncoder((5,), 2)
    sampled = log_likelihood(model, NormalGuide(encoder), x, num_particles=10)
    analytic = log_likelihood(model, NormalGuide(encoder, entropy="analytic"), x, num_particles=10)
    assert torch.equal(analytic.log_prob, sampled.log_prob)
    assert torch.equal(analytic.elbo_values, sampled.elbo_values)


class Surrogate(dist.Normal):
    training_density = "surrogate"


class ExactLater(Surrogate):
    def exact(self) -> Any:
        return dist.Normal(self.loc, self.scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return ExactLater(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        raise AssertionError("the surrogate must not be scored")


@pytest.mark.parametrize(("family", "allowed"), [(Surrogate, False), (ExactLater, True)])
def test_a_surrogate_density_is_exchanged_or_refused(family: Any, allowed: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", family(x / 2, torch.full((len(x),), 0.5**0.5)))

    x = torch.randn(6)
    if not allowed:
        with pytest.raises(ValueError, match="guide site 'z' has only a surrogate density"):
            log_likelihood(model, guide, x)
        return
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    torch.testing.assert_close(log_likelihood(model, guide, x).log_prob, exact, rtol=1e-5, atol=1e-5)


def broken(site: str, kind: str) -> Any:
    """A model with one site that the contract does not allow."""

    def program(x: Tensor) -> None:
        if kind == "outside":
            pyro.sample(site, dist.Normal(0.0, 1.0), obs=torch.zeros(()))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            if kind == "extra":
                z = z + pyro.sample(site, dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ z.new_ones(3, 5), 1.0).to_event(1), obs=x)

    return program


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (broken("f", "outside"), "model site 'f' must lie in the plate over the data"),
        (broken("w", "extra"), "model and guide must have the same latents"),
    ],
)
def test_programs_outside_the_contract_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, LinearGuide(), torch.randn(4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles must be positive, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        ({"x": torch.zeros(0, 5)}, ValueError, r"x must have shape \(N, \*x_shape\)"),
        ({"x": [1.0]}, TypeError, "x must be a tensor or a split such as data.test, got list"),
        ({"y": torch.zeros(3)}, ValueError, "y must have one row for each of the 4 data, got 3"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: Any, message: str) -> None:
    settings = {"x": torch.randn(4, 5)} | arguments
    x = settings.pop("x")
    with pytest.raises(error, match=message):
        log_likelihood(LinearModel(), LinearGuide(), x, **settings)


def vae() -> tuple[VAE, NormalGuide]:
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    return model, NormalGuide(MLPEncoder((1, 4, 4), 2))


def test_grey_values_under_bernoulli_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Bernoulli needs x in \{0, 1\}"):
        log_likelihood(*vae(), torch.rand(5, 1, 4, 4))


def test_a_split_brings_its_protocol() -> None:
    data = from_tensors((torch.rand(40, 1, 4, 4) < 0.5).float(), name="bits")
    estimate = log_likelihood(*vae(), data.train, num_particles=30)
    assert estimate.protocol is not None
    assert estimate.protocol["hash"] in str(estimate)
    assert len(estimate.log_prob) == 40


def test_it_prints_one_line_and_goes_into_json() -> None:
    estimate = log_likelihood(LinearModel(), LinearGuide(), torch.randn(20, 5), num_particles=50)
    line = str(estimate)
    assert "\n" not in line
    assert f"{estimate.mean:.2f} ± {estimate.standard_error:.2f} nats" in line
    assert "IWAE-50 on 20 data" in line
    assert "k-hat >" in line
    row = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    assert row["log_likelihood"] == estimate.mean
    assert row["per_datum"]["log_prob"] == estimate.log_prob.tolist()
    few = log_likelihood(LinearModel(), LinearGuide(), torch.randn(20, 5), num_particles=5)
    assert "k-hat needs 30 particles" in str(few)
    json.dumps(few.to_dict(), allow_nan=False)
