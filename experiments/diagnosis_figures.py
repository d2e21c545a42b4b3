# ruff: noqa: RUF001  (mathematical symbols)
"""Pictures of a diagnosis: layers, scores inside and outside, ROC curves, conformal tests, log p(z)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae import canvas
from pvae.evaluation import OODReport, roc_curve

from .ladder_report import LadderReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["conformal_curves", "density_scatter", "layer_bars", "roc_curves", "score_histograms"]

_BINS = 48
_ALPHAS = torch.linspace(0.0, 0.2, 201, dtype=torch.float64)
_POINTS = 2000
_MAPS_ACROSS = 8

# The quantities themselves, not their signed scores: a reader looks for log p(z) where it is high.
_QUANTITIES = {
    "log_p_mean": "log p(z) at the posterior mean",
    "kl": "KL(q(z | x) ‖ p(z))",
    "entropy": "entropy of q(z | x)",
    "elbo": "ELBO",
}
_SHORT = {
    "log_p_mean": "log p(z)",
    "log_p": "E log p(z)",
    "kl": "KL",
    "entropy": "H(q)",
    "elbo": "ELBO",
    "log_prob": "log p(x)",
}


def layer_bars(report: LadderReport, path: Path, title: str = "") -> Path:
    """Draw the KL of each layer on held-out and training data with its active units, and where it is paid.

    Maps show the mean KL of each place of a layer that is an image, on one scale of colours for all; the map
    of u is the log-variance of r(u | x).

    Args:
        report: The layers.
        path: PNG to write.
        title: Line above the panels.
    """
    layers, u = report.test.layers, report.u
    planes = {layer.name: layer.plane for layer in layers if layer.plane is not None}
    count = len(planes) + (u is not None)
    rows, width = -(-count // _MAPS_ACROSS), max(6.4, 0.55 * len(layers) + 1.6)
    across = -(-count // max(1, rows))
    side = min(1.2, (width - 0.4) / max(1, across))  # inches
    heights = (3.2, *([side + 0.3] * rows))
    with canvas.look(grid=False):
        figure = canvas.figure(width, sum(heights))
        if not rows:
            _bars(figure.subplots(), report)
            return canvas.save(figure, path, title)
        # Typed as one figure by some versions of matplotlib, and as an array by others.
        halves: Any = figure.subfigures(2, 1, height_ratios=(heights[0], sum(heights[1:])))
        above, below = halves
        _bars(above.subplots(), report)
        grid = below.add_gridspec(rows, across)
        panels = [below.add_subplot(grid[i // across, i % across]) for i in range(count)]
        if u is not None:
            # First, as it is in the model.
            low, high = (float(end) for end in u.log_variance.aminmax())
            name = f"r(u | x): log var\n{low:.1f} to {high:.1f}"
            _map(panels[0], u.log_variance.mean(0), name, vmin=u.bounds[0], vmax=u.bounds[1], cmap="viridis")
        if planes:
            largest = max(float(plane.max()) for plane in planes.values())
            for axes, (name, plane) in zip(panels[-len(planes) :], planes.items(), strict=True):
                name = f"{name}: KL by place\nup to {float(plane.max()):.2g} nats"
                _map(axes, plane, name, vmin=0.0, vmax=largest or 1.0, cmap="magma")
        return canvas.save(figure, path, title)


def score_histograms(reports: Mapping[str, OODReport], path: Path, name: str, title: str = "") -> Path:
    """Draw the laws of four scores, familiar data filled, each outside set as a line.

    Args:
        reports: Reports with one inside sample in common, by the name of the outside data; at least one.
        path: PNG to write.
        name: Name of the inside data.
        title: Line above the panels.
    """
    inside = next(iter(reports.values())).inside.columns()
    with canvas.look(grid=False):
        figure = canvas.figure(9.0, 5.2)
        for axes, (key, label) in zip(figure.subplots(2, 2).flat, _QUANTITIES.items(), strict=True):
            samples = [inside[key], *(report.outside.columns()[key] for report in reports.values())]
            ends = torch.tensor([0.005, 0.995], dtype=torch.float64)
            bounds = torch.stack([sample.quantile(ends) for sample in samples])
            low, high = float(bounds[:, 0].min()), float(bounds[:, 1].max())
            places = {"bins": _BINS, "range": (low, high) if high > low else (low - 1, high + 1)}
            for i, (sample, of) in enumerate(zip(samples, (name, *reports), strict=True)):
                axes.hist(
                    sample.clamp(low, high).numpy(),
                    **places,
                    density=True,
                    histtype="step" if i else "stepfilled",
                    alpha=1.0 if i else 0.4,
                    linewidth=1.4,
                    color=canvas.series(i)["color"],
                    label=of + ("" if i else " (inside)"),
                )
            axes.set(title=label, xlabel="nats", yticks=[])
            axes.spines["left"].set_visible(False)
        _legend(figure)
        return canvas.save(figure, path, title)


def roc_curves(reports: Mapping[str, OODReport], path: Path, title: str = "") -> Path:
    """Draw the ROC curves of all scores, a panel for each outside set, with the areas in the legend.

    Args:
        reports: Reports by the name of the outside data; at least one.
        path: PNG to write.
        title: Line above the panels.
    """
    with canvas.look():
        figure = canvas.figure(max(5.2, 3.2 * len(reports) + 0.4), 4.6)
        # Legends below, where they cover no curve: scores may lie on either side of the diagonal.
        grid = figure.subplots(2, len(reports), squeeze=False, height_ratios=(4, 1))
        for axes, below, (name, report) in zip(*grid, reports.items(), strict=True):
            for i, (key, found) in enumerate(report.detectors.items()):
                sign = 1.0 if key in ("kl", "entropy") else -1.0
                here, there = report.inside.columns()[key], report.outside.columns()[key]
                false, true = roc_curve(sign * here, sign * there)
                label = f"{_SHORT[key]}  {found.auroc.value:.3f}"
                axes.plot(false.numpy(), true.numpy(), color=_colour(i), linewidth=1.4, label=label)
            axes.plot([0, 1], [0, 1], color=canvas.GREY, linewidth=0.8, linestyle=":")
            axes.set(title=name, xlabel="inside, called strange", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            below.set_axis_off()
            below.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=2, fontsize=8)
        grid[0, 0].set_ylabel("outside, called strange")
        return canvas.save(figure, path, title)


def conformal_curves(reports: Mapping[str, OODReport], path: Path, title: str = "") -> Path:
    """Draw what conformal tests call strange, by their level: false alarms, then each outside set.

    The grey band of the first panel is where 95 % of such curves lie if test data and calibration data are
    exchangeable, at each level by itself.

    Args:
        reports: Reports with one inside sample in common, by the name of the outside data; at least one.
        path: PNG to write.
        title: Line above the panels.
    """
    first = next(iter(reports.values()))
    with canvas.look():
        figure = canvas.figure(2.9 * (len(reports) + 1) + 0.4, 3.9)
        panels = figure.subplots(1, len(reports) + 1)
        alphas = _ALPHAS.numpy()
        test = next(iter(first.detectors.values())).conformal
        low, high = _band(len(test.p_inside), test.num_calibration)
        panels[0].fill_between(alphas, low, high, color=canvas.LINE, step="mid", linewidth=0)
        names = ("false alarms, inside", *(f"detected, {name}" for name in reports))
        for j, (axes, name) in enumerate(zip(panels, names, strict=True)):
            report = first if j == 0 else list(reports.values())[j - 1]
            for i, (key, found) in enumerate(report.detectors.items()):
                p_values = found.conformal.p_outside if j else found.conformal.p_inside
                shares = _share_below(p_values)
                axes.plot(alphas, shares.numpy(), color=_colour(i), linewidth=1.4, label=_SHORT[key])
            axes.plot([0, 0.2], [0, 0.2], color=canvas.GREY, linewidth=0.8, linestyle=":")
            axes.set(title=name, xlabel="level α", xlim=(0, 0.2), ylim=(0, None if j == 0 else 1.02))
        panels[0].set_ylabel("share with p ≤ α")
        _legend(figure)
        return canvas.save(figure, path, title)


def density_scatter(
    log_prior: Tensor, log_density: Tensor, path: Path, title: str = "", law: Tensor | None = None
) -> Path:
    """Draw log p(z) against an external log-density of the same data: the two laws, and datum by datum.

    Args:
        log_prior: log p(z) at the posterior mean, nats, shape ``(N,)``.
        log_density: Nats, shape ``(N,)``.
        path: PNG to write.
        title: Line above the panels.
        law: log p(z) at a draw for each datum, whose law is compared; ``log_prior`` if absent.
    """
    law = log_prior if law is None else law
    with canvas.look(grid=False):
        figure = canvas.figure(8.2, 3.8)
        left, right = figure.subplots(1, 2)
        pooled = torch.cat([law, log_density]).double()
        low, high = pooled.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64)).tolist()
        places = {"bins": _BINS, "range": (low, high) if high > low else (low - 1, high + 1)}
        for sample, colour, style, label in (
            (log_density, canvas.BLUE, "stepfilled", "density of x"),
            (law, canvas.ORANGE, "step", "log p(z), z ~ q(z | x)"),
        ):
            alpha = 0.45 if style == "stepfilled" else 1.0
            shown = sample.double().clamp(low, high).numpy()
            left.hist(
                shown,
                **places,
                density=True,
                histtype=style,
                color=colour,
                alpha=alpha,
                linewidth=1.4,
                label=label,
            )
        left.set(title="laws of the two", xlabel="nats", yticks=[])
        left.spines["left"].set_visible(False)
        across, up = log_density[:_POINTS].numpy(), log_prior[:_POINTS].numpy()
        right.scatter(across, up, s=6, alpha=0.4, linewidths=0, color=canvas.BLUE)
        middle = float(log_density.mean()), float(log_prior.mean())
        right.axline(
            middle, slope=1, color=canvas.GREY, linewidth=1, linestyle=":", label="slope 1, through the means"
        )
        right.set(
            title="datum by datum",
            xlabel="log-density of x, nats",
            ylabel="log p(z) at the posterior mean, nats",
        )
        _legend(figure)
        return canvas.save(figure, path, title)


def _bars(axes: "Axes", report: LadderReport) -> None:
    """Bars of the KL of each layer, with the active units above and the KL under another's u as points."""
    layers, places = report.test.layers, range(len(report.test.layers))
    top = 0.0
    for i, (label, part) in enumerate((("held-out data", report.test), ("training data", report.train))):
        heights, errors = ([getattr(layer, of) for layer in part.layers] for of in ("mean", "standard_error"))
        at = [place + 0.4 * i - 0.2 for place in places]
        axes.bar(at, heights, 0.38, yerr=errors, color=_colour(i), ecolor=canvas.GREY, label=label)
        top = max(top, *heights)
    if report.u is not None:
        other = report.u.exchange.other
        at = [place - 0.2 for place, layer in zip(places, layers, strict=True) if layer.name in other]
        points = [float(kl.mean()) for kl in other.values()]
        axes.plot(at, points, "D", color=_colour(3), markersize=4, label="held-out, with u of another datum")
        top = max(top, *points)
    for place, layer in zip(places, layers, strict=True):
        highest = max(layer.mean, report.train[layer.name].mean)
        axes.annotate(
            f"{layer.active}/{layer.size}",
            (place, highest),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=canvas.GREY,
        )
    axes.set(ylabel="KL, nats", ylim=(0, 1.14 * top or 1.0), title="rate of each layer; active units above")
    axes.set_xticks(list(places), [layer.name for layer in layers])
    axes.legend(loc="best", fontsize=8)


def _map(axes: "Axes", plane: Tensor, name: str, **look: Any) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.imshow(plane.numpy(), **look)


def _share_below(p_values: Tensor) -> Tensor:
    """Share of p-values at or below each level of the picture."""
    return torch.searchsorted(p_values.sort().values, _ALPHAS, right=True).double() / len(p_values)


def _band(total: int, num_calibration: int) -> tuple[list[float], list[float]]:
    """Where the share of false alarms of ``total`` data lies with 95 % at each level."""
    from scipy.stats import betabinom

    low, high = [], []
    for alpha in _ALPHAS.tolist():
        k = math.floor(alpha * (num_calibration + 1) * (1 + 1e-12))
        ends = betabinom.ppf([0.025, 0.975], total, k, num_calibration + 1 - k) if k else (0.0, 0.0)
        low.append(float(ends[0]) / total)
        high.append(float(ends[1]) / total)
    return low, high


def _colour(i: int) -> str:
    return canvas.series(i)["color"]


def _legend(figure: "Figure") -> None:
    """One legend under all panels, with every series once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 7))
