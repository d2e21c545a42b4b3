r"""What each layer of a hierarchical model carries: its rate, its active and its collapsed units.

A latent is used where its posterior leaves its prior; a ladder's failures (a pseudoinput that is paid for and
ignored, layers that switch off) are layers' figures, which a sum over the layers hides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, Site, SiteRecorder, particle_plate
from pvae.inference.progress import reporting

from .latent_scores import _PASS_NUMBERS, _PASS_ROWS, _blocks, _closed_kl
from .latents import _call, _mean, _part, _wide
from .weights import draw, exact, held_out, log_weights

__all__ = ["Exchange", "Layer", "LayerReport", "exchanged_kl", "layer_report"]

# A number of a latent is collapsed if its KL is below so many nats for so large a share of the data.
_QUIET = 0.01
_MOST = 0.95
# Of log-variances, read back from single-precision scales.
_NEAR = 1e-4
# Whether a latent is exchanged.
_KINDS = (False, True)


@dataclass(frozen=True)
class Layer:
    r"""One latent site.

    Attributes:
        name: Of the site.
        kl: :math:`\mathbb E\, KL(q(z_l \mid z_{>l}, x) \| p(z_l \mid z_{>l}))` of each datum in nats, the
            expectation over the latents above, shape ``(N,)``; an upper bound under a bound on a density.
        closed_form: Whether the KL given the latents above is in closed form; else it is one of draws, too.
        variance: Variance over the data of the posterior mean of each number, in squared units of z, shape
            ``event_shape``. The spread of that mean with the drawn latents above is subtracted.
        threshold: Variance above which a unit is active; it supposes a latent of about unit scale.
        kl_map: Mean KL of each number in nats, shape ``event_shape``; ``None`` where prior and posterior are
            not both normal with independent numbers.
        quiet: Share of the data for which the KL of each number is below 0.01 nats, shape ``event_shape``;
            ``None`` as ``kl_map``.
        at_bounds: Of prior ``"p"`` and posterior ``"q"``, the shares of the log-variances at the lower and at
            the upper end of their range; ``None`` where no range was given.
    """

    name: str
    kl: Tensor
    closed_form: bool
    variance: Tensor
    threshold: float = 0.01
    kl_map: Tensor | None = None
    quiet: Tensor | None = None
    at_bounds: Mapping[str, tuple[float, float]] | None = None

    @property
    def size(self) -> int:
        """How many numbers the latent has."""
        return self.variance.numel()

    @property
    def mean(self) -> float:
        """Mean KL in nats."""
        return float(self.kl.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over data, nats; NaN for a single datum."""
        return _standard_error(self.kl)

    @property
    def active(self) -> int:
        """Number of active units."""
        return int((self.variance > self.threshold).sum())

    @property
    def collapsed(self) -> float | None:
        """Share of the numbers whose KL is below 0.01 nats for 95 % of the data."""
        return None if self.quiet is None else float((self.quiet >= _MOST).double().mean())

    @property
    def plane(self) -> Tensor | None:
        """Mean KL of each place of a latent that is an image, nats, shape ``(height, width)``."""
        return self.kl_map.sum(0) if self.kl_map is not None and self.kl_map.ndim == 3 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        ends = {who: list(pair) for who, pair in (self.at_bounds or {}).items()}
        return {
            "shape": list(self.variance.shape),
            "kl": self.mean,
            "standard_error": _finite(self.standard_error),
            "closed_form": self.closed_form,
            "active_units": self.active,
            "collapsed": self.collapsed,
            "at_bounds": ends or None,
            "kl_plane": None if self.plane is None else self.plane.tolist(),
        }


