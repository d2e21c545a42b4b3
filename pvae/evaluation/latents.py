"""The latents of a model under its prior and under a guide: flat vectors with densities, for any sites."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.inference.program import Program, Site, SiteRecorder, particle_plate

from .features import FeatureExtractor
from .weights import draw, exact, log_weights

__all__ = [
    "Posterior",
    "Prior",
    "draw_posterior",
    "draw_prior",
    "latent_names",
    "log_aggregate",
    "log_aggregate_within",
    "means",
    "shared_latents",
]

_ROWS = 500  # data in one pass; fixed, so that draws do not depend on memory
_NUMBERS = 2**22  # latent numbers in one pass of the aggregate posterior


@dataclass(frozen=True)
class Prior:
    """Draws of the latents from the prior, in double precision on the CPU.

    Attributes:
        z: Latents, all sites side by side, shape ``(M, d)``.
        log_p: Their log-density in nats, shape ``(M,)``; NaN where the prior has none.
        values: The draws site by site, on the device, shape ``(M, *event_shape)``.
        features: Features of the means of p(x | z), shape ``(M, F)``, where asked for.
        rows: The datum whose context each draw was made for, shape ``(M,)``.
    """

    z: Tensor
    log_p: Tensor
    values: dict[str, Tensor]
    features: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class Posterior:
    """One draw of the latents from the guide for each datum, in double precision on the CPU.

    Attributes:
        z: Latents, all sites side by side, shape ``(N, d)``.
        log_q: Their log-density under the guide in nats, shape ``(N,)``.
        log_p: Under the prior; NaN where it has none.
        log_x: Log-likelihood of the datum given them.
        square_error: Squared distance of the mean of p(x | z) from x, mean over the numbers of x, in squared
            units of x, shape ``(N,)``; NaN where the distribution has no mean.
        values: The draws site by site, on the device, shape ``(N, *event_shape)``.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    log_x: Tensor
    square_error: Tensor
    values: dict[str, Tensor]


def latent_names(model: Program, guide: Program, x: Tensor, y: Tensor | None) -> tuple[str, ...]:
    """Check both programs on two data; name the latent sites in the model's order.

    Raises:
        ValueError: If a site lies outside the plate over the data, the programs have different latents, or
            the guide has no exact density.
    """
    two = slice(0, 2)
    with pyro.validation_enabled(True):
        drawn = draw(guide, x[two], _part(y, two), 2, seed=0)
        log_weights(model, x[two], _part(y, two), [drawn], rows=4)
        sites = _run(model, x[two], _part(y, two))
    return tuple(name for name, site in sites.items() if not (site.observed or site.is_factor))


def shared_latents(model: Program, guide: Program, x: Tensor, y: Tensor | None) -> tuple[str, ...]:
    """Name the latent sites of both programs in the model's order, whose prior need not have a density.

    Raises:
        ValueError: If the programs have different latents, or the guide has no exact density.
    """
    two = slice(0, 2)
    with pyro.validation_enabled(True):
        found = [
            tuple(name for name, site in sites.items() if not (site.observed or site.is_factor))
            for sites in (
                _run(model, x[two], _part(y, two)),
                _run(guide, x[two], _part(y, two), replace=exact),
            )
        ]
    if set(found[0]) != set(found[1]):
        raise ValueError(
            f"model and guide must have the same latents, got {set(found[0])} and {set(found[1])}"
        )
    return found[0]


