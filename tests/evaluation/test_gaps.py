"""Planted gaps: what the decomposition says of guides whose faults are known in closed form."""

import json
import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.evaluation import Interval, inference_gaps, log_likelihood
from pvae.guides import FlowGuide
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE
from pvae.testing.linear_gaussian import LinearGaussianGuide
from tests.inference.programs import LinearGuide, LinearModel

from .programs import Layers
from .traces import everything

QUICK: dict[str, Any] = {"num_steps": 120, "num_particles": 400}
SHORT: dict[str, Any] = {"num_steps": 20, "num_particles": 50}


def oracle(scale: float = 0.5, correlated: bool = True) -> LinearGaussianVAE:
    weight = torch.tensor([[1.0, 0.9], [0.8, 1.0], [0.2, -0.1]]) if correlated else torch.eye(3)[:, :2]
    return LinearGaussianVAE(x_dim=3, z_dim=2, scale=scale, weight=weight)


def data(exact: LinearGaussianVAE, num: int = 32) -> Tensor:
    torch.manual_seed(1)
    return exact.model.sample(num)


def shifted(guide: LinearGaussianGuide, by: float) -> LinearGaussianGuide:
    with torch.no_grad():
        guide.bias.add_(by)
    return guide


def best_diagonal(exact: LinearGaussianVAE, x: Tensor) -> Tensor:
    """Highest ELBO of a diagonal Gaussian, in closed form."""
    loc, covariance = exact.posterior(x)
    return exact.elbo(loc, (1 / torch.linalg.inv(covariance).diagonal()).diag(), x)


def test_planted_amortisation_and_family_gaps_are_recovered() -> None:
    exact = oracle()
    x = data(exact)
    guide = shifted(exact.widened_guide(0.6), 0.7)
    found = inference_gaps(exact.model, guide, x, num_data=None, **QUICK)
    log_p, best, elbo = exact.log_prob(x), best_diagonal(exact, x), exact.guide_elbo(guide, x)
    assert found.family == found.best_name == "diagonal"
    torch.testing.assert_close(found.best, best, rtol=0, atol=0.25)
    torch.testing.assert_close(found.reference, log_p, rtol=0, atol=1e-3)
    planted = {
        "amortisation": (best - elbo).mean(),
        "family": (log_p - best).mean(),
        "total": (log_p - elbo).mean(),
        "full": (log_p - best).mean(),
        "difference": (2 * best - elbo - log_p).mean(),
    }
    assert planted["amortisation"] > 1
    assert planted["family"] > 0.2
    for name, value in planted.items():
        assert found.intervals[name].value == pytest.approx(value.item(), abs=0.2)
        assert found.intervals[name].low <= value <= found.intervals[name].high
    assert found.reference_name == "IWAE-400, proposal full"
    # The full Gaussian is the posterior: every weight is p(x).
    torch.testing.assert_close(found.local["full"].elbo_values, log_p, rtol=0, atol=1e-3)
    assert found.verdict == "encoder"
    assert found.sentence.startswith("Exchange the encoder or train it longer, as of ")


def test_a_planted_family_gap_is_the_familys() -> None:
    exact = oracle(scale=0.15)
    x = data(exact)
    found = inference_gaps(exact.model, exact.mean_field_guide, x, num_data=None, **QUICK)
    loss = (exact.log_prob(x) - best_diagonal(exact, x)).mean().item()
    assert loss > 1
    assert found.intervals["family"].value == pytest.approx(loss, abs=0.1)
    assert found.intervals["amortisation"].value == pytest.approx(0, abs=0.1)
    assert found.intervals["full"].value == pytest.approx(loss, abs=0.1)
    assert found.verdict == "family"
    assert found.sentence.startswith("Exchange the posterior family, as of ")
    assert found.sentence.endswith("of them, which is most of it.")
    assert found.full_gain is not None
    torch.testing.assert_close(found.full_gain, found.local["full"].elbo_values - found.best)


