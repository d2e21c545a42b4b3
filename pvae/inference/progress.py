"""Progress on a terminal: one rich bar, silent where nobody watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Reporter", "reporting"]


class Reporter(Protocol):
    """What a long computation tells about itself."""

    def __call__(self, done: int, message: str = "") -> None: ...


@contextmanager
def reporting(label: str, total: int, show: bool | None = None) -> Iterator[Reporter]:
    """Show a bar over ``total`` units of work while the block runs.

    Args:
        label: Text before the bar.
        total: Units of work in all.
        show: Whether to show it; by default only if standard error is a terminal.

    Yields:
        A function of the units done so far and a message after the bar.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield lambda done, message="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, message="")

        def report(done: int, message: str = "") -> None:
            progress.update(task, completed=done, message=message)

        yield report
