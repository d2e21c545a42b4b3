"""A right estimator passes every check, and each planted fault fails the one that names it."""

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pvae import log_likelihood
from pvae.testing import ExactnessError, check_likelihood_estimator
from tests.testing.faults import (
    AnalyticKL,
    Estimate,
    Estimator,
    FactorsLeftIn,
    LeftInTraining,
    MissingLogQ,
    PooledKhat,
    RefittedVariance,
    ScalesLeftIn,
)

ALL = (
    "reproducible",
    "side effects",
    "training-only factors",
    "training scales",
    "stored variance",
    "labels",
    "batch size",
    "datum independence",
    "per-datum k-hat",
    "lower bound",
    "exact guide",
    "tightens with K",
    "known tail",
)


def test_ours_passes_everything() -> None:
    report = check_likelihood_estimator()
    assert report.applied == ALL
    assert report.subject == "log_likelihood"


def test_in_many_passes_it_passes_everything() -> None:
    """Particles that no pass of networks can hold at once."""

    def within_a_budget(*arguments: Any, **settings: Any) -> Any:
        return log_likelihood(*arguments, **settings, memory=2**22)

    assert check_likelihood_estimator(within_a_budget).applied == ALL


def test_a_hand_written_estimator_passes_everything() -> None:
    assert check_likelihood_estimator(Estimator()).applied == ALL


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        pytest.param(AnalyticKL(), "lower bound", "exceed log p\\(x\\) by", id="analytic KL"),
        pytest.param(MissingLogQ(), "lower bound", "exceed log p\\(x\\) by", id="missing log q"),
        pytest.param(FactorsLeftIn(), "training-only factors", "pyro.factor in the model", id="factor"),
        pytest.param(ScalesLeftIn(), "training scales", "poutine.scale in the model", id="scale"),
        pytest.param(RefittedVariance(), "stored variance", "refitted to the data scored", id="refit"),
        pytest.param(LeftInTraining(), "stored variance", "refits its variance in training", id="training"),
        pytest.param(PooledKhat(), "per-datum k-hat", "when the others change", id="pooled k-hat"),
    ],
)
def test_a_planted_fault_is_named(fault: Estimator, check: str, said: str) -> None:
    with pytest.raises(ExactnessError, match=said) as caught:
        check_likelihood_estimator(fault)
    assert caught.value.check == check
    assert str(caught.value).startswith(f"{type(fault).__name__} fails the check '{check}': ")


@pytest.mark.parametrize("fault", [AnalyticKL(), MissingLogQ()], ids=["analytic KL", "missing log q"])
def test_a_wrong_weight_also_misses_the_exact_value(fault: Estimator) -> None:
    with pytest.raises(ExactnessError, match="under the exact posterior") as caught:
        check_likelihood_estimator(fault, skip=["lower bound"])
    assert caught.value.check == "exact guide"


class Slip(Estimator):
    """An estimator whose result goes through one more function."""

    def __call__(
        self, model: nn.Module, guide: nn.Module, x: Tensor, y: Any = None, **options: Any
    ) -> Estimate:
        estimate = super().__call__(model, guide, x, y, **options)
        return self.slip(estimate, model, x, **options)

    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        raise NotImplementedError


