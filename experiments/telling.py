"""What the command says while a run is judged, and at the end."""

from collections.abc import Callable, Mapping
from typing import Any

from .evidence import BUDGETS, Judgement, Part
from .runs import RunFolder

__all__ = ["Teller", "to_json"]


class Teller:
    """Tells a reader of every part as soon as it is finished.

    Args:
        folder: The run.
        say: Prints a line; takes ``err=True`` for standard error.
        progress: Whether to name a part when it is begun.
    """

    def __init__(self, folder: RunFolder, say: Callable[..., None], progress: bool) -> None:
        self._folder, self._say, self._progress = folder, say, progress

    def begun(self, part: Part, number: int, total: int) -> None:
        """Name a part that is begun."""
        if self._progress:
            self._say(f"part {number} of {total}: {part.about}", err=True)

    def ended(self, part: Part, record: Mapping[str, Any], before: bool) -> None:
        """Print what a part found."""
        if "left_out" in record:
            self._say(f"{part.heading}\n\nleft out: {record['left_out']}\n")
            return
        if part.name == "latents":
            self._say(record["text"] + "\n")
            for path in record["result"]["pictures"]:
                self._say(f"figure    {self._folder.path / path}")
            self._say(f"record    {self._folder.diagnosis}\n")
            return
        kept = ", found before" if before else ""
        sizes = ", ".join(f"{count} {name}" for name, count in record["sizes"].items() if count)
        took = f"{record['seconds']:.1f} s{kept}"
        self._say(f"{part.heading}  ({', '.join(filter(None, (sizes, took)))})\n\n{record['text']}\n")

    def summary(self, found: Judgement, budget: str) -> None:
        """Print the certificate, what the budget left no time for, and the way to the page."""
        minutes = BUDGETS[budget].minutes
        self._say(
            f"budget    {budget}, about {minutes} {'minute' if minutes == 1 else 'minutes'} on two cores; "
            f"took {found.seconds / 60:.1f}" + ("" if found.share == 1 else f"; sizes cut to {found.share:g}")
        )
        for name, why in found.unfinished.items():
            self._say(f"left      {name}: {why}")
        self._say(f"page      pvae report {self._folder.path}")
        if found.certificate is not None:
            self._say(f"certified {found.certificate}")


def to_json(folder: RunFolder, found: Judgement) -> dict[str, Any]:
    """Return one object for machines, with the tables of the latents at its top, where they always were.

    Args:
        folder: The run.
        found: What was found.
    """
    table = found.to_dict()
    latents = found.records.get("latents", {}).get("result")
    if latents is None:
        return table
    table["evidence"].pop("latents")
    figures = [str(folder.path / path) for path in latents["pictures"]]
    return {"figures": figures, **latents["diagnosis"], **table}
