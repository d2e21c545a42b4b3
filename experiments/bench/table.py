"""Measured rows as a table."""

from .timing import Row

__all__ = ["format_table"]


def format_table(rows: list[Row]) -> str:
    """Lay rows out as a Markdown table that can be read as plain text, too."""
    head = (
        "benchmark",
        "ours",
        "yardstick",
        "ours ms",
        "yardstick ms",
        "ratio",
        "quartiles",
        "target",
        "syncs",
    )
    table = [head, *(_cells(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    target = "" if row["target"] is None else f"{row['target']:.2f} {'met' if _met(row) else 'missed'}"
    return (
        f"{row['benchmark']}",
        f"{row['ours']}",
        f"{row['yardstick']}",
        f"{row['ours_ms']:.2f}",
        f"{row['yardstick_ms']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        target,
        "" if row["syncs"] is None else f"{row['syncs']}",
    )


def _met(row: Row) -> bool:
    ratio, target = row["ratio"], row["target"]
    assert isinstance(ratio, float)
    assert isinstance(target, float)
    return ratio <= target
