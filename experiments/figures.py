# ruff: noqa: RUF001  (mathematical symbols)
"""Pictures of a run: loss curves, reconstructions, samples. Matplotlib without pyplot: no global state."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae import canvas
from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.rows import parse_row

from .program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PANELS",
    "densities",
    "draw_samples",
    "given_grid",
    "labelled_grid",
    "loss_curves",
    "read_metrics",
    "reconstructed",
    "reconstructions",
    "samples",
    "value_range",
]

PANELS = ("mean of p(x | z),  z ~ p(z)", "draw  x ~ p(x | z), same z")
"""What stands above the two panels of samples of a model without labels."""

_LARGEST = 60.0  # inches: a picture of hundreds of labels is still one that can be opened
# Data of a picture of reconstructions: images, or points, which only in numbers show where they lie.
_IMAGES, _POINTS = 10, 300


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
    with canvas.look():
        figure = canvas.figure(8.4, 3.3)
        left, middle, right = figure.subplots(1, 3)
        _line(left, rows, "loss", canvas.BLUE, "train")
        _line(left, rows, "valid_loss", canvas.ORANGE, "valid")
        left.set(title="loss (minus the objective)", ylabel="nats per datum")
        _line(middle, rows, "reconstruction", canvas.GREEN, "reconstruction")
        middle.set_title("reconstruction  −E log p(x | z)")
        _line(right, rows, "kl", canvas.ORANGE, "kl")
        right.set_title("rate  KL(q(z | x) ‖ p(z))")
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.margins(x=0.02)
            _zoom(axes)
        if any("valid_loss" in row for row in rows):
            left.legend()
        return canvas.save(figure, path, title)


def reconstructions(
    program: Program, split: Split, path: Path, title: str = "", num: int | None = None
) -> Path:
    """Draw data above the means of p(x | z), with z drawn from the guide.

    A conditional program sees each datum's own label. Other data than images stand beside their means, each
    of which a line joins to its datum.

    Args:
        program: The trained program.
        split: Data to show, spread evenly over the split.
        path: PNG to write.
        title: Line above the panels.
        num: Number of data, by default 10 images or 300 points.
    """
    x, means = reconstructed(program, split, num)
    panels = {"data": x, "reconstruction": means}
    if x.ndim == 4:
        return _compare(panels, path, title, columns=len(x), bounds=value_range(split))
    with canvas.look():
        return canvas.save(_scatter({name: {"": each} for name, each in panels.items()}, x), path, title)


def reconstructed(program: Program, split: Split, num: int | None = None) -> tuple[Tensor, Tensor]:
    """Return data and the means of p(x | z), with z drawn from the guide, each ``(num, *x_shape)``.

    Args:
        program: The trained program.
        split: Data, of which some are taken, spread evenly.
        num: Their number, by default 10 images or 300 points.
    """
    images = len(split.protocol.x_shape) == 3
    shown = split[_spread(len(split), num or (_IMAGES if images else _POINTS))]
    device = device_of(*program)
    x = shown.x.to(device)
    y = shown.y.to(device) if shown.y is not None and getattr(program.model, "conditional", False) else None
    with evaluating(*program):
        torch.manual_seed(0)
        guide = pyro.poutine.trace(program.guide).get_trace(*((x,) if y is None else (x, y)))
        model = pyro.poutine.trace(pyro.poutine.replay(program.model, trace=guide))
        means: Tensor = model.get_trace(*((x,) if y is None else (x, y))).nodes["x"]["fn"].mean
    return x, means


def draw_samples(
    program: Program,
    num: int,
    seed: int = 0,
    y: Tensor | None = None,
    u: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Draw ``z`` from the prior; return means of p(x | z) and draws of x, each ``(num, *x_shape)``.

    Both share their latents: the seed is set before each, and z is drawn first.

    Args:
        program: The trained program.
        num: Number of draws.
        seed: Seed of the draws; with the same one, other labels or options meet the same noise.
        y: Labels of a conditional model, ``num`` of them or one.
        u: Pseudoinput that all draws share, ``u_shape``, of a model with ``sample_given``.
        **options: Further arguments of the model's ``sample``, or of ``sample_given``.
    """
    model: Any = program.model
    given = options if y is None else {"y": y.to(device_of(*program)), **options}
    pictures = []
    with evaluating(*program):
        for mean in (True, False):
            torch.manual_seed(seed)
            if u is None:
                pictures.append(model.sample(num, mean=mean, **given))
            else:
                pictures.append(model.sample_given(u.unsqueeze(0), num, mean=mean, **given)[0])
    return pictures[0], pictures[1]


