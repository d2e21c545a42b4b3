"""Figures of a study, from its records alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvae import canvas

from .ledger import Record
from .tables import Column, OverSeeds, configurations, interval

__all__ = ["Trend", "curves", "dots", "trends"]

_BASELINE = {"linewidth": 5, "alpha": 0.4, "markersize": 9}


def dots(
    records: Sequence[Record],
    factors: Sequence[str],
    columns: Sequence[Column],
    path: Path,
    title: str = "",
    *,
    name: Callable[[tuple[str, ...]], str] = ", ".join,
) -> Path:
    """Draw one panel for each metric, one row for each configuration: every seed, the mean and its interval.

    Args:
        records: Records that may be compared.
        factors: Factors that name a row.
        columns: Metrics; those that no record has are left out.
        path: PNG to write.
        title: Line above the panels.
        name: Called with the tuple of a row's factors, returns what stands beside the row.
    """
    groups = configurations(records, factors)
    cells = [record for group in groups.values() for record in group]
    shown = [c for c in columns if any(r.metrics.get(c.key) is not None for r in cells)]
    with canvas.look():
        figure = canvas.figure(2.4 + 2.6 * max(1, len(shown)), 0.9 + 0.24 * len(groups))
        panels = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, shown, strict=False):
            for row, group in enumerate(groups.values()):
                values = [r.metrics.get(column.key) for r in group]
                known = [column.factor * value for value in values if value is not None]
                if not known:
                    continue
                mean = interval(known)
                axes.plot(known, [row] * len(known), "o", color=canvas.GREY, markersize=2.5, alpha=0.7)
                half = mean.half if mean.half == mean.half else 0.0  # NaN: a single seed has no interval
                look = {"fmt": "o", "color": canvas.BLUE, "markersize": 4.5, "linewidth": 1.2}
                axes.errorbar(mean.mean, row, xerr=half, **look)
            axes.set_title(column.title)
        panels[0].set_yticks(range(len(groups)), [name(values) for values in groups], color=canvas.INK)
        panels[0].invert_yaxis()
        return canvas.save(figure, path, title)


def curves(
    lines: Mapping[str, Sequence[tuple[str, float, float]]],
    path: Path,
    title: str = "",
    *,
    across: str,
    up: str,
    point: tuple[str, float, float] | None = None,
) -> Path:
    """Draw one line for each name through marked points; the first, the baseline, is wide and pale.

    Args:
        lines: Of each name its points: what stands beside a point (or nothing), and its two coordinates.
        path: PNG to write.
        title: Line above the panel.
        across: What the first coordinate is.
        up: What the second coordinate is, on a logarithmic axis.
        point: A reference: its name and coordinates.
    """
    with canvas.look():
        figure = canvas.figure(7.2, 4.6)
        axes: Any = figure.subplots()
        for i, (name, points) in enumerate(lines.items()):
            texts, xs, ys = zip(*points, strict=True)
            style: dict[str, Any] = {**canvas.series(i)}
            style |= _BASELINE if i == 0 else {"linewidth": 1.3, "markersize": 4}
            axes.plot(xs, ys, label=name, **style)
            for text, x, y in zip(texts, xs, ys, strict=True):
                axes.annotate(
                    text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=canvas.GREY
                )
        if point is not None:
            axes.plot(*point[1:], "*", color=canvas.INK, markersize=11, label=point[0])
        axes.set(xlabel=across, ylabel=up, yscale="log")
        axes.legend()
        return canvas.save(figure, path, title)


@dataclass(frozen=True)
class Trend:
    """A line through means over seeds.

    Attributes:
        name: What it is; lines of one name have one colour in all panels.
        points: First coordinate, and the mean with its interval.
    """

    name: str
    points: Sequence[tuple[float, OverSeeds]]


def trends(
    panels: Mapping[str, Sequence[Trend]],
    path: Path,
    title: str = "",
    *,
    across: str,
    ticks: Sequence[float] = (),
) -> Path:
    """Draw panels beside one another: lines with the intervals of their points.

    Args:
        panels: Lines of each panel by its title; points without a value are left out.
        path: PNG to write.
        title: Line above the panels.
        across: What the first coordinate is, positive.
        ticks: Marks of the first axis, which is then logarithmic; by default it is linear and begins at zero.
    """
    names = list(dict.fromkeys(trend.name for lines in panels.values() for trend in lines if trend.points))
    with canvas.look():
        figure = canvas.figure(0.6 + 3.3 * len(panels), 3.6)
        drawn: dict[str, Any] = {}
        for axes, (heading, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for trend in lines:
                known = [(x, value) for x, value in trend.points if value.n]
                if not known:
                    continue
                halves = [value.half if value.n > 1 else 0.0 for _, value in known]
                drawn[trend.name] = axes.errorbar(
                    [x for x, _ in known],
                    [value.mean for _, value in known],
                    yerr=halves,
                    linewidth=1.2,
                    markersize=4,
                    capsize=2,
                    **canvas.series(names.index(trend.name)),
                )
            axes.set_xlabel(across)
            axes.set_title(heading)
            if not ticks:
                axes.set_xlim(left=0)
            else:
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.set_xticks([], minor=True)
        shown = [name for name in names if name in drawn]
        if shown:
            legend = [drawn[name] for name in shown]
            figure.legend(legend, shown, loc="outside lower center", ncols=min(len(shown), 2 * len(panels)))
        return canvas.save(figure, path, title)
