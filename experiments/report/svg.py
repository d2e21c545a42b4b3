"""Pictures as SVG inside a page: its colours, light or dark, text that is text, names that are unique."""

import io
import re
from typing import TYPE_CHECKING

from pvae import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["to_svg"]

# Of the page's style sheet, which has two values for each.
_VARIABLES = {
    canvas.INK: "ink",
    canvas.GREY: "soft",
    canvas.LINE: "line",
    **{canvas.series(i)["color"]: f"series-{i + 1}" for i in range(9)},
}


def to_svg(figure: "Figure", prefix: str, label: str) -> str:
    """Write a figure as an ``svg`` element for a page, without anything from elsewhere.

    Args:
        figure: The figure.
        prefix: Begins every name inside, which must be unique in the page: letters, digits and hyphens.
        label: What the picture shows, for those who cannot see it; any text.
    """
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # A style inside would hold for the whole page, whose sheet has its own for pictures.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*; ?|\stransform=\"rotate\(-?0 [^\"]*\"", "", text)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", _head(text)) + text[_end(text) :]
    text = text.replace("xlink:href", "href")
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    text = _own_names(text, prefix)
    shown = label.translate({ord(c): f"&#{ord(c)};" for c in "&<>\"'"})
    return re.sub(r"\s*\n\s*", "\n", text.replace("<svg", f'<svg role="img" aria-label="{shown}"', 1)).strip()


def _end(text: str) -> int:
    """Where the opening tag ends."""
    return text.index(">") + 1


def _head(text: str) -> str:
    return text[: _end(text)]


def _own_names(text: str, prefix: str) -> str:
    """Keep the names that something refers to, with a prefix, and drop all others."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))

    def renamed(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r'\sid="([^"]*)"', renamed, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
