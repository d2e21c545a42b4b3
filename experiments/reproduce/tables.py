"""Tables of a study from its records alone: means over seeds with 95 % intervals, and paired differences."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .ledger import Record

__all__ = [
    "Column",
    "Comparable",
    "OverSeeds",
    "by_protocol",
    "configurations",
    "differences",
    "interval",
    "markdown",
    "paired",
    "table",
    "verdict",
]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: Name of the metric.
        title: Heading, with the unit.
        factor: What the number is multiplied by, 100 for per cent.
    """

    key: str
    title: str
    factor: float = 1.0


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds and half the width of its 95 % interval, NaN where there is none.

    Attributes:
        mean: The mean.
        half: Half the width.
        n: Number of values.
    """

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"  # noqa: RUF001  (a dash for no number)
        if math.isnan(self.half):
            return f"{self.mean:.4g}"
        if self.half == 0:
            return f"{self.mean:.4g} ± 0"
        # Two digits of the half width, and the mean to the same place.
        places = min(max(1 - math.floor(math.log10(self.half)), 0), 6)
        return f"{self.mean:.{places}f} ± {self.half:.{places}f}"


def interval(values: Iterable[float | None], level: float = 0.95) -> OverSeeds:
    """Return the mean of some values and Student's interval of it; values that are missing do not count."""
    from scipy import stats

    known = [value for value in values if value is not None]
    if not known:
        return OverSeeds(math.nan, math.nan, 0)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return OverSeeds(mean, math.nan, 1)
    spread = statistics.stdev(known) / math.sqrt(len(known))
    return OverSeeds(mean, float(stats.t.ppf(0.5 + level / 2, len(known) - 1)) * spread, len(known))


class Comparable(NamedTuple):
    """What records must share to stand in one table.

    Attributes:
        name: Name of the data set.
        protocol: Hash of its protocol.
        sizes: Sizes of the measurement, in words.
    """

    name: str
    protocol: str
    sizes: str

    def __str__(self) -> str:
        return f"{self.name}, protocol {self.protocol} ({self.sizes})"


def by_protocol(records: Iterable[Record]) -> dict[Comparable, list[Record]]:
    """Put records together that may share a table."""
    groups: dict[Comparable, list[Record]] = {}
    for record in records:
        # A study that measures nothing of a kind has zero of it.
        used = {key: value for key, value in record.settings.items() if value}
        sizes = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in used.items())
        same = Comparable(record.protocol["name"], record.protocol["hash"], sizes)
        groups.setdefault(same, []).append(record)
    return groups


def configurations(records: Iterable[Record], factors: Sequence[str]) -> dict[tuple[str, ...], list[Record]]:
    """Group records by the values of some factors, in the order of first appearance; others are left out."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if all(factor in record.factors for factor in factors):
            groups.setdefault(tuple(record.factors[factor] for factor in factors), []).append(record)
    return groups


def differences(
    records: Iterable[Record],
    factor: str,
    baseline: str,
    columns: Sequence[Column],
    within: Sequence[str] = (),
) -> dict[tuple[str, ...], list[OverSeeds]]:
    """Compare the levels of one factor with a baseline, everything else being equal.

    Cells that differ in this factor alone are paired, their differences are averaged for each seed, and the
    interval is over seeds: what seeds and other factors share drops out.

    Args:
        records: Records that may be compared.
        factor: The factor.
        baseline: The level that is subtracted.
        columns: What is compared.
        within: Factors whose levels are reported apart.

    Returns:
        Intervals of each column by ``(*levels of within, level)``.
    """
    cells: dict[tuple[tuple[str, str], ...], dict[str, Record]] = {}
    for record in records:
        if factor in record.factors:
            rest = {key: value for key, value in record.factors.items() if key != factor}
            place = (*rest.items(), ("seed", str(record.seed)))
            cells.setdefault(place, {})[record.factors[factor]] = record
    found: dict[tuple[str, ...], dict[str, list[list[float]]]] = {}
    for place, levels in cells.items():
        at = dict(place)
        for level, record in levels.items():
            if level != baseline and baseline in levels:
                seeds = found.setdefault((*(at[name] for name in within), level), {})
                seeds.setdefault(at["seed"], [[] for _ in columns])
                for values, column in zip(seeds[at["seed"]], columns, strict=True):
                    after, before = record.metrics.get(column.key), levels[baseline].metrics.get(column.key)
                    if after is not None and before is not None:
                        values.append(column.factor * (after - before))
    return {
        row: [
            interval(statistics.fmean(values[i]) for values in seeds.values() if values[i])
            for i in range(len(columns))
        ]
        for row, seeds in found.items()
    }


def table(
    records: Iterable[Record],
    factors: Sequence[str],
    columns: Sequence[Column],
    words: Mapping[str, str] | None = None,
) -> str:
    """Write one row for each configuration: its factors, its number of seeds, and its metrics.

    Args:
        records: Records that may be compared.
        factors: Factors that stand at the front of a row; cells that lack one are left out.
        columns: Metrics.
        words: How a factor's value reads, where it is not printed as it is.

    Returns:
        Markdown. Columns that no record has are left out.
    """
    words = words or {}
    groups = configurations(records, factors)
    cells = [cell for group in groups.values() for cell in group]
    shown = [column for column in columns if any(cell.metrics.get(column.key) is not None for cell in cells)]
    rows = []
    for values, group in groups.items():
        measured = [record for record in group if record.failure is None]
        seeds = str(len(group)) if len(measured) == len(group) else f"{len(measured)} of {len(group)}"
        numbers = [interval(_scaled(record, column) for record in measured) for column in shown]
        rows.append([*(words.get(value, value) for value in values), seeds, *map(str, numbers)])
    return markdown([*factors, "seeds", *(column.title for column in shown)], rows)


def paired(
    records: Iterable[Record],
    factor: str,
    baseline: str,
    columns: Sequence[Column],
    words: Mapping[str, str],
    less: str,
    *,
    within: Sequence[str] = (),
    title: str = "Paired differences",
) -> list[str]:
    """Write the :func:`differences` from a baseline as one table under a title, or nothing if there are none.

    Args:
        records, factor, baseline, columns, within: As for :func:`differences`.
        words: How a level reads, where it is not printed as it is.
        less: Heading of the levels, which says what is subtracted.
        title: Line above the table, without a colon.
    """
    found = differences(records, factor, baseline, columns, within)
    if not found:
        return []
    rows = [[*(words.get(v, v) for v in levels), *map(str, row)] for levels, row in found.items()]
    header = [*within, less, *(column.title for column in columns)]
    return [f"{title}:\n\n{markdown(header, rows)}"]


def verdict(difference: OverSeeds, sign: int = 1) -> str:
    """Write a difference, and whether it is above zero (below, for ``sign`` -1): open if zero is within."""
    if math.isnan(difference.half):
        return str(difference)
    if abs(difference.mean) <= difference.half:
        return f"{difference}: open"
    return f"{difference}: {'yes' if sign * difference.mean > 0 else 'no'}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _scaled(record: Record, column: Column) -> float | None:
    value = record.metrics.get(column.key)
    return None if value is None else column.factor * value
