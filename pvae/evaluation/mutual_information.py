r"""Information of latents about data, between two bounds (Poole et al. 2019, arXiv:1905.06922v1), and what of
the rate it leaves (Hoffman & Johnson 2016, "ELBO surgery").
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program

from .alignment import _groups, is_saturated
from .blocks import block_seed
from .interval import Interval, bootstrap_intervals
from .latents import Posterior, draw_posterior, log_aggregate_within, shared_latents
from .weights import held_out

__all__ = ["MutualInformation", "mutual_information"]


@dataclass(frozen=True)
class MutualInformation:
    r"""What latents tell of data under the guide, in nats, with 95 % intervals over data.

    .. math:: \underbrace{\mathbb E \log \frac{q(z|x)}{p(z)}}_{\text{rate}} = I_q(x; z) + KL(q_{agg} \| p)

    In a conditional model everything is given y, within the data of one context, averaged over data. The
    intervals resample data; the mixture behind the bounds stays as it is.

    Attributes:
        low: Lower bound on :math:`I_q(x; z)` in expectation; never above ``ceiling``, whatever the truth.
        high: Upper bound in expectation, from the mixture without a datum's own posterior. It is loose, and
            may exceed the rate, where posteriors are narrow and the data few. ``None`` where a context has a
            single datum.
        rate: :math:`\mathbb E\, KL(q(z|x) \| p(z))`, an upper bound as well, whatever the prior; ``None``
            where the prior has no density. Too large where the prior's density is only an estimate or a lower
            bound.
        kl_low: ``rate`` less ``high``: no more than :math:`KL(q_{agg} \| p)` in expectation.
        kl_high: ``rate`` less ``low``: no less, and but the rate less the ceiling where ``saturated``.
        ceiling: Logarithm of the number of data (of equal context, averaged).
        num_data: Number of data.
        seed: Seed of the draws.
        protocol: What the data were, if known.
        conditional: Whether everything is given a label.
    """

    low: Interval
    high: Interval | None
    rate: Interval | None
    kl_low: Interval | None
    kl_high: Interval | None
    ceiling: float
    num_data: int
    seed: int
    protocol: dict[str, Any] | None = None
    conditional: bool = False

    @property
    def saturated(self) -> bool:
        """Whether ``low`` says little: above 0.9 of the ceiling, or fewer than ten data share a context."""
        return is_saturated(self.low.value, self.ceiling)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold; what there is not is ``None``."""
        names = ("low", "high", "rate", "kl_low", "kl_high")
        return {
            **{name: _plain(getattr(self, name)) for name in names},
            "ceiling": self.ceiling,
            "saturated": self.saturated,
            "num_data": self.num_data,
            "seed": self.seed,
            "conditional": self.conditional,
            "protocol": self.protocol,
        }

    def __str__(self) -> str:
        given = " | y" if self.conditional else ""
        bounds = [("", self.high), ("the rate ", self.rate)]
        above = " and ".join(f"{word}{_said(bound)}" for word, bound in bounds if bound is not None)
        upper = f" <= {above}" if above else ""
        parts = [
            f"{_said(self.low)} <= I(x; z{given}){upper} nats on {self.num_data} data, the lower bound "
            f"at most {self.ceiling:.2f}" + (" and saturated" if self.saturated else "")
        ]
        if self.kl_high is not None:
            low = ""
            if self.kl_low is not None and self.kl_low.value > 0:  # a divergence above less is no news
                low = f"{_said(self.kl_low)} <= "
            parts.append(f"{low}KL(q_agg ‖ p) <= {_said(self.kl_high)}")
        return "; ".join(parts)


def mutual_information(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> MutualInformation:
    r"""Bound the information that latents have about data, from both sides.

    .. math:: \mathbb E \log \frac{q(z_i | x_i)}{\frac1N \sum_j q(z_i | x_j)} \le I_q(x; z) \le
              \mathbb E \log \frac{q(z_i | x_i)}{\frac{1}{N-1} \sum_{j \ne i} q(z_i | x_j)}, \qquad
              I_q(x; z) \le \mathbb E \log \frac{q(z_i | x_i)}{p(z_i)}

    with one :math:`z_i \sim q(z | x_i)` for each datum. The lower bound cannot exceed :math:`\log N`. Each
    holds in expectation over data and draws. Latents of several sites count together. Both programs run in
    evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; its prior need not have a density.
        guide: The guide program, with a density.
        x: Data, shape ``(N, *x_shape)``, at least two, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_bootstrap: Resamples behind an interval; 0 leaves the intervals out.
        seed: Seed of the draws and of the resamples.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    x, y, protocol = held_out(model, x, y)
    if len(x) < 2:
        raise ValueError(f"x must hold at least two data, got {len(x)}")
    device = device_of(model, guide)
    with evaluating(model, guide):
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = shared_latents(model, guide, x, y)
        # Not the seed itself, which data that were simulated may have had.
        q = draw_posterior(model, guide, x, y, names, block_seed(seed + 1, 0))
        return information_of(guide, q, x, y, num_bootstrap, seed, protocol)


def information_of(
    guide: Program,
    q: Posterior,
    x: Tensor,
    y: Tensor | None,
    num_bootstrap: int,
    seed: int,
    protocol: dict[str, Any] | None,
) -> MutualInformation:
    """Return :func:`mutual_information` of draws that are there."""
    group = _groups(y, len(x))
    own, others = log_aggregate_within(guide, q.values, x, y, group)
    terms = {
        "low": q.log_q - own,
        "high": q.log_q - others,
        "rate": q.log_q - q.log_p,
        "kl_low": others - q.log_p,
        "kl_high": own - q.log_p,
    }
    known = {name: column for name, column in terms.items() if not bool(column.isnan().any())}
    table = torch.stack(list(known.values()), -1)
    found = bootstrap_intervals(
        lambda i: table[i].mean(0), len(table), num_bootstrap=num_bootstrap, seed=seed
    )
    bounds: dict[str, Interval | None] = dict.fromkeys(terms)
    bounds |= dict(zip(known, found, strict=True))
    low = bounds.pop("low")
    if low is None:
        raise ValueError("the guide's log-densities must be numbers, got NaN")
    return MutualInformation(
        low,
        **bounds,
        ceiling=float(torch.bincount(group)[group].double().log().mean()),
        num_data=len(x),
        seed=seed,
        protocol=protocol,
        conditional=y is not None,
    )


def _said(bound: Interval) -> str:
    reach = "" if math.isnan(bound.low) else f" [{bound.low:.2f}, {bound.high:.2f}]"
    return f"{bound.value:.2f}{reach}"


def _plain(bound: Interval | None) -> dict[str, float | None] | None:
    if bound is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in vars(bound).items()}
