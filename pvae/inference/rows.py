"""Rows of ``metrics.jsonl``, read back: a name for each number, whoever wrote the file."""

import json

__all__ = ["parse_row"]

_LONGEST = 2**16


def parse_row(line: bytes | str) -> dict[str, float]:
    """Read one line.

    Args:
        line: JSON, an object of numbers (``null`` is one that is missing).

    Raises:
        ValueError: If it is anything else.
    """
    if len(line) > _LONGEST:
        raise ValueError(f"a row must have at most {_LONGEST} characters, got {len(line)}")
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("a row must hold numbers, got lists within lists") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    for name, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name[:80]!r} of a row must be a number, got {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name[:80]!r} of a row must be a number of 64 bits")
    return row