def draw_prior(
    model: Program,
    x: Tensor,
    y: Tensor | None,
    names: Sequence[str],
    num: int,
    seed: int,
    features: FeatureExtractor | None = None,
) -> Prior:
    """Run the model freely; a conditional one takes contexts from the data, each as often as the others."""
    torch.manual_seed(seed)
    rows = torch.cat([torch.randperm(len(x)) for _ in range(-(-num // len(x)))])[:num]
    log_p, values, found = [], [], []
    for part in rows.split(_ROWS):
        where = part.to(x.device)
        sites = _run(model, x[where], None if y is None else y[where])
        values.append({name: sites[name].value for name in names})
        log_p.append(_log_prior(sites, names, len(part)))
        if features is not None:
            found.append(_wide(features(sites["x"].fn.mean)))
    joined = {name: torch.cat([v[name] for v in values]) for name in names}
    return Prior(_flat(joined), torch.cat(log_p), joined, torch.cat(found) if found else None, rows)


def draw_posterior(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, names: Sequence[str], seed: int
) -> Posterior:
    """Draw the latents of every datum once, and score them under both programs."""
    torch.manual_seed(seed)
    columns: list[tuple[Tensor, ...]] = []
    values = []
    for part in _parts(len(x)):
        x_part, y_part = x[part], _part(y, part)
        q = _run(guide, x_part, y_part, replace=exact)
        values.append({name: q[name].value for name in names})
        p = _run(model, x_part, y_part, values[-1])
        columns.append(
            (
                _total(q[name].log_prob() for name in names),
                _log_prior(p, names, len(x_part)),
                _total(s.log_prob() for s in p.values() if s.observed and not s.is_factor),
                _square_error(p["x"]),
            )
        )
    log_q, log_p, log_x, error = (torch.cat(column) for column in zip(*columns, strict=True))
    joined = {name: torch.cat([v[name] for v in values]) for name in names}
    return Posterior(_flat(joined), log_q, log_p, log_x, error, joined)


def means(
    guide: Program, x: Tensor, y: Tensor | None, names: Sequence[str], seed: int, num_draws: int
) -> tuple[Tensor, Tensor]:
    """Posterior means of the latents, and the variance of their Monte-Carlo error, each ``(N, d)``.

    The mean of a site's distribution is taken where it has one, else the draw; both are averaged over
    ``num_draws`` runs of the guide, for a site may hang on the draw of the site above it.
    """
    torch.manual_seed(seed)
    found, errors = [], []
    for part in _parts(len(x)):
        with SiteRecorder(replace=exact) as q, particle_plate(num_draws):
            _call(guide, x[part], _part(y, part))
        runs = torch.cat([_rows(_mean(q.sites[name]), 2) for name in names], -1)
        found.append(runs.mean(0))
        errors.append(runs.var(0) / num_draws if num_draws > 1 else torch.zeros_like(runs[0]))
    return torch.cat(found), torch.cat(errors)


def log_aggregate(
    guide: Program,
    values: dict[str, Tensor],
    x: Tensor,
    y: Tensor | None,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-density of latents under the mixture of all posteriors, in nats.

    .. math:: \log \frac1N \sum_j q(z_i \mid x_j)

    Every datum is encoded once, and no matrix of all pairs is kept.

    Args:
        guide: The guide program.
        values: Latents by site, shape ``(M, *event_shape)``.
        x: Data of the mixture, shape ``(N, *x_shape)``.
        y: Their contexts.
        group: Where the latents are those of the data themselves (``M = N``): a number for each datum,
            shape ``(N,)``. ``None`` for other latents.

    Returns:
        The density under the mixture of the data of the same group, and under that of all data but the
        latent's own; for other latents both are the mixture of all data. Shapes ``(M,)``.
    """
    num_latents, num_data = len(next(iter(values.values()))), len(x)
    numbers = sum(value[0].numel() for value in values.values())
    size = max(1, _NUMBERS // max(1, num_latents * numbers))
    within = torch.full((num_latents,), -math.inf, dtype=torch.float64)
    others = within.clone()
    for start in range(0, num_data, size):
        part = slice(start, min(start + size, num_data))
        width = part.stop - part.start
        replayed = {
            name: value.unsqueeze(1).expand(num_latents, width, *value.shape[1:])
            for name, value in values.items()
        }
        with SiteRecorder(replayed, replace=exact) as q, particle_plate(num_latents):
            _call(guide, x[part], _part(y, part))
        log_q = _total(q.sites[name].log_prob() for name in values)
        if group is None:
            others = torch.logaddexp(others, log_q.logsumexp(-1))
            continue
        apart = group.unsqueeze(-1) != group[part]
        within = torch.logaddexp(within, log_q.masked_fill(apart, -math.inf).logsumexp(-1))
        own = torch.arange(num_latents).unsqueeze(-1) == torch.arange(part.start, part.stop)
        others = torch.logaddexp(others, log_q.masked_fill(own, -math.inf).logsumexp(-1))
    if group is None:
        others = others - math.log(num_data)
        return others, others
    members = torch.bincount(group)[group].double()
    return within - members.log(), others - math.log(num_data - 1)


def log_aggregate_within(
    guide: Program, values: dict[str, Tensor], x: Tensor, y: Tensor | None, group: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-density of each datum's latents under the mixture of the posteriors of its group, in nats.

    Args:
        guide: The guide program.
        values: Latents of the data by site, shape ``(N, *event_shape)``.
        x: The data, shape ``(N, *x_shape)``.
        y: Their contexts.
        group: A number for each datum, shape ``(N,)``.

    Returns:
        The density under all posteriors of the group, and under all but the datum's own: NaN for a datum that
        is alone. Shapes ``(N,)``.
    """
    own = torch.empty(len(x), dtype=torch.float64)
    others = torch.full_like(own, math.nan)
    for number in group.unique().tolist():
        members = (group == number).nonzero()[:, 0]
        rows = members.to(x.device)
        part = {name: value[rows] for name, value in values.items()}
        data, context = x[rows], None if y is None else y[rows]
        if len(members) > 1:
            within = torch.zeros(len(members), dtype=torch.int64)
            own[members], others[members] = log_aggregate(guide, part, data, context, within)
        else:
            own[members] = log_aggregate(guide, part, data, context)[0]
    return own, others


def _call(program: Program, x: Tensor, y: Tensor | None) -> Any:
    return program(x) if y is None else program(x, y)


def _run(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    values: dict[str, Tensor] | None = None,
    replace: Callable[[str, Any], Any] | None = None,
) -> dict[str, Site]:
    with SiteRecorder(values, replace=replace) as recorded:
        _call(program, x, y)
    return recorded.sites


def _parts(num_data: int) -> Iterator[slice]:
    for start in range(0, num_data, _ROWS):
        yield slice(start, min(start + _ROWS, num_data))


def _part(y: Tensor | None, part: slice) -> Tensor | None:
    return None if y is None else y[part]


def _wide(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([_rows(value, 1) for value in values.values()], -1)


def _rows(value: Tensor, leading: int) -> Tensor:
    """Make the event one dimension, which a scalar has not yet."""
    return _wide(value).reshape(*value.shape[:leading], -1)


def _total(terms: Iterator[Tensor]) -> Tensor:
    """Add up log-probabilities site by site, in double precision."""
    first, *rest = map(_wide, terms)
    return sum(rest, first)


def _log_prior(sites: dict[str, Site], names: Sequence[str], size: int) -> Tensor:
    """Log-density of the latents of ``size`` data, NaN where the prior can only be drawn from."""
    try:
        return _total(sites[name].log_prob() for name in names)
    except NotImplementedError:
        return torch.full((size,), math.nan, dtype=torch.float64)


def _mean(site: Site) -> Tensor:
    try:
        mean: Tensor = site.fn.mean
    except NotImplementedError:
        mean = site.value
    return mean.expand(site.value.shape)


def _square_error(site: Site) -> Tensor:
    x = _wide(site.value)
    try:
        mean = _wide(site.fn.mean)
    except NotImplementedError:
        return torch.full((len(x),), math.nan, dtype=torch.float64)
    return _rows((mean - x).square(), 1).mean(-1)
