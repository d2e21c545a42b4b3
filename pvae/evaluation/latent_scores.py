r"""What prior, posterior and bound say of each datum: scores that tell familiar data from strange ones."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, Site, SiteRecorder, particle_plate
from pvae.inference.progress import Reporter, reporting

from .latents import _call, _mean, _total, _wide, latent_names
from .likelihood import log_likelihood
from .pareto import khat_share
from .weights import exact, held_out

__all__ = ["LatentScores", "best_labels", "latent_scores"]

# Numbers of x, and rows, in one pass of the decoder.
_PASS_NUMBERS, _PASS_ROWS = 2**21, 4096


@dataclass(frozen=True)
class LatentScores:
    r"""Scores of some data, one of each for every datum, in nats, float64, shape ``(N,)``.

    Attributes:
        log_p_mean: :math:`\log p_Z` at the posterior mean.
        log_p: :math:`E_q \log p_Z(z)`.
        log_p_draw: :math:`\log p_Z` at one draw from q.
        kl: :math:`KL(q(z|x) \| p_Z)`.
        entropy: :math:`H(q(z|x))`.
        elbo: Evidence lower bound.
        log_prob: Importance-weighted bound on log p(x), where it was asked for.
        pareto_k: k-hat of its weights (:func:`pareto_khat`).
        ess: Effective sample size of its weights, between 1 and ``num_particles``.
        closed_form: Which of ``"kl"`` and ``"entropy"`` are in closed form; the others, and what is made of
            them, are averages over draws.
        num_samples: Draws from q behind each average.
        num_particles: Particles behind ``log_prob``.
        seed: Seed of all draws.
        protocol: What the data were, if known.
        conditional: Whether p and q are those given a label.
    """

    log_p_mean: Tensor
    log_p: Tensor
    log_p_draw: Tensor
    kl: Tensor
    entropy: Tensor
    elbo: Tensor
    log_prob: Tensor | None
    closed_form: tuple[str, ...]
    num_samples: int
    num_particles: int | None
    seed: int
    protocol: dict[str, Any] | None = None
    conditional: bool = False
    pareto_k: Tensor | None = None
    ess: Tensor | None = None

    def __len__(self) -> int:
        return len(self.elbo)

    def columns(self) -> dict[str, Tensor]:
        """Return the scores there are, by name."""
        found = {name: getattr(self, name) for name in _COLUMNS}
        return {name: column for name, column in found.items() if column is not None}

    @property
    def khat_share(self) -> float:
        """Share of data whose bound has a k-hat too high; NaN without a bound or with too few particles."""
        if self.pareto_k is None or self.num_particles is None:
            return math.nan
        return khat_share(self.pareto_k, self.num_particles)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        share = self.khat_share
        return {
            "khat_share": share if math.isfinite(share) else None,
            "means": {name: float(column.mean()) for name, column in self.columns().items()},
            "closed_form": list(self.closed_form),
            "num_data": len(self),
            "num_samples": self.num_samples,
            "num_particles": self.num_particles,
            "seed": self.seed,
            "conditional": self.conditional,
            "protocol": self.protocol,
            "per_datum": {name: column.tolist() for name, column in self.columns().items()},
        }

    def __str__(self) -> str:
        means = {name: float(column.mean()) for name, column in self.columns().items()}
        return (
            f"log p(E z) {means['log_p_mean']:.2f}, E log p(z) {means['log_p']:.2f}, KL {means['kl']:.2f}, "
            f"H(q) {means['entropy']:.2f}, ELBO {means['elbo']:.2f} nats on {len(self)} data"
        )


_COLUMNS = ("log_p_mean", "log_p", "log_p_draw", "kl", "entropy", "elbo", "log_prob")


def latent_scores(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_samples: int = 16,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> LatentScores:
    """Score data by the prior's log-density of their codes, the rate, the posterior's entropy and the bound.

    KL and entropy are in closed form where one is registered and exact, else averages over draws; a prior
    whose registered KL is a bound is averaged over draws. ``pyro.factor`` terms never count. Latents of
    several sites count together. The draws of a datum depend on its position alone. Both programs run in
    evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; its prior must have a density.
        guide: The guide program, with a density.
        x: Data, shape ``(N, *x_shape)``, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true;
            for data that have none, see :func:`best_labels`.
        num_samples: Draws of the latents for each datum.
        num_particles: Particles of an importance-weighted bound (:func:`log_likelihood`), ``None`` for none.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes that are not positive, a score that is not finite, or programs outside the
            contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    if num_particles is not None and num_particles < 1:
        raise ValueError(f"num_particles must be positive, got {num_particles}")
    split, split_y = x, y
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    with evaluating(model, guide), reporting("scoring", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        parts, closed = [], set(_CLOSED)
        for block, (x_block, y_block), size in _blocks(x, y, num_samples, report):
            torch.manual_seed((seed * 1_000_003 + block) % 2**63)
            found, exactly = _scores(model, guide, x_block, y_block, names, num_samples)
            closed &= exactly
            parts.append({name: column[:size] for name, column in found.items()})
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, column in columns.items():
        bad = ~column.isfinite()
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(f"{name} must be finite, got {float(column[where])} for datum {where}")
    bound = None
    if num_particles is not None:
        bound = log_likelihood(
            model, guide, split, split_y, num_particles=num_particles, seed=seed, progress=progress
        )
    return LatentScores(
        **columns,
        log_prob=None if bound is None else bound.log_prob,
        closed_form=tuple(sorted(closed)),
        num_samples=num_samples,
        num_particles=num_particles,
        seed=seed,
        protocol=protocol,
        conditional=y is not None,
        pareto_k=None if bound is None else bound.pareto_k,
        ess=None if bound is None else bound.ess,
    )


def best_labels(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    labels: Tensor,
    *,
    num_samples: int = 4,
    seed: int = 0,
) -> Tensor:
    """Return for each datum the label under which a conditional model gives it the highest ELBO.

    Data from elsewhere have no labels that the model knows. To compare them with familiar data, label both
    in this way: a label that only the latter have, and that is right, would be seen in the scores.

    Args:
        model: The model program, ``model(x, y)``.
        guide: The guide program.
        x: Data, shape ``(N, *x_shape)``, or a split, whose own labels are not looked at.
        labels: The labels to choose from, shape ``(K, ...)``.
        num_samples: Draws of the latents for each datum and label.
        seed: Seed of the draws, the same for all labels.

    Returns:
        Rows of ``labels``, first dimension ``N``.

    Raises:
        ValueError: If there are no labels, or as :func:`latent_scores`.
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if labels.ndim < 1 or len(labels) < 1:
        raise ValueError(f"labels must have shape (K, ...) with K at least 1, got {tuple(labels.shape)}")
    data = x.x if isinstance(x, Split) else x
    bounds = []
    for label in labels:
        given = label.expand(len(data), *label.shape)
        found = latent_scores(model, guide, data, given, num_samples=num_samples, seed=seed, progress=False)
        bounds.append(found.elbo)
    return labels[torch.stack(bounds).argmax(0).to(labels.device)]


def _blocks(
    x: Tensor, y: Tensor | None, num_samples: int, report: Reporter
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None], int]]:
    """Cut data into blocks of one size, the last one padded: draws then never depend on their number."""
    rows = min(_PASS_ROWS, _PASS_NUMBERS // x[0].numel())
    size = max(1, rows // num_samples)
    for block, start in enumerate(range(0, len(x), size)):
        index = torch.arange(start, start + size, device=x.device).clamp_(max=len(x) - 1)
        yield block, (x[index], None if y is None else y[index]), min(size, len(x) - start)
        report(min(start + size, len(x)))


def _scores(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, names: tuple[str, ...], num_samples: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Score a block of data; and say which of KL and entropy were in closed form throughout."""
    with SiteRecorder(replace=exact) as q, particle_plate(num_samples):
        _call(guide, x, y)
    with SiteRecorder({name: q.sites[name].value for name in names}) as p, particle_plate(num_samples):
        _call(model, x, y)
    means = {name: _mean(q.sites[name]).mean(0) for name in names}
    with SiteRecorder(means) as at_mean:
        _call(model, x, y)

    log_q = {name: _wide(q.sites[name].log_prob()) for name in names}
    log_p = {name: _wide(p.sites[name].log_prob()) for name in names}
    log_x = _total(s.log_prob() for s in p.sites.values() if s.observed and not s.is_factor)
    closed = set(_CLOSED)
    terms: dict[str, Tensor] = {}
    for kind, form in _CLOSED.items():
        total = torch.zeros_like(log_x)
        for name in names:
            term = form(q.sites[name], p.sites[name])
            if term is None:
                closed.discard(kind)
                term = -log_q[name] if kind == "entropy" else log_q[name] - log_p[name]
            total = total + term
        terms[kind] = total.mean(0)
    summed = torch.stack(list(log_p.values())).sum(0)
    return {
        "log_p_mean": _total(at_mean.sites[name].log_prob() for name in names),
        # -(KL + H) is the mean of log p exactly where both are.
        "log_p": -(terms["kl"] + terms["entropy"]) if closed == set(_CLOSED) else summed.mean(0),
        "log_p_draw": summed[0],
        "kl": terms["kl"],
        "entropy": terms["entropy"],
        "elbo": log_x.mean(0) - terms["kl"],
    }, closed


def _closed_kl(q: Site, p: Site) -> Tensor | None:
    """KL of the two distributions of a latent, shape ``(S, B)``; ``None`` where there is none, or a bound."""
    if isinstance(p.mask, Tensor) or isinstance(q.mask, Tensor) or getattr(p.fn, "kl_mode", "mc") != "mc":
        return None
    prior = p.fn
    normal = prior.base_dist if isinstance(prior, Independent) else None
    if isinstance(q.fn, MultivariateNormal) and isinstance(normal, Normal) and len(prior.event_shape) == 1:
        # Not among the pairs that are registered.
        prior = MultivariateNormal(normal.loc, scale_tril=torch.diag_embed(normal.scale))
    try:
        return _wide(kl_divergence(q.fn, prior))
    except NotImplementedError:
        return None


def _closed_entropy(q: Site, _: Site) -> Tensor | None:
    if isinstance(q.mask, Tensor):
        return None
    try:
        return _wide(q.fn.entropy())
    except NotImplementedError:
        return None


_CLOSED: Mapping[str, Callable[[Site, Site], Tensor | None]] = {"kl": _closed_kl, "entropy": _closed_entropy}