class OtherSeed(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        return Estimate(estimate.log_prob + 1e-3 * torch.rand(len(x)), estimate.pareto_k)


class Mean(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        return Estimate(estimate.log_prob.mean().reshape(1), estimate.pareto_k)


class Freezes(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        model.requires_grad_(False)
        return estimate


class ForgetsGradients(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        model.zero_grad()
        return estimate


class LeavesEvaluationMode(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        model.eval()
        return estimate


class Registers(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        pyro.param("left.behind", torch.tensor(0.0))
        return estimate


class Draws(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        torch.rand(1)
        return estimate


class BatchSized(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        # The last batch counts once more than it should.
        shift = 1e-6 * (len(x) % (options["batch_size"] or len(x)))
        return Estimate(estimate.log_prob + shift, estimate.pareto_k)


class Normalised(Slip):
    """Each datum compared with the batch it came in."""

    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        conditional = getattr(model, "label_weight", None) is not None
        return estimate if conditional else Estimate(estimate.log_prob + 1e-6 * x.mean(), estimate.pareto_k)


class BatchedKhat(Slip):
    """One k-hat for each batch."""

    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        parts = estimate.pareto_k.split(options["batch_size"] or 1)
        return Estimate(estimate.log_prob, torch.cat([part.mean().expand(len(part)) for part in parts]))


class LastDatum(Slip):
    def slip(self, estimate: Estimate, model: nn.Module, x: Tensor, **options: Any) -> Estimate:
        return Estimate(estimate.log_prob - 1e-9, estimate.pareto_k)


class NegativeKhat(Estimator):
    def khat(self, log_w: Tensor) -> Tensor:
        return super().khat(-log_w)


class AverageOfLogs(Estimator):
    """The ELBO under the name of a bound that tightens."""

    def __call__(self, *args: Any, num_particles: int, **options: Any) -> Estimate:
        estimate = super().__call__(*args, num_particles=num_particles, **options)
        return Estimate(self.log_w.mean(-1), estimate.pareto_k)

    def khat(self, log_w: Tensor) -> Tensor:
        self.log_w = log_w
        return super().khat(log_w)


class SharedLabel(Estimator):
    def __call__(
        self, model: nn.Module, guide: nn.Module, x: Tensor, y: Any = None, **options: Any
    ) -> Estimate:
        return super().__call__(model, guide, x, None if y is None else y[:1].expand_as(y), **options)


LONG = ["batch size", "lower bound"]


@pytest.mark.parametrize(
    ("fault", "check", "said", "skip"),
    [
        (OtherSeed(), "reproducible", "the same seed gives values", []),
        (Mean(), "reproducible", r"log_prob must have shape \(8,\), got \(1,\)", []),
        (Freezes(), "side effects", "it changes requires_grad$", []),
        (ForgetsGradients(), "side effects", "it changes gradients$", []),
        (LeavesEvaluationMode(), "side effects", "it changes training flags$", []),
        (Registers(), "side effects", "it changes Pyro's param store$", []),
        (Draws(), "side effects", "it changes torch's generator$", []),
        (SharedLabel(), "labels", "nats from those of each datum's own label", []),
        (BatchSized(), "batch size", "batch_size 64 moves values", []),
        (Normalised(), "datum independence", "when the others are far from it", LONG),
        (BatchedKhat(), "per-datum k-hat", "when batch_size is 3", LONG),
        (LastDatum(), "exact guide", "1e-09 nats from log p", LONG),
        (AverageOfLogs(), "tightens with K", "is still", [*LONG, "exact guide"]),
        (NegativeKhat(), "known tail", "where their tail index is 0.94", [*LONG, "tightens with K"]),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Estimator) else "",
)
def test_another_fault_is_named(fault: Estimator, check: str, said: str, skip: list[str]) -> None:
    with pytest.raises(ExactnessError, match=said) as caught:
        check_likelihood_estimator(fault, skip=skip)
    assert caught.value.check == check


def test_an_estimator_without_khats_is_not_asked_for_them() -> None:
    def bare(*args: Any, **options: Any) -> Tensor:
        return Estimator()(*args, **options).log_prob

    slow = ("labels", "batch size", "lower bound", "tightens with K")
    report = check_likelihood_estimator(bare, num_particles=(1, 10), skip=slow)
    left_out = {outcome.check for outcome in report.outcomes if not outcome.applied}
    assert left_out == {"per-datum k-hat", "known tail", *slow}
    assert "no k-hats" in str(report)
    assert "skipped on request" in str(report)


@pytest.mark.parametrize("num_particles", [(), (0, 1), (10, 10)])
def test_refuses_particles_that_do_not_rise(num_particles: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="num_particles must rise from at least 1"):
        check_likelihood_estimator(num_particles=num_particles)


def test_refuses_to_skip_what_is_no_check() -> None:
    with pytest.raises(ValueError, match=r"skip must name checks .* got \['lower bond'\]"):
        check_likelihood_estimator(skip=["lower bond"])


def test_leaves_the_generators_alone() -> None:
    before = torch.random.get_rng_state()
    check_likelihood_estimator(Estimator(), skip=[name for name in ALL if name != "reproducible"])
    assert torch.equal(torch.random.get_rng_state(), before)
