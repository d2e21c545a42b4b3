r"""How far an annealed bound is from log p(x), measured on data that the model makes: bidirectional Monte
Carlo (Grosse, Ghahramani & Adams 2015, arXiv:1511.02543v1).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting
from pvae.ops import log_mean_exp

from .annealing import shown
from .interval import Interval, bootstrap_intervals
from .likelihood import _summary
from .pareto import khat_share
from .tempering import FORWARD, REVERSE, Annealer, Schedule, betas_of, chain_weights, origin_of
from .weights import held_out

__all__ = ["BidirectionalEstimate", "bidirectional"]


@dataclass(frozen=True)
class BidirectionalEstimate:
    r"""Annealed bounds from both sides on data simulated by the model, one per datum, in nats.

    Attributes:
        lower: Lower bounds on log p(x) in expectation, shape ``(N,)``, double precision.
        upper: Upper bounds in expectation, shape ``(N,)``.
        acceptance: Acceptance rates of the transitions, forward and back, shape ``(2, N)``; NaN where there
            are none.
        pareto_k: Tail index of the chains' weights, forward, and of their inverses, back, shape ``(2, N)``
            (:func:`pareto_khat`). NaN with fewer than 30 chains.
        ess: Effective sample size of the same weights, shape ``(2, N)``, between 1 and ``num_chains``.
        num_chains: Chains per datum, in each direction.
        num_steps: Steps S of the path.
        num_leapfrog: Leapfrog steps of a transition.
        start: ``"guide"`` or ``"prior"``: the end of the path that is not the posterior.
        seed: Seed of data and chains.
        conditional: Whether densities are those of x given a label.
        level: Coverage of the intervals.
    """

    lower: Tensor
    upper: Tensor
    acceptance: Tensor
    pareto_k: Tensor
    ess: Tensor
    num_chains: int
    num_steps: int
    num_leapfrog: int
    start: str
    seed: int
    conditional: bool = False
    level: float = 0.95

    @property
    def gap(self) -> Tensor:
        r"""Upper less lower bound, nats, shape ``(N,)``; single ones can be negative by chance.

        Its mean is in expectation at least that of :math:`\log p(x)` less the lower bound.
        """
        return self.upper - self.lower

    @property
    def intervals(self) -> dict[str, Interval]:
        """Means over data of ``lower``, ``upper`` and ``gap``, with bootstrap intervals over data."""
        table = torch.stack([self.lower, self.upper, self.gap])
        found = bootstrap_intervals(
            lambda rows: table[:, rows].mean(1),
            len(self.lower),
            num_bootstrap=1000,
            level=self.level,
            seed=self.seed,
        )
        return dict(zip(("lower", "upper", "gap"), found, strict=True))

    @property
    def khat_shares(self) -> list[float]:
        """Share of data whose k-hat is too high, forward and back; NaN where no k-hat could be had."""
        return [khat_share(way, self.num_chains) for way in self.pareto_k]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (a rate that does not exist is ``None``)."""
        rates = [None if rate != rate else rate for rate in self.acceptance.mean(1).tolist()]
        return {
            **{name: vars(interval) for name, interval in self.intervals.items()},
            "level": self.level,
            "acceptance": dict(zip(("forward", "reverse"), rates, strict=True)),
            "ess": dict(zip(("forward", "reverse"), self.ess.mean(1).tolist(), strict=True)),
            "khat_share": dict(
                zip(
                    ("forward", "reverse"),
                    [None if share != share else share for share in self.khat_shares],
                    strict=True,
                )
            ),
            "num_data": len(self.lower),
            "num_chains": self.num_chains,
            "num_steps": self.num_steps,
            "num_leapfrog": self.num_leapfrog,
            "start": self.start,
            "seed": self.seed,
            "conditional": self.conditional,
            "simulated": True,
            "per_datum": {"lower": self.lower.tolist(), "upper": self.upper.tolist()},
        }

    def __str__(self) -> str:
        found = self.intervals
        low, high, gap = found["lower"].value, found["upper"].value, found["gap"]
        density = "log p(x | y)" if self.conditional else "log p(x)"
        return (
            f"on data simulated by this model the annealing run of {self.num_steps} steps and"
            f" {self.num_chains} chains from the {self.start} falls short of {density} by at most"
            f" {gap.value:.3f} nats on average ({100 * self.level:.0f} % interval {gap.low:.3f} to"
            f" {gap.high:.3f}; {low:.3f} <= {density} <= {high:.3f}, {len(self.lower)} data);"
            " of other data it proves nothing"
            + (
                f"; k-hat too high for {100 * worst:.1f} %: more steps narrow the gap"
                if (worst := max((s for s in self.khat_shares if s == s), default=0.0)) > 0.05
                else ""
            )
        )


