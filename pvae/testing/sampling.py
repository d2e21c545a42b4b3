"""Does a distribution integrate to one, and do its draws follow its density?"""

import math

import pyro
import torch
from torch import Tensor

from .calculus import direction_of
from .space import has_moving_support
from .statistics import (
    chi_square,
    fourier,
    location,
    stein,
    student_threshold,
    threshold,
    two_sample,
    worst,
)
from .subject import Subject, element

__all__ = ["check_integral", "check_moments", "check_pathwise", "check_sampler_of"]

_QUADRATURE = 1e-4
_SUM = 1e-6
_WORST_STANDARD_ERROR = 0.05
# Cells of equal probability in one and in two dimensions.
_BINS = {1: 40, 2: 8}
_BLOCKS, _WAVES = 100, 6
_RESOLUTION = 1e6


def check_integral(s: Subject) -> str:
    """Add up the mass: by summation, quadrature or importance sampling."""
    if s.discrete:
        total = s.log_mass.exp().sum(0)
        excess = _furthest(total)
        s.require(abs(excess) < _SUM, f"its {len(s.values)} values sum to {1 + excess:.8g}")
        return f"sum over {len(s.values)} values, error {excess:.1e}"
    if s.space.dim <= 2:
        excess, coarse = _furthest(s.grid.integral), _furthest(s.grid.coarse_integral)
        s.require(
            abs(excess - coarse) < 10 * _QUADRATURE,
            f"quadrature gives {1 + excess:.6g}, with half the nodes {1 + coarse:.6g}: the density is not "
            "finite, or too rough",
        )
        s.require(abs(excess) < _QUADRATURE, f"quadrature gives {1 + excess:.6g}")
        return f"quadrature in {s.space.dim} dimensions, error {excess:.1e}"
    bound = threshold(s.false_alarm, s.num_elements)
    farthest, detail = -1.0, ""
    for index in range(s.num_elements):
        weight = s.importance(index)[1].exp()
        mean, error = float(weight.mean()), float(weight.std()) / math.sqrt(len(weight))
        s.require(
            error < _WORST_STANDARD_ERROR,
            f"importance sampling gives {mean:.3g} with standard error {error:.2g}, too large to tell: raise "
            "num_samples, or check a smaller instance",
        )
        z = abs(mean - 1) / max(error, 1e-9)
        s.require(
            z < bound,
            f"importance sampling gives {mean:.5g} with standard error {error:.2g}: {z:.1f} standard errors "
            f"from 1, {bound:.1f} are allowed",
        )
        if z > farthest:
            farthest, detail = z, f"{mean:.4f} with standard error {error:.1e}"
    return f"importance sampling in {s.space.dim} dimensions, {detail}"


def check_sampler_of(s: Subject) -> str:
    """Compare draws with the density, by the strongest test that its dimension allows."""
    s.require(bool(s.d.support.check(s.samples).all()), "a draw lies outside the support")
    s.require(s.d.log_prob(s.samples).isfinite().all(), "a draw has no finite log_prob")
    if s.discrete:
        return _counts(s)
    detail = _uniforms(s) if s.space.dim <= 2 else _identities(s)
    if s.d.has_rsample:
        _compare_with_sample(s)
    return detail


def _compare_with_sample(s: Subject) -> None:
    """``sample`` may be written apart from ``rsample``, which Pyro calls."""
    other = s.space.flat(s.d.sample(torch.Size((s.num_samples,)))).reshape(s.num_samples, -1)
    z, tests = two_sample(s.u.reshape(s.num_samples, -1), other)
    bound = threshold(s.false_alarm / 3, tests)
    s.require(
        z < bound,
        f"sample and rsample draw differently: {z:.1f} standard errors apart, {bound:.1f} are allowed",
    )


