"""The report of a study: Markdown and figures, made from ``cells.jsonl`` alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pvae.files import write_atomically

from ..runs import RunError
from .ledger import Ledger, Record
from .study import AnyStudy
from .tables import by_protocol, interval

__all__ = ["report"]


def report(study: AnyStudy, out: Path) -> list[Path]:
    """Write the tables and figures of the cells that are finished.

    Args:
        study: The study.
        out: Its folder.

    Returns:
        The files: ``tables.md`` and the figures.

    Raises:
        RunError: If there is no finished cell, a damaged line, or a cell of another study.
    """
    ledger = Ledger(out)
    records = ledger.read()
    if not records:
        raise RunError(f"there is no finished cell in {out}")
    strangers = {record.study for record in records} - {study.name}
    if strangers:
        raise RunError(
            f"{ledger.path} holds cells of {', '.join(sorted(strangers))}, not of {study.name} alone"
        )
    # In the study's own order, whatever the order in which they were finished.
    order = {cell.name: i for scale in study.scales.values() for i, cell in enumerate(study.cells(scale))}
    records.sort(key=lambda record: (order.get(record.cell, len(order)), record.cell))
    sentences = (("num_particles", _LIKELIHOODS), ("num_images", _FRECHET))
    used = (text for size, text in sentences if any(record.settings.get(size) for record in records))
    reading = _READING + "".join(used)
    lines, figures = [f"# {study.name}", "", f"{study.about}. {reading}"], []
    for same, group in by_protocol(records).items():
        lines += ["", f"## {same}"]
        for table in study.tables(group):
            lines += ["", table]
        stem = out / "figures" / f"{same.name}-{same.protocol}"
        for path in study.figures(group, stem, same.name):
            lines += ["", f"![{path.stem}]({path.relative_to(out).as_posix()})"]
            figures.append(path)
        lines += ["", *_footer(group)]
    path = out / "tables.md"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return [path, *figures]


_READING = "Mean over seeds ± half of its 95 % interval (Student's t); a single seed has no interval."
_LIKELIHOODS = (
    " Log-likelihoods and rates are in nats per datum. Where many k-hats are high, more particles would "
    "raise IWAE."
)
_FRECHET = " Fréchet distances are in the features of a classifier trained here, which are no FID."


def _footer(records: Sequence[Record]) -> list[str]:
    """Say what the numbers were measured with, and which cells have none."""
    seconds = interval(record.seconds for record in records)
    machines = _distinct(
        f"{r.environment['device']['name']} with {r.environment['threads']} thread(s)" for r in records
    )
    versions = _distinct(
        ", ".join(f"{name} {version}" for name, version in r.environment["versions"].items()) for r in records
    )
    commits = _distinct(_commit(record) for record in records)
    lines = [
        f"{len(records)} cells of {seconds.mean:.0f} s on {machines}; {versions}; commit {commits}; "
        f"scale {_distinct(record.scale for record in records)}."
    ]
    failed = [record for record in records if record.failure is not None]
    return lines + [f"\n{record.cell} diverged: {record.failure}." for record in failed]


def _commit(record: Record) -> str:
    git = record.environment["git"]
    if git is None:
        return "unknown"
    return git["commit"][:12] + (" with changes" if git["changed"] else "")


def _distinct(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))
