"""Every prior under every guide, directly and through a flow, with every way to score a posterior."""

from typing import Any

import pyro
import pytest
import torch

from pvae.alignment import align
from pvae.inference import ELBO

from .programs import BATCH, GUIDES, PRIORS, arguments, density, programs

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.filterwarnings("ignore:a flow takes up the scale", "ignore:.* of the targets lie above")
@pytest.mark.parametrize("kind", ["direct", "flow"])
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("prior", PRIORS)
def test_it_runs_and_its_gradients_are_finite_and_reach_prior_and_encoder(
    prior: str, guide: str, kind: Any
) -> None:
    index = torch.arange(BATCH) + 3
    estimators: tuple[Any, ...] = ("sample", "mean", "multi") if kind == "direct" else ("sample",)
    for estimator in estimators:
        model, encoder = programs(prior, guide)
        aligned = align(model, encoder, density(), kind=kind, estimator=estimator, num_samples=2)
        args = arguments(model, index)
        aligned.model.on_step(args, index, 9, 10)
        with pyro.validation_enabled(True):
            terms = ELBO().terms(aligned.model, aligned.guide, *args)
        names = [name for name, p in aligned.model.named_parameters() if p.requires_grad]
        assert not [name for name in names if name.startswith("aligner")]
        assert terms.parts["align"] > 0
        learned = [p for p in model.prior.parameters() if p.requires_grad]  # type: ignore[union-attr]
        reached = torch.autograd.grad(
            terms.parts["align"], [*encoder.parameters(), *learned], allow_unused=True, retain_graph=True
        )
        assert any(g is not None and g.abs().sum() > 0 for g in reached[: len(list(encoder.parameters()))])
        assert not learned or any(g is not None and g.abs().sum() > 0 for g in reached[-len(learned) :])
        terms.loss.backward()
        for parameter in [*model.parameters(), *encoder.parameters()]:
            assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("objective", ["elbo", "mean_field", "iwae", "dreg"])
@pytest.mark.parametrize("estimator", ["sample", "mean", "multi"])
@pytest.mark.parametrize("prior", ["normal", "gmm"])
def test_an_objective_adds_it_outside_of_any_logarithm(prior: str, objective: Any, estimator: Any) -> None:
    index, particles = torch.arange(BATCH), 3
    model, guide = programs(prior)
    aligned = align(model, guide, density(), estimator=estimator, gamma=0.8)
    args = arguments(model, index)
    aligned.model.on_batch(index)
    elbo = ELBO(objective, particles)
    if objective == "dreg" and estimator == "sample":
        with pytest.raises(ValueError, match="made of the draw: align with estimator='mean'"):
            elbo.terms(aligned.model, aligned.guide, *args)
        return
    parameters = [*model.parameters(), *guide.parameters()]

    def measured(pair: Any) -> tuple[Any, tuple[Any, ...]]:
        torch.manual_seed(5)
        terms = elbo.terms(*pair, *args)
        return terms, torch.autograd.grad(terms.loss, parameters, allow_unused=True, retain_graph=True)

    plain, gradients = measured((model, guide))
    terms, moved = measured(aligned)
    torch.testing.assert_close(terms.loss, plain.loss + terms.parts["align"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.bound, plain.bound, rtol=0, atol=0)
    extra = torch.autograd.grad(terms.parts["align"], parameters, allow_unused=True)
    if objective == "dreg":
        # Its hooks scale what reaches the draws; this term must not come that way.
        assert estimator != "sample"
    for before, after, own in zip(gradients, moved, extra, strict=True):
        total = sum((g for g in (before, own) if g is not None), torch.zeros(()))
        torch.testing.assert_close(
            after if after is not None else torch.zeros(()), total, rtol=1e-10, atol=1e-12
        )


def test_one_particle_makes_the_draw_harmless_for_dreg() -> None:
    index = torch.arange(BATCH)
    aligned = align(*programs(), density(), gamma=1.0)
    aligned.model.on_batch(index)
    terms = ELBO("dreg").terms(*aligned, *arguments(aligned.model, index))
    assert terms.loss.isfinite()