def _counts(s: Subject) -> str:
    """Chi-square of how often each value was drawn."""
    # Rounded: a level such as 1/255 may come out of another order of operations than the list's.
    draws, rows = (
        (values.double() * _RESOLUTION).round().reshape(len(values), -1, math.prod(s.d.event_shape))
        for values in (s.samples, s.values)
    )
    rows = rows[:, 0]
    tails = []
    for index in range(s.num_elements):
        distinct, place = torch.unique(torch.cat([rows, draws[:, index]]), dim=0, return_inverse=True)
        s.require(len(distinct) == len(rows), "a draw is none of the values of the support")
        counts = torch.bincount(place[len(rows) :], minlength=len(rows))[place[: len(rows)]]
        statistic, freedom, tail = chi_square(counts, s.log_mass[:, index].exp() * s.num_samples)
        s.require(
            tail > s.false_alarm / s.num_elements,
            f"chi-square of {s.num_samples} counts is {statistic:.1f} on {freedom} degrees of freedom "
            f"(p = {tail:.1g})",
        )
        tails.append(tail)
    return f"chi-square of counts, p = {min(tails):.2g}"


def _uniforms(s: Subject) -> str:
    """Chi-square of the probability integral transform; mean of log_prob against quadrature."""
    uniform = s.grid.uniforms(s.u)
    dim, bins = s.space.dim, _BINS[s.space.dim]
    expected = torch.full((bins**dim,), s.num_samples / bins**dim)
    tails = []
    for index in range(s.num_elements):
        cell = (element(uniform, index) * bins).long().clamp(0, bins - 1) * bins ** torch.arange(dim)
        counts = torch.bincount(cell.sum(-1), minlength=bins**dim)
        statistic, freedom, tail = chi_square(counts, expected)
        s.require(
            tail > s.false_alarm / (3 * s.num_elements),
            f"chi-square of {s.num_samples} draws over cells of equal probability is {statistic:.1f} on "
            f"{freedom} degrees of freedom (p = {tail:.1g})",
        )
        tails.append(tail)
    log_prob = s.space.log_prob(s.u).reshape(s.num_samples, -1)[:, : s.num_elements]
    exact = -s.grid.entropy.reshape(-1)[: s.num_elements]
    z = (log_prob.mean(0) - exact).abs() / (log_prob.std(0) / math.sqrt(s.num_samples)).clamp(min=1e-7)
    at, bound = z.argmax(), threshold(s.false_alarm / 3, s.num_elements)
    s.require(
        z.max() < bound,
        f"log_prob averages {log_prob.mean(0)[at]:.5g} over draws and {exact[at]:.5g} under the density: "
        f"{z.max():.1f} standard errors apart, {bound:.1f} are allowed",
    )
    return f"chi-square p = {min(tails):.2g}; mean log_prob {z.max():.1f} standard errors off"


def _identities(s: Subject) -> str:
    """Stein's identity; expectations of waves and of squashed coordinates against importance sampling."""
    score = s.space.score(s.u)
    largest = 0.0
    for index in range(s.num_elements):
        terms = stein(element(s.u, index), element(score, index))
        found = float(worst(terms))
        bound = threshold(s.false_alarm / 3, s.num_elements * terms.shape[-1])
        s.require(
            found < bound,
            f"Stein's identity between draws and the gradient of log_prob is {found:.1f} standard errors "
            f"off, {bound:.1f} are allowed",
        )
        largest = max(largest, found)
    furthest = 0.0
    for index in range(s.num_elements):
        found, tests = _expectations(element(s.u, index), *s.importance(index))
        bound = threshold(s.false_alarm / 3, s.num_elements * tests)
        s.require(
            found < bound,
            f"an expectation over draws is {found:.1f} standard errors from that under the density, "
            f"{bound:.1f} are allowed",
        )
        furthest = max(furthest, found)
    return f"Stein's identity {largest:.1f}, expectations {furthest:.1f} standard errors off"


def _expectations(draws: Tensor, u: Tensor, log_weight: Tensor) -> tuple[float, int]:
    """Largest ``|z|`` between means over ``draws`` and weighted means over ``u``, and the number of tests."""
    middle, scale = location(draws)
    frequency, phase = fourier(draws)
    ours, theirs = (
        torch.cat([points.tanh(), (points @ frequency + phase).cos()], -1)
        for points in ((draws - middle) / scale, (u - middle) / scale)
    )
    weight = log_weight.softmax(0)
    expected = weight @ theirs
    error = (ours.var(0) / len(ours) + weight.square() @ (theirs - expected).square()).sqrt()
    z = (ours.mean(0) - expected).abs() / error.clamp(min=1e-9)
    return float(z.max()), ours.shape[-1]


