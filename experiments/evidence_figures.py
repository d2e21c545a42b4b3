"""Pictures of what the parts of a judgement found, from their records; small enough for a phone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvae import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Drawing",
    "Raster",
    "auroc_dots",
    "bound_ladder",
    "code_scatter",
    "coverage_curve",
    "curves",
    "gap_bars",
    "information_bars",
    "khat_histogram",
    "layer_maps",
    "layer_rates",
    "marginal_bars",
    "marginal_histograms",
    "point_clouds",
    "predictive_dots",
    "quality_bars",
    "rank_histograms",
]

WIDTH, HEIGHT = 4.4, 2.7  # inches
_RED = canvas.series(3)["color"]
_MOST_SHOWN = 6  # histograms in one picture


@dataclass(frozen=True)
class Drawing:
    """A picture that is yet to be drawn.

    Attributes:
        name: One word or two, for its file or its anchor.
        alt: What it shows, for those who cannot see it.
        caption: What stands below it.
        draw: Makes it.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Raster:
    """A picture made of pixels.

    Attributes:
        name: One word or two.
        alt: What it shows, for those who cannot see it.
        caption: What stands below it.
        png: The file, in base 64.
        pixels: Whether its pixels are to be seen as squares, however large.
    """

    name: str
    alt: str
    caption: str
    png: str
    pixels: bool = False


def curves(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str, ylabel: str) -> "Figure":
    """Draw columns of the metrics over the steps; the steep beginning of long ones leaves the picture.

    Args:
        rows: Rows of ``metrics.jsonl``.
        keys: Columns, with what they are called.
        title: Line above.
        ylabel: Unit of the columns.
    """
    with canvas.look():
        figure = canvas.figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        settled: list[float] = []
        for i, (key, label) in enumerate(keys.items()):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=canvas.series(i)["color"], label=label, linewidth=1.5)
            settled += values[len(values) // 10 :]
        low, high = min(settled), max(settled)
        margin = 0.08 * max(high - low, 1e-3)
        axes.set(title=title, xlabel="step", ylabel=ylabel, ylim=(low - margin, high + margin))
        axes.margins(x=0.02)
        if len(keys) > 1:
            axes.legend()
        return figure


def khat_histogram(khats: Sequence[float], threshold: float) -> "Figure":
    """Draw the k-hats of all data, those above the threshold in another colour.

    Args:
        khats: One for each datum.
        threshold: Above it an estimate is not reliable.
    """
    low, high = min([*khats, 0.0]), max([*khats, 1.0])
    width = (high - low) / 40
    edges = [low + i * width for i in range(41)]
    counts = [0] * 40
    for khat in khats:
        counts[min(39, int((khat - low) / width))] += 1
    with canvas.look():
        figure = canvas.figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        colours = [_RED if edge + width / 2 > threshold else canvas.BLUE for edge in edges[:-1]]
        axes.bar(edges[:-1], counts, width * 0.9, align="edge", color=colours)
        axes.axvline(threshold, color=canvas.INK, linewidth=1, linestyle="--")
        axes.text(threshold, max(counts), f" {threshold:.2f}", va="top", color=canvas.INK)
        axes.set(title="Pareto k-hat of every datum", xlabel="k-hat", ylabel="data")
        axes.locator_params(axis="y", integer=True)
        axes.grid(axis="x", visible=False)
        return figure


def bound_ladder(rungs: Sequence[tuple[str, float, float, float]]) -> "Figure":
    """Draw lower bounds of the same data, lowest first, by their distance to the importance-weighted one.

    Args:
        rungs: Name, difference in nats, and the ends of its interval.
    """
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.9 + 0.36 * len(rungs))
        axes = figure.subplots()
        for i, (_, value, low, high) in enumerate(rungs):
            axes.plot([low, high], [i, i], color=canvas.series(i)["color"], linewidth=3, alpha=0.45)
            axes.plot(value, i, "o", color=canvas.series(i)["color"], markersize=6)
        axes.axvline(0, color=canvas.GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rungs)), [name for name, *_ in rungs])
        axes.tick_params(axis="y", length=0, labelcolor=canvas.INK)
        axes.set(title="lower bounds on the same data", xlabel="nats from the importance-weighted bound")
        axes.set_ylim(-0.6, len(rungs) - 0.4)
        axes.grid(axis="y", visible=False)
        return figure


