r"""Whether a Jacobian posterior can be believed, watched while it trains (FIVE, arXiv:2506.01522v1)."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data import Data, Split
from pvae.distributions import variance_of
from pvae.inference import Run
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import SiteRecorder

from .jacobian import JacobianReport, jacobian_posterior, jacobian_report

__all__ = ["FIGURES", "JacobianMonitor"]

FIGURES = ("health", "half_log_det", "half_log_det_surrogate", "inconsistency", "residual", "active")
"""Figures of :class:`JacobianReport` that stand in the rows, there under ``five/<name>``."""

# Steps after which the networks are no longer what they were at random.
_LEAST_STEPS = 200

_PRIOR_DRAWS = 256


class JacobianMonitor:
    """A callback of :func:`pvae.fit` that puts :func:`jacobian_report` on a few fixed data into the rows.

    Once per epoch the row of the epoch's end gets ``five/health``, ``five/half_log_det`` (exact) and
    ``five/half_log_det_surrogate`` (what the loss has for it), ``five/inconsistency``, ``five/residual`` and
    ``five/active``; rows of FIVE have ``surrogate/z`` beside them, the health by the probes of training.
    Measured are the parameters that validate, in evaluation mode, without a trace on random generators.
    Nothing happens within a step. Figures that are not finite are left out.

    Warnings are given once, at the end, for the parameters that remain after averaging or early stopping: the
    networks then had all the time that they will get, and a problem on the way that went away was none. After
    fewer than 200 steps nothing is said: an encoder that is nearly random inverts no decoder.

    Args:
        guide: The guide, such as :class:`pvae.guides.FiveGuide` with either objective.
        x: Where the data are taken from, evenly spread: a data set (its validation split, if it has one, else
            the training split), a split, or a tensor ``(N, *x_shape)``.
        y: Labels, first dimension ``N``; a split has its own. They are used if ``model.conditional`` is true.
        num_data: How many data to look at, positive.
        every: Epochs between two measurements, positive.
        warn: Whether to warn of problems at the end.

    Attributes:
        report: The last report; ``None`` before the first.

    Raises:
        TypeError: If the guide has no such posterior.
        ValueError: If ``num_data`` or ``every`` is not positive.

    Example:
        >>> monitor = JacobianMonitor(guide, data)  # doctest: +SKIP
        >>> run = pvae.fit(model, guide, data, epochs=50, callbacks=[monitor])  # doctest: +SKIP
        >>> monitor.problems  # doctest: +SKIP
    """

    def __init__(
        self,
        guide: nn.Module,
        x: Tensor | Split | Data,
        y: Tensor | None = None,
        *,
        num_data: int = 16,
        every: float = 1.0,
        warn: bool = True,
    ) -> None:
        if num_data < 1:
            raise ValueError(f"num_data must be positive, got {num_data}")
        if not every > 0:
            raise ValueError(f"every must be positive, got {every}")
        self.guide, self.every, self.warn = guide, every, warn
        self.report: JacobianReport | None = None
        self._judged = False
        self._x, self._y = _some(x, y, num_data)
        with evaluating(guide):
            device = device_of(guide)
            jacobian_posterior(guide, self._x.to(device), None if self._y is None else self._y.to(device))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong at the end of training, one sentence each; nothing before, or after a few steps."""
        return self.report.problems if self.report is not None and self._judged else ()

    def measure(self, run: Run, row: Mapping[str, float]) -> dict[str, float]:
        """Return the figures for a row that is due; none for another one."""
        last = next((old["epoch"] for old in reversed(run.history) if "five/health" in old), 0.0)
        # On a grid of epochs, wherever the rows and the interruptions were.
        if _count(row["epoch"], self.every) == _count(last, self.every):
            return {}
        self.report = self._look(run)
        figures = {f"five/{name}": getattr(self.report, name) for name in FIGURES}
        return figures if all(math.isfinite(value) for value in figures.values()) else {}

    def finish(self, run: Run) -> None:
        """Judge the programs as they remain, and warn if asked to."""
        self.report = self._look(run)
        self._judged = run.steps >= _LEAST_STEPS
        if self.warn:
            for problem in self.problems:
                warnings.warn(problem, RuntimeWarning, stacklevel=4)

    def _look(self, run: Run) -> JacobianReport:
        y = self._y if getattr(run.model, "conditional", False) else None
        with evaluating(run.model, self.guide):
            scale = _prior_scale(run.model, self._x, y)
            return jacobian_report(
                self.guide, self._x, y, num_data=len(self._x), prior_scale=scale, warn=False
            )


def _some(x: Any, y: Tensor | None, num_data: int) -> tuple[Tensor, Tensor | None]:
    """Take data evenly spread over a set, since some sets are sorted by class."""
    if isinstance(x, Data):
        x = x.valid if "valid" in x.parts else x.train
    if not isinstance(x, Tensor | Split):
        raise TypeError(f"x must be a tensor, a split or a data set, got {type(x).__name__}")
    index = torch.linspace(0, len(x) - 1, min(num_data, len(x)), dtype=torch.float64).long()
    if isinstance(x, Split):
        part = x[index]
        return part.x, part.y if y is None else y[index]
    return x[index], None if y is None else y[index]


def _count(epoch: float, every: float) -> int:
    return math.floor(epoch / every + 1e-9)


def _prior_scale(model: Any, x: Tensor, y: Tensor | None) -> Tensor:
    """Standard deviation of z under the prior, root mean square over labels, ``(z_dim,)``."""
    device = device_of(model)
    args = [x.to(device)] if y is None else [x.to(device), y.to(device)]
    with SiteRecorder() as p:
        model(*args)
    torch.manual_seed(0)  # the same draws every time, where it takes any
    variance = variance_of(p.sites["z"].fn, _PRIOR_DRAWS * len(x))
    return variance.reshape(-1, variance.shape[-1]).mean(0).sqrt()
