r"""Is an estimate of log p(x) a lower bound that is exact under the exact posterior and tightens?"""

import itertools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .bench import NUM_DATA, ROUNDING, Bench, difference
from .discrete import DiscreteModel
from .linear_gaussian import LinearGaussianVAE
from .programs import PartlyNarrowGuide
from .quadrature import QuadratureModel
from .statistics import seeded, threshold

__all__ = ["check_exact_guide", "check_known_tail", "check_lower_bound", "check_tightens"]

# How often each datum is scored in a statistical check: every copy has draws of its own. Estimates from few
# particles are cheap and skewed.
_COPIES, _MANY_COPIES = 32, 256
_FEW_PARTICLES = 100
# Share of the ELBO's gap that 1,000 particles may leave.
_LEFT = 0.1


@dataclass(frozen=True)
class Case:
    """An exact model and one of its guides, with data and their exact log-likelihoods."""

    name: str
    oracle: Any
    guide: nn.Module
    x: Tensor
    y: Tensor | None
    exact: Tensor

    def excess(self, bench: Bench, num_particles: int) -> Tensor:
        """Estimates minus exact values, shape ``(copies, data)``, from independent draws; made once."""
        key = f"{self.name}, K = {num_particles}"
        if key not in bench.made:
            copies = _MANY_COPIES if num_particles < _FEW_PARTICLES else _COPIES
            y = None if self.y is None else self.y.repeat(copies, 1)
            x = self.x.repeat(copies, 1)
            value = bench.value(self.oracle.model, self.guide, x, y, num_particles=num_particles)
            bench.made[key] = value.reshape(copies, -1) - self.exact
        return bench.made[key]


def _oracles() -> list[Any]:
    return [
        LinearGaussianVAE(x_dim=5, z_dim=2, scale=0.2),
        LinearGaussianVAE(x_dim=3, z_dim=2, scale=torch.tensor([0.3, 0.5, 0.8]), y_dim=1, seed=6),
        DiscreteModel(),
        QuadratureModel(),
    ]


def _cases(bench: Bench, guide: str, num_data: int = NUM_DATA) -> list[Case]:
    """Pair every exact model that has it with its guide of this name."""
    cases = []
    for oracle in _oracles():
        if hasattr(oracle, guide):
            with seeded(bench.seed):
                conditional = getattr(oracle.model, "label_weight", None) is not None
                y = torch.randn(num_data, 1, dtype=torch.float64) if conditional else None
                x = oracle.model.sample(num_data, y)
            name = f"{oracle}, {guide}"
            cases.append(Case(name, oracle, getattr(oracle, guide), x, y, oracle.log_prob(x, y)))
    return cases


def _mean(excess: Tensor) -> tuple[float, float]:
    """Mean over copies and data, and its standard error."""
    return float(excess.mean()), float(excess.std()) / math.sqrt(excess.numel())


def check_lower_bound(bench: Bench) -> str:
    """Means must not exceed log p(x), under guides that are too wide, too narrow, or of the wrong kind."""
    cases = _cases(bench, "imperfect_guide") + _cases(bench, "mean_field_guide")
    num_tests = len(cases) * len(bench.num_particles)
    bound = threshold(bench.false_alarm / 2, num_tests)
    most = 2 * num_tests * NUM_DATA / bench.false_alarm
    furthest = -math.inf
    for case, num_particles in itertools.product(cases, bench.num_particles):
        excess = case.excess(bench, num_particles)
        mean, error = _mean(excess)
        where = f"{case.oracle} at K = {num_particles}"
        bench.require(
            mean < bound * error + ROUNDING,
            f"on {where} estimates exceed log p(x) by {mean:.3g} nats on average, where {bound:.1f} standard "
            f"errors of {error:.2g} are allowed",
        )
        ratio = float(excess.exp().mean(0).max())
        bench.require(
            ratio < most,
            f"on {where} the estimates of one p(x) average {ratio:.3g} times p(x), {most:.3g} is allowed",
        )
        furthest = max(furthest, mean / max(error, 1e-300))
    return f"{num_tests} cases, at most {furthest:.1f} standard errors above log p(x)"


def check_exact_guide(bench: Bench) -> str:
    """Under the exact posterior every weight is p(x), so every value is log p(x)."""
    largest = 0.0
    cases = _cases(bench, "exact_guide", num_data=40)
    for case, num_particles in itertools.product(cases, bench.num_particles):
        value = bench.value(case.oracle.model, case.guide, case.x, case.y, num_particles=num_particles)
        error = difference(value, case.exact)
        bench.require(
            error < bench.tolerance,
            f"under the exact posterior of {case.oracle} a value at K = {num_particles} is {error:.3g} nats "
            "from log p(x)",
        )
        largest = max(largest, error)
    return f"{len(cases)} models, K up to {bench.num_particles[-1]}, largest error {largest:.1e} nats"


def check_tightens(bench: Bench) -> str:
    """The mean must start at the exact ELBO and rise with K towards log p(x)."""
    cases = _cases(bench, "imperfect_guide")
    bound = threshold(bench.false_alarm, len(cases) * (len(bench.num_particles) + 2))
    for case in cases:
        oracle = case.oracle
        elbo = float((oracle.guide_elbo(case.guide, case.x, case.y) - case.exact).mean())
        means = [(k, *_mean(case.excess(bench, k))) for k in bench.num_particles]
        for num_particles, mean, error in means:
            bench.require(
                num_particles > 1 or abs(mean - elbo) < bound * error,
                f"on {oracle} one particle is on average {mean:.4g} nats from log p(x), the exact ELBO is "
                f"{elbo:.4g}",
            )
            bench.require(
                num_particles < 1000 or mean > _LEFT * elbo - bound * error,
                f"on {oracle} K = {num_particles} is still {-mean:.3g} nats below log p(x), the ELBO is "
                f"{-elbo:.3g}",
            )
        for (fewer, low, error), (more, high, other) in pairwise(means):
            bench.require(
                high > low - bound * math.hypot(error, other),
                f"on {oracle} the mean falls by {low - high:.3g} nats from K = {fewer} to {more}",
            )
    return f"{len(cases)} models, from the exact ELBO up"


def check_known_tail(bench: Bench) -> str:
    """Weights in two latent dimensions under a narrow guide are exactly Pareto, with tail index 1 - s^2."""
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)
    model, guide = oracle.model, PartlyNarrowGuide(oracle.exact_guide)
    x = oracle.model.sample(64)
    x[:, -1] = x[:, -1].abs() * torch.where(torch.arange(64) % 2 == 0, -1.0, 1.0)
    _, khat = bench.run(model, guide, x, num_particles=1000)
    if khat is None:
        return "- no k-hats"
    wide, narrow = float(khat[::2].mean()), float(khat[1::2].mean())
    bench.require(
        narrow > 0.65 and wide < 0.4,
        f"k-hats average {wide:.2f} where the weights are bounded (at most 0.4 is allowed) and {narrow:.2f} "
        "where their tail index is 0.94 (at least 0.65)",
    )
    return f"k-hats average {wide:.2f} where weights are bounded, {narrow:.2f} where the tail index is 0.94"