def samples(
    means: Tensor,
    draws: Tensor,
    path: Path,
    title: str = "",
    *,
    panels: tuple[str, str] = PANELS,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """Draw the prior's samples: the means of p(x | z) beside draws of x from the same latents.

    Args:
        means: Shape ``(N, *x_shape)``, in the units of the data.
        draws: Shape ``(N, *x_shape)``.
        path: PNG to write.
        title: Line above the panels.
        panels: What stands above the means and above the draws.
        bounds: Values shown as black and as white, see :func:`value_range`.
    """
    shown = dict(zip(panels, (means, draws), strict=True))
    return _compare(shown, path, title, columns=math.ceil(math.sqrt(len(means))), bounds=bounds)


def labelled_grid(
    rows: Mapping[str, Tensor],
    path: Path,
    title: str = "",
    *,
    draws: Mapping[str, Tensor],
    panels: tuple[str, str] = PANELS,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """Draw samples by label: a row of images for each, its label to the left, means beside draws.

    Other data than images are points in the colour of their label.

    Args:
        rows: Means of p(x | z) of each label, each ``(N, *x_shape)``, in the units of the data.
        path: PNG to write.
        title: Line above the panels.
        draws: Draws of x of each label, from the same latents.
        panels: What stands above the means and above the draws.
        bounds: Values shown as black and as white, see :func:`value_range`.

    Raises:
        ValueError: If there is no row, or rows differ in their number of images.
    """
    if len({len(x) for shown in (rows, draws) for x in shown.values()}) != 1:
        raise ValueError("rows and draws must hold the same number of images for every label")
    shown = dict(zip(panels, (rows, draws), strict=True))
    first = next(iter(rows.values()))
    with canvas.look(grid=first.ndim != 4):
        figure = _label_rows(shown, bounds) if first.ndim == 4 else _scatter(shown)
        return canvas.save(figure, path, title)


def given_grid(
    given: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    draws: Mapping[str, Tensor],
    path: Path,
    title: str = "",
    *,
    panels: tuple[str, str] = PANELS,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """Draw a row for each image of which a model is given a low-pass picture: both, then what it makes of it.

    Args:
        given: Image and low-pass picture by label, each ``(2, C, H, W)``, in the units of the data.
        means: Means of p(x | z) of each label, each ``(N, C, H, W)``.
        draws: Draws of x of each label, from the same latents.
        path: PNG to write.
        title: Line above the panels.
        panels: What stands above the means and above the draws.
        bounds: Values shown as black and as white, see :func:`value_range`.
    """
    shown = {"x, low-pass": given} | dict(zip(panels, (means, draws), strict=True))
    with canvas.look(grid=False):
        return canvas.save(_label_rows(shown, bounds), path, title)


def densities(targets: Tensor, before: Tensor, after: Tensor, path: Path, title: str = "") -> Path:
    """Draw what an alignment is about: targets and log p(z) of the same data, before and after training.

    Args:
        targets: Log-density of the data less the constant, nats, shape ``(N,)``.
        before: log p(z) at a draw of z before training, nats, shape ``(N,)``.
        after: The same after training.
        path: PNG to write.
        title: Line above the panels.
    """
    columns = {"before": before.double(), "after": after.double()}
    target = targets.double()
    drawn = torch.cat([target, *columns.values()])
    low, high = (float(drawn.quantile(q)) for q in (0.005, 0.995))
    with canvas.look(grid=False):
        figure = canvas.figure(9.0, 5.0)
        for i, (when, log_p) in enumerate(columns.items()):
            law, cloud = figure.add_subplot(2, 2, 1 + i), figure.add_subplot(2, 2, 3 + i)
            bins: Any = {"bins": 60, "range": (low, high), "density": True}
            law.hist(target.clamp(low, high).numpy(), **bins, color=canvas.BLUE, alpha=0.4, label="targets")
            law.hist(
                log_p.clamp(low, high).numpy(),
                **bins,
                color=canvas.ORANGE,
                histtype="step",
                linewidth=1.4,
                label="log p(z)",
            )
            law.set(title=f"{when} training", xlabel="nats", yticks=[])
            law.legend()
            cloud.scatter(target.numpy(), log_p.numpy(), s=3, alpha=0.3, color=canvas.ORANGE, linewidths=0)
            cloud.plot([low, high], [low, high], color=canvas.GREY, linewidth=0.8)
            cloud.set(xlim=(low, high), ylim=(low, high), xlabel="target, nats", ylabel="log p(z), nats")
        return canvas.save(figure, path, title)


def value_range(split: Split) -> tuple[float, float]:
    """Return the values to show as black and as white; what lies outside is clipped.

    The bounds of the data's values where these have bounds, so that a picture does not depend on what else is
    in it and the mean of a Normal that leaves [0, 1] by a little does not dim the others. Else the range of
    256 of the data, from zero on for counts.
    """
    values, levels = split.protocol.values, split.protocol.levels
    if values in ("binary", "unit"):
        return 0.0, 1.0
    if values == "count" and levels is not None:
        return 0.0, levels - 1.0
    some = split[_spread(len(split), 256)].x
    low, high = 0.0 if values == "count" else float(some.min()), float(some.max())
    return low, high if high > low else low + 1.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(parse_row(line))
        except ValueError:
            break
    return rows


def _spread(size: int, num: int) -> Tensor:
    """Positions of at most ``num`` of ``size`` data, evenly spread."""
    return torch.linspace(0, size - 1, min(num, size), dtype=torch.float64).long()


def _compare(
    panels: Mapping[str, Tensor], path: Path, title: str, columns: int, bounds: tuple[float, float]
) -> Path:
    """Draw panels of data: images as grids, anything else as points."""
    first = next(iter(panels.values()))
    with canvas.look(grid=first.ndim != 4):
        if first.ndim != 4:
            return canvas.save(_scatter({name: {"": x} for name, x in panels.items()}), path, title)
        # One row of images: panels stand on top of one another, so that each datum has a column.
        stacked = len(first) <= columns
        grids = {name: _grid(x, columns, bounds) for name, x in panels.items()}
        height, width = next(iter(grids.values())).shape[:2]
        wide = 7.6 if stacked else 3.9
        tall = wide * height / width + 0.3
        figure = canvas.figure(wide if stacked else 2 * wide, (2 * tall if stacked else tall) + 0.35)
        axes = figure.subplots(*((2, 1) if stacked else (1, 2)))
        for panel, (name, grid) in zip(axes, grids.items(), strict=True):
            panel.imshow(grid, interpolation="nearest", vmin=0, vmax=1)
            panel.set_title(name)
            panel.set_axis_off()
        return canvas.save(figure, path, title)


def _scatter(panels: Mapping[str, Mapping[str, Tensor]], origins: Tensor | None = None) -> "Figure":
    """Draw points in the plane, in space where they have three coordinates, or the first two of more.

    Args:
        panels: Of each panel the points of every label, which has a colour of its own; a legend if there are
            labels.
        origins: Points to which lines lead from those of the last panel.
    """
    every = [_coordinates(x) for series in panels.values() for x in series.values()]
    axes_of = every[0].shape[1]
    space = axes_of == 3
    figure = canvas.figure(7.6, 3.9)
    axes = figure.subplots(1, len(panels), subplot_kw={"projection": "3d"} if space else {}, squeeze=False)[0]
    for panel, (name, series) in zip(axes, panels.items(), strict=True):
        if origins is not None and panel is axes[-1]:
            for pair in np.stack((_coordinates(origins), every[-1]), -1):
                panel.plot(*pair, color=canvas.GREY, linewidth=0.6, zorder=1)
        for i, (label, x) in enumerate(series.items()):
            drawn = {"s": 6, "alpha": 0.6, "linewidths": 0, "label": _plain(label), **canvas.series(i)}
            panel.scatter(*_coordinates(x).T, **drawn)
        panel.set(xlabel="x₁", ylabel="x₂", **({"zlabel": "x₃"} if space else {}))
        panel.set_title(name, loc="left")
    _same_limits(axes, np.concatenate(every))
    if any(label for series in panels.values() for label in series):
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", markerscale=2)
    return figure


def _coordinates(x: Tensor) -> Any:
    """Coordinates to draw, ``(N, 2)`` or ``(N, 3)``; the second is zero where there is one alone."""
    points = x.detach().float().cpu().numpy().reshape(len(x), -1)
    if points.shape[1] == 1:
        return np.concatenate((points, np.zeros_like(points)), 1)
    return points if points.shape[1] == 3 else points[:, :2]


def _same_limits(axes: Any, points: Any) -> None:
    """Give panels the same axes, which hold all points."""
    low, high = points.min(0), points.max(0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    for panel in axes:
        for name, *ends in zip("xyz", low - margin, high + margin, strict=False):
            getattr(panel, f"set_{name}lim")(*ends)
        if hasattr(panel, "set_zlim"):
            panel.view_init(elev=22, azim=-68)
            panel.set_box_aspect(None, zoom=0.92)
            panel.zaxis.labelpad = -3.0  # further out it would lie outside
            panel.patch.set_visible(False)
            for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
                axis.pane.set(facecolor="white", edgecolor=canvas.LINE)


def _label_rows(panels: Mapping[str, Mapping[str, Tensor]], bounds: tuple[float, float]) -> "Figure":
    """Draw a row of images for each label, the labels left of the first panel."""
    rows = next(iter(panels.values()))
    rise, run = next(iter(rows.values())).shape[2:]
    columns = [len(next(iter(shown.values()))) for shown in panels.values()]
    labels = [_wrapped(label) for label in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    letters = max(len(line) for label in labels for line in label.split("\n"))

    # In inches: a row is as tall as its text needs, a panel as wide as its heading needs.
    row = max(0.4, 0.04 + 0.14 * lines)
    needed = zip(panels, columns, strict=True)
    wide = [max(0.2 + 0.07 * len(name), row * n * run / rise) for name, n in needed]
    if len(set(columns)) == 1:  # panels alike
        wide = [max(wide)] * len(wide)
    width, height = 0.3 + 0.075 * letters + sum(wide), 0.7 + row * len(rows)
    grids = [
        _grid(torch.cat(list(shown.values())), n, bounds)
        for shown, n in zip(panels.values(), columns, strict=True)
    ]
    figure = canvas.figure(min(width, _LARGEST), min(height, _LARGEST))
    # A pixel has the same size in every panel, so that rows go through.
    axes = figure.subplots(1, len(panels), width_ratios=[grid.shape[1] for grid in grids])
    for i, (panel, name, grid) in enumerate(zip(axes, panels, grids, strict=True)):
        panel.imshow(grid, interpolation="nearest", vmin=0, vmax=1)
        panel.set_title(name)
        panel.set_anchor("NW")
        panel.spines[:].set_visible(False)
        panel.set_xticks([])
        middles = [k * (rise + _gap(rise)) + (rise - 1) / 2 for k in range(len(labels))]
        panel.set_yticks(middles, labels if i == 0 else [""] * len(labels))
        panel.tick_params(length=0, labelsize=8 * min(1.0, _LARGEST / height), labelcolor=canvas.INK)
    return figure


def _wrapped(label: str) -> str:
    return "\n".join(_plain(line) for part in label.split("\n") for line in textwrap.wrap(part, 24) or [""])


def _plain(label: str) -> str:
    """Keep matplotlib from reading a name as a formula."""
    return label.replace("$", r"\$")


def _grid(x: Tensor, columns: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Any:
    """Tile images ``(N, C, H, W)`` with a light gap into one RGB array with values in [0, 1]."""
    low, high = bounds
    x = ((x.detach().float().cpu() - low) / (high - low)).clamp(0.0, 1.0)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    n, _, height, width = x.shape
    rows, gap = math.ceil(n / columns), _gap(height)
    canvas = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(x):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas.permute(1, 2, 0).numpy()


def _gap(height: int) -> int:
    """Pixels between the images of a grid."""
    return max(1, height // 14)


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
