"""What a page is made of: paragraphs, tables, lists, notes and pictures, as the template takes them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..evidence_figures import Drawing, Raster
from .svg import to_svg

__all__ = ["Block", "Figure", "figure", "figures", "from_markdown", "image", "note", "paragraph", "table"]


class Figure(NamedTuple):
    """A picture on a page.

    Attributes:
        alt: What it shows, for those who cannot see it.
        caption: What stands below it.
        svg: Its element; empty for a picture made of pixels.
        png: Base 64 of the file; empty for a drawing.
        kind: How it is shown: ``"drawing"``, ``"pixels"`` (squares, however large), ``"image"`` or ``"card"``
            (made for a white page).
    """

    alt: str
    caption: str
    svg: str = ""
    png: str = ""
    kind: str = "drawing"


@dataclass(frozen=True)
class Block:
    """One element of a page.

    Attributes:
        kind: ``"paragraph"``, ``"strong"``, ``"note"``, ``"heading"``, ``"command"``, ``"code"`` (folded),
            ``"table"``, ``"list"``, ``"terms"`` or ``"figures"``.
        text: Its text; the caption of a table, the summary of folded code.
        rows: Cells of a table, items of a list (one cell each), or pairs of a term and what it is.
        head: Cells of the head of a table.
        figures: Pictures.
    """

    kind: str
    text: str = ""
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    head: Sequence[str] = field(default_factory=tuple)
    figures: Sequence[Figure] = field(default_factory=tuple)


def paragraph(text: str) -> Block:
    """Make a paragraph."""
    return Block("paragraph", text)


def note(text: str) -> Block:
    """Make a remark."""
    return Block("note", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Block:
    """Make a table, whose first column names its rows."""
    return Block("table", caption, tuple(map(tuple, rows)), tuple(head))


def figure(drawing: Drawing | Raster, prefix: str) -> Figure:
    """Draw a picture for a page.

    Args:
        drawing: The picture.
        prefix: Begins every name inside of it, unique in the page.
    """
    if isinstance(drawing, Raster):
        kind = "pixels" if drawing.pixels else "image"
        return Figure(drawing.alt, drawing.caption, png=drawing.png, kind=kind)
    return Figure(drawing.alt, drawing.caption, svg=to_svg(drawing.draw(), prefix, drawing.alt))


def figures(drawings: Sequence[Drawing | Raster], prefix: str) -> list[Block]:
    """Draw pictures that stand together; none where there are none."""
    if not drawings:
        return []
    drawn = [figure(drawing, f"{prefix}-{i}") for i, drawing in enumerate(drawings)]
    return [Block("figures", figures=drawn)]


def image(alt: str, caption: str, png: str) -> Block:
    """Make a block of a picture that was made for a white page."""
    return Block("figures", figures=[Figure(alt, caption, png=png, kind="card")])


def from_markdown(text: str) -> list[Block]:
    """Read the Markdown that reports write: tables of pipes, items behind dashes, and lines of text."""
    found: list[Block] = []
    lines, i = text.splitlines(), 0
    while i < len(lines):
        line = lines[i].strip()
        if line.startswith("|"):
            end = i
            while end < len(lines) and lines[end].strip().startswith("|"):
                end += 1
            head, *rows = (_cells(each) for each in lines[i:end] if not re.fullmatch(r"[|:\-\s]+", each))
            found.append(table(head, rows))
            i = end
            continue
        if line.startswith("- "):
            end = i
            while end < len(lines) and lines[end].strip().startswith("- "):
                end += 1
            found.append(Block("list", rows=[[each.strip()[2:]] for each in lines[i:end]]))
            i = end
            continue
        if line:
            found.append(paragraph(line))
        i += 1
    return found


def _cells(line: str) -> list[str]:
    """Take a row apart; a pipe inside parentheses, such as that of p(x | z), ends no cell."""
    cells, depth, cell = [], 0, ""
    for letter in line.strip().strip("|"):
        depth += (letter in "([") - (letter in ")]")
        if letter == "|" and depth <= 0:
            cells.append(cell.strip())
            cell, depth = "", 0
        else:
            cell += letter
    return [*cells, cell.strip()]