def check_moments(s: Subject) -> str:
    """Compare the mean, variance and entropy that the distribution states with its draws."""
    samples = s.samples.double()
    stated = {name: _stated(s, name) for name in ("mean", "variance", "entropy")}
    terms: dict[str, Tensor] = {"mean": samples, "entropy": -s.d.log_prob(s.samples)}
    if stated["mean"] is not None:
        terms["variance"] = (samples - stated["mean"]).square()
    checked = [name for name in terms if stated[name] is not None]
    for name in checked:
        _compare_moment(s, name, terms[name], stated[name], s.false_alarm / len(checked))
    return f"{', '.join(checked)} agree with draws" if checked else "- none stated"


def _compare_moment(s: Subject, name: str, terms: Tensor, stated: Tensor | None, level: float) -> None:
    assert stated is not None
    wanted = tuple(terms.shape[1:])
    s.require(stated.shape == wanted, f"{name} must have shape {wanted}, got {tuple(stated.shape)}")
    stated, terms = stated.double().reshape(-1), terms.reshape(len(terms), -1)
    # An infinite or undefined moment is a statement that draws can neither confirm nor refute.
    known = stated.isfinite()
    if not known.any():
        return
    stated, terms = stated[known], terms[:, known]
    error = terms.std(0) / math.sqrt(len(terms))
    z = (terms.mean(0) - stated).abs() / torch.maximum(error, 1e-9 * (1 + stated.abs()))
    at, bound = z.argmax(), threshold(level, len(stated))
    s.require(
        z.max() < bound,
        f"{name} is stated as {stated[at]:.5g} and is {terms.mean(0)[at]:.5g} over draws: {z.max():.1f} "
        f"standard errors apart, {bound:.1f} are allowed",
    )


def check_pathwise(s: Subject) -> str:
    """Compare gradients of expectations through ``rsample`` with those through ``log_prob``."""
    if not s.d.has_rsample or s.discrete:
        return "- no rsample"
    if not s.recipe.explicit:
        return "- needs a factory and its parameters"
    if has_moving_support(s.d):
        # Its mass crosses a bound that moves, which the gradient of log_prob does not see.
        return "- the support depends on parameters"
    pilot = s.u.reshape(s.num_samples, -1)
    middle, scale = location(pilot)
    frequency, phase = (part[..., :_WAVES] for part in fourier(pilot))
    baseline = ((pilot - middle) / scale @ frequency + phase).cos().mean(0)
    terms = []
    with torch.enable_grad(), pyro.validation_enabled(False):
        distribution, leaves = s.recipe.on_leaves()
        directions = [direction_of(leaf.detach()) for leaf in leaves.values()]
        for _ in range(_BLOCKS):
            value = distribution.rsample(torch.Size((s.num_samples // _BLOCKS,)))
            if not value.requires_grad:
                return "- draws depend on no floating parameter"
            u = s.space.flat(value).reshape(len(value), -1)
            wave = ((u - middle) / scale @ frequency + phase).cos()
            log_prob = distribution.log_prob(value.detach()).reshape(len(value), -1).sum(-1, keepdim=True)
            # The gradient of this has mean zero: pathwise minus score-function estimate.
            difference = (wave - (wave - baseline).detach() * log_prob).sum(0)
            for column in difference:
                gradients = torch.autograd.grad(
                    column, list(leaves.values()), retain_graph=True, materialize_grads=True
                )
                terms += [(g * d).sum() for g, d in zip(gradients, directions, strict=True)]
    found = float(worst(torch.stack(terms).reshape(_BLOCKS, -1)))
    bound = student_threshold(s.false_alarm, _WAVES * len(leaves), _BLOCKS - 1)
    s.require(
        found < bound,
        f"the gradient of an expectation through rsample is {found:.1f} standard errors from that through "
        f"log_prob, {bound:.1f} are allowed",
    )
    return f"{len(leaves)} parameters, {found:.1f} standard errors from the score-function gradient"


def _stated(s: Subject, name: str) -> Tensor | None:
    try:
        stated = getattr(s.d, name)
        stated = stated() if callable(stated) else stated
    except (NotImplementedError, AttributeError):
        return None
    return stated if isinstance(stated, Tensor) else None


def _furthest(totals: Tensor) -> float:
    """The deviation from 1 that is largest in size."""
    deviation = (totals - 1).reshape(-1)
    return float(deviation[deviation.abs().nan_to_num(nan=math.inf).argmax()])
