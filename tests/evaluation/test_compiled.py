"""Compiled evaluations: the same figures up to rounding, and without a compiler the same at all."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.evaluation import annealed_likelihood, log_likelihood
from pvae.evaluation.blocks import PASS_ROWS
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import VampPrior
from tests.evaluation.test_annealing import networks
from tests.evaluation.test_memory import ladders
from tests.inference.programs import LinearGuide, LinearModel
from tests.oracles import LinearGaussianVAE


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to the compiler, which runs it as it is."""
    given: list[Any] = []

    def compile(graph: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "fullgraph": True}
        given.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    return given


@pytest.mark.parametrize("num_data", [64, 70])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_one_graph_scores_all_chunks_but_the_last_data(
    float64: None,
    handed_over: list[Any],
    num_data: int,
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PASS_ROWS, "cpu", 64 * 9)  # so that 50 particles are no multiple of a chunk
    model, guide, x = LinearModel(ladder=True), LinearGuide(ladder=True), torch.randn(num_data, 5)
    plain, compiled = (
        log_likelihood(model, guide, x, num_particles=50, batch_size=batch_size, compile=compile)
        for compile in (False, True)
    )
    assert len(handed_over) == 1
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled.elbo_values, plain.elbo_values, rtol=1e-12, atol=1e-12)


def test_labels_go_in_as_data_do(float64: None, handed_over: list[Any]) -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2, y_dim=2)
    y = torch.randn(64, 2)
    x = oracle.model.sample(64, y)
    compiled = log_likelihood(oracle.model, oracle.exact_guide, x, y, num_particles=30, compile=True)
    torch.testing.assert_close(compiled.log_prob, oracle.log_prob(x, y), rtol=0, atol=1e-9)
    assert len(handed_over) == 1


def test_factors_and_masks_count_as_little_as_elsewhere(float64: None, handed_over: list[Any]) -> None:
    model, guide, x = LinearModel(factor=2.0), LinearGuide(), torch.randn(32, 5)
    masked = pyro.poutine.mask(model, mask=torch.tensor(False))
    plain, compiled = (log_likelihood(masked, guide, x, compile=compile) for compile in (False, True))
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-12, atol=1e-12)
    assert len(handed_over) == 1


@pytest.mark.parametrize("kind", ["normal", "hvae", "ladder"])
def test_chains_take_the_same_steps(float64: None, handed_over: list[Any], kind: str) -> None:
    model, guide, x = networks(kind)
    plain, compiled = (
        annealed_likelihood(model, guide, x, num_chains=3, num_steps=3, compile=compile)
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-12, atol=1e-12)
    assert len(handed_over) == 2  # for 16 chains and for 3


def test_a_graph_is_for_all_data_of_a_shape(float64: None, handed_over: list[Any]) -> None:
    model, guide, x = LinearModel(ladder=True), LinearGuide(ladder=True), torch.randn(128, 5)
    settings: dict[str, Any] = {"num_chains": 3, "num_steps": 3, "batch_size": 32}
    plain, compiled = (annealed_likelihood(model, guide, x, compile=c, **settings) for c in (False, True))
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-12, atol=1e-12)
    assert len(handed_over) == 2


def broken(*_: Any, **__: Any) -> Any:
    def fails(*_: Tensor) -> Any:
        raise RuntimeError("no working C++ compiler found in path.\nAnd more of it.")

    return fails


@pytest.mark.parametrize("evaluate", [log_likelihood, annealed_likelihood])
def test_without_a_compiler_it_goes_on_and_says_so(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(70, 5)
    settings = {} if evaluate is log_likelihood else {"num_steps": 3, "num_chains": 3}
    plain = evaluate(model, guide, x, **settings)
    monkeypatch.setattr(torch, "compile", broken)
    sentence = (
        r"this model is evaluated without being compiled, as compiling failed "
        r"\(no working C\+\+ compiler found in path\)$"
    )
    with pytest.warns(UserWarning, match=sentence) as warned:
        found = evaluate(model, guide, x, compile=True, **settings)
    assert len(warned) == 1
    assert torch.equal(found.log_prob, plain.log_prob)


def test_what_cannot_be_a_graph_is_evaluated_as_it_is() -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                loc = z @ z.new_ones(3, 5) if float(z.sum()) != 0.5 else x
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    model, guide, x = Reading(), LinearGuide(), torch.randn(32, 5)
    plain = log_likelihood(model, guide, x, num_particles=30)
    with pytest.warns(UserWarning, match="evaluated without being compiled, as recording it failed"):
        found = log_likelihood(model, guide, x, num_particles=30, compile=True)
    assert torch.equal(found.log_prob, plain.log_prob)


def test_estimated_densities_are_not_compiled() -> None:
    model, guide, x = ladders("diffusion")
    plain = log_likelihood(model, guide, x[:3], num_particles=5)
    with pytest.warns(UserWarning, match="as it draws noise to estimate a density"):
        found = log_likelihood(model, guide, x[:3], num_particles=5, compile=True)
    assert torch.equal(found.log_prob, plain.log_prob)


@pytest.mark.slow
def test_the_compiler_itself() -> None:
    torch.manual_seed(0)
    encoder = MLPEncoder((1, 8, 8), 2, hidden=(8,))
    prior = VampPrior(encoder, torch.rand(3, 1, 8, 8))
    model = VAE(prior, MLPDecoder(2, (1, 8, 8), hidden=(8,)), Bernoulli())
    guide, x = NormalGuide(encoder), (torch.rand(40, 1, 8, 8) < 0.5).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own modules
        compiled = log_likelihood(model, guide, x, num_particles=60, compile=True)
    plain = log_likelihood(model, guide, x, num_particles=60)
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(compiled.ess, plain.ess, rtol=1e-3, atol=1e-3)
