"""The table of runs: what shares a row, what shares a table, and the numbers in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pvae.experiments.cli import app
from pvae.experiments.compare import compare, to_markdown
from pvae.experiments.jobs import train
from pvae.experiments.runs import RunError
from pvae.experiments.spec import load_spec

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "fit.epochs=1",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "evaluate.num_particles=30",
    "evaluate.limit=20",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one experiment, one of another, and one on other data."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {
        "a-0": ["fit.seed=0"],
        "a-1": ["fit.seed=1"],
        "b-0": ["z_dim=2"],
        "c-0": ["data.binarize='threshold'"],
    }.items():
        train(load_spec("vae", [*SMALL, *changes]), folder / name, progress=False)
    return folder


def values(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "evaluation.json").read_text())[-1]
    return record


def test_seeds_share_a_row_and_protocols_a_table(runs: Path) -> None:
    tables = compare([runs / name for name in ("a-0", "a-1", "b-0", "c-0")])
    assert len(tables) == 2
    by_size = sorted(tables.values(), key=len)
    assert [row.name for row in by_size[0]] == ["c"]
    rows = {row.name: row for row in by_size[1]}
    assert set(rows) == {"a", "b"}
    assert rows["a"].seeds == (0, 1)
    assert rows["a"].epochs == 1
    a0, a1 = values(runs / "a-0"), values(runs / "a-1")
    assert rows["a"].log_likelihoods == (a0["log_likelihood"], a1["log_likelihood"])
    best = max(by_size[1], key=lambda row: sum(row.log_likelihoods) / len(row.seeds))
    assert by_size[1][0] is best


def test_densities_given_y_have_a_table_of_their_own(runs: Path, tmp_path: Path) -> None:
    changes = ["model=conditional", "encoder.label_dim=4", "decoder.label_dim=4", "posterior=normal"]
    trained = train(load_spec("vae", [*SMALL, *changes]), tmp_path / "given-0", progress=False)
    assert str(trained.estimates[0]).startswith("log p(x | y) >= ")
    tables = compare([runs / "a-0", tmp_path / "given-0"])
    plain, given = sorted(tables, key=len)
    assert given == f"{plain}, given y"
    assert str(values(runs / "a-0")["text"]).startswith("log p(x) >= ")


def test_the_table_prints_mean_and_spread(runs: Path) -> None:
    (rows,) = compare([runs / "a-0", runs / "a-1"]).values()
    a, b = (values(runs / name)["log_likelihood"] for name in ("a-0", "a-1"))
    table = to_markdown(rows)
    assert f"| {(a + b) / 2:.2f} | ± {abs(a - b) / 2**0.5:.2f} |" in table
    assert len(table.splitlines()) == 3
    (single,) = compare([runs / "b-0"]).values()
    assert "one seed" in to_markdown(single)


def test_the_command_prints_the_same_table(runs: Path) -> None:
    arguments = ["compare", str(runs / "a-0"), str(runs / "a-1")]
    (protocol, rows), *_ = compare(arguments[1:]).items()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.strip() == f"{protocol}\n\n{to_markdown(rows)}"
    as_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert as_json[protocol][0]["seeds"] == [0, 1]
    assert CliRunner().invoke(app, ["compare", str(runs)]).exit_code == 2


def test_checkpoints_are_not_needed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a-0", tmp_path / "a-0", ignore=shutil.ignore_patterns("checkpoints", "figures"))
    assert compare([tmp_path / "a-0"])


def test_what_is_no_evaluated_run_is_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        compare([tmp_path])
    shutil.copytree(runs / "a-0", tmp_path / "a-0")
    (tmp_path / "a-0" / "evaluation.json").unlink()
    with pytest.raises(RunError, match="was never evaluated: pvae evaluate"):
        compare([tmp_path / "a-0"])
