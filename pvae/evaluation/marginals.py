r"""Prior against aggregate posterior, dimension by dimension: divergences with a ceiling, and histograms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.distributions import CodeMixture, NormalMixture
from pvae.inference.program import Program, Site

from .alignment import _moment_gaps, is_saturated
from .latents import Posterior, Prior, _part, _run, _wide
from .weights import exact

__all__ = ["Marginals"]

_NUMBERS = 2**22  # log-densities in one pass
_BUDGET = 2**27  # and in all
_BINS = 40
_WORST = 16


@dataclass(frozen=True)
class Marginals:
    r"""Marginals of the aggregate posterior :math:`q_{agg} = \mathbb E_x q(z|x)` and of the prior, in nats.

    .. math:: KL(q_{agg,j} \| p_j) \approx \frac1N \sum_i \left[ \log \frac1N \sum_n q(z_{ij} | x_n)
              - \log p_j(z_{ij}) \right]

    Marginals that match do not make a match of the whole; one that does not breaks it. The densities are in
    closed form where sites are products of univariate distributions, mixtures of such, or Gaussian: of a site
    below others, given the draws above, averaged over them. All others are kernel estimates from draws.

    Attributes:
        high: The divergence with a datum's own posterior in the mixture, shape ``(d,)``: no less than the
            truth in expectation, but where ``estimated``. Latents of several sites stand side by side.
        low: The same without it, shape ``(d,)``: no more than the truth in expectation where ``exact``.
            Single values may be negative.
        exact: Whether the prior's marginal is in closed form, shape ``(d,)``, bool.
        estimated: Whether a density is a kernel estimate, whose bias has no known sign, shape ``(d,)``, bool.
        information: What the dimension tells of the datum (and of the draws of sites above), a lower bound in
            expectation, shape ``(d,)``; at most ``ceiling``. NaN where the guide's marginal is estimated.
        saturated: Whether ``information`` exceeds 0.9 of the ceiling, so that the posteriors at hand do not
            overlap and ``high`` counts the gaps between them, shape ``(d,)``, bool.
        ceiling: Logarithm of the number of data in the mixture.
        mean_gap: :math:`(\bar z_j - m_j) / s_j`, shape ``(d,)``, in standard deviations of the prior.
        log_std_ratio: Logarithm of the standard deviations' ratio, shape ``(d,)``.
        shown: The dimensions of the histograms, shape ``(w,)``: those of the largest ``high``, that first.
        edges: Bins of each, in units of z, shape ``(w, B + 1)``; the first and the last are open.
        codes: Share of the codes in each bin, shape ``(w, B)``.
        prior: Share of the prior's draws, shape ``(w, B)``.
        num_data: Number of data in the mixture.
    """

    high: Tensor
    low: Tensor
    exact: Tensor
    estimated: Tensor
    information: Tensor
    saturated: Tensor
    ceiling: float
    mean_gap: Tensor
    log_std_ratio: Tensor
    shown: Tensor
    edges: Tensor
    codes: Tensor
    prior: Tensor
    num_data: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        names = ("high", "low", "exact", "estimated", "saturated", "mean_gap", "log_std_ratio")
        information = [v if math.isfinite(v) else None for v in self.information.tolist()]
        return {
            "kl": {name: getattr(self, name).tolist() for name in names} | {"information": information},
            "ceiling": self.ceiling,
            "num_data": self.num_data,
            "histograms": {
                name: getattr(self, name).tolist() for name in ("shown", "edges", "codes", "prior")
            },
        }

    def __str__(self) -> str:
        worst = int(self.shown[0])
        said = (
            f"sum of marginal KL {float(self.low.sum()):.3f} to {float(self.high.sum()):.3f} nats over "
            f"{len(self.high)} dimensions, the worst {float(self.low[worst]):.3f} to "
            f"{float(self.high[worst]):.3f} in dimension {worst} (mixture of {self.num_data} posteriors, "
            f"ceiling {self.ceiling:.2f}"
        )
        notes = [
            f"{int(flags.sum())} {word}"
            for flags, word in ((self.saturated, "saturated"), (self.estimated, "by kernel estimates"))
            if bool(flags.any())
        ]
        return "; ".join([said, *notes]) + ")"


def match_marginals(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    names: Sequence[str],
    q: Posterior,
    p: Prior,
    max_points: int,
    seed: int,
) -> Marginals:
    """Compare the marginals of draws that are there; programs are in evaluation mode.

    Args:
        model: The model program.
        guide: The guide program.
        x: The data that ``q`` was drawn for, shape ``(N, *x_shape)``.
        y: Their contexts.
        names: The latent sites.
        q: A draw of the latents for each datum.
        p: Draws of the prior.
        max_points: Most data in the mixture; fewer where there are many dimensions.
        seed: Seed of the choice of data, and of draws of the prior's upper sites.
    """
    dim = q.z.shape[1]
    num = max(2, min(len(x), max_points, int((_BUDGET / dim) ** 0.5)))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num]
    where = rows.to(x.device)
    x, y = x[where], None if y is None else y[where]
    values = {name: value[where] for name, value in q.values.items()}
    torch.manual_seed(seed)
    found = [
        torch.stack(columns, 0)
        for columns in (_column(model, guide, x, y, name, values, p.values[name]) for name in names)
    ]
    high, low, closed, estimated, information = torch.cat(found, -1)
    ceiling = math.log(num)
    gaps, ratios, _ = _moment_gaps(q.z, p.z)
    shown = high.nan_to_num(0.0).argsort(descending=True)[:_WORST]
    edges, codes, prior = _histograms(q.z[:, shown], p.z[:, shown])
    return Marginals(
        high=high,
        low=low,
        exact=closed > 0,
        estimated=estimated > 0,
        information=information,
        saturated=torch.tensor([is_saturated(v, ceiling) for v in information.tolist()]),
        ceiling=ceiling,
        mean_gap=gaps,
        log_std_ratio=ratios,
        shown=shown,
        edges=edges,
        codes=codes,
        prior=prior,
        num_data=num,
    )


def _column(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    name: str,
    values: dict[str, Tensor],
    prior: Tensor,
) -> tuple[Tensor, ...]:
    """Both divergences, flags and the information of one site's dimensions, each ``(e,)``."""
    z = values[name]
    num = len(z)
    q_site = _run(guide, x[:2], _part(y, slice(0, 2)), {k: v[:2] for k, v in values.items()}, exact)[name]
    p_site = _run(model, x[:2], _part(y, slice(0, 2)))[name]
    own_known, prior_known = (_numbers(site, site.value) is not None for site in (q_site, p_site))
    own = others = torch.full((num, _width(z)), -math.inf, dtype=torch.float64)
    mine = torch.full_like(own, math.nan)
    if own_known:
        for part in _parts(num, num * _width(z)):
            sites = _run(guide, x[part], _part(y, part), {k: v[part] for k, v in values.items()}, exact)
            log_q = _pairs(sites[name], z)
            own = torch.logaddexp(own, log_q.logsumexp(1))
            index = torch.arange(part.start, part.stop)
            mine[part] = log_q[index, index - part.start]
            log_q[index, index - part.start] = -math.inf
            others = torch.logaddexp(others, log_q.logsumexp(1))
        own, others = own - math.log(num), others - math.log(num - 1)
    else:
        own = others = _kernel(_flat(z), _flat(z), apart=True)
    # Two data may have one label, so that a prior given labels is never taken for the same everywhere.
    constant = prior_known and y is None and _constant(p_site, z)
    if constant:
        log_p = _pairs(_run(model, x[:1], _part(y, slice(0, 1)))[name], z)[:, 0]
    elif prior_known:
        log_p = torch.full_like(own, -math.inf)
        for part in _parts(num, num * _width(z)):
            log_p = torch.logaddexp(log_p, _pairs(_run(model, x[part], _part(y, part))[name], z).logsumexp(1))
        log_p = log_p - math.log(num)
    else:
        log_p = _kernel(_flat(z), _flat(prior))
    flag = torch.ones(own.shape[1], dtype=torch.float64)
    return (
        (own - log_p).mean(0),
        (others - log_p).mean(0),
        flag * constant,
        flag * (not (own_known and prior_known)),
        (mine - own).mean(0),
    )