def test_nothing_is_lost_where_the_guide_is_exact() -> None:
    exact = oracle()
    x = data(exact, 20)
    found = inference_gaps(exact.model, exact.exact_guide, x, **QUICK)
    assert found.family == "full"
    for name in ("total", "amortisation", "family"):
        assert found.intervals[name].value == pytest.approx(0, abs=1e-3)
    assert found.full_gain is None
    assert "full" not in found.intervals
    assert found.verdict == "neither"
    assert "what is missing is the decoder's or the prior's." in found.sentence
    assert found.intervals["total"].value < 0.5 == found.threshold


def test_a_full_covariance_of_the_wrong_place_is_amortisation() -> None:
    exact = oracle()
    x = data(exact, 20)
    guide = shifted(exact.exact_guide, 0.5)
    found = inference_gaps(exact.model, guide, x, **QUICK)
    planted = (exact.log_prob(x) - exact.guide_elbo(guide, x)).mean().item()
    assert found.intervals["amortisation"].value == pytest.approx(planted, abs=0.15)
    assert found.intervals["family"].value == pytest.approx(0, abs=1e-3)
    assert found.verdict == "encoder"


def test_conditional_guides_are_optimised_in_their_own_family(float64: None) -> None:
    x = torch.randn(12, 3)
    found = inference_gaps(Layers(), Layers(guide=True), x, num_steps=200, num_particles=2000)
    assert found.family == found.best_name == "conditional"
    assert set(found.local) == {"conditional", "full"}
    ones = torch.tensor([[1.0, 1.0, -1.0]])
    prior = torch.diag(torch.tensor([1.0, 1.0, 0.0])) + ones.T @ ones
    log_p = torch.distributions.MultivariateNormal(
        torch.zeros(3), torch.linalg.inv(prior) + torch.eye(3)
    ).log_prob(x)
    # The dependence of z_1 on z_2 stays the guide's: see the test of fit_adjustment for this loss.
    dependence = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    precision = prior + torch.eye(3)
    loss = 0.5 * (dependence.T @ precision @ dependence).diagonal().log().sum() - 0.5 * precision.logdet()
    assert found.intervals["family"].value == pytest.approx(loss.item(), abs=0.05)
    torch.testing.assert_close(found.reference, log_p, rtol=0, atol=0.1)
    assert found.intervals["full"].value == pytest.approx(loss.item(), abs=0.05)
    assert found.intervals["amortisation"].value > 0


def test_other_families_are_measured_by_gaussians_and_by_themselves(float64: None) -> None:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    guide = FlowGuide(MLPEncoder((1, 4, 4), 2))
    x = (torch.rand(20, 1, 4, 4) < 0.5).double()
    found = inference_gaps(model, guide, x, num_steps=60, num_particles=200)
    assert found.family == "other"
    assert set(found.local) == {"diagonal", "full"}
    assert found.best_name in ("diagonal", "full", "amortised")
    assert "for want of the guide's own family" in str(found)
    assert found.intervals["amortisation"].value > -0.05


@pytest.mark.parametrize("full", [False, True])
def test_large_latents_get_no_full_covariance(full: bool) -> None:
    exact = oracle()
    x = data(exact, 8)
    guide = exact.exact_guide if full else exact.mean_field_guide
    found = inference_gaps(exact.model, guide, x, max_full=1, **SHORT)
    assert set(found.local) == {"diagonal"}
    assert found.family == ("other" if full else "diagonal")
    assert found.best_name == ("amortised" if full else "diagonal")
    assert found.full_gain is None


def test_steps_that_still_gain_leave_the_verdict_open() -> None:
    exact = oracle(scale=0.15)
    x = data(exact)
    guide = shifted(exact.mean_field_guide, 0.3)
    found = inference_gaps(exact.model, guide, x, num_steps=12, num_particles=400, learning_rate=0.05)
    assert found.late_gains["diagonal"] > 0.5
    assert found.verdict == "family"
    assert not found.settled("diagonal")
    assert found.sentence.startswith("No verdict before num_steps is raised")
    assert found.late_gains["diagonal"] < (best_diagonal(exact, x) - exact.guide_elbo(guide, x)).mean()


