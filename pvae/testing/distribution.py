r"""A distribution put through its own mathematics: normalised, sampled, differentiated, shaped."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .calculus import (
    check_float32,
    check_log_determinant,
    check_parameter_gradients,
    check_value_gradient,
)
from .rebuild import recipe_of
from .report import Outcome, Report
from .sampling import check_integral, check_moments, check_pathwise, check_sampler_of
from .shapes import check_shapes
from .statistics import seeded
from .subject import Subject

__all__ = ["check_distribution"]

_CHECKS: dict[str, Callable[[Subject], str]] = {
    "shapes": check_shapes,
    "log-determinant": check_log_determinant,
    "value gradient": check_value_gradient,
    "parameter gradients": check_parameter_gradients,
    "float32": check_float32,
    "integrates to 1": check_integral,
    "sampler follows density": check_sampler_of,
    "moments": check_moments,
    "pathwise gradient": check_pathwise,
}


def check_distribution(
    distribution: dist.TorchDistribution | Callable[..., dist.TorchDistribution],
    parameters: Mapping[str, Any] | None = None,
    *,
    values: Tensor | None = None,
    num_samples: int = 20_000,
    false_alarm: float = 1e-6,
    seed: int = 0,
    skip: Collection[str] = (),
) -> Report:
    r"""Check that a distribution is one: that density, sampler, shapes and gradients belong together.

    Everything runs in double precision on the CPU. The checks, in their order:

    - ``shapes``: draws and densities under ``sample_shape`` and ``expand``; draws differ, and lie in the
      support; ``log_prob`` treats leading dimensions of a value one by one.
    - ``log-determinant``: of every bijective transform, against the Jacobian by autograd (1e-8 relative);
      its inverse inverts.
    - ``value gradient``: of ``log_prob``, against central differences (1e-5 relative).
    - ``parameter gradients``: the same for every floating tensor that the distribution stands on.
    - ``float32``: ``log_prob`` of a single-precision copy agrees (1e-4 relative), and types are kept.
    - ``integrates to 1``: by quadrature in one or two dimensions (to 1e-4), by summation over a finite
      support (1e-6), by importance sampling in more, whose standard error must be below 0.05.
    - ``sampler follows density``: in one or two dimensions chi-square of the probability integral transform
      and the mean of ``log_prob`` against quadrature; over a finite support chi-square of counts; in more
      dimensions Stein's identity, and expectations against importance sampling. Draws are those of
      ``rsample`` where there is one; those of ``sample`` must agree with them.
    - ``moments``: ``mean``, ``variance`` and ``entropy``, where stated, against the draws.
    - ``pathwise gradient``: of expectations through ``rsample``, against those through ``log_prob``.

    The statistical checks (``integrates to 1`` in three dimensions or more, and the last three) each
    raise a false alarm with probability ``false_alarm`` at most: Bonferroni-corrected within the check,
    by the normal, Student or chi-square approximation for ``num_samples`` draws. The draws are seeded: a
    distribution that passes once passes always.

    Args:
        distribution: What to check, or a factory of it, called with ``parameters`` as keywords.
        parameters: The factory's arguments. With them parameters are differentiated where they enter;
            without, wherever they lie inside the distribution (transforms, modules and closures too).
        values: Every value of a discrete support, shape ``(num_values, *event_shape)``; found out for
            Booleans, integer ranges and counts.
        num_samples: Draws for the statistical checks.
        false_alarm: Probability that a right distribution fails one statistical check.
        seed: Seed of all draws; the process's generators are left as they were.
        skip: Names of checks to leave out.

    Returns:
        A report; ``str`` prints it as a table.

    Raises:
        ExactnessError: At the first check that fails, with its name and the figures.
        ValueError: If ``skip`` names no check, or the support is unknown.

    Example:
        One's own distribution, here a Gaussian on a log scale, with its parameters:

        >>> import pyro.distributions as dist, torch
        >>> from pvae.testing import check_distribution
        >>> parameters = {"loc": torch.tensor(0.3), "scale": torch.tensor(0.5)}
        >>> report = check_distribution(dist.LogNormal, parameters)
        >>> "sampler follows density" in report.applied
        True

        A sampler that forgot the scale:

        >>> class Forgetful(dist.Normal):
        ...     def rsample(self, sample_shape=torch.Size()):
        ...         return self.loc + torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype)
        >>> check_distribution(Forgetful(torch.tensor(0.0), torch.tensor(0.5)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pvae.testing.report.ExactnessError: Forgetful(...) fails the check 'sampler follows density': ...
    """
    unknown = set(skip) - set(_CHECKS)
    if unknown:
        raise ValueError(f"skip must name checks out of {list(_CHECKS)}, got {sorted(unknown)}")
    if num_samples < 1000:
        raise ValueError(f"num_samples must be at least 1000, got {num_samples}")
    outcomes = []
    with seeded(seed), torch.no_grad():
        recipe = recipe_of(distribution, parameters)
        double = recipe.in_dtype(torch.float64)
        name = (
            f"{type(double).__name__}(batch {tuple(double.batch_shape)}, event {tuple(double.event_shape)})"
        )
        subject = Subject(name, double, recipe, values, num_samples, false_alarm)
        for check, run in _CHECKS.items():
            if check in skip:
                outcomes.append(Outcome(check, "skipped on request", applied=False))
                continue
            subject.check = check
            torch.manual_seed(seed)
            detail = run(subject)
            outcomes.append(Outcome(check, detail.removeprefix("- "), applied=not detail.startswith("- ")))
    return Report(name, tuple(outcomes))
