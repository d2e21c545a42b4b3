"""What a study has measured: ``cells.jsonl``, one line for each finished cell, and nothing lost by a kill."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pvae.inference.checkpoint import write_atomically

from ..runs import RunError
from .study import Cell, Metrics

__all__ = ["Ledger", "Record", "locked"]


@dataclass(frozen=True)
class Record:
    """One finished cell.

    Attributes:
        study: Name of the study.
        scale: Name of its size.
        cell: Name of the cell.
        key: Digest of everything that its numbers depend on but code.
        factors: What sets the configuration apart.
        seed: Its seed.
        metrics: What was measured; empty where training diverged.
        failure: Why there are no metrics, or ``None``.
        protocol: Name and hash of the data.
        settings: Sizes of the measurement.
        seconds: Wall time.
        environment: Versions, commit, device, threads.
    """

    study: str
    scale: str
    cell: str
    key: str
    factors: dict[str, str]
    seed: int
    metrics: Metrics
    failure: str | None
    protocol: dict[str, str]
    settings: dict[str, int]
    seconds: float
    environment: dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """The finished cells of a study's folder.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "cells.jsonl"

    def read(self) -> list[Record]:
        """Read all records; none if there is no file yet.

        Raises:
            RunError: If a line is damaged.
        """
        if not self.path.is_file():
            return []
        records = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError):
                raise RunError(
                    f"line {number} of {self.path} is damaged: delete it to measure its cell again"
                ) from None
        return records

    def append(self, record: Record) -> None:
        """Add a record; a reader, or a kill at any moment, finds the file with it or without it.

        One process writes at a time, see :func:`locked`; the whole file is replaced, which is small.
        """
        before = self.path.read_bytes() if self.path.is_file() else b""
        line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
        write_atomically(self.path, before + line.encode() + b"\n")

    def missing(self, cells: Sequence[Cell], settings: dict[str, int]) -> list[Cell]:
        """Return the cells that are not finished yet.

        Raises:
            RunError: If a cell of the same name was finished under other settings or another recipe.
        """
        keys = {record.cell: record.key for record in self.read()}
        left = []
        for cell in cells:
            if cell.name not in keys:
                left.append(cell)
            elif keys[cell.name] != cell.key(settings):
                raise RunError(
                    f"{self.path} holds {cell.name} of another recipe or other sizes: choose another --out"
                )
        return left


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system takes back when the process ends, however it ends.

    Without file locks (on Windows) nothing is locked: then two processes may do the same work twice.

    Args:
        path: Lock file, made if absent.
        wait: Whether to wait for another holder.

    Raises:
        RunError: If another process holds it and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl  # not on every system
    except ImportError:
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(f"another process is at work in {path.parent}") from None
        yield
