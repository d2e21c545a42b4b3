"""What a study has measured: ``cells.jsonl``, one line for each finished cell, and nothing lost by a kill."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pvae.files import sealed, unsealed, write_atomically

from ..runs import RunError
from .study import Cell, Metrics

__all__ = ["Ledger", "Record"]


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
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                records.append(Record(**unsealed(json.loads(line))))
            except (ValueError, TypeError):
                raise RunError(
                    f"line {number} of {self.path} is damaged: delete it to measure its cell again"
                ) from None
        return records

    def append(self, record: Record) -> None:
        """Add a record; a reader, or a kill at any moment, finds the file with it or without it.

        One process writes at a time, see :func:`pvae.files.locked`; the whole file, which is small, is
        replaced.
        """
        before = self.path.read_bytes() if self.path.is_file() else b""
        line = json.dumps(sealed(asdict(record)), ensure_ascii=False, allow_nan=False)
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
