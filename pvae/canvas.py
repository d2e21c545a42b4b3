"""The look of every picture: colours, type, and figures made without pyplot, which keeps global state."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "LINE", "ORANGE", "figure", "look", "save", "series"]

INK, GREY, LINE = "#22303c", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2f6fab", "#d9822b", "#3a9a6b"
_SERIES = (BLUE, ORANGE, GREEN, "#b5474b", "#7a5ea8", "#8a6d4b", "#c770a6", "#9a9b35", "#35a0b5")
_MARKERS = "o^sDvP"

_RC = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 160,
}


def series(i: int) -> dict[str, str]:
    """Colour and marker of the i-th of several series, as keywords of matplotlib's; the first 54 differ."""
    return {
        "color": _SERIES[i % len(_SERIES)],
        "marker": _MARKERS[i // len(_SERIES) % len(_MARKERS)],
    }


@contextmanager
def look(grid: bool = True) -> Iterator[None]:
    """Draw inside in the one style; matplotlib's settings are as before afterwards.

    Args:
        grid: Whether axes have grid lines.
    """
    import matplotlib as mpl

    settings: Any = {**_RC, "axes.grid": grid}
    with mpl.rc_context(settings):
        yield


def figure(width: float, height: float) -> "Figure":
    """Make an empty figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def save(drawn: "Figure", path: Path, title: str = "") -> Path:
    """Write a figure as PNG, with a line above it, and return the path."""
    if title:
        title = title.replace("$", r"\$")  # a name, and no formula
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    content = io.BytesIO()
    drawn.savefig(content, format="png", metadata={"Software": "pvae"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path