def _numbers(site: Site, value: Tensor) -> Tensor | None:
    """Log-density of every number of values ``(*batch, *event_shape)`` under its marginal, if known."""
    return None if isinstance(site.mask, Tensor) else _log_marginals(site.fn, value)


def _log_marginals(fn: Any, value: Tensor) -> Tensor | None:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if not fn.event_shape:
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    if isinstance(fn, torch.distributions.MultivariateNormal):
        scale = fn.scale_tril.square().sum(-1).sqrt()
        return dist.Normal(fn.loc, scale).log_prob(value)
    if isinstance(fn, NormalMixture | CodeMixture):
        spread = fn.scale
        if spread is None:
            assert fn.scale_tril is not None
            spread = fn.scale_tril.square().sum(-1).sqrt()
        inside = dist.Normal(fn.loc, spread).log_prob(value.unsqueeze(-2))
        return (inside + fn.logits.log_softmax(-1).unsqueeze(-1)).logsumexp(-2)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        at = -len(fn.event_shape) - 1
        inside = _log_marginals(fn.component_distribution, value.unsqueeze(at))
        if inside is None:
            return None
        log_mix = fn.mixture_distribution.logits.log_softmax(-1)
        weighted = inside + log_mix.reshape(*log_mix.shape, *[1] * len(fn.event_shape))
        return weighted.logsumexp(at)
    return None


