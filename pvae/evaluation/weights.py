"""Log-weights of draws from a guide, datum by datum: what every estimate of this room is made of."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.distributions import declared
from pvae.inference.program import Program, Site, SiteRecorder, particle_plate
from pvae.ops import has_float64

__all__ = ["chain_of", "draw", "exact", "has_estimates", "held_out", "log_weights"]


def held_out(model: Any, x: Any, y: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Any] | None]:
    """Take data and protocol out of a split; check what can be checked once."""
    protocol = None
    if isinstance(x, Split):
        protocol = x.protocol.to_dict()
        if y is None and getattr(model, "conditional", False):
            y = x.y
        x = x.x
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor or a split such as data.test, got {type(x).__name__}")
    if x.ndim < 1 or len(x) < 1:
        raise ValueError(f"x must have shape (N, *x_shape) with N >= 1, got {tuple(x.shape)}")
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must have one row for each of the {len(x)} data, got {len(y)}")
    likelihood = getattr(model, "likelihood", None)
    check: Callable[[Tensor], None] | None = getattr(likelihood, "check", None)
    if check is not None:
        check(x)
    check_held_out: Callable[[], None] | None = getattr(likelihood, "check_held_out", None)
    if check_held_out is not None:
        check_held_out()
    check_labels: Callable[[Tensor], None] | None = getattr(model, "check_labels", None)
    if check_labels is not None and y is not None:
        check_labels(y)
    return x, y, protocol


def draw(
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    seed: int,
    given: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw every latent ``num_particles`` times; return the draws and log q, shape ``(K, B)``.

    Those in ``given`` keep their values, ``(K, B, *event_shape)``, and log q is that of the others given
    them, which must come later.
    """
    given = given or {}
    torch.manual_seed(seed)
    with SiteRecorder(given, replace=exact) as q, particle_plate(num_particles):
        guide(x) if y is None else guide(x, y)
    latents = {name: site for name, site in q.sites.items() if not site.is_factor}
    shape = (num_particles, len(x))
    log_q = torch.zeros(shape, dtype=_precision(x.device), device=x.device)
    for name, site in latents.items():
        if site.observed:
            raise ValueError(f"the guide must observe nothing, got observed site {name!r}")
        if name not in given:
            log_q += _log_prob(site, shape, "guide")
    return {name: site.value for name, site in latents.items()}, log_q


def exact(name: str, fn: Any) -> Any:
    """Exchange a distribution whose training density is a surrogate for the exact one."""
    if declared(fn, "density", "exact") != "exact":
        # One over an unbiased estimate is biased upwards, and so would be the weight.
        raise ValueError(
            f"guide site {name!r} has only an estimate of its density, which cannot divide a weight"
        )
    if getattr(fn, "training_density", "exact") == "exact":
        return fn
    exact = getattr(fn, "exact", None)
    if exact is None:
        raise ValueError(f"guide site {name!r} has only a surrogate density, which cannot enter a likelihood")
    return exact()


def log_weights(
    model: Program,
    x: Tensor,
    y: Tensor | None,
    draws: list[tuple[dict[str, Tensor], Tensor]],
    rows: int,
    given: Collection[str] = (),
) -> Tensor:
    """Score the draws of several blocks under the model, a chunk of particles at a time; shape ``(K, B)``.

    The sites in ``given`` are conditions: their own densities do not count.
    """
    size = len(x)
    values = {name: torch.cat([v[name] for v, _ in draws], dim=1)[:, :size] for name in draws[0][0]}
    log_w = -torch.cat([log_q for _, log_q in draws], dim=1)[:, :size].to(x.device)
    for chunk in _chunks(len(log_w), max(1, rows // size)):
        part = {name: value[chunk] for name, value in values.items()}
        shape = (chunk.stop - chunk.start, size)
        with SiteRecorder(part) as p, particle_plate(shape[0]):
            model(x) if y is None else model(x, y)
        latents = {name for name, site in p.sites.items() if not (site.observed or site.is_factor)}
        if latents != set(part):
            raise ValueError(f"model and guide must have the same latents, got {latents} and {set(part)}")
        scored = [site for name, site in p.sites.items() if name not in given]
        _check_bounds(scored, len(log_w))
        for site in scored:
            if not site.is_factor:
                log_w[chunk] += _log_prob(site, shape, "model")
    return log_w


def has_estimates(sites: Iterable[Site]) -> bool:
    """Whether a density is an estimate, which draws noise of its own when it is asked for."""
    return any(declared(site.fn, "density", "exact") != "exact" for site in sites)


def chain_of(sites: Iterable[Site]) -> tuple[int, bool] | None:
    """Number of steps of the chain that an unbiased density is estimated along, and whether it is
    calibrated; ``None`` where there is none.
    """
    for site in sites:
        if declared(site.fn, "density", "exact") == "unbiased":
            steps = declared(site.fn, "num_steps", None)
            if steps is not None:
                return int(steps), declared(site.fn, "mse", None) is not None
    return None


def _check_bounds(sites: Iterable[Site], num_particles: int) -> None:
    """Refuse to exponentiate a bound on a log-density, whose noise alone would raise the estimate."""
    for site in sites:
        if num_particles > 1 and declared(site.fn, "density", "exact") == "bound":
            raise ValueError(
                f"model site {site.name!r} has only a stochastic lower bound of its log-density (estimator "
                f"'vlb'), which cannot enter a log-mean-exp over {num_particles} particles: take its "
                "unbiased estimate (estimator 'chain')"
            )


def _precision(device: torch.device) -> torch.dtype:
    """What log-weights are added up in, whatever the programs compute in."""
    return torch.float64 if has_float64(device) else torch.float32


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _log_prob(site: Site, shape: tuple[int, int], program: str) -> Tensor:
    log_prob = site.log_prob()
    if tuple(log_prob.shape) != shape:
        raise ValueError(
            f"{program} site {site.name!r} must lie in the plate over the data: its log-probability must "
            f"have shape {shape}, got {tuple(log_prob.shape)}"
        )
    return log_prob.to(_precision(log_prob.device))
