"""Aggregate posterior against prior, as a picture. Matplotlib without pyplot: no global state."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae import canvas

__all__ = ["plot_alignment"]

_SHOWN = 6
_POINTS = 1500


def plot_alignment(z_posterior: Tensor, z_prior: Tensor, scale: Tensor, path: Path, title: str = "") -> Path:
    """Draw histograms of the dimensions that differ most, and both samples on their principal plane.

    Args:
        z_posterior: Draws of the aggregate posterior, shape ``(n, d)``.
        z_prior: Draws of the prior, shape ``(m, d)``.
        scale: Standard deviations of the prior, shape ``(d,)``, in whose units dimensions are compared.
        path: PNG to write.
        title: Line above the panels.
    """
    worst = worst_dimensions(z_posterior, z_prior, scale)[:_SHOWN].tolist()
    with canvas.look(grid=False):
        figure = canvas.figure(9.4, 4.0)
        grid = figure.add_gridspec(2, 5)
        for place, j in enumerate(worst):
            axes = figure.add_subplot(grid[place // 3, place % 3])
            _histogram(axes, z_posterior[:, j], z_prior[:, j])
            axes.set_title(f"dimension {j + 1}")
        axes = figure.add_subplot(grid[:, 3:])
        plane_q, plane_p = principal_plane(z_posterior, z_prior, scale)
        for plane, colour, label in (
            (plane_p, canvas.ORANGE, "prior"),
            (plane_q, canvas.BLUE, "aggregate posterior"),
        ):
            across, up = plane[:_POINTS].T.numpy()
            axes.scatter(across, up, s=5, alpha=0.45, color=colour, linewidths=0, label=label)
        axes.set(title="principal plane, prior scales", xticks=[], yticks=[])
        axes.legend(loc="upper right", markerscale=2.5)
        return canvas.save(figure, path, title)


def worst_dimensions(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Dimensions by the distance of their quantiles (one-dimensional W1) in scales, largest first."""
    levels = torch.linspace(0.005, 0.995, 199, dtype=a.dtype)
    distance = (a.quantile(levels, dim=0) - b.quantile(levels, dim=0)).abs().mean(0)
    return (distance / scale.clamp(min=1e-12)).argsort(descending=True)


def principal_plane(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples on the two directions in which they vary most together, shape ``(n, 2)``."""
    a, b = (z / scale.clamp(min=1e-12) for z in (a, b))
    pooled = torch.cat([a, b])
    centre = pooled.mean(0)
    axes = torch.linalg.svd(pooled - centre, full_matrices=False).Vh[:2].T
    if axes.shape[1] < 2:  # one latent dimension: a line
        axes = torch.cat([axes, torch.zeros_like(axes)], -1)
    return (a - centre) @ axes, (b - centre) @ axes


def _histogram(axes: Any, posterior: Tensor, prior: Tensor) -> None:
    pooled = torch.cat([posterior, prior])
    low, high = pooled.quantile(torch.tensor([0.001, 0.999], dtype=pooled.dtype)).tolist()
    for sample, colour, style in ((prior, canvas.ORANGE, "step"), (posterior, canvas.BLUE, "stepfilled")):
        axes.hist(
            sample.clamp(low, high).numpy(),
            bins=36,
            range=(low, high) if high > low else (low - 1, high + 1),
            density=True,
            histtype=style,
            color=colour,
            alpha=0.45 if style == "stepfilled" else 1.0,
            linewidth=1.3,
        )
    axes.set_yticks([])
