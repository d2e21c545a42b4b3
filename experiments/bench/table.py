"""Measured rows as a table."""

from collections.abc import Iterable, Sequence

from .timing import Row

__all__ = ["format_table"]

_HEAD = (
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
_RECIPES_HEAD = (
    "recipe",
    "step ms",
    "floor ms",
    "ratio",
    "quartiles",
    "size",
    "syncs",
    "evaluation ms",
    "floor ms",
    "ratio",
    "quartiles",
    "size",
    "note",
)
_RECIPE = "recipe:"


def format_table(rows: list[Row]) -> str:
    """Lay rows out as Markdown tables that can be read as plain text, too.

    Recipes have a table of their own, with the step under an engine and the evaluation side by side. Notes
    have a column if there are any.
    """
    recipes = [row for row in rows if str(row["benchmark"]).startswith(_RECIPE)]
    others = [row for row in rows if row not in recipes]
    tables = []
    if others:
        noted = any(row.get("note") for row in others)
        notes = [[str(row.get("note", ""))] if noted else [] for row in others]
        head = [*_HEAD, *(["note"] if noted else [])]
        tables.append(_table(head, [[*_cells(row), *note] for row, note in zip(others, notes, strict=True)]))
    if recipes:
        tables.append(_table(_RECIPES_HEAD, _recipe_lines(recipes)))
    return "\n\n".join(tables)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [head, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def _recipe_lines(rows: list[Row]) -> list[list[str]]:
    """One line for each recipe and engine; the evaluation, which knows no engine, stands in the first."""
    evaluations = {row["benchmark"]: row for row in rows if row["ours"] == "log_likelihood"}
    lines = []
    for row in rows:
        if row["ours"] == "log_likelihood":
            continue
        evaluation = evaluations.pop(row["benchmark"], None)
        name, engine = str(row["benchmark"]).removeprefix(_RECIPE), str(row["ours"]).partition(",")[0]
        found = [] if evaluation is None else [("evaluation ", evaluation)]
        notes = [f"{what}{r['note']}" for what, r in (("", row), *found) if r.get("note")]
        lines.append(
            [
                name if engine == "eager" else f"{name}, {engine}",
                *_measured(row),
                str(row.get("size", "")).removeprefix("batch "),
                _text(row["syncs"]),
                *(_measured(evaluation) if evaluation else ("", "", "", "")),
                str(evaluation.get("size", "")) if evaluation else "",
                "; ".join(notes),
            ]
        )
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    target = "" if row["target"] is None else f"{row['target']:.2f} {'met' if _met(row) else 'missed'}"
    names = tuple(str(row[name]) for name in ("benchmark", "ours", "yardstick"))
    return (*names, *_measured(row), target, _text(row["syncs"]))


def _measured(row: Row) -> tuple[str, str, str, str]:
    """Milliseconds, ratio and quartiles; nothing where nothing was timed."""
    if row["ratio"] is None:
        return ("", "", "", "")
    return (
        f"{row['ours_ms']:.2f}",
        f"{row['yardstick_ms']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _met(row: Row) -> bool:
    ratio, target = row["ratio"], row["target"]
    assert isinstance(ratio, float)
    assert isinstance(target, float)
    return ratio <= target
