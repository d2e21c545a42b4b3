"""A run of the benchmarks beside a stored one: which ratios got worse, and by how much."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..program import SpecError
from .timing import Row

__all__ = ["LEAST", "Comparison", "Stored", "compare", "read_stored"]

LEAST = 0.1
"""Share by which a ratio must have grown to count as slower."""

_KEY = ("benchmark", "ours", "yardstick")
_NUMBERS = ("ratio", "low", "high")


@dataclass(frozen=True)
class Stored:
    """A run as ``--out`` writes it.

    Attributes:
        machine: What it was measured on.
        rows: Its rows.
    """

    machine: Row
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """What became of the ratios since a stored run.

    Attributes:
        slower: A sentence for each row that got slower.
        compared: Number of rows that were compared.
        remarks: Sentences on what is not the same: machine, versions, sizes, rows.
    """

    slower: list[str]
    compared: int
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"slower": self.slower, "compared": self.compared, "remarks": self.remarks}

    def __str__(self) -> str:
        head = f"{len(self.slower)} of {self.compared} rows are slower than in the stored run"
        return "\n".join([head, *(f"slower    {line}" for line in self.slower), *self.remarks])


def read_stored(path: Path) -> Stored:
    """Read a run that ``--out`` wrote.

    Raises:
        SpecError: If it cannot be read, or is something else.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        stored = Stored(dict(read["machine"]), [dict(row) for row in read["rows"]])
        for row in stored.rows:
            if not all(isinstance(row[name], str) for name in _KEY):
                raise TypeError
            numbers = [row[name] for name in _NUMBERS]
            if row["ratio"] is not None and not all(_finite(number) for number in numbers):
                raise TypeError
    except OSError as error:
        raise SpecError(f"cannot read the stored run {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise SpecError(f"--compare must be a file that pvae bench --out wrote, got {path}") from None
    return stored


def compare(stored: Stored, rows: list[Row], machine: Row) -> Comparison:
    """Compare the ratios of a run with those of a stored one, never their times.

    A row is slower if its ratio grew by more than :data:`LEAST`, and by more than the spread of both: the
    root of the sum of the squared distances between quartiles. Rows of one round have no spread.

    Args:
        stored: The earlier run.
        rows: Rows of this one.
        machine: What this one was measured on.
    """
    before = {_key(row): row for row in stored.rows if row["ratio"] is not None}
    slower, resized, compared = [], [], 0
    now = [row for row in rows if row["ratio"] is not None]
    for row in now:
        old = before.get(_key(row))
        if old is None:
            continue
        if old.get("size") != row.get("size"):
            resized.append(_name(row))
            continue
        compared += 1
        was, is_ = _ratio(old), _ratio(row)
        spread = math.hypot(_spread(old), _spread(row))
        if is_ > (1 + LEAST) * was and is_ - was > spread:
            slower.append(
                f"{_name(row)}: ratio {is_:.2f}, was {was:.2f}: {is_ / was - 1:+.0%}, spread {spread:.2f}"
            )
    found = {_key(row) for row in now}
    return Comparison(
        slower,
        compared,
        [
            *_differences(stored.machine, machine),
            *([f"not compared, as they are of other sizes: {'; '.join(resized)}"] if resized else []),
            *_missing(len(found - before.keys()), "are new"),
            *_missing(len(before.keys() - found), "only the stored run has"),
        ],
    )


def _differences(before: Row, now: Row) -> list[str]:
    """One sentence on machine and versions, if they differ."""
    changed = [f"{key} {now[key]} (was {before.get(key)})" for key in now if now[key] != before.get(key)]
    if not changed:
        return []
    return [f"not the same: {', '.join(changed)}; ratios are compared, never times"]


def _missing(number: int, what: str) -> list[str]:
    return [f"rows that {what}: {number}"] if number else []


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in _KEY)


def _name(row: Row) -> str:
    return f"{row['benchmark']} ({row['ours']} / {row['yardstick']})"


def _ratio(row: Row) -> float:
    return float(row["ratio"])  # type: ignore[arg-type]


def _spread(row: Row) -> float:
    return float(row["high"]) - float(row["low"])  # type: ignore[arg-type]


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)
