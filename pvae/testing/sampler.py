r"""A model's sampler against the density the model scores."""

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .report import ExactnessError, Outcome, Report
from .space import Unconstrained, is_discrete
from .statistics import seeded, stein, student_threshold, threshold, two_sample, worst

__all__ = ["check_sampler"]

_BLOCKS = 100
_DIRECTIONS = 4


def check_sampler(
    model: nn.Module,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    num_samples: int = 10_000,
    false_alarm: float = 1e-6,
    seed: int = 0,
    skip: Collection[str] = (),
) -> Report:
    r"""Check that joint draws of ``z`` and ``x`` from a model follow the density that the model scores.

    The program is run without its observations, so that every site draws from its own distribution, and
    the draws are compared with the densities of the same sites:

    ========================= =============================================================================
    ``sites``                 each continuous site: Stein's identity between its draws and the gradient of
                              its log-density given its parents; a flow whose sampler skips its inverse
                              fails it
    ``score``                 :math:`E[\partial_\theta \log p(x, z)] = 0` along random directions of the
                              parameters; the one test that also sees discrete sites
    ``sample``                ``model.sample(n, y)`` draws ``x`` from the same distribution as the program
    ========================= =============================================================================

    Each check has false-alarm probability ``false_alarm``, Bonferroni-corrected over what it looks at, by
    the normal (``score``: Student) approximation to means of ``num_samples`` terms.

    Args:
        model: The model program.
        x: A batch of any data of the right shape, ``(B, *x_shape)``; by default from ``model.sample``.
        y: One context, shape ``(1, ...)``, or one for each draw, ``(num_samples, ...)``.
        num_samples: Joint draws.
        false_alarm: Probability that a right model fails one check.
        seed: Seed of the draws; the process's generators are left as they were.
        skip: Names of checks to leave out.

    Returns:
        A report; ``str`` prints it as a table.

    Raises:
        ExactnessError: At the first check that fails.
        ValueError: If ``x`` is missing and the model has no ``sample``, or ``skip`` names no check.

    Example:
        >>> from pvae.testing import LinearGaussianVAE, check_sampler
        >>> check_sampler(LinearGaussianVAE().model).applied
        ('sites', 'score', 'sample')
    """
    unknown = set(skip) - set(_CHECKS)
    if unknown:
        raise ValueError(f"skip must name checks out of {list(_CHECKS)}, got {sorted(unknown)}")
    if x is None and not hasattr(model, "sample"):
        raise ValueError("x must be given for a model without a method sample, got None")
    name = type(model).__name__
    if y is not None and len(y) == 1:
        y = y.expand(num_samples, *y.shape[1:])
    outcomes = []
    modules = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with seeded(seed):
            draws = _Draws(name, model, x, y, num_samples, false_alarm)
            for check, run in _CHECKS.items():
                if check in skip:
                    outcomes.append(Outcome(check, "skipped on request", applied=False))
                    continue
                draws.check = check
                detail = run(draws)
                outcomes.append(Outcome(check, detail.removeprefix("- "), not detail.startswith("- ")))
    finally:
        for module, training in modules.items():
            module.training = training
    return Report(name, tuple(outcomes))


class _Draws:
    """Joint draws of a model's sites, and the program conditioned on them."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        x: Tensor | None,
        y: Tensor | None,
        num_samples: int,
        false_alarm: float,
    ) -> None:
        self.name, self.model, self.y = name, model, y
        self.num_samples, self.false_alarm = num_samples, false_alarm
        self.check = ""
        with torch.no_grad():
            sample: Any = getattr(model, "sample", None)
            self.sampled: Tensor | None = None if sample is None else sample(num_samples, y)
            x = self.sampled if x is None else x[:1].expand(num_samples, *x.shape[1:])
            trace = poutine.trace(poutine.uncondition(model)).get_trace(x, y)
        self.values = {name: site["value"].detach() for name, site in _sites(trace).items()}

    def sites(self, part: slice = slice(None)) -> dict[str, tuple[dist.TorchDistribution, Tensor]]:
        """Distributions given their parents, and the draws, for a part of the draws."""
        values = {name: value[part] for name, value in self.values.items()}
        y = None if self.y is None else self.y[part]
        trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(values["x"], y)
        return {name: (site["fn"], values[name]) for name, site in _sites(trace).items()}

    def require(self, holds: bool, finding: str) -> None:
        if not holds:
            raise ExactnessError(self.name, self.check, finding)


def _sites(trace: Any) -> dict[str, Any]:
    """Sample sites that carry a value: no plates, no factors."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["value"].numel() and type(site["fn"]).__name__ != "_Subsample"
    }


def _stein_of_sites(draws: _Draws) -> str:
    with torch.no_grad():
        sites = {n: (fn, v) for n, (fn, v) in draws.sites().items() if not is_discrete(fn)}
    if not sites:
        return "- all sites are discrete"
    found = []
    for name, (fn, value) in sites.items():
        space = Unconstrained(fn)
        u = space.flat(value)
        terms = stein(*(part.reshape(len(u), -1).cpu().double() for part in (u, space.score(u))))
        z, bound = float(worst(terms)), threshold(draws.false_alarm / len(sites), terms.shape[-1])
        draws.require(
            z < bound,
            f"at site {name!r} Stein's identity between draws and the gradient of the log-density is {z:.1f} "
            f"standard errors off, {bound:.1f} are allowed",
        )
        found.append(f"{name} {z:.1f}")
    return f"Stein's identity {', '.join(found)} standard errors off"


def _score(draws: _Draws) -> str:
    parameters = [p for p in draws.model.parameters() if p.requires_grad]
    if not parameters:
        return "- no parameters"
    size = draws.num_samples // _BLOCKS
    directions = [torch.randn(p.numel(), _DIRECTIONS, dtype=p.dtype, device=p.device) for p in parameters]
    rows = []
    for start in range(0, size * _BLOCKS, size):
        with torch.enable_grad():
            sites = draws.sites(slice(start, start + size)).values()
            log_prob = torch.stack([fn.log_prob(value).sum() for fn, value in sites]).sum()
            if not log_prob.requires_grad:
                return "- log p(x, z) depends on no parameter"
            gradients = torch.autograd.grad(log_prob, parameters, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) @ d for g, d in zip(gradients, directions, strict=True)]))
    terms = torch.stack(rows).double()
    z, bound = float(worst(terms)), student_threshold(draws.false_alarm, terms.shape[-1], _BLOCKS - 1)
    draws.require(
        z < bound,
        f"the gradient of log p(x, z) in the parameters averages {z:.1f} standard errors from zero over "
        f"joint draws, {bound:.1f} are allowed",
    )
    return f"{len(parameters)} parameters, {z:.1f} standard errors from zero"


def _sample(draws: _Draws) -> str:
    if draws.sampled is None:
        return "- no method sample"
    ours, theirs = (part.double().cpu().flatten(1) for part in (draws.sampled, draws.values["x"]))
    draws.require(
        ours.shape == theirs.shape,
        f"sample must give shape {tuple(draws.values['x'].shape)}, got {tuple(draws.sampled.shape)}",
    )
    z, tests = two_sample(ours, theirs)
    bound = threshold(draws.false_alarm, tests)
    draws.require(
        z < bound,
        f"model.sample and the program draw x differently: {z:.1f} standard errors apart, "
        f"{bound:.1f} are allowed",
    )
    return f"agrees with the program, {z:.1f} standard errors apart"


_CHECKS = {"sites": _stein_of_sites, "score": _score, "sample": _sample}
