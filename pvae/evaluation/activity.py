r"""Which latent dimensions the data move (Burda et al. 2016, arXiv:1509.00519v4, sec. 5.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program

from .interval import bootstrap_intervals
from .latents import draw_prior, latent_names, means
from .weights import held_out

__all__ = ["Activity", "active_units", "mean_variance"]

_RELATIVE = 0.1
_LEAST_PRIOR = 1000


@dataclass(frozen=True)
class Activity:
    r"""How far the posterior means move with the data, dimension by dimension.

    Attributes:
        variance: :math:`A_j = \mathrm{Var}_x \, E_q[z_j \mid x]`, shape ``(d,)``, in squared units of z, in
            double precision; latents of several sites stand side by side, in the model's order.
        prior_scale: Standard deviation :math:`s_j` of the prior, shape ``(d,)``, from draws.
        threshold: Variance above which a dimension counts as active.
        sites: Number of dimensions of each latent site, in the model's order, where it is known.
        reach: Ends of the 95 % intervals of ``variance`` over data, shape ``(d, 2)``, where they were asked
            for.
    """

    variance: Tensor
    prior_scale: Tensor
    threshold: float = 0.01
    sites: Mapping[str, int] = field(default_factory=dict)
    reach: Tensor | None = None

    @property
    def active(self) -> Tensor:
        """Whether each dimension's variance exceeds the threshold (Burda et al.), shape ``(d,)``, bool."""
        return self.variance > self.threshold

    @property
    def count(self) -> int:
        """Number of active units. The threshold supposes a prior of unit scale."""
        return int(self.active.sum())

    @property
    def relative_count(self) -> int:
        r"""Number of dimensions with :math:`\sqrt{A_j} > 0.1 \, s_j`, whatever the prior's scale."""
        return int((self.variance.sqrt() > _RELATIVE * self.prior_scale).sum())

    @property
    def count_reach(self) -> tuple[int, int] | None:
        """Number of units active for certain, and of those that may be: by both ends of their intervals."""
        if self.reach is None:
            return None
        sure, perhaps = (self.reach > self.threshold).sum(0).tolist()
        return sure, perhaps

    @property
    def relative_count_reach(self) -> tuple[int, int] | None:
        """The same for :attr:`relative_count`."""
        if self.reach is None:
            return None
        sure, perhaps = (self.reach.sqrt() > _RELATIVE * self.prior_scale.unsqueeze(-1)).sum(0).tolist()
        return sure, perhaps

    @property
    def by_site(self) -> "dict[str, Activity]":
        """The activity of each latent site by itself, such as each layer of a ladder."""
        if not self.sites:
            return {}
        sizes = list(self.sites.values())
        reach = [None] * len(sizes) if self.reach is None else self.reach.split(sizes)
        parts = zip(self.variance.split(sizes), self.prior_scale.split(sizes), reach, strict=True)
        return {
            name: Activity(variance, scale, self.threshold, reach=ends)
            for name, (variance, scale, ends) in zip(self.sites, parts, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        sites = {
            name: {
                "active_units": one.count,
                "relative_active_units": one.relative_count,
                "z_dim": len(one.variance),
            }
            for name, one in (self.by_site if len(self.sites) > 1 else {}).items()
        }
        return {
            **({"sites": sites} if sites else {}),
            "active_units": self.count,
            "relative_active_units": self.relative_count,
            "z_dim": len(self.variance),
            "threshold": self.threshold,
            "variance": self.variance.tolist(),
            "prior_scale": self.prior_scale.tolist(),
            "active_units_reach": self.count_reach,
            "relative_active_units_reach": self.relative_count_reach,
            "variance_reach": None if self.reach is None else self.reach.tolist(),
        }

    def __str__(self) -> str:
        by_site = (f"{name} {one.count} of {len(one.variance)}" for name, one in self.by_site.items())
        return (
            f"{self.count} of {len(self.variance)} units active (variance of posterior means above "
            f"{self.threshold:g}{_reach('; ', self.count_reach)}), {self.relative_count} by more than "
            f"{_RELATIVE:g} prior scales{_reach(', ', self.relative_count_reach)}"
            + (f"; {', '.join(by_site)}" if len(self.sites) > 1 else "")
        )


def active_units(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    threshold: float = 0.01,
    *,
    num_draws: int = 32,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> Activity:
    """Count the latent dimensions whose posterior mean varies over the data.

    Means are those of the guide's distributions where these have one, else averages over draws, whose own
    variance is subtracted. Variances are unbiased but where nothing moves, as they are cut off at zero; data
    are resampled for their intervals. Both programs run in evaluation mode and are left as they were.

    Args:
        model: The model program; its prior gives the scale.
        guide: The guide program.
        x: Data, shape ``(N, *x_shape)``, ``N >= 2``, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        threshold: Variance above which a unit is active.
        num_draws: Runs of the guide per datum, positive.
        num_bootstrap: Resamples behind an interval; 0 leaves the intervals out.
        seed: Seed of the draws and of the resamples.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be positive, got {num_draws}")
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    x, y, _ = held_out(model, x, y)
    if len(x) < 2:
        raise ValueError(f"x must hold at least two data, got {len(x)}")
    device = device_of(model, guide)
    with evaluating(model, guide):
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        mean, error = means(guide, x, y, names, seed, num_draws)
        prior = draw_prior(model, x, y, names, max(len(x), _LEAST_PRIOR), seed)
    sizes = {name: prior.values[name][0].numel() for name in names}
    return activity_of(mean, error, prior.z.std(0), threshold, sizes, num_bootstrap, seed)


def activity_of(
    mean: Tensor,
    error: Tensor,
    prior_scale: Tensor,
    threshold: float,
    sites: Mapping[str, int],
    num_bootstrap: int,
    seed: int,
) -> Activity:
    """Return the activity of means ``(N, d)`` known up to errors of variance ``(N, d)``."""
    reach = None
    if num_bootstrap:
        found = bootstrap_intervals(
            lambda i: mean_variance(mean[i], error[i]),
            len(mean),
            num_bootstrap=num_bootstrap,
            seed=seed,
            least=0.0,
        )
        reach = torch.tensor([[each.low, each.high] for each in found], dtype=torch.float64)
    return Activity(mean_variance(mean, error), prior_scale, threshold, sites, reach)


def mean_variance(mean: Tensor, error: Tensor) -> Tensor:
    """Variance over data of means ``(N, d)`` known up to errors of variance ``(N, d)``; shape ``(d,)``."""
    return (mean.var(0) - error.mean(0)).clamp(min=0)


def _reach(before: str, ends: tuple[int, int] | None) -> str:
    """Both counts, where the intervals leave a doubt."""
    return "" if ends is None or ends[0] == ends[1] else f"{before}{ends[0]} to {ends[1]} by its intervals"