@dataclass(frozen=True)
class LayerReport:
    """All latent sites of a model on some data.

    Attributes:
        layers: In the model's order, from the top.
        num_samples: Draws of the latents for each datum.
        seed: Seed of the draws.
        protocol: What the data were, if known.
    """

    layers: Sequence[Layer]
    num_samples: int
    seed: int
    protocol: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Layer:
        return self.by_name[name]

    def __len__(self) -> int:
        """Number of data."""
        return len(self.layers[0].kl)

    @property
    def by_name(self) -> dict[str, Layer]:
        """The layers by the names of their sites."""
        return {layer.name: layer for layer in self.layers}

    @property
    def kl(self) -> Tensor:
        """KL of all layers together in nats, shape ``(N,)``."""
        return torch.stack([layer.kl for layer in self.layers]).sum(0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        return {
            "layers": {layer.name: layer.to_dict() for layer in self.layers},
            "kl": float(self.kl.mean()),
            "standard_error": _finite(_standard_error(self.kl)),
            "threshold": self.layers[0].threshold,
            "num_data": len(self),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def to_markdown(self, train: "LayerReport | None" = None) -> str:
        """Return one table, a row for each layer.

        Args:
            train: The same model on training data, for two columns more: a rate that is lower there than on
                held-out data is one that has learned them by heart.
        """
        bounded = any(layer.at_bounds for layer in self.layers)
        head = ["layer", "numbers", "KL, nats"]
        head += ["on training data", "difference"] if train is not None else []
        head += ["active units", "collapsed"]
        head += ["log var p at low, high end", "of q"] if bounded else []
        lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
        for layer in self.layers:
            other = None if train is None else train[layer.name].kl
            cells = [layer.name, _shape(layer.variance), *_rates(layer.kl, other)]
            cells += [f"{layer.active}", _percent(layer.collapsed)]
            if bounded:
                cells += [_ends(layer, "p"), _ends(layer, "q")]
            lines.append(f"| {' | '.join(cells)} |")
        numbers = sum(layer.size for layer in self.layers)
        cells = ["all", f"{numbers}", *_rates(self.kl, None if train is None else train.kl)]
        cells += [f"{sum(layer.active for layer in self.layers)}", "", *(["", ""] if bounded else [])]
        return "\n".join([*lines, f"| {' | '.join(cells)} |"])

    def __str__(self) -> str:
        each = ", ".join(f"{layer.name} {layer.mean:.2f}" for layer in self.layers)
        total = f"{float(self.kl.mean()):.2f} ± {_standard_error(self.kl):.2f}"
        return f"KL {total} nats on {len(self)} data: {each}"


@dataclass(frozen=True)
class Exchange:
    """What becomes of the layers below a latent when every datum is given that of another.

    Attributes:
        site: The latent that is exchanged.
        own: KL of each layer below it in nats, shape ``(N,)``, by name, with the datum's own.
        other: The same with that of another datum, in the posteriors and the priors of these layers alike;
            all other noise is the same.
    """

    site: str
    own: Mapping[str, Tensor]
    other: Mapping[str, Tensor]

    @property
    def rise(self) -> Tensor:
        """By how much the KL of all layers below rises, nats, shape ``(N,)``."""
        return torch.stack([self.other[name] - kl for name, kl in self.own.items()]).sum(0)

    @property
    def used(self) -> bool:
        """Whether the KL rises by more than three standard errors: the layers below look at the latent."""
        return float(self.rise.mean()) > 3 * _standard_error(self.rise)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold."""
        return {
            "site": self.site,
            "layers": {
                name: {
                    "own": float(kl.mean()),
                    "other": float(self.other[name].mean()),
                    "rise_standard_error": _finite(_standard_error(self.other[name] - kl)),
                }
                for name, kl in self.own.items()
            },
            "rise": float(self.rise.mean()),
            "standard_error": _finite(_standard_error(self.rise)),
            "used": self.used,
        }

    def to_markdown(self) -> str:
        """Return one table, a row for each layer below."""
        lines = [
            f"| layer | KL, nats | with {self.site} of another datum | rise |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, kl in self.own.items():
            other = self.other[name]
            lines.append(
                f"| {name} | {float(kl.mean()):.3f} | {float(other.mean()):.3f} | {_change(other - kl)} |"
            )
        own, other = (torch.stack(list(kls.values())).sum(0).mean() for kls in (self.own, self.other))
        lines.append(f"| all | {float(own):.3f} | {float(other):.3f} | {_change(self.rise)} |")
        return "\n".join(lines)


def layer_report(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_samples: int = 4,
    threshold: float = 0.01,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> LayerReport:
    """Measure every latent site of a model: what it costs, and what of it moves with the data.

    Given the latents above, a KL is in closed form where one is registered and exact, else log q - log p at
    the draw; either is averaged over ``num_samples`` draws of all latents. A log-density that is only bounded
    may stand in it, for it enters linearly: the KL is then an upper bound. The model is never run freely, so
    that a prior that is slow to draw from costs nothing. Draws of a datum depend on its position alone. Both
    programs run in evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program, with a density.
        x: Data, shape ``(N, *x_shape)``, ``N >= 2``, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_samples: Draws of the latents for each datum, at least 2.
        threshold: Variance of the posterior mean above which a unit is active.
        bounds: Range that the log-variances of a site are clamped to, by its name, for sites where prior and
            posterior are normal: beyond it there is no gradient.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, a KL that is not finite, or programs outside the contract (see
            :func:`pvae.evaluation.log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    label = f"layers, {x.name} data" if isinstance(x, Split) else "layers"
    x, y, protocol = held_out(model, x, y)
    if len(x) < 2:
        raise ValueError(f"x must hold at least two data, got {len(x)}")
    device = device_of(model, guide)
    with evaluating(model, guide), reporting(label, len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        sums = {
            name: _Sums((bounds or {}).get(name)) for name in _names(model, guide, x[:2], _part(y, slice(2)))
        }
        for block, (x_block, y_block), size in _blocks(x, y, num_samples, report):
            torch.manual_seed((seed * 1_000_003 + block) % 2**63)
            q, p = _both(model, guide, x_block, y_block, {}, num_samples)
            for name, found in sums.items():
                found.add(q[name], p[name], size)
    layers = tuple(found.layer(name, threshold) for name, found in sums.items())
    return LayerReport(layers, num_samples, seed, protocol)


def exchanged_kl(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    site: str = "u",
    num_samples: int = 4,
    seed: int = 0,
    progress: bool | None = None,
) -> Exchange:
    """Test whether the layers below a latent look at it: give every datum that of another one.

    A latent that is paid for and not used leaves the KL of the layers below where it was. It is drawn from
    the guide once, and exchanged within blocks of data in random order; posteriors and priors of the layers
    below then see the same.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program, with a density.
        x: Data, shape ``(N, *x_shape)``, ``N >= 2``, or a split.
        y: Contexts, first dimension ``N``, which are not exchanged. A split's own labels are used if
            ``model.conditional`` is true.
        site: The latent; one with others below it.
        num_samples: Draws of the latents for each datum.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, a ``site`` that is no latent or has none below it, or programs
            outside the contract (see :func:`pvae.evaluation.log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    x, y, _ = held_out(model, x, y)
    if len(x) < 2:
        raise ValueError(f"x must hold at least two data, got {len(x)}")
    device = device_of(model, guide)
    with evaluating(model, guide), reporting(f"{site} exchanged", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = _names(model, guide, x[:2], _part(y, slice(2)))
        if site not in names[:-1]:
            raise ValueError(
                f"site must be a latent above others, one of {', '.join(names[:-1]) or 'none'}, got {site!r}"
            )
        below = names[names.index(site) + 1 :]
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        size = max(2, min(_PASS_ROWS, _PASS_NUMBERS // x[0].numel()) // num_samples)
        # Parts of nearly one size: none holds a single datum, which would be given its own.
        parts = order.tensor_split(min(-(-len(x) // size), len(x) // 2))
        kls: dict[bool, dict[str, list[Tensor]]] = {kind: {name: [] for name in below} for kind in _KINDS}
        done = 0
        for block, part in enumerate(parts):
            where = part.to(device)
            data = x[where], None if y is None else y[where]
            seeds = [(seed * 1_000_003 + 2 * block + i + 1) % 2**63 for i in range(2)]
            torch.manual_seed(seeds[0])
            with SiteRecorder(replace=exact) as drawn, particle_plate(num_samples):
                _call(guide, *data)
            value = drawn.sites[site].value
            for exchanged, columns in kls.items():
                torch.manual_seed(seeds[1])  # the same noise below for both
                seen = {site: value.roll(1, dims=1) if exchanged else value}
                q, p = _both(model, guide, *data, seen, num_samples)
                for name in below:
                    columns[name].append(_divergence(q[name], p[name])[0].mean(0))
            done += len(part)
            report(done)
    back = order.argsort()
    own, other = ({name: torch.cat(column)[back] for name, column in kls[kind].items()} for kind in _KINDS)
    return Exchange(site, own, other)


class _Sums:
    """Adds up what a layer shows of one block of data after another."""

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self.bounds = bounds
        self.kl: list[Tensor] = []
        self.closed = True
        self.count = 0
        self.origin: Tensor | None = None
        self.total = self.square = self.error = torch.zeros((), dtype=torch.float64)
        self.numbers: Tensor | None = None
        self.quiet = torch.zeros((), dtype=torch.float64)
        self.ends: dict[str, Tensor] = {}

    def add(self, q: Site, p: Site, size: int) -> None:
        """Take in the first ``size`` data of a block."""
        kl, numbers, closed = _divergence(q, p)
        self.kl.append(kl.mean(0)[:size])
        self.closed &= closed
        runs = _wide(_mean(q))[:, :size]
        mean = runs.mean(0)
        if self.origin is None:
            self.origin = mean.mean(0)  # keeps the digits of a variance far from zero
        self.count += size
        self.total = self.total + (mean - self.origin).sum(0)
        self.square = self.square + (mean - self.origin).square().sum(0)
        self.error = self.error + runs.var(0).sum(0) / len(runs)
        if numbers is None:
            return
        numbers = numbers.mean(0)[:size]
        summed = numbers.sum(0)
        self.numbers = summed if self.numbers is None else self.numbers + summed
        self.quiet = self.quiet + (numbers < _QUIET).sum(0)
        if self.bounds is not None:
            for who, site in (("p", p), ("q", q)):
                self.ends[who] = self.ends.get(who, 0) + _at_ends(site, self.bounds, size) * size

    def layer(self, name: str, threshold: float) -> Layer:
        """Make the figures of the sums."""
        kl = torch.cat(self.kl)
        bad = ~kl.isfinite()
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(f"KL of {name} must be finite, got {float(kl[where])} for datum {where}")
        centre = self.total / self.count
        variance = (self.square - self.count * centre.square()) / (self.count - 1) - self.error / self.count
        factorises = self.numbers is not None
        return Layer(
            name,
            kl,
            self.closed,
            variance.clamp(min=0),
            threshold,
            self.numbers / self.count if self.numbers is not None else None,
            self.quiet / self.count if factorises else None,
            {who: _pair(shares / self.count) for who, shares in self.ends.items()} or None,
        )


def _names(model: Program, guide: Program, x: Tensor, y: Tensor | None) -> tuple[str, ...]:
    """Check both programs, with one particle, as a bound on a density may stand in a KL; name the latents."""
    with pyro.validation_enabled(True):
        values, log_q = draw(guide, x, y, 1, seed=0)
        log_weights(model, x, y, [(values, log_q)], rows=len(x))
        with SiteRecorder(values) as p, particle_plate(1):
            _call(model, x, y)
    if not values:
        raise ValueError("model must have at least one latent, got none")
    return tuple(name for name in p.sites if name in values)


def _both(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, given: dict[str, Tensor], num_samples: int
) -> tuple[dict[str, Site], dict[str, Site]]:
    """Run the guide with some latents given, and the model at its draws."""
    with SiteRecorder(given, replace=exact) as q, particle_plate(num_samples):
        _call(guide, x, y)
    values = {name: site.value for name, site in q.sites.items() if not site.is_factor}
    with SiteRecorder(values) as p, particle_plate(num_samples):
        _call(model, x, y)
    return q.sites, p.sites


def _divergence(q: Site, p: Site) -> tuple[Tensor, Tensor | None, bool]:
    """KL of a latent given those above, shape ``(S, B)``; that of each number ``(S, B, *event_shape)``, where
    there is such a thing; and whether it is in closed form.
    """
    ours, theirs = _normal(q), _normal(p)
    if ours is not None and theirs is not None and q.fn.event_shape == p.fn.event_shape:
        numbers = _wide(kl_divergence(ours, theirs)).expand(q.value.shape)
        return numbers.reshape(*q.value.shape[:2], -1).sum(-1), numbers, True
    closed = _closed_kl(q, p)
    if closed is not None:
        return closed.expand(q.value.shape[:2]), None, True
    return _wide(q.log_prob()) - _wide(p.log_prob()), None, False


def _normal(site: Site) -> Normal | None:
    """The normal distribution of a site of independent numbers; ``None`` of any other, or a masked one."""
    fn = site.fn
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, Normal) and not isinstance(site.mask, Tensor) else None


def _at_ends(site: Site, bounds: tuple[float, float], size: int) -> Tensor:
    """Shares of the log-variances at the lower and at the upper end, shape ``(2,)``."""
    normal = _normal(site)
    assert normal is not None
    log_variance = 2 * _wide(normal.scale.expand(site.value.shape)[:, :size].log())
    low, high = bounds
    shares = (log_variance <= low + _NEAR), (log_variance >= high - _NEAR)
    return torch.stack([share.double().mean() for share in shares])


def _pair(shares: Tensor) -> tuple[float, float]:
    low, high = shares.tolist()
    return low, high


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _rates(kl: Tensor, train: Tensor | None) -> list[str]:
    """Mean and standard error here, there, and of the difference of two independent samples."""
    cells = [f"{float(kl.mean()):.3f} ± {_standard_error(kl):.3f}"]
    if train is not None:
        error = math.hypot(_standard_error(kl), _standard_error(train))
        cells += [
            f"{float(train.mean()):.3f} ± {_standard_error(train):.3f}",
            f"{float(kl.mean() - train.mean()):+.3f} ± {error:.3f}",
        ]
    return cells


def _change(values: Tensor) -> str:
    return f"{float(values.mean()):+.3f} ± {_standard_error(values):.3f}"


def _shape(tensor: Tensor) -> str:
    sides = " x ".join(map(str, tensor.shape))
    return f"{sides} = {tensor.numel()}" if tensor.ndim > 1 else f"{tensor.numel()}"


def _ends(layer: Layer, who: str) -> str:
    pair = (layer.at_bounds or {}).get(who)
    return "" if pair is None else ", ".join(_percent(share) for share in pair)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
