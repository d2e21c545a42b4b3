"""A run under a diffusion prior: the full bound and the nested one, side by side and never mixed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pvae.evaluation import LikelihoodEstimate, NestedEstimate, log_likelihood, nested_likelihood
from pvae.experiments.cli import app
from pvae.experiments.compare import HEADER, compare, to_markdown
from pvae.experiments.jobs import Trained, compare_bounds, evaluate, train
from pvae.experiments.runs import RunFolder, open_run
from pvae.experiments.spec import load_spec
from pvae.files import unsealed

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "pseudoinput.size=2",
    "prior.hidden=8",
    "prior.blocks=1",
    "prior.num_steps=7",
    "decoder.scales=[[4, 1], [2, 1]]",
    "decoder.channels=4",
    "fit.epochs=1",
    "evaluate.num_particles=30",
    "evaluate.limit=20",
]
PLAIN = [*SMALL[4:], "prior=none", "pseudoinput=none"]


def small(out: Path, *changes: str, base: list[str] = SMALL) -> Trained:
    return train(load_spec("dvp-tiny", [*base, *changes]), out, progress=False)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds under a diffusion prior, and a plain ladder; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    small(folder / "dvp-0")
    small(folder / "dvp-1", "fit.seed=1")
    small(folder / "plain-0", base=PLAIN)
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(runs / "dvp-0", tmp_path / "dvp-0"))


def test_both_are_kept_with_what_they_depend_on(runs: Path) -> None:
    full, nested = RunFolder(runs / "dvp-0").read_evaluations()
    assert (full["num_steps"], full["calibrated"], full["num_particles"]) == (7, True, 30)
    assert "bound" not in full["settings"]
    assert (nested["bound"], nested["num_particles"], nested["num_draws"]) == ("nested", 30, 4)
    assert nested["settings"] == full["settings"] | {"bound": "nested", "num_draws": 4, "num_times": 32}
    assert list(nested["kl"]) == ["u", "z_2", "z_1"]
    opened = open_run(runs / "dvp-0")
    x = opened.data.test[torch.tensor([i * 299 // 19 for i in range(20)])]
    again = log_likelihood(*opened.program, x, num_particles=30)
    assert full["log_likelihood"] == pytest.approx(again.mean, abs=1e-4)
    inner = nested_likelihood(*opened.program, x, num_particles=30)
    assert nested["log_likelihood"] == pytest.approx(inner.mean, abs=1e-4)
    for record in (full, nested):
        assert record["protocol"]["name"] == "digits"
        assert record["seconds"] > 0


def test_a_plain_ladder_has_one_estimate_without_any_word_of_steps(runs: Path) -> None:
    (record,) = RunFolder(runs / "plain-0").read_evaluations()
    assert not {"num_steps", "calibrated", "bound"} & set(record)
    assert "T =" not in record["text"]


def test_the_command_prints_both_and_their_gap(copy: Path) -> None:
    full, nested, bounds = command("evaluate", copy).stdout.splitlines()
    assert re.match(
        r"test +log p\(x\) >= .* \(IWAE-30 on 20 data, T = 7 calibrated steps, .*; ELBO -\d+\.\d\d\)", full
    )
    assert re.match(
        r"test +nested bound: log p\(x\) >= .* \(IWAE-30 given u, 4 draws of u, continuous time, on 20 data, "
        r".*; ELBO -\d+\.\d\d, rate of u \d+\.\d\d\)",
        nested,
    )
    assert bounds.startswith("bounds    the full bound (7 steps) is ")
    printed = json.loads(command("evaluate", copy, "--json").stdout)
    assert [estimate.get("bound") for estimate in printed["estimates"]] == [None, "nested"]
    assert printed["bounds"] == bounds.removeprefix("bounds").strip()
    assert "better" not in printed
    assert "per_datum" not in printed["estimates"][1]
    # Neither adds a record: both had the same settings.
    assert len(RunFolder(copy).read_evaluations()) == 2
    command("evaluate", copy, "--num-particles", 31)
    assert len(RunFolder(copy).read_evaluations()) == 4


def test_train_says_the_same(tmp_path: Path) -> None:
    arguments = ["train", "dvp-tiny", *SMALL, "--out", tmp_path / "run"]
    lines = command(*arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["test", "test", "bounds"]
    printed = json.loads(command(*arguments, "--json", "--force").stdout)["evaluation"]
    assert printed["bounds"] == lines[-1].removeprefix("bounds").strip()


def test_no_other_proposal_is_offered(copy: Path) -> None:
    refused = command("evaluate", copy, "--proposal", "laplace")
    assert refused.exit_code == 2
    assert "[evaluate] proposal = 'laplace': " in refused.stderr
    assert len(evaluate(open_run(copy), load_spec(copy).evaluate, batch_size=64, progress=False)) == 2


def full_estimate(mean: float, calibrated: bool = True) -> LikelihoodEstimate:
    column, error = torch.full((4,), mean).double(), torch.full((4,), 0.2).double()
    return LikelihoodEstimate(
        column, column, column, column, error, 30, 0, num_steps=25, calibrated=calibrated
    )


def nested_estimate(mean: float) -> NestedEstimate:
    column, error = torch.full((4,), mean).double(), torch.full((4,), 0.2).double()
    return NestedEstimate(column, column, {"u": column}, error, ("u",), 30, 4, 8, 0)


@pytest.mark.parametrize(
    ("full", "calibrated", "said"),
    [
        (-1.0, True, "is 2.00 nats above the nested one, Monte-Carlo error 0.14"),
        (-3.2, True, "is 0.20 nats below the nested one, Monte-Carlo error 0.14"),
        (-4.0, True, "is 1.00 nats below the nested one: more steps or particles would raise it"),
        (
            -4.0,
            False,
            "is 1.00 nats below the nested one: more steps, calibration or particles would raise it",
        ),
    ],
)
def test_what_the_gap_says(full: float, calibrated: bool, said: str) -> None:
    found = compare_bounds(full_estimate(full, calibrated), nested_estimate(-3.0))
    assert found == f"the full bound (25 steps) {said}"


def test_a_chain_that_was_not_calibrated_says_so() -> None:
    assert "on 4 data, T = 25 uncalibrated steps, Monte-Carlo" in str(full_estimate(-1.0, False))
    record = full_estimate(-1.0, False).to_dict()
    assert (record["num_steps"], record["calibrated"]) == (25, False)


# The table of runs --------------------------------------------------------------------------------------


def test_nested_bounds_are_rows_of_their_own(runs: Path) -> None:
    (rows,) = compare([runs / name for name in ("dvp-0", "dvp-1", "plain-0")]).values()
    found = {(row.name, row.bound): row for row in rows}
    assert set(found) == {("dvp", "full"), ("dvp", "nested, 4 of u"), ("plain", "full")}
    records = [RunFolder(runs / name).read_evaluations() for name in ("dvp-0", "dvp-1")]
    for i, bound in enumerate(("full", "nested, 4 of u")):
        row = found["dvp", bound]
        assert row.seeds == (0, 1)
        assert row.log_likelihoods == tuple(pair[i]["log_likelihood"] for pair in records)
        assert row.elbos == tuple(pair[i]["elbo"] for pair in records)
    header, _, *lines = (line.strip("| ").split(" | ") for line in to_markdown(rows).splitlines())
    assert header == [*HEADER, "bound", "T"]
    assert sorted(line[-2:] for line in lines) == [
        ["full", "-"],
        ["full", "7 calibrated"],
        ["nested, 4 of u", "continuous"],
    ]
    (k_hat,) = (line[HEADER.index("k-hat high")] for line in lines if line[-1] == "continuous")
    assert k_hat == "-"


def test_another_number_of_steps_is_another_row(runs: Path, copy: Path) -> None:
    records = [unsealed(record) for record in json.loads((copy / "evaluation.json").read_text())]
    records[0]["calibrated"] = False
    (copy / "evaluation.json").write_text(json.dumps(records))
    (rows,) = compare([copy, runs / "dvp-1"]).values()
    assert sorted(row.steps for row in rows) == ["7 calibrated", "7 uncalibrated", "continuous"]


def test_json_leaves_out_what_there_is_not(runs: Path) -> None:
    printed = json.loads(command("compare", runs / "dvp-0", runs / "plain-0", "--json").stdout)
    (rows,) = printed.values()
    by_kind = {(row["name"], "num_draws" in row): row for row in rows}
    assert not {"num_steps", "calibrated", "num_draws"} & set(by_kind["plain", False])
    assert by_kind["dvp", False]["num_steps"] == 7
    assert by_kind["dvp", True]["num_draws"] == 4
    assert "khat_shares" not in by_kind["dvp", True]
    table = to_markdown(next(iter(compare([runs / "plain-0"]).values())))
    assert table.splitlines()[0] == f"| {' | '.join(HEADER)} |"