def test_bounds_are_bounds() -> None:
    """Scored on draws that no step has seen, an optimum of two draws a step is no higher than it may be."""
    exact = oracle(scale=0.15)
    x = data(exact, 100)
    found = inference_gaps(
        exact.model,
        exact.mean_field_guide,
        x,
        num_data=None,
        num_steps=60,
        step_particles=2,
        num_particles=200,
    )
    gap = best_diagonal(exact, x) - found.best
    assert gap.mean() > -3 * gap.std() / 10
    error = (exact.log_prob(x) - found.reference).mean()
    assert error > -3 * found.local["full"].monte_carlo_error


def test_a_reference_may_be_given() -> None:
    exact = oracle()
    x = data(exact)
    guide = exact.mean_field_guide
    found = inference_gaps(exact.model, guide, x, num_data=10, reference=exact.log_prob(x), **SHORT)
    torch.testing.assert_close(found.reference, exact.log_prob(x)[found.rows])
    assert found.reference_name == "given"
    estimate = log_likelihood(exact.model, guide, x, num_particles=50)
    other = inference_gaps(exact.model, guide, x, num_data=10, reference=estimate, **SHORT)
    torch.testing.assert_close(other.reference, estimate.log_prob[found.rows])
    assert torch.equal(other.elbo, found.elbo)
    with pytest.raises(ValueError, match=r"reference must have shape \(32,\), got \(10,\)"):
        inference_gaps(exact.model, guide, x, reference=torch.zeros(10), **QUICK)


def test_labels_reach_both_programs() -> None:
    exact = LinearGaussianVAE(x_dim=3, z_dim=2, y_dim=2)
    y = torch.randn(30, 2, dtype=torch.float64)
    x = exact.model.sample(30, y)
    found = inference_gaps(exact.model, exact.mean_field_guide, x, y, num_data=10, **QUICK)
    torch.testing.assert_close(found.reference, exact.log_prob(x, y)[found.rows], rtol=0, atol=0.1)
    assert found.amortised.conditional


def test_data_are_a_random_part_and_do_not_feel_each_other() -> None:
    exact = oracle()
    x = data(exact)
    few = inference_gaps(exact.model, exact.mean_field_guide, x, num_data=10, **SHORT)
    again = inference_gaps(exact.model, exact.mean_field_guide, x, num_data=10, **SHORT)
    assert torch.equal(few.best, again.best)
    assert few.rows.tolist() != list(range(10))
    assert len(few.rows.unique()) == 10
    changed = x.clone()
    changed[few.rows[3:]] += 1.0
    part = inference_gaps(exact.model, exact.mean_field_guide, changed, num_data=10, **SHORT)
    torch.testing.assert_close(part.best[:3], few.best[:3])
    assert not torch.isclose(part.best[3:], few.best[3:]).any()


def test_it_leaves_no_trace() -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(9, 5)
    model.decoder = nn.Sequential(nn.Dropout(0.5), model.decoder)  # type: ignore[assignment]
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    (model.decoder(torch.randn(2, 3)).sum() + guide.encoder(x).sum()).backward()
    optimizer.step()
    guide.eval()
    pyro.param("mine", torch.ones(2))
    before = everything(model, guide, optimizer=optimizer)
    inference_gaps(model, guide, x, num_steps=4, num_particles=20)
    assert everything(model, guide, optimizer=optimizer) == before
    ladder = LinearModel(ladder=True), LinearGuide(ladder=True)
    before = everything(*ladder)
    inference_gaps(*ladder, x, num_steps=4, num_particles=20)
    assert everything(*ladder) == before


