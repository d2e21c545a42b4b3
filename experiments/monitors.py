# ruff: noqa: RUF001  (mathematical symbols)
"""What is watched while a program trains, beside its loss: the Jacobians of FIVE."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvae import canvas
from pvae.data import Data
from pvae.evaluation import JacobianMonitor
from pvae.evaluation.jacobian import LIMITS
from pvae.guides import FiveGuide

from .program import Program

__all__ = ["jacobian_curves", "jacobian_monitor"]

_TITLES = {
    "health": "tr(J G) / d,  wanted: 1",
    "inconsistency": "‖J G − (I − $\\Sigma_L$)‖ / √d,  wanted: 0",
    "residual": "(x − g(f(x)))² / σ²,  wanted: ≤ 1",
}

_LEGEND = "grey: where the approximation fails, a note if it stands there at the end"


def jacobian_monitor(program: Program, data: Data) -> JacobianMonitor | None:
    """Return the monitor of a program whose posterior is the encoder's Jacobian, ``None`` for another one.

    It gives no warnings: its ``problems`` are for the notes of a run.

    Args:
        program: The program.
        data: Its data.
    """
    return JacobianMonitor(program.guide, data, warn=False) if isinstance(program.guide, FiveGuide) else None


def jacobian_curves(metrics: Iterable[Mapping[str, Any]], path: Path, title: str = "", *, z_dim: int) -> Path:
    """Draw the figures of :class:`pvae.evaluation.JacobianMonitor` over the steps.

    A panel is grey where its figure would be a problem at the end of training.

    Args:
        metrics: Rows of ``metrics.jsonl``.
        path: PNG to write.
        title: Line above the panels.
        z_dim: Number of latents.

    Raises:
        ValueError: If no row has such figures.
    """
    rows = list(metrics)
    measured = [row for row in rows if "five/health" in row]
    if not measured:
        raise ValueError("metrics must hold at least one row of a JacobianMonitor, got none")
    with canvas.look():
        figure = canvas.figure(9.6, 5.4)
        (volume, gap, health), (inconsistency, residual, active) = figure.subplots(2, 3)

        _curve(volume, measured, "five/half_log_det", canvas.BLUE, "exact")
        _curve(volume, measured, "five/half_log_det_surrogate", canvas.ORANGE, "in the loss")
        volume.set(title="½ log det J S² Jᵀ", ylabel="nats")
        volume.legend()
        difference = [
            {"step": row["step"], "gap": row["five/half_log_det_surrogate"] - row["five/half_log_det"]}
            for row in measured
        ]
        _curve(gap, difference, "gap", canvas.ORANGE)
        gap.axhline(0.0, color=canvas.GREY, linewidth=0.8, zorder=1)
        gap.set(title="the same, in the loss − exact", ylabel="nats")

        _curve(health, rows, "surrogate/z", canvas.ORANGE, "by probes, training")
        _curve(health, measured, "five/health", canvas.BLUE, "exact, held out")
        health.legend()
        _curve(inconsistency, measured, "five/inconsistency", canvas.BLUE)
        _curve(residual, measured, "five/residual", canvas.BLUE)
        for axes, name in ((health, "health"), (inconsistency, "inconsistency"), (residual, "residual")):
            axes.set_title(_TITLES[name])
            _limit(axes, LIMITS[name], below=name == "health")
        health.set_ylim(top=max(1.06, health.get_ylim()[1]))

        _curve(active, measured, "five/active", canvas.BLUE)
        active.set_title(f"active latents, of {z_dim}")
        active.yaxis.get_major_locator().set_params(integer=True)
        _limit(active, z_dim - 0.5, below=True)
        for axes in (volume, gap):
            low, high = _settled(axes)
            margin = 0.08 * max(high - low, 1e-3)
            axes.set_ylim(low - margin, high + margin)
        for axes in figure.axes:
            axes.set_xlabel("step")
            axes.margins(x=0.02)
        figure.supxlabel(_LEGEND, x=0.012, ha="left", fontsize=8, color=canvas.GREY)
        return canvas.save(figure, path, title)


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, label: str = "") -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if len(points) < 25 else None
        axes.plot(
            *zip(*points, strict=True), color=colour, label=label, linewidth=1.3, marker=marker, markersize=3
        )


def _limit(axes: Any, limit: float, below: bool) -> None:
    """Shade what is beyond a limit; the axis shows the limit and zero."""
    low, high = _settled(axes)
    low, high = min(0.0, 1.08 * low), 1.08 * max(high, limit)
    axes.axhspan(*((low, limit) if below else (limit, high)), color=canvas.LINE, alpha=0.6, zorder=0)
    axes.set_ylim(low, high)


def _settled(axes: Any) -> tuple[float, float]:
    """Range of the curves without the first twentieth of a long one, where it comes from afar."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    settled = np.concatenate([values[len(values) // 20 :] for values in drawn])
    return float(settled.min()), float(settled.max())
