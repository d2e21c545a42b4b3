r"""Rate-distortion curve of a decoder from one annealing run (Huang, Makhzani, Cao & Grosse 2020,
arXiv:2008.06653v1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting

from .annealing import shown
from .hmc import Point
from .likelihood import _summary
from .pareto import khat_share
from .tempering import FORWARD, Annealer, chain_weights
from .weights import held_out

__all__ = ["RateDistortion", "rate_distortion"]

_POWER = 3.0


@dataclass(frozen=True)
class RateDistortion:
    r"""Points of an upper bound on the rate-distortion curve of a model, in nats.

    Attributes:
        betas: Weights on the distortion, shape ``(P,)``, rising.
        rate: Upper bounds on the rate in expectation, shape ``(P, N)``, double precision.
        distortion: Distortions :math:`-\log p(x \mid z)` of the same codes, shape ``(P, N)``.
        acceptance: Acceptance rate of the transitions, shape ``(N,)``.
        pareto_k: Tail index of the chains' weights at each point, shape ``(P, N)``; see :func:`pareto_khat`.
            NaN with fewer than 30 chains.
        ess: Effective sample size of these weights, shape ``(P, N)``, between 1 and ``num_chains``. Near 1 a
            point is that of a single chain: no less valid, but farther from the curve.
        num_chains: Chains per datum.
        num_steps: Steps of the run.
        num_leapfrog: Leapfrog steps of a transition.
        seed: Seed of the draws.
        protocol: What was scored, if known.
        conditional: Whether a label is known to both ends of the channel.
    """

    betas: Tensor
    rate: Tensor
    distortion: Tensor
    acceptance: Tensor
    pareto_k: Tensor
    ess: Tensor
    num_chains: int
    num_steps: int
    num_leapfrog: int
    seed: int
    protocol: dict[str, Any] | None = None
    conditional: bool = False

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """Mean over data of every point: ``(beta, rate, distortion)``."""
        means = (self.betas, self.rate.mean(1), self.distortion.mean(1))
        return list(zip(*(column.tolist() for column in means), strict=True))

    @property
    def standard_errors(self) -> Tensor:
        """Standard errors over data of rate and distortion, shape ``(P, 2)``; NaN for a single datum."""
        n = self.rate.shape[1]
        if n < 2:
            return torch.full((len(self.betas), 2), math.nan, dtype=torch.float64)
        return torch.stack([self.rate.std(1), self.distortion.std(1)], 1) / math.sqrt(n)

    @property
    def khat_shares(self) -> list[float]:
        """Share of data whose k-hat is too high, at each point; NaN where no k-hat could be had."""
        return [khat_share(point, self.num_chains) for point in self.pareto_k]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        errors = [[None if e != e else e for e in pair] for pair in self.standard_errors.tolist()]
        return {
            "points": [
                {"beta": b, "rate": r, "distortion": d, "rate_error": e[0], "distortion_error": e[1]}
                for (b, r, d), e in zip(self.curve, errors, strict=True)
            ],
            "acceptance": float(self.acceptance.mean()),
            "ess": self.ess.mean(1).tolist(),
            "khat_share": [None if share != share else share for share in self.khat_shares],
            "num_data": self.rate.shape[1],
            "num_chains": self.num_chains,
            "num_steps": self.num_steps,
            "num_leapfrog": self.num_leapfrog,
            "seed": self.seed,
            "protocol": self.protocol,
            "conditional": self.conditional,
            "per_datum": {"rate": self.rate.tolist(), "distortion": self.distortion.tolist()},
        }

    def __str__(self) -> str:
        points = ", ".join(
            f"{r:.2f} ± {e_r:.2f} nats buy {d:.2f} ± {e_d:.2f} (beta {b:g})"
            for (b, r, d), (e_r, e_d) in zip(self.curve, self.standard_errors.tolist(), strict=True)
        )
        return (
            f"rate at most, for distortion -log p(x | z): {points}; {self.num_chains} chains of"
            f" {self.num_steps} steps on {self.rate.shape[1]} data, effectively"
            f" {float(self.ess.mean(1).min()):.1f} of them where fewest"
            + (
                f"; k-hat too high for {100 * worst:.1f} % where most: more steps"
                if (worst := max((s for s in self.khat_shares if s == s), default=0.0)) > 0.05
                else ""
            )
        )


def rate_distortion(
    model: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    betas: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0),
    num_chains: int = 16,
    num_steps: int = 400,
    num_leapfrog: int = 2,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> RateDistortion:
    r"""Trace what a decoder and its prior could do at every rate, with no guide in the way.

    The best codes for a weight :math:`\beta` on the distortion :math:`d(x, z) = -\log p(x \mid z)` are
    :math:`q_\beta(z \mid x) \propto p(z) \, e^{-\beta d(x, z)}`, and the rate counted is :math:`KL(q \,\|\,
    p(z))`, which is at least the mutual information. Chains annealed from the prior pass all of them.
    Picking one of K chains in proportion to its weight, after the step to :math:`\beta`, is a channel from
    x to z with

    .. math:: D_\beta = \sum_k \tilde w_k \, d(x, z_k), \qquad
              R_\beta = -\log \frac1K \sum_k w_k - \beta D_\beta

    where :math:`\tilde w` are normalised weights. In expectation :math:`D_\beta` is the channel's distortion
    and :math:`R_\beta` an upper bound on its rate, so that :math:`(R_\beta, D_\beta)` lies on or above the
    curve of the model, and on it as steps grow. At :math:`\beta = 1`, minus their sum is an annealed lower
    bound on log p(x).

    Args:
        model: The model program, as in :func:`annealed_likelihood`.
        x: Data, shape ``(N, *x_shape)``, or a split of a data set.
        y: Contexts, first dimension ``N``.
        betas: Weights wanted, positive and rising strictly.
        num_chains: Chains K per datum.
        num_steps: Steps of the whole run, placed as :math:`(s / S)^3` between 0 and the largest weight; those
            wanted take the place of the nearest ones.
        num_leapfrog: Leapfrog steps of a transition.
        batch_size: Data in one pass; by default as many as fit into a few megabytes.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        A point of the curve for each weight, datum by datum.

    Raises:
        ValueError: For weights that do not rise strictly from above 0, more of them than steps, and whatever
            :func:`annealed_likelihood` refuses.
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    wanted, path = _path(betas, num_steps)
    x, y, protocol = held_out(model, x, y)
    device = device_of(model)
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    parts = []
    with evaluating(model), reporting("rate and distortion", len(x) * num_steps, progress) as report:
        annealer = Annealer(
            model,
            None,
            x.to(device),
            None if y is None else y.to(device),
            path,
            num_chains=num_chains,
            num_leapfrog=num_leapfrog,
            seed=seed,
            batch_size=batch_size,
            moves_at_end=True,
        )
        for chains in annealer.passes():
            seen: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in wanted}
            show = partial(shown, report, chains.part.start * num_steps, chains.start.shape[1] * num_steps)
            visit = partial(_keep, seen)
            *_, rate = chain_weights(annealer, chains, chains.start, FORWARD, show, visit=visit)
            points = [
                _point(groups, beta, rounding, chains.part.start)
                for groups, beta in zip(seen.values(), betas, strict=True)
            ]
            parts.append((torch.stack(points, 1), rate.cpu().double()))
    rate, distortion, khat, ess = torch.cat([found for found, _ in parts], -1)
    bad = (rate.isnan() | distortion.isnan()).any(0)
    if bad.any():
        raise ValueError(f"log-weights must not be NaN, got NaN for datum {int(bad.nonzero()[0])}")
    return RateDistortion(
        torch.tensor(list(betas), dtype=torch.float64),
        rate,
        distortion,
        torch.cat([rate for _, rate in parts]),
        khat,
        ess,
        num_chains,
        num_steps,
        num_leapfrog,
        seed,
        protocol,
        conditional=y is not None,
    )


