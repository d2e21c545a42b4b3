"""The page itself: runs side by side, section by section, through one template."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pvae.files import write_atomically

from ..compare import compare, to_markdown
from ..evidence import certificate
from ..program import SpecError
from ..runs import RunError, RunFolder
from .blocks import Block, from_markdown
from .sections import SECTIONS, Section
from .view import RunView, view

__all__ = ["render", "write_report"]

# What comes of a record that is not as it was written: a key is missing, a text stands for a number.
_OTHERWISE = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
_NEEDED = ("seconds", "steps", "device", "threads", "data")


class _Cell(NamedTuple):
    """What a section shows of one run."""

    run: RunView
    blocks: list[Block]


class _Row(NamedTuple):
    """A section with all its runs."""

    section: Section
    cells: list[_Cell]


def write_report(runs: Sequence[str | Path], out: Path | None = None, *, root: Path | None = None) -> Path:
    """Write one HTML page that shows runs side by side, complete in itself.

    Nothing is computed: what a diagnosis left in the folders is shown, with the command that adds what is
    missing.

    Args:
        runs: Run folders, at least one.
        out: The file; by default ``report.html`` in the folder of the run, or in the working folder for
            several.
        root: Folder of the data files, for the sizes of the parts.

    Returns:
        The file.

    Raises:
        RunError: If a folder is no run, or the file cannot be written.
        SpecError: If a spec cannot be read.
    """
    text = render(runs, root=root)
    path = out or (RunFolder(Path(runs[0])).report if len(runs) == 1 else Path("report.html"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"cannot write the page to {path}: {error.strerror}") from None
    return path


def render(runs: Sequence[str | Path], *, root: Path | None = None) -> str:
    """Return the page of :func:`write_report` as text.

    Raises:
        RunError: If there is no run, or a folder is none.
        SpecError: If a spec cannot be read.
    """
    if not runs:
        raise RunError("runs must name at least one run folder, got none")
    paths = [Path(run) for run in runs]
    try:
        return _page(paths, root)
    except (RunError, SpecError):
        raise
    # The files of a run may be somebody else's, and hold anything that is JSON.
    except _OTHERWISE as error:
        reason = " ".join(repr(error).split())[:200]
        where = ", ".join(map(str, paths))
        raise RunError(
            f"{where} cannot be shown: a file there does not hold what pvae writes into it ({reason})"
        ) from error


def _page(paths: Sequence[Path], root: Path | None) -> str:
    """Read the runs and fill in the template."""
    views = [
        view(path, name, f"run-{i}", root)
        for i, (path, name) in enumerate(zip(paths, _names(paths), strict=True), 1)
    ]
    rows = []
    for section in SECTIONS:
        cells = [_Cell(run, section.show(run)) for run in views]
        cells = [cell for cell in cells if cell.blocks]
        if cells:
            rows.append(_Row(section, cells))
    page: str = _template().render(
        title=views[0].title if len(views) == 1 else f"{len(views)} runs side by side",
        runs=views,
        certificates={run.prefix: certificate(run.records) for run in views},
        tables=_comparison(views) if len(views) > 1 else [],
        rows=rows,
        several=len(views) > 1,
    )
    return page


def _names(paths: Sequence[Path]) -> list[str]:
    """What runs are called: the name of the folder, or its path where that names several."""
    short = [path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _comparison(views: Sequence[RunView]) -> list[Block]:
    """One table for each protocol of the runs that were trained to an end and evaluated."""
    ready = [run for run in views if run.evaluations and all(key in run.manifest for key in _NEEDED)]
    found = []
    for protocol, rows in (compare([run.folder.path for run in ready]) if ready else {}).items():
        (table,) = from_markdown(to_markdown(rows))
        found.append(Block("table", protocol, table.rows, table.head))
    return found


@cache
def _template() -> Any:
    """The template, which escapes everything that is not a drawing of our own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