def gap_bars(intervals: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw what amortisation and the posterior's family lose, with intervals over data.

    Args:
        intervals: ``"amortisation"``, ``"family"`` and, where it is there, ``"full"``.
    """
    words = {"amortisation": "amortisation", "family": "family", "full": "removed by a\nfull covariance"}
    names = [name for name in words if name in intervals]
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.9 + 0.42 * len(names))
        axes = figure.subplots()
        for i, name in enumerate(reversed(names)):
            found = intervals[name]
            colour = canvas.series(names.index(name))["color"]
            axes.barh(i, found["value"], 0.55, color=colour)
            _reach(axes, found, i)
        axes.set_yticks(range(len(names)), [words[name] for name in reversed(names)])
        axes.tick_params(axis="y", length=0, labelcolor=canvas.INK)
        axes.axvline(0, color=canvas.GREY, linewidth=0.8)
        axes.set(title="where the nats go", xlabel="nats per datum")
        axes.grid(axis="y", visible=False)
        return figure


def rank_histograms(
    quantities: Sequence[Mapping[str, Any]], low: Sequence[float], high: Sequence[float], title: str
) -> "Figure":
    """Draw rank histograms with the band that holds all bins of a calibrated one with probability 0.95.

    Args:
        quantities: Each with ``name`` and ``histogram``; at most six are shown.
        low: Lower ends of the band, one for each bin.
        high: Upper ends.
        title: Line above.
    """
    shown = quantities[:_MOST_SHOWN]
    rows = -(-len(shown) // 2)
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.45 + 1.15 * rows)
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
        bins = [i + 0.5 for i in range(len(low))]
        edges = [0.0, *(i + 1.0 for i in range(len(low)))]
        for axes, found in zip(grid.flat, shown, strict=False):
            axes.fill_between(
                edges, [*low, low[-1]], [*high, high[-1]], step="post", color=canvas.LINE, linewidth=0
            )
            colours = [
                canvas.BLUE if a <= n <= b else _RED
                for n, a, b in zip(found["histogram"], low, high, strict=True)
            ]
            axes.bar(bins, found["histogram"], 0.86, color=colours, alpha=0.85)
            axes.set_title(found["name"].replace("$", r"\$"), fontsize=8)
            axes.set(xticks=[], xlim=(0, len(low)))
            axes.grid(visible=False)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, color=canvas.INK)
        return figure


def coverage_curve(coverage: Mapping[str, Any]) -> "Figure":
    """Draw how often central intervals hold the truth, pooled over the latents, by their level.

    Args:
        coverage: ``nominal``, ``pooled`` with its ends, ``band_low`` and ``band_high``.
    """
    with canvas.look():
        figure = canvas.figure(WIDTH, 3.0)
        axes = figure.subplots()
        level = coverage["nominal"]
        axes.fill_between(level, coverage["band_low"], coverage["band_high"], color=canvas.LINE, linewidth=0)
        axes.plot([0, 1], [0, 1], color=canvas.GREY, linewidth=0.8, linestyle=":")
        axes.plot(level, coverage["pooled"], color=canvas.BLUE, linewidth=1.6)
        if all(value is not None for value in coverage["pooled_low"]):
            axes.fill_between(
                level,
                coverage["pooled_low"],
                coverage["pooled_high"],
                color=canvas.BLUE,
                alpha=0.3,
                linewidth=0,
            )
        axes.set(title="coverage of central intervals", xlabel="level", ylabel="share that holds the truth")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        return figure


def predictive_dots(check: Mapping[str, Mapping[str, Any]], misfits: Sequence[str], title: str) -> "Figure":
    """Draw each statistic of the data beside the interval of 95 % of its replications, scaled to one length.

    Args:
        check: By statistic ``observed`` and ``replicated``.
        misfits: Statistics that misfit.
        title: Line above.
    """
    names = list(check)
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.8 + 0.3 * len(names))
        axes = figure.subplots()
        reach = 1.0
        for i, name in enumerate(reversed(names)):
            found = check[name]["replicated"]
            middle, half = (found["low"] + found["high"]) / 2, (found["high"] - found["low"]) / 2
            place = (check[name]["observed"] - middle) / half if half > 0 else 0.0
            shown = max(-4.0, min(4.0, place))
            reach = max(reach, abs(shown))
            axes.plot([-1, 1], [i, i], color=canvas.GREY, linewidth=5, alpha=0.35, solid_capstyle="butt")
            marker = "o" if shown == place else (">" if place > 0 else "<")
            axes.plot(shown, i, marker, color=_RED if name in misfits else canvas.BLUE, markersize=6)
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in reversed(names)])
        axes.tick_params(axis="y", length=0, labelcolor=canvas.INK)
        axes.set(xlim=(-reach - 0.3, reach + 0.3), ylim=(-0.6, len(names) - 0.4))
        axes.set(title=title, xlabel="grey: 95 % of the replications; dot: the data")
        axes.set_xticks([-1, 0, 1])
        axes.grid(axis="y", visible=False)
        return figure


def marginal_histograms(histograms: Mapping[str, Any]) -> "Figure":
    """Draw codes and prior in the dimensions where they differ most.

    Args:
        histograms: ``shown``, ``edges``, ``codes`` and ``prior``, of which at most six dimensions are drawn.
    """
    shown = histograms["shown"][:_MOST_SHOWN]
    rows = -(-len(shown) // 2)
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.75 + 1.1 * rows)
        grid = figure.subplots(rows, 2, squeeze=False)
        for i, (axes, dimension) in enumerate(zip(grid.flat, shown, strict=False)):
            edges = histograms["edges"][i]
            for key, colour, alpha in (("codes", canvas.BLUE, 0.45), ("prior", canvas.ORANGE, 0.0)):
                heights = [
                    share / (b - a)
                    for share, a, b in zip(histograms[key][i], edges[:-1], edges[1:], strict=True)
                ]
                if alpha:
                    axes.stairs(heights, edges, fill=True, color=colour, alpha=alpha, label="codes")
                else:
                    axes.stairs(heights, edges, color=colour, linewidth=1.4, label="prior")
            axes.set_title(f"dimension {dimension}", fontsize=8)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure


def marginal_bars(kl: Mapping[str, Sequence[float]]) -> "Figure":
    """Draw the divergence of every marginal, between its bounds, largest first.

    Args:
        kl: ``low`` and ``high`` of every dimension; at most 40 are drawn.
    """
    order = sorted(range(len(kl["high"])), key=lambda j: -kl["high"][j])[:40]
    with canvas.look():
        figure = canvas.figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        places = range(len(order))
        axes.bar(places, [kl["high"][j] for j in order], 0.8, color=canvas.BLUE, alpha=0.4, label="at most")
        low = [max(0.0, kl["low"][j]) for j in order]
        axes.bar(places, low, 0.8, color=canvas.BLUE, label="at least")
        few = len(order) <= 16
        axes.set_xticks(list(places) if few else [], [str(j) for j in order] if few else [])
        axes.set(title="KL(codes ‖ prior) of each dimension", xlabel="dimension", ylabel="nats")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def information_bars(information: Mapping[str, Any]) -> "Figure":
    """Draw the bounds on the information of the latents about the data, and the rate.

    Args:
        information: ``low``, ``high`` and ``rate``, of which the last two may be ``None``.
    """
    words = {"low": "I(x; z), at least", "high": "I(x; z), at most", "rate": "rate"}
    names = [name for name in words if information.get(name) is not None]
    with canvas.look():
        figure = canvas.figure(WIDTH, 0.9 + 0.36 * len(names))
        axes = figure.subplots()
        for i, name in enumerate(reversed(names)):
            axes.barh(i, information[name]["value"], 0.55, color=canvas.series(names.index(name))["color"])
            _reach(axes, information[name], i)
        axes.axvline(information["ceiling"], color=canvas.GREY, linewidth=0.9, linestyle=":")
        axes.set_yticks(range(len(names)), [words[name] for name in reversed(names)])
        axes.tick_params(axis="y", length=0, labelcolor=canvas.INK)
        axes.set(
            title="what the latents tell of the data", xlabel="nats; dotted: logarithm of the number of data"
        )
        axes.grid(axis="y", visible=False)
        return figure


def code_scatter(codes: Mapping[str, Any]) -> "Figure":
    """Draw posterior means in the plane, coloured by label, over draws of the prior.

    Args:
        codes: ``points``, ``prior``, ``labels`` or ``None``, ``axes``.
    """
    with canvas.look():
        figure = canvas.figure(WIDTH, 3.9)
        axes = figure.subplots()
        if codes["prior"]:
            across, up = zip(*codes["prior"], strict=True)
            axes.scatter(across, up, s=5, color=canvas.GREY, alpha=0.3, linewidths=0, label="prior")
        labels = codes["labels"]
        groups = [("codes", codes["points"])]
        if labels is not None:
            names = sorted(set(labels), key=lambda name: (len(name), name))
            groups = [
                (name, [p for p, of in zip(codes["points"], labels, strict=True) if of == name])
                for name in names
            ]
        for i, (name, points) in enumerate(groups):
            across, up = zip(*points, strict=True)
            look: Any = canvas.series(i)
            label = name.replace("$", r"\$")
            axes.scatter(across, up, s=14, alpha=0.85, linewidths=0, label=label, **look)
        axes.set(xlabel=codes["axes"][0], ylabel=codes["axes"][1])
        if len(groups) <= 20:
            columns = 1 if len(groups) == 1 else 6
            figure.legend(loc="outside lower center", ncols=min(columns, len(groups) + 1), markerscale=1.4)
        return figure


def point_clouds(clouds: Mapping[str, Sequence[Sequence[float]]]) -> "Figure":
    """Draw several sets of points over one another.

    Args:
        clouds: Points of two coordinates by name.
    """
    with canvas.look():
        figure = canvas.figure(WIDTH, 3.6)
        axes = figure.subplots()
        for i, (name, points) in enumerate(clouds.items()):
            across, up = zip(*points, strict=True)
            look: Any = canvas.series(i)
            axes.scatter(across, up, s=8, alpha=0.6, linewidths=0, label=name, **look)
        axes.set(xlabel="x₁", ylabel="x₂")
        figure.legend(loc="outside lower center", ncols=len(clouds), markerscale=1.6)
        return figure


def layer_rates(layers: Mapping[str, Any]) -> "Figure":
    """Draw the KL of each layer on held-out and training data.

    Args:
        layers: ``test`` and ``train``, each with ``layers``.
    """
    names = list(layers["test"]["layers"])
    with canvas.look():
        figure = canvas.figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        for i, (part, label) in enumerate((("test", "held-out"), ("train", "training"))):
            found = [layers[part]["layers"][name] for name in names]
            at = [place + 0.4 * i - 0.2 for place in range(len(names))]
            errors = [layer["standard_error"] or 0.0 for layer in found]
            axes.bar(
                at,
                [layer["kl"] for layer in found],
                0.38,
                yerr=errors,
                color=canvas.series(i)["color"],
                ecolor=canvas.GREY,
                label=label,
            )
        axes.set_xticks(range(len(names)), names)
        axes.set(title="rate of each layer", ylabel="KL, nats")
        axes.grid(axis="x", visible=False)
        axes.legend()
        return figure


def layer_maps(layers: Mapping[str, Any]) -> "Figure":
    """Draw where in the image each layer pays, on one scale of colours.

    Args:
        layers: By name, of which those with a ``kl_plane`` are drawn.
    """
    planes = {name: of["kl_plane"] for name, of in layers.items() if of["kl_plane"] is not None}
    largest = max(value for plane in planes.values() for row in plane for value in row)
    columns = min(4, len(planes))
    rows = -(-len(planes) // columns)
    with canvas.look(grid=False):
        figure = canvas.figure(WIDTH, 1.3 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (name, plane) in zip(grid.flat, planes.items(), strict=False):
            axes.imshow(plane, vmin=0.0, vmax=largest or 1.0, cmap="magma", interpolation="nearest")
            most = max(value for row in plane for value in row)
            axes.set_title(f"{name}, up to {most:.2g}", fontsize=7)
        return figure


def auroc_dots(tables: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw the area under the ROC curve of every score, with its interval, for each outside set.

    Args:
        tables: By outside set, the detectors by the name of the score.
    """
    scores = list(dict.fromkeys(name for table in tables.values() for name in table))
    with canvas.look():
        figure = canvas.figure(WIDTH, 1.0 + 0.3 * len(scores) + 0.15 * len(tables))
        axes = figure.subplots()
        offset = 0.5 / max(1, len(tables))
        for i, (outside, table) in enumerate(tables.items()):
            style = canvas.series(i)
            for j, name in enumerate(reversed(scores)):
                if name not in table:
                    continue
                area = table[name]["auroc"]
                place = j + offset * ((len(tables) - 1) / 2 - i)
                if area["low"] is not None:
                    axes.plot(
                        [area["low"], area["high"]], [place, place], color=style["color"], linewidth=1.5
                    )
                label = outside if j == len(scores) - 1 else None
                axes.plot(area["value"], place, "o", color=style["color"], markersize=5, label=label)
        axes.axvline(0.5, color=canvas.GREY, linewidth=0.9, linestyle=":")
        axes.set_yticks(range(len(scores)), [name.replace("_", " ") for name in reversed(scores)])
        axes.tick_params(axis="y", length=0, labelcolor=canvas.INK)
        axes.set(xlim=(0, 1.02), xlabel="AUROC; 0.5 tells nothing", ylim=(-0.6, len(scores) - 0.4))
        axes.grid(axis="y", visible=False)
        # As many beside one another as there is room for their names.
        columns = max(1, min(len(tables), 60 // (8 + max(map(len, tables)))))
        figure.legend(loc="outside lower center", ncols=columns)
        return figure


def quality_bars(quality: Mapping[str, Any]) -> "Figure":
    """Draw precision, recall, density and coverage of samples beside those of training data.

    Args:
        quality: ``precision_recall`` and ``precision_recall_floor``.
    """
    names = ("precision", "recall", "density", "coverage")
    with canvas.look():
        figure = canvas.figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        sources = (("precision_recall", "samples"), ("precision_recall_floor", "training data"))
        for i, (key, label) in enumerate(sources):
            at = [place + 0.4 * i - 0.2 for place in range(len(names))]
            heights = [quality[key][name] for name in names]
            axes.bar(at, heights, 0.38, color=canvas.series(i)["color"], label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set(title="samples among held-out data")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _reach(axes: "Axes", found: Mapping[str, Any], place: float) -> None:
    """Draw the interval of a bar, where it has one."""
    if found.get("low") is not None and found.get("high") is not None:
        axes.plot([found["low"], found["high"]], [place, place], color=canvas.INK, linewidth=1.4)