def bidirectional(
    model: Program,
    guide: Program | None,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_chains: int = 16,
    num_steps: int = 250,
    schedule: Schedule | Tensor = "linear",
    num_leapfrog: int = 2,
    start: Literal["guide", "prior"] = "guide",
    batch_size: int | None = None,
    memory: int | None = None,
    compile: bool = False,
    seed: int = 0,
    level: float = 0.95,
    progress: bool | None = None,
) -> BidirectionalEstimate:
    r"""Enclose log p(x) of data that the model makes, and so measure what an annealed bound misses there.

    Latents and data are drawn from the model, :math:`(z^*, x) \sim p(x, z)`, which makes :math:`z^*` one
    exact draw of p(z | x). From there chains run back along the path to q, by the transitions of
    :func:`annealed_likelihood` in the opposite order. Each one's weight has :math:`\mathbb E\, 1/w =
    1/p(x)`, also if all chains of a datum start at the same :math:`z^*`, so that

    .. math:: \mathbb E \log \frac1K \sum_k w_k^{\text{forward}} \;\le\; \log p(x) \;\le\;
              -\mathbb E \log \frac1K \sum_k \frac{1}{w_k^{\text{reverse}}}

    and the mean gap is in expectation at least the mean shortfall of the lower bound. Both sides use the same
    leapfrog steps, found by chains that start at the guide and never see :math:`z^*`.

    What this proves: on the distribution p(x) of the model, :func:`annealed_likelihood` with the same
    settings is on average at most the gap (within its error over data) below log p(x). What it does not
    prove: anything about other data. Held-out data can have harder posteriors than the model's own draws,
    and a guide trained on data may be worse, or better, on draws; the poorer the model, the less the gap
    carries over.

    Args:
        model: The model program, as in :func:`annealed_likelihood`, with one observed site, whose
            distribution given the latents does not depend on x.
        guide: The guide program; ``None`` is allowed where paths start from the prior.
        x: As many data as are to be simulated, shape ``(N, *x_shape)``, or a split: only their number, shape
            and contexts count.
        y: Contexts that data are simulated for, first dimension ``N``.
        num_chains: Chains per datum and direction.
        num_steps: Steps S of the path.
        schedule: As in :func:`annealed_likelihood`.
        num_leapfrog: Leapfrog steps of a transition.
        start: As in :func:`annealed_likelihood`.
        batch_size: Data in one pass; by default as many as fit into a few megabytes.
        memory: Bytes that a pass keeps within; fewer chains at a time where they need more. See
            :func:`log_likelihood`.
        compile: Whether densities and gradients go through ``torch.compile``: chains take the same steps up
            to rounding, which over many can turn an acceptance. See :func:`log_likelihood`.
        seed: Seed of the data and the chains.
        level: Coverage of the intervals over data.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        Both bounds for each simulated datum, and their gap with its interval.

    Raises:
        ValueError: As :func:`annealed_likelihood`, and for a model whose data cannot be simulated.
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    origin = origin_of(start, guide)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    betas = betas_of(schedule, num_steps)
    x, y, _ = held_out(model, x, y)
    device = device_of(model, guide)
    steps = len(betas) - 1
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    parts = []
    with evaluating(model, guide), reporting("annealing both ways", 2 * len(x) * steps, progress) as report:
        annealer = Annealer(
            model,
            origin,
            x.to(device),
            None if y is None else y.to(device),
            betas,
            num_chains=num_chains,
            num_leapfrog=num_leapfrog,
            seed=seed,
            batch_size=batch_size,
            memory=memory,
            compile=compile,
            simulate=True,
        )
        for chains in annealer.passes():
            assert chains.truth is not None
            work = chains.start.shape[1] * steps
            done = 2 * chains.part.start * steps
            show = partial(shown, report, done, work)
            forward, _, there = chain_weights(annealer, chains, chains.start, FORWARD, show)
            show = partial(shown, report, done + work, work)
            truth = chains.truth.expand_as(chains.start)
            reverse, _, back = chain_weights(annealer, chains, truth, REVERSE, show, reverse=True)
            bounds = (log_mean_exp(forward, 0), -log_mean_exp(-reverse, 0), there, back)
            evidence = [
                _summary(log_w.T.cpu().double(), rounding, chains.part.start)[2:4]
                for log_w in (forward, -reverse)
            ]
            columns = [*bounds, *(column for pair in evidence for column in pair)]
            parts.append(torch.stack([column.cpu().double() for column in columns]))
    lower, upper, there, back, khat, ess, khat_back, ess_back = torch.cat(parts, 1)
    bad = lower.isnan() | upper.isnan()
    if bad.any():
        raise ValueError(f"log-weights must not be NaN, got NaN for datum {int(bad.nonzero()[0])}")
    return BidirectionalEstimate(
        lower,
        upper,
        torch.stack([there, back]),
        torch.stack([khat, khat_back]),
        torch.stack([ess, ess_back]),
        num_chains,
        steps,
        num_leapfrog,
        start,
        seed,
        conditional=y is not None,
        level=level,
    )
