"""Two runs are compared by their ratios: slower means beyond ten per cent and beyond the noise of both."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pvae.experiments import bench
from pvae.experiments.bench import compare, read_stored
from pvae.experiments.bench.compare import Stored
from pvae.experiments.bench.timing import Row, left_out
from pvae.experiments.cli import app
from pvae.experiments.program import SpecError

MACHINE: Row = {"device": "a CPU", "threads": 1, "torch": "2.13.0", "pvae": "0.1.0"}


def row(ratio: float, half: float = 0.01, name: str = "small", **more: object) -> Row:
    """A row with quartiles ``half`` on either side."""
    return {
        "benchmark": name,
        "ours": "eager",
        "yardstick": "loop",
        "ratio": ratio,
        "low": ratio - half,
        "high": ratio + half,
        "ours_ms": 10 * ratio,
        "yardstick_ms": 10.0,
        **more,
    }


@pytest.mark.parametrize(
    ("was", "now", "half", "slower"),
    [
        (1.0, 1.2, 0.01, True),
        (1.0, 1.09, 0.01, False),  # within ten per cent
        (2.0, 2.19, 0.01, False),
        (2.0, 2.21, 0.01, True),
        (1.0, 1.2, 0.08, False),  # within the spread of both: sqrt(2) * 0.16 = 0.226
        (1.0, 1.2, 0.07, True),  # 0.198
        (1.0, 0.5, 0.01, False),
    ],
)
def test_slower_is_beyond_a_tenth_and_beyond_both_spreads(
    was: float, now: float, half: float, slower: bool
) -> None:
    found = compare(Stored(MACHINE, [row(was, half)]), [row(now, half)], MACHINE)
    assert bool(found.slower) == slower
    assert (found.compared, found.remarks) == (1, [])


def test_times_are_not_compared() -> None:
    slow = row(1.0) | {"ours_ms": 1e6, "yardstick_ms": 1e6}
    assert compare(Stored(MACHINE, [row(1.0)]), [slow], MACHINE).slower == []


def test_what_is_not_the_same_is_said() -> None:
    before = [
        row(1.0),
        row(1.0, name="recipe:a", size="batch 4"),
        row(1.0, name="gone"),
        left_out("recipe:b", "eager, step", "networks", "no data"),
    ]
    now = [
        row(1.5),
        row(9.0, name="recipe:a", size="batch 8"),
        row(1.0, name="new"),
        left_out("peers", "eager, step", "pythae", "not installed"),
    ]
    found = compare(Stored(MACHINE, before), now, MACHINE | {"device": "a GPU", "torch": "3.0"})
    assert found.slower == ["small (eager / loop): ratio 1.50, was 1.00: +50%, spread 0.03"]
    assert found.remarks == [
        "not the same: device a GPU (was a CPU), torch 3.0 (was 2.13.0); ratios are compared, never times",
        "not compared, as they are of other sizes: recipe:a (eager / loop)",
        "rows that are new: 1",
        "rows that only the stored run has: 1",
    ]
    assert str(found).splitlines() == [
        "1 of 1 rows are slower than in the stored run",
        f"slower    {found.slower[0]}",
        *found.remarks,
    ]


def _bench(monkeypatch: pytest.MonkeyPatch, rows: list[Row], *arguments: object) -> Any:
    monkeypatch.setattr(bench, "run_bench", lambda **_: rows)
    monkeypatch.setattr(bench, "format_table", lambda rows: f"{len(rows)} rows")
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A run that was kept."""
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"machine": MACHINE, "rows": [row(1.0)]}))
    return path


def test_the_command_fails_where_something_got_slower(monkeypatch: pytest.MonkeyPatch, stored: Path) -> None:
    result = _bench(monkeypatch, [row(2.0)], "--compare", stored)
    assert result.exit_code == 1
    assert "1 rows\n\n1 of 1 rows are slower than in the stored run\nslower    small" in result.stdout
    result = _bench(monkeypatch, [row(2.0)], "--compare", stored, "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["rows"] == [row(2.0)]
    assert printed["compare"]["compared"] == len(printed["compare"]["slower"]) == 1


def test_the_command_succeeds_where_nothing_did(monkeypatch: pytest.MonkeyPatch, stored: Path) -> None:
    result = _bench(monkeypatch, [row(1.02)], "--compare", stored)
    assert result.exit_code == 0
    assert "0 of 1 rows are slower" in result.stdout
    assert "not the same: device " in result.stdout  # this machine is no "a CPU"


def test_the_runs_that_are_kept_in_the_repository_can_be_compared_with() -> None:
    paths = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
    assert len(paths) > 5
    for path in paths:
        kept = read_stored(path)
        found = compare(kept, kept.rows, kept.machine)
        assert found.slower == found.remarks == []
        assert found.compared == len([r for r in kept.rows if r["ratio"] is not None]) > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"machine": {}, "rows": 3}',
        '{"machine": {}, "rows": [{"benchmark": "small"}]}',
        '{"machine": 1, "rows": []}',
        json.dumps({"machine": {}, "rows": [row(1.0) | {"low": "1"}]}),
        json.dumps({"machine": {}, "rows": [row(1.0) | {"ratio": float("nan")}]}),
        json.dumps({"machine": {}, "rows": [row(1.0) | {"ours": ["eager"]}]}),
    ],
)
def test_another_file_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(SpecError, match="--compare must be a file that pvae bench --out wrote"):
        read_stored(path)
    result = CliRunner().invoke(app, ["bench", "--compare", str(path)])
    assert result.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the stored run .*none\.json: No such file"):
        read_stored(tmp_path / "none.json")
