"""Log-weights of draws from a guide, datum by datum: what every estimate of this room is made of."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.data.tensors import check_dense
from pvae.distributions import declared
from pvae.inference.door import in_precision_of
from pvae.inference.program import Program, Site, SiteRecorder, particle_plate
from pvae.ops import has_float64

from .compiled import CompiledScore
from .cutting import Cut, NotCuttable

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
    check_dense("x", x)
    x = in_precision_of(model, x)
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
    rows: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw every latent ``num_particles`` times; return the draws and log q, shape ``(K, B)``.

    Those in ``given`` keep their values, ``(K, B, *event_shape)``, and log q is that of the others given
    them, which must come later. With ``rows`` no more of them go through the guide at once, which changes no
    draw, unless its random numbers cannot be told apart by particles (a discrete latent's).
    """
    given = given or {}
    size = num_particles if rows is None else max(1, rows // len(x))
    if size < num_particles:
        try:
            return _draw_in_cuts(guide, x, y, num_particles, seed, given, size)
        except NotCuttable:
            pass
    torch.manual_seed(seed)
    return _drawn(guide, x, y, num_particles, given)


def _drawn(
    guide: Program, x: Tensor, y: Tensor | None, num_particles: int, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
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


def _draw_in_cuts(
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    seed: int,
    given: Mapping[str, Tensor],
    size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """The same for some particles at a time."""
    # As even as can be, as the last cut goes over some particles again.
    size = -(-num_particles // -(-num_particles // size))
    cut = Cut(num_particles, size, len(x))
    values: dict[str, Tensor] = {}
    log_q = torch.empty(num_particles, len(x), dtype=_precision(x.device), device=x.device)
    torch.manual_seed(seed)
    for part in cut.parts():
        some = {name: value[part] for name, value in given.items()}
        with cut.running(part, some):
            drawn, log_q_part = _drawn(guide, x, y, size, some)
        log_q[part] = log_q_part
        for name, value in drawn.items():
            if name not in values:
                values[name] = value.new_empty(num_particles, *value.shape[1:])
            values[name][part] = value
    return values, log_q


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
    fitting: int | None = None,
    compiled: CompiledScore | None = None,
) -> Tensor:
    """Score the draws of several blocks under the model, a chunk of particles at a time; shape ``(K, B)``.

    The sites in ``given`` are conditions: their own densities do not count. The noise of estimated densities
    is drawn for a chunk of ``rows``, on which it depends; networks see ``fitting`` rows at once, if fewer.
    With ``compiled`` exact densities come from there, for as long as it has them.
    """
    size = len(x)
    values = {name: _joined([v[name] for v, _ in draws], size) for name in draws[0][0]}
    log_w = -torch.cat([log_q for _, log_q in draws], dim=1)[:, :size].to(x.device)
    if compiled is not None and compiled.add_to(log_w, x, y, values, min(rows, fitting or rows), given):
        return log_w
    weighed = []
    for chunk in _chunks(len(log_w), max(1, rows // size)):
        part = {name: value[chunk] for name, value in values.items()}
        passed = max(1, (fitting or rows) // size)
        weighed.append(_weighed(log_w[chunk], model, x, y, part, given, passed, len(log_w)))
    return torch.cat(weighed)


def _weighed(
    log_w: Tensor,
    model: Program,
    x: Tensor,
    y: Tensor | None,
    values: Mapping[str, Tensor],
    given: Collection[str],
    size: int,
    num_particles: int,
) -> Tensor:
    """``log_w`` ``(k, B)`` with the model's log-density added, ``size`` particles in a pass of networks."""
    estimated: set[str] = set()
    pieces = []
    for piece in _chunks(len(log_w), size):
        part = {name: value[piece] for name, value in values.items()}
        log_p, shape = log_w[piece], (piece.stop - piece.start, len(x))
        sites = _replayed(SiteRecorder(part), model, x, y, shape[0])
        latents = {name for name, site in sites.items() if not (site.observed or site.is_factor)}
        if latents != set(part):
            raise ValueError(f"model and guide must have the same latents, got {latents} and {set(part)}")
        scored = [site for name, site in sites.items() if name not in given]
        _check_bounds(scored, num_particles)
        if shape[0] < len(log_w):
            estimated = {site.name for site in scored if has_estimates([site])}
        for site in scored:
            if not (site.is_factor or site.name in estimated):
                log_p = log_p + _log_prob(site, shape, "model")
        pieces.append(log_p)
    log_w = torch.cat(pieces)
    if estimated:
        # Their noise is that of all these particles, whatever passes they were cut into.
        sites = _replayed(_UntilSeen(values, estimated), model, x, y, len(log_w))
        for name, site in sites.items():
            if name in estimated:
                log_w = log_w + _log_prob(site, (len(log_w), len(x)), "model")
    return log_w


def _replayed(
    recorder: SiteRecorder, model: Program, x: Tensor, y: Tensor | None, num_particles: int
) -> dict[str, Site]:
    try:
        with recorder, particle_plate(num_particles):
            model(x) if y is None else model(x, y)
    except _ReachedError:
        pass
    return recorder.sites


class _ReachedError(Exception):
    """A program has come to the last site it was run for."""


class _UntilSeen(SiteRecorder):
    """Stops a program when it has come by some of its sites."""

    def __init__(self, values: Mapping[str, Tensor], names: Collection[str]) -> None:
        super().__init__(values)
        self._names = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if self._names <= self.sites.keys():
            raise _ReachedError


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


def _joined(parts: list[Tensor], size: int) -> Tensor:
    """Draws of several blocks side by side, without a copy of those of one."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return whole[:, :size]


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