def _path(betas: Sequence[float], num_steps: int) -> tuple[list[int], Tensor]:
    """Place the steps, those wanted among them; return the numbers of these, and all places."""
    values = torch.tensor(list(betas), dtype=torch.float64)
    if values.ndim != 1 or not len(values) or not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError(f"betas must be positive, got {betas}")
    if (values.diff() <= 0).any():
        raise ValueError(f"betas must rise strictly, got {betas}")
    if num_steps < len(values):
        raise ValueError(f"num_steps must be at least the number of betas {len(values)}, got {num_steps}")
    # Where on the path each lies, in steps; none shares a step with the one below it or leaves none above.
    at = ((values / values[-1]) ** (1 / _POWER) * num_steps).round().long().tolist()
    for i in range(len(at)):
        at[i] = max(at[i], at[i - 1] + 1 if i else 1)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], at[i + 1] - 1 if i + 1 < len(at) else num_steps)
    places = [torch.zeros(1, dtype=torch.float64)]
    low, start = 0.0, 0
    for high, stop in zip(values.tolist(), at, strict=True):
        ends = (low ** (1 / _POWER), high ** (1 / _POWER))
        root = torch.linspace(*ends, stop - start + 1, dtype=torch.float64)
        places.append(root[1:] ** _POWER)
        places[-1][-1] = high
        low, start = high, stop
    return at, torch.cat(places)


def _keep(seen: dict[int, list[tuple[Tensor, Tensor]]], number: int, log_w: Tensor, point: Point) -> None:
    """Write down log-weights and distortions where a point of the curve is wanted."""
    if number in seen:
        # -log p(x | z): the densities at both ends of the path differ by nothing else.
        seen[number].append((log_w, point.log_start - point.log_end))


def _point(groups: Sequence[tuple[Tensor, Tensor]], beta: float, rounding: float, start: int) -> Tensor:
    """Rate, distortion, k-hat and ESS, ``(4, B)``, from log-weights and distortions ``(K, B)``."""
    log_w, each = (torch.cat(column).cpu().double() for column in zip(*groups, strict=True))
    share = log_w.softmax(0)
    distortion = torch.where(share > 0, share * each, 0.0).sum(0)  # a code without weight may cost infinitely
    _, _, khat, ess, _ = _summary(log_w.T, rounding, start)
    rate = math.log(len(log_w)) - log_w.logsumexp(0) - beta * distortion
    return torch.stack([rate, distortion, khat, ess])
