r"""An estimator of log p(x) put through models whose log p(x) is known."""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

from .bench import Bench
from .bounds import check_exact_guide, check_known_tail, check_lower_bound, check_tightens
from .invariances import (
    check_batch_size,
    check_datum_independence,
    check_labels,
    check_per_datum_khat,
    check_reproducible,
    check_side_effects,
    check_stored_variance,
    check_training_factors,
    check_training_scales,
)
from .report import Outcome, Report
from .statistics import seeded

__all__ = ["check_likelihood_estimator"]

_CHECKS: dict[str, Callable[[Bench], str]] = {
    "reproducible": check_reproducible,
    "side effects": check_side_effects,
    "training-only factors": check_training_factors,
    "training scales": check_training_scales,
    "stored variance": check_stored_variance,
    "labels": check_labels,
    "batch size": check_batch_size,
    "datum independence": check_datum_independence,
    "per-datum k-hat": check_per_datum_khat,
    "lower bound": check_lower_bound,
    "exact guide": check_exact_guide,
    "tightens with K": check_tightens,
    "known tail": check_known_tail,
}


def check_likelihood_estimator(
    estimator: Callable[..., Any] | None = None,
    *,
    num_particles: Sequence[int] = (1, 10, 1000),
    tolerance: float = 1e-10,
    false_alarm: float = 1e-6,
    seed: int = 0,
    skip: Collection[str] = (),
) -> Report:
    r"""Check that an estimator of log p(x) is a lower bound, exact where it can be, and changes nothing.

    It is run on models with exact answers: linear-Gaussian ones (isotropic noise; diagonal noise and
    labels), a discrete one summed by enumeration, and a curved one integrated by quadrature, under their
    exact posteriors and under others. The checks, in their order:

    - ``reproducible``: a seed gives the same numbers twice, another seed others; one value for each datum.
    - ``side effects``: parameters, buffers, gradients, training flags, generators, param store and global
      settings are byte for byte what they were.
    - ``training-only factors``: ``pyro.factor`` sites in model and guide change nothing.
    - ``training scales``: nor does ``poutine.scale``.
    - ``stored variance``: the decoder's variance is the stored one, neither refitted to the data that are
      scored nor moved by a likelihood that refits itself in training mode.
    - ``labels``: ``y`` reaches model and guide, each datum's own.
    - ``batch size``: it changes no value.
    - ``datum independence``: the value of a datum does not change with the data beside it.
    - ``per-datum k-hat``: nor does its k-hat, nor with the batch size.
    - ``lower bound``: values are not above log p(x), for every K and guide; see below.
    - ``exact guide``: under the exact posterior every value is log p(x) to ``tolerance``, for every K.
    - ``tightens with K``: one particle gives the exact ELBO, more do not lower the mean, and 1,000 close
      nine tenths of its gap to log p(x).
    - ``known tail``: k-hats are small where the guide is wide and large where the weights have tail index
      0.94.

    ``lower bound`` is two tests. The mean over data and copies must not exceed that of log p(x) by more
    than a normal quantile of its standard error. And since weights have mean p(x), Markov's inequality
    bounds the average of :math:`\exp(\text{estimate} - \log p(x))` over the copies of a datum: a test
    that holds for any number of copies, without approximation. By chance a right estimator fails
    ``lower bound`` and ``tightens with K`` with probability ``false_alarm`` each (the Markov part exactly,
    the rest by the normal approximation to means of 256 terms or more); the others compare numbers that
    are equal up to rounding or, in ``known tail``, far apart. Draws are seeded: an estimator that passes
    once passes always.

    Args:
        estimator: Called as ``estimator(model, guide, x, y, num_particles=K, batch_size=B, seed=S)``, as
            :func:`pvae.log_likelihood`, the default. Returns the bounds, shape ``(N,)``, or an object with
            them as ``log_prob`` and, if it has any, k-hats ``(N,)`` as ``pareto_k``.
        num_particles: The K at which bounds are tested, rising.
        tolerance: Largest error in nats under the exact posterior.
        false_alarm: Probability that a right estimator fails one statistical check.
        seed: Seed of data and draws; the process's generators are left as they were.
        skip: Names of checks to leave out.

    Returns:
        A report; ``str`` prints it as a table.

    Raises:
        ExactnessError: At the first check that fails, with its name and the figures.
        ValueError: If ``num_particles`` does not rise from 1 or more, or ``skip`` names no check.

    Example:
        One's own estimator, here one that forgets the guide's density:

        >>> import math, pyro, torch
        >>> from pyro import poutine
        >>> from pvae.testing import check_likelihood_estimator
        >>> def forgetful(model, guide, x, y=None, *, num_particles, batch_size=None, seed=0):
        ...     with torch.no_grad(), torch.random.fork_rng(), pyro.plate("particles", num_particles, dim=-2):
        ...         torch.manual_seed(seed)
        ...         q = poutine.trace(guide).get_trace(x, y)
        ...         p = poutine.trace(poutine.replay(model, q)).get_trace(x, y)
        ...     log_w = sum(p.nodes[name]["fn"].log_prob(p.nodes[name]["value"]) for name in ("z", "x"))
        ...     return log_w.logsumexp(0) - math.log(num_particles)
        >>> check_likelihood_estimator(
        ...     forgetful, skip=["stored variance", "datum independence"]
        ... )  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pvae.testing.report.ExactnessError: forgetful fails the check 'lower bound': ...
    """
    particles = tuple(num_particles)
    if not particles or particles[0] < 1 or any(b <= a for a, b in pairwise(particles)):
        raise ValueError(f"num_particles must rise from at least 1, got {particles}")
    unknown = set(skip) - set(_CHECKS)
    if unknown:
        raise ValueError(f"skip must name checks out of {list(_CHECKS)}, got {sorted(unknown)}")
    if estimator is None:
        from pvae.evaluation import log_likelihood

        estimator = log_likelihood
    name = getattr(estimator, "__qualname__", type(estimator).__qualname__)
    bench = Bench(name, estimator, particles, tolerance, false_alarm, seed)
    outcomes = []
    for check, run in _CHECKS.items():
        if check in skip:
            outcomes.append(Outcome(check, "skipped on request", applied=False))
            continue
        bench.check = check
        with seeded(seed):
            detail = run(bench)
        outcomes.append(Outcome(check, detail.removeprefix("- "), applied=not detail.startswith("- ")))
    return Report(name, tuple(outcomes))
