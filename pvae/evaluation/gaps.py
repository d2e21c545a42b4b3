r"""Where the nats go: amortisation gap and family gap (Cremer, Li & Duvenaud 2018, arXiv:1801.03558)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting

from .blocks import block_of, block_seed, rows_per_pass
from .estimate import LikelihoodEstimate
from .interval import Interval, bootstrap_intervals
from .latents import latent_names
from .layout import Layout, layout_of
from .likelihood import _summary
from .local_normal import (
    AdjustedGuide,
    Ascent,
    Family,
    LocalNormal,
    family_of,
    fit_adjustment,
    fit_normal,
    moments,
)
from .weights import draw, held_out, log_weights

__all__ = ["InferenceGaps", "inference_gaps"]

_BLOCK = 32  # data optimised together
_BLOCK_NUMBERS = 2**23  # most latent numbers drawn, or entries of Cholesky factors, in one block
_SETTLED = 0.02
_PILOT = 10  # a pilot has one particle for so many of the estimate

Propose = Callable[[int, int], tuple[dict[str, Tensor], Tensor]]
Columns = dict[str, list[tuple[Tensor, ...]]]

_FAMILIES: dict[Family, str] = {
    "diagonal": "a diagonal Gaussian for each datum",
    "conditional": "the guide's conditional Gaussians, shifted and stretched for each datum",
    "full": "a full-covariance Gaussian for each datum",
    "other": "the best of the guide and Gaussians for each datum, for want of the guide's own family",
}


@dataclass(frozen=True)
class InferenceGaps:
    r"""What the guide loses, datum by datum, and to which of its parts.

    .. math:: \log p(x) - \mathcal L[q_\phi] =
              \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{family gap}} +
              \underbrace{\mathcal L[q^*] - \mathcal L[q_\phi]}_{\text{amortisation gap}}

    with :math:`q_\phi` the guide, :math:`q^*` the best member of its family for the datum; the paper calls
    the first term approximation gap. All bounds are taken on draws that no optimisation has seen, so that
    each is a lower bound on log p(x) in expectation. Biases: an optimum not quite reached makes the
    amortisation gap too small and the family gap too large; a reference below log p(x), as all are, makes
    the family gap too small. Their sum is never too large, in expectation.

    Attributes:
        amortised: The guide's estimate, with ELBOs and importance-weighted bounds.
        local: Those of the Gaussians fitted to each datum: ``"diagonal"``, ``"conditional"``, ``"full"``.
        family: The guide's family. ``"diagonal"``: one site of independent normals; :math:`q^*` is any
            diagonal Gaussian. ``"conditional"``: several sites of them; :math:`q^*` shifts and stretches
            every conditional by numbers of the datum's own, and leaves its dependence on the draws above as
            the network has it. ``"full"``: one multivariate normal; :math:`q^*` is any Gaussian, so that
            what a covariance loses by being tied to a network's derivative counts as amortisation.
            ``"other"``: a family that was not optimised in; :math:`q^*` is the best of the guide and the
            Gaussians, and the amortisation gap too small where the family holds better ones.
        best_name: What stands for :math:`q^*`: a name in ``local``, or ``"amortised"``.
        reference: Lower bounds on log p(x), shape ``(N,)``, nats.
        reference_name: What they are.
        late_gains: By name of ``local``: mean ELBO, in nats, that the second half of the optimisation added,
            on the same draws. What more steps would add is the first of these biases.
        intervals: 95 % intervals over data of the means, in nats: ``"total"``, ``"amortisation"``,
            ``"family"``, ``"difference"`` (amortisation minus family) and, where it was fitted and is not
            :math:`q^*` itself, ``"full"`` (what a full covariance adds to :math:`q^*`). The noise of the
            draws is in them.
        threshold: Nats for each datum below which a loss asks for nothing.
        rows: Which data were looked at, shape ``(N,)``, int64.
        seed: Seed of all draws.
    """

    amortised: LikelihoodEstimate
    local: dict[str, LikelihoodEstimate]
    family: Family
    best_name: str
    reference: Tensor
    reference_name: str
    late_gains: dict[str, float]
    intervals: dict[str, Interval]
    threshold: float
    rows: Tensor
    seed: int

    @property
    def elbo(self) -> Tensor:
        """ELBO of the guide, nats, shape ``(N,)``, float64."""
        return self.amortised.elbo_values

    @property
    def best(self) -> Tensor:
        """ELBO of the best member of the family, nats, shape ``(N,)``."""
        return self.local.get(self.best_name, self.amortised).elbo_values

    @property
    def amortisation_gap(self) -> Tensor:
        """What one network for all data loses, nats, shape ``(N,)``."""
        return self.best - self.elbo

    @property
    def family_gap(self) -> Tensor:
        """What the shape of the posteriors loses, nats, shape ``(N,)``."""
        return self.reference - self.best

    @property
    def full_gain(self) -> Tensor | None:
        """The part of the family gap that a full covariance removes, nats, shape ``(N,)``."""
        return self.local["full"].elbo_values - self.best if "full" in self.intervals else None

    def settled(self, name: str) -> bool:
        """Whether the second half of a climb gained little: 2 % of the loss, or a tenth of the threshold."""
        return self.late_gains.get(name, 0.0) <= max(
            _SETTLED * self.intervals["total"].value, self.threshold / 10
        )

    @property
    def verdict(self) -> str:
        """Which part to exchange: ``"encoder"``, ``"family"``, ``"either"`` or ``"neither"``."""
        total, difference = self.intervals["total"], self.intervals["difference"]
        if total.value < self.threshold:
            return "neither"
        if difference.low <= 0 <= difference.high:
            return "either"
        return "encoder" if difference.value > 0 else "family"

    @property
    def sentence(self) -> str:
        """Which part to exchange, and why."""
        total, amortisation, family = (self.intervals[name] for name in ("total", "amortisation", "family"))
        losses = f"of {_nats(total)} nats between ELBO and log p(x)"
        # Where the encoder is to blame already, more steps only add to that.
        if self.verdict in ("family", "either") and not self.settled(self.best_name):
            return (
                f"No verdict before num_steps is raised, as the second half of them still gained "
                f"{self.late_gains[self.best_name]:.2f} {losses}."
            )
        if self.verdict == "neither":
            return (
                f"Exchange neither encoder nor posterior family, as the guide loses {_nats(total)} nats, "
                f"less than {self.threshold:g}: what is missing is the decoder's or the prior's."
            )
        if self.verdict == "encoder":
            return (
                f"Exchange the encoder or train it longer, as {losses}, {_nats(amortisation)} are lost by "
                "amortisation."
            )
        if self.verdict == "either":
            return (
                f"Exchange encoder or posterior family, which lose alike: {losses}, {_nats(amortisation)} by "
                f"amortisation and {_nats(family)} by the family."
            )
        return f"Exchange the posterior family, as {losses}, {_nats(family)} are lost by it{self._remedy()}."

    def _remedy(self) -> str:
        gain = self.intervals.get("full")
        if gain is None:
            return ""
        half = self.intervals["family"].value / 2
        removed = f"; a full covariance removes {_nats(gain)} of them"
        if gain.value > half:
            return f"{removed}, which is most of it"
        if not self.settled("full"):
            return f"{removed} or more, as its optimisation had not settled"
        return f"{removed}, so that a flow is needed"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        gain = self.full_gain
        return {
            "elbo": self.amortised.elbo,
            "best_in_family": float(self.best.mean()),
            "reference": float(self.reference.mean()),
            "reference_name": self.reference_name,
            "family": self.family,
            "family_in_words": _FAMILIES[self.family],
            "best_name": self.best_name,
            "intervals": {
                name: {key: v if math.isfinite(v) else None for key, v in vars(interval).items()}
                for name, interval in self.intervals.items()
            },
            "late_gains": self.late_gains,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "threshold": self.threshold,
            "num_data": len(self.rows),
            "num_particles": self.amortised.num_particles,
            "seed": self.seed,
            "protocol": self.amortised.protocol,
            "per_datum": {
                "row": self.rows.tolist(),
                "elbo": self.elbo.tolist(),
                "best_in_family": self.best.tolist(),
                "reference": self.reference.tolist(),
                "amortisation_gap": self.amortisation_gap.tolist(),
                "family_gap": self.family_gap.tolist(),
                "full_gain": None if gain is None else gain.tolist(),
            },
        }

    def __str__(self) -> str:
        return (
            f"ELBO {self.amortised.elbo:.2f}, best in the family {float(self.best.mean()):.2f} "
            f"({_FAMILIES[self.family]}), log p(x) >= {float(self.reference.mean()):.2f} nats "
            f"({self.reference_name}) on {len(self.rows)} data: amortisation gap "
            f"{_nats(self.intervals['amortisation'])} (too small by what the optimisation leaves), family "
            f"gap {_nats(self.intervals['family'])} (too small by what the reference lacks). {self.sentence}"
        )


def inference_gaps(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_data: int | None = 200,
    num_particles: int = 1000,
    num_steps: int = 300,
    step_particles: int = 16,
    learning_rate: float = 0.2,
    max_full: int = 256,
    reference: Tensor | LikelihoodEstimate | None = None,
    threshold: float = 0.5,
    num_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> InferenceGaps:
    r"""Split what a guide loses into what amortisation and what the posterior family lose.

    Latents of all sites count together, as one vector of d real numbers. For each datum a Gaussian of the
    guide's family is fitted, from the guide's own location and scale, and one with a full covariance; both
    by Adam in whitened coordinates. Guide and optima are then scored on draws that neither has seen. Part of
    what an encoder loses it loses on data that it was not trained on: compare the figures on training data.

    The reference is the importance-weighted bound under one of these proposals, chosen as the one with the
    highest mean in a pilot on other draws, or what is given. Where the model has only an unbiased estimate of
    a density, its noise is one more latent that the guide draws as the model does, and what that loses
    counts to the family. Both programs run in
    evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; log p(x, z) must have a gradient in z.
        guide: The guide program, with an exact density.
        x: Data, shape ``(N, *x_shape)``, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_data: Most data to look at, drawn at random; ``None`` for all.
        num_particles: Particles of every bound, for each datum.
        num_steps: Steps of each optimisation, in two climbs of half of them.
        step_particles: Draws behind a step, even.
        learning_rate: Of Adam at the start, in posterior standard deviations.
        max_full: Most latent numbers for which a full covariance is fitted; 0 for none.
        reference: Lower bounds on log p(x) of all of ``x``, such as annealed ones, to take the place of the
            importance-weighted ones: an estimate, or nats of shape ``(N,)``.
        threshold: Mean loss in nats below which neither encoder nor family is to be exchanged.
        num_bootstrap: Resamples of the data behind an interval; 0 leaves the intervals out.
        seed: Seed of all draws, and of the choice of data.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
        ValueError: If a latent is not a real number.

    Example:
        >>> print(inference_gaps(model, guide, data.test).sentence)  # doctest: +SKIP
    """
    for name, size, least in (("num_particles", num_particles, 1), ("num_steps", num_steps, 2)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if step_particles < 2 or step_particles % 2:
        raise ValueError(f"step_particles must be even and positive, got {step_particles}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate:g}")
    if num_data is not None and num_data < 1:
        raise ValueError(f"num_data must be positive or None, got {num_data}")
    x, y, protocol = held_out(model, x, y)
    given = reference.log_prob if isinstance(reference, LikelihoodEstimate) else reference
    if given is not None and tuple(given.shape) != (len(x),):
        raise ValueError(f"reference must have shape ({len(x)},), got {tuple(given.shape)}")
    device = device_of(model, guide)
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[:num_data].sort().values
    where = rows.to(x.device)
    x, y = x[where], None if y is None else y[where.to(y.device)]
    columns: Columns = {}
    pilots: Columns = {}
    halfway: Columns = {}
    pilot = -(-num_particles // _PILOT)
    with evaluating(model, guide), reporting("inference gaps", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        latent_names(model, guide, x, y)
        layout = layout_of(model, x, y)
        family = family_of(guide, x[:1], None if y is None else y[:1])[0]
        pass_rows = rows_per_pass(x)
        full = layout.size <= max_full
        numbers = max(num_particles * layout.size, layout.size**2 if full else 0)
        if family == "full" and not full:
            family = "other"
        # One noise for all data: what is fitted to a datum depends on no other, nor on its place.
        ascent = Ascent(num_steps, step_particles, learning_rate, block_seed(seed + 1, 0))
        block = max(1, min(_BLOCK, _BLOCK_NUMBERS // numbers, pass_rows // step_particles))
        for start in range(0, len(x), block):
            data = block_of(x, y, start, block)
            used = min(block, len(x) - start)
            found = _proposals(model, guide, *data, family, layout, ascent, full)
            for number, (name, (propose, before)) in enumerate(found.items()):
                own, other = (block_seed(seed + 2, 64 * start + 2 * number + i) for i in (0, 1))
                tasks = [(columns, propose, num_particles, own), (pilots, propose, pilot, other)]
                if before is not None:
                    tasks.append((halfway, before, pilot, other))  # on the pilot's noise
                for table, source, num, draws_seed in tasks:
                    log_w = log_weights(model, *data, [source(num, draws_seed)], pass_rows)[:, :used]
                    table.setdefault(name, []).append(_summary(log_w.T.cpu().double(), rounding, start))
            report(start + used)
    estimates = {}
    for name, parts in columns.items():
        log_prob, elbo, khat, ess, error = (torch.cat(column) for column in zip(*parts, strict=True))
        joined = (log_prob, elbo, khat, ess, error)
        estimates[name] = LikelihoodEstimate(
            *joined, num_particles, seed, protocol, conditional=y is not None, proposal=name
        )
    elbos = _means(pilots, 1)
    late_gains = {name: elbos[name] - elbo for name, elbo in _means(halfway, 1).items()}
    best_name = family if family in estimates else max(elbos, key=lambda name: elbos[name])
    if given is not None:
        reference_name, bounds = "given", given.detach().cpu().double()[rows]
    else:
        pilot_bounds = _means(pilots, 0)
        proposal = max(pilot_bounds, key=lambda name: pilot_bounds[name])
        reference_name, bounds = f"IWAE-{num_particles}, proposal {proposal}", estimates[proposal].log_prob
    intervals = _intervals(estimates, best_name, bounds, num_bootstrap, seed)
    return InferenceGaps(
        amortised=estimates["amortised"],
        local={name: estimate for name, estimate in estimates.items() if name != "amortised"},
        family=family,
        best_name=best_name,
        reference=bounds,
        reference_name=reference_name,
        late_gains=late_gains,
        intervals=intervals,
        threshold=threshold,
        rows=rows,
        seed=seed,
    )


def _proposals(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    family: Family,
    layout: Layout,
    ascent: Ascent,
    full: bool,
) -> dict[str, tuple[Propose, Propose | None]]:
    """Fit what there is to fit to some data; return what to draw from, and the same half-way."""

    def score(z: Tensor) -> Tensor:
        zero = torch.zeros(z.shape[:2], dtype=z.dtype, device=z.device)
        return log_weights(model, x, y, [(layout.sites(z), zero)], rows=zero.numel())

    def normal(found: LocalNormal) -> Propose:
        return lambda num, seed: found.draw(layout, num, seed)

    def program(found: Program) -> Propose:
        return lambda num, seed: draw(found, x, y, num, seed)

    first, second = ascent.halves()
    proposals: dict[str, tuple[Propose, Propose | None]] = {"amortised": (program(guide), None)}
    if family == "conditional":
        half = fit_adjustment(model, AdjustedGuide.unchanged(guide, layout, x), x, y, first)
        adjusted = fit_adjustment(model, half, x, y, second)
        proposals["conditional"] = program(adjusted), program(half)
        start = moments(adjusted, x, y, layout, ascent.seed) if full else None
    else:
        own = family_of(guide, x, y)[1]
        wide = moments(guide, x, y, layout, ascent.seed) if own is None else own
        before = fit_normal(score, wide.diagonalised(), first)
        diagonal = fit_normal(score, before, second)
        proposals["diagonal"] = normal(diagonal), normal(before)
        start = diagonal if family == "diagonal" else wide
    if full and start is not None:
        before = fit_normal(score, start.full(), first)
        proposals["full"] = normal(fit_normal(score, before, second)), normal(before)
    return proposals


def _means(columns: Columns, which: int) -> dict[str, float]:
    """Mean over data of one column of the summaries."""
    return {name: float(torch.cat([part[which] for part in parts]).mean()) for name, parts in columns.items()}


def _intervals(
    estimates: dict[str, LikelihoodEstimate],
    best_name: str,
    reference: Tensor,
    num_bootstrap: int,
    seed: int,
) -> dict[str, Interval]:
    elbo, best = estimates["amortised"].elbo_values, estimates[best_name].elbo_values
    terms = {
        "total": reference - elbo,
        "amortisation": best - elbo,
        "family": reference - best,
        "difference": (best - elbo) - (reference - best),
    }
    if "full" in estimates and best_name != "full":
        terms["full"] = estimates["full"].elbo_values - best
    table = torch.stack(list(terms.values()), -1)
    found = bootstrap_intervals(
        lambda i: table[i].mean(0), len(table), num_bootstrap=num_bootstrap, seed=seed
    )
    return dict(zip(terms, found, strict=True))


def _nats(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
