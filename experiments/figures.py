# ruff: noqa: RUF001  (mathematical symbols)
"""Pictures of a run: loss curves, reconstructions, samples. Matplotlib without pyplot: no global state."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating

from .program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_samples", "loss_curves", "read_metrics", "reconstructions", "samples"]

_INK, _GREY, _LINE = "#22303c", "#7b8794", "#e4e7eb"
_BLUE, _ORANGE, _GREEN = "#2f6fab", "#d9822b", "#3a9a6b"
_RC = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 160,
}


def loss_curves(metrics: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the loss and its parts over the steps, in nats per datum.

    Args:
        metrics: Rows of ``metrics.jsonl``.
        path: PNG to write.
        title: Line above the panels.

    Raises:
        ValueError: If there is no row with a loss.
    """
    rows = list(metrics)
    if not any("loss" in row for row in rows):
        raise ValueError("metrics must hold at least one row with a loss, got none")
    import matplotlib as mpl

    with mpl.rc_context(_RC):
        figure = _figure(8.4, 3.3)
        left, middle, right = figure.subplots(1, 3)
        _line(left, rows, "loss", _BLUE, "train")
        _line(left, rows, "valid_loss", _ORANGE, "valid")
        left.set(title="loss (minus the objective)", ylabel="nats per datum")
        _line(middle, rows, "reconstruction", _GREEN, "reconstruction")
        middle.set_title("reconstruction  −E log p(x | z)")
        _line(right, rows, "kl", _ORANGE, "kl")
        right.set_title("rate  KL(q(z | x) ‖ p(z))")
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.margins(x=0.02)
            _zoom(axes)
        if any("valid_loss" in row for row in rows):
            left.legend()
        return _save(figure, path, title)


def reconstructions(program: Program, split: Split, path: Path, title: str = "", num: int = 10) -> Path:
    """Draw data above the means of p(x | z), with z drawn from the guide.

    Args:
        program: The trained program.
        split: Data to show, spread evenly over the split.
        path: PNG to write.
        title: Line above the panels.
        num: Number of data.
    """
    where = torch.linspace(0, len(split) - 1, min(num, len(split))).long()
    shown = split[where]
    device = device_of(*program)
    x = shown.x.to(device)
    y = shown.y.to(device) if shown.y is not None and getattr(program.model, "conditional", False) else None
    with evaluating(*program):
        torch.manual_seed(0)
        guide = pyro.poutine.trace(program.guide).get_trace(*((x,) if y is None else (x, y)))
        model = pyro.poutine.trace(pyro.poutine.replay(program.model, trace=guide))
        means = model.get_trace(*((x,) if y is None else (x, y))).nodes["x"]["fn"].mean
    return _compare({"data": x, "reconstruction": means}, path, title, columns=len(x))


def draw_samples(program: Program, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw ``z`` from the prior; return means of p(x | z) and draws of x, each ``(num, *x_shape)``.

    Both share their latents: the seed is set before each, and z is drawn first.
    """
    pictures = []
    with evaluating(*program):
        for mean in (True, False):
            torch.manual_seed(seed)
            pictures.append(program.model.sample(num, mean=mean))  # type: ignore[operator]
    return pictures[0], pictures[1]


def samples(means: Tensor, draws: Tensor, path: Path, title: str = "") -> Path:
    """Draw the prior's samples: the means of p(x | z) beside draws of x from the same latents.

    Args:
        means: Shape ``(N, *x_shape)``, in the units of the data.
        draws: Shape ``(N, *x_shape)``.
        path: PNG to write.
        title: Line above the panels.
    """
    return _compare(
        {"mean of p(x | z),  z ~ p(z)": means, "draw  x ~ p(x | z), same z": draws},
        path,
        title,
        columns=math.ceil(math.sqrt(len(means))),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _compare(panels: Mapping[str, Tensor], path: Path, title: str, columns: int) -> Path:
    """Draw panels of data: images as grids, anything else as the first two coordinates."""
    import matplotlib as mpl

    first = next(iter(panels.values()))
    with mpl.rc_context({**_RC, "axes.grid": first.ndim != 4}):
        if first.ndim == 4:
            # One row of images: panels stand on top of one another, so that each datum has a column.
            stacked = len(first) <= columns
            grids = {name: _grid(x, columns) for name, x in panels.items()}
            height, width = next(iter(grids.values())).shape[:2]
            wide = 7.6 if stacked else 3.9
            tall = wide * height / width + 0.3
            figure = _figure(wide if stacked else 2 * wide, (2 * tall if stacked else tall) + 0.35)
            axes = figure.subplots(*((2, 1) if stacked else (1, 2)))
            for panel, (name, grid) in zip(axes, grids.items(), strict=True):
                panel.imshow(grid, interpolation="nearest", vmin=0, vmax=1)
                panel.set_title(name)
                panel.set_axis_off()
        else:
            figure = _figure(7.6, 3.9)
            axes = figure.subplots(1, 2, sharex=True, sharey=True)
            for panel, (name, x) in zip(axes, panels.items(), strict=True):
                points = x.detach().float().cpu().numpy().reshape(len(x), -1)
                across, up = points[:, 0], points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))
                panel.scatter(across, up, s=6, alpha=0.6, color=_BLUE, linewidths=0)
                panel.set(title=name, xlabel="x₁", ylabel="x₂")
        return _save(figure, path, title)


def _grid(x: Tensor, columns: int) -> Any:
    """Tile images ``(N, C, H, W)`` with a light gap into one RGB array with values in [0, 1]."""
    x = x.detach().float().cpu()
    # Counts and unbounded means are shown over their own range.
    x = (x - x.min().clamp(max=0.0)) / (x.max().clamp(min=1.0) - x.min().clamp(max=0.0))
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    n, _, height, width = x.shape
    rows, gap = math.ceil(n / columns), max(1, height // 14)
    canvas = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(x):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas.permute(1, 2, 0).numpy()


def _line(axes: Any, rows: list[Mapping[str, Any]], key: str, colour: str, label: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) < 25 else None
    axes.plot(steps, values, color=colour, label=label, linewidth=1.3, marker=marker, markersize=3)


def _zoom(axes: Any) -> None:
    """Let the first twentieth of a long curve, where it falls from afar, leave the picture."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    settled = np.concatenate([values[len(values) // 20 :] for values in drawn])
    margin = 0.08 * max(float(np.ptp(settled)), 1e-3)
    axes.set_ylim(settled.min() - margin, settled.max() + margin)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path, title: str) -> Path:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "pvae"})
    return path