def _pairs(site: Site, z: Tensor) -> Tensor:
    """Log-density of every number of ``z`` under each datum's distribution, ``(M, B, e)``."""
    found = []
    for rows in z.split(max(1, _NUMBERS // max(1, _parameters(site) * _width(z)))):
        log_prob = _numbers(site, rows.unsqueeze(1))
        assert log_prob is not None
        found.append(_wide(log_prob).reshape(len(rows), -1, _width(z)))
    return torch.cat(found)


def _parameters(site: Site) -> int:
    """Number of distributions of each number: data, times components."""
    fn, many = site.fn, len(site.value)
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        many *= fn.mixture_distribution.logits.shape[-1]
    elif isinstance(fn, NormalMixture | CodeMixture):
        many *= len(fn.logits)
    return many


def _constant(site: Site, z: Tensor) -> bool:
    """Whether the distribution is the same for all data and draws above."""
    log_prob = _pairs(site, z[:4])
    return bool((log_prob == log_prob[:, :1]).all())


def _kernel(z: Tensor, draws: Tensor, apart: bool = False) -> Tensor:
    """Log-density by Gaussian kernels of Silverman's width, ``(M, e)``; without itself if ``apart``."""
    num = len(draws)
    spread = torch.minimum(draws.std(0), (draws.quantile(0.75, 0) - draws.quantile(0.25, 0)) / 1.34)
    spread = torch.where(spread > 0, spread, draws.std(0)).clamp(min=1e-12)
    width = 0.9 * spread * num**-0.2
    total = torch.full_like(z, -math.inf)
    for part in _parts(num, z.numel()):
        distance = (z.unsqueeze(1) - draws[part]) / width
        log_k = -0.5 * distance.square()
        if apart:
            index = torch.arange(part.start, part.stop)
            log_k[index, index - part.start] = -math.inf
        total = torch.logaddexp(total, log_k.logsumexp(1))
    return total - math.log(num - apart) - width.log() - 0.5 * math.log(2 * math.pi)


def _histograms(codes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bins over all but the outermost of both samples, and the shares in them."""
    pooled = torch.cat([codes, prior])
    low, high = pooled.quantile(0.005, 0), pooled.quantile(0.995, 0)
    high = torch.where(high > low, high, low + 1)
    steps = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
    edges = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
    shares = []
    for sample in (codes, prior):
        place = torch.searchsorted(edges[:, 1:-1].contiguous(), sample.T.contiguous())
        one = torch.ones_like(place, dtype=torch.float64) / len(sample)
        shares.append(torch.zeros(len(edges), _BINS, dtype=torch.float64).scatter_add_(1, place, one))
    return edges, shares[0], shares[1]


def _parts(num: int, numbers: int) -> list[slice]:
    size = max(1, _NUMBERS // max(1, numbers))
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


def _width(z: Tensor) -> int:
    return z[0].numel()


def _flat(z: Tensor) -> Tensor:
    return _wide(z).reshape(len(z), -1)