def test_it_prints_one_line_and_goes_into_json() -> None:
    split = from_tensors(torch.randn(30, 5), name="noise").train
    found = inference_gaps(LinearModel(), LinearGuide(), split, num_data=8, num_steps=4, num_particles=20)
    line = str(found)
    assert "\n" not in line
    assert f"ELBO {found.amortised.elbo:.2f}, best in the family {found.best.mean():.2f}" in line
    assert "(a diagonal Gaussian for each datum)" in line
    assert "on 8 data: amortisation gap" in line
    assert line.endswith(found.sentence)
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row["verdict"] == found.verdict
    assert row["sentence"] == found.sentence
    assert row["protocol"]["name"] == "noise"
    assert row["per_datum"]["family_gap"] == found.family_gap.tolist()
    assert row["per_datum"]["amortisation_gap"] == (found.best - found.elbo).tolist()
    total = [
        a + f
        for a, f in zip(row["per_datum"]["amortisation_gap"], row["per_datum"]["family_gap"], strict=True)
    ]
    assert row["intervals"]["total"]["value"] == pytest.approx(sum(total) / 8)
    bare = inference_gaps(
        LinearModel(), LinearGuide(), split, num_data=1, num_steps=2, num_particles=20, num_bootstrap=0
    )
    assert json.loads(json.dumps(bare.to_dict(), allow_nan=False))["intervals"]["total"]["low"] is None
    assert "[" not in bare.sentence


@pytest.mark.parametrize(
    ("total", "amortisation", "gain", "late", "verdict", "words"),
    [
        (0.3, 0.2, 0.05, 0.0, "neither", "less than 0.5"),
        (4.0, 3.0, 0.5, 0.0, "encoder", "3.00 [2.90, 3.10] are lost by amortisation."),
        (4.0, 1.0, 2.0, 0.0, "family", "a full covariance removes 2.00 [1.90, 2.10] of them, which is most"),
        (4.0, 1.0, 0.5, 0.0, "family", "so that a flow is needed."),
        (4.0, 2.0, 0.5, 0.0, "either", "which lose alike"),
        (4.0, 1.0, 0.5, 0.1, "family", "No verdict before num_steps is raised"),
        (4.0, 2.0, 0.5, 0.1, "either", "No verdict before num_steps is raised"),
        (0.3, 0.2, 0.05, 0.1, "neither", "less than 0.5"),
        (4.0, 3.0, 0.5, 0.1, "encoder", "Exchange the encoder"),
    ],
)
def test_one_sentence_says_what_to_exchange(
    total: float, amortisation: float, gain: float, late: float, verdict: str, words: str
) -> None:
    values = {
        "total": total,
        "amortisation": amortisation,
        "family": total - amortisation,
        "difference": 2 * amortisation - total,
        "full": gain,
    }
    exact = oracle()
    found = inference_gaps(exact.model, exact.mean_field_guide, data(exact, 4), num_steps=2, num_particles=10)
    intervals = {name: Interval(v, v - 0.1, v + 0.1) for name, v in values.items()}
    said = replace(found, intervals=intervals, late_gains={"diagonal": late, "full": late})
    assert said.verdict == verdict
    assert said.settled("diagonal") == (late == 0)
    assert words in said.sentence
    assert said.sentence.endswith(".")


def test_a_flow_is_not_asked_for_before_the_full_covariance_has_settled() -> None:
    exact = oracle(scale=0.15)
    x = data(exact, 8)
    found = inference_gaps(exact.model, exact.mean_field_guide, x, num_steps=2, num_particles=400)
    late = replace(found, late_gains={"diagonal": 0.0, "full": 1.0})
    assert late.sentence.endswith("of them or more, as its optimisation had not settled.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"step_particles": 3}, "step_particles must be even and positive, got 3"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0"),
        ({"num_data": 0}, "num_data must be positive or None, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference_gaps(LinearModel(), LinearGuide(), torch.randn(4, 5), **arguments)


def test_discrete_latents_are_refused() -> None:
    def program(x: Tensor, model: bool) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((), 0.5)))
            if model:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="model site 'z' must be real"):
        inference_gaps(lambda x: program(x, True), lambda x: program(x, False), torch.randn(4))


def test_a_broken_model_is_named() -> None:
    model = LinearModel()
    with torch.no_grad():
        model.decoder.bias[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        inference_gaps(model, LinearGuide(), torch.randn(4, 5), num_steps=2, num_particles=4)
