"""What z is drawn from in an evaluation: one record, one line and one row for each proposal."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pvae
from pvae.evaluation import LikelihoodEstimate
from pvae.experiments import SpecError, load_spec, open_run
from pvae.experiments.cli import app
from pvae.experiments.compare import HEADER, compare, to_markdown
from pvae.experiments.jobs import Trained, better_bound, evaluate, train
from pvae.experiments.runs import RunFolder
from pvae.experiments.spec import Evaluate
from pvae.files import unsealed, unsealed_text
from pvae.guides import laplace_proposal

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
SMALL = [
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "fit.epochs=3",
    "evaluate.num_particles=30",
    "evaluate.limit=20",
]


def small(out: Path, *changes: str, recipe: str = "five-digits") -> Trained:
    return train(load_spec(recipe, [*SMALL, *changes]), out, progress=False)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of FIVE, and one run of every other kind; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    small(folder / "five-0")
    small(folder / "five-1", "fit.seed=1")
    small(folder / "laplace-0", "posterior=laplace")
    small(folder / "normal-0", "posterior=normal")
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A run of FIVE of one's own."""
    return Path(shutil.copytree(runs / "five-0", tmp_path / "five-0"))


def drawn(run: Path) -> list[tuple[str, str | None]]:
    return [(r["settings"]["proposal"], r["proposal"]) for r in RunFolder(run).read_evaluations()]


def test_a_guide_with_two_proposals_is_scored_under_both(runs: Path) -> None:
    assert drawn(runs / "five-0") == [("own", "five"), ("laplace", "laplace")]
    assert drawn(runs / "laplace-0") == [("own", "laplace")]
    assert drawn(runs / "normal-0") == [("own", None)]
    opened = open_run(runs / "five-0")
    where = torch.tensor([i * 299 // 19 for i in range(20)])
    records = RunFolder(runs / "five-0").read_evaluations()
    for record, guide in zip(records, (opened.guide, laplace_proposal(*opened.program)), strict=True):
        again = pvae.log_likelihood(opened.model, guide, opened.data.test[where], num_particles=30)
        assert record["log_likelihood"] == pytest.approx(again.mean, abs=1e-9)
        assert f"proposal {record['proposal']}, " in record["text"]


def test_the_command_prints_both_and_which_is_better(copy: Path) -> None:
    own, laplace, better = command("evaluate", copy).stdout.splitlines()
    assert re.match(r"test +log p\(x\) >= .* on 20 data, proposal five, Monte-Carlo error", own)
    assert re.match(r"test +log p\(x\) >= .* on 20 data, proposal laplace, Monte-Carlo error", laplace)
    means = [float(line.split(">= ")[1].split()[0]) for line in (own, laplace)]
    gap = abs(means[0] - means[1])
    found = re.fullmatch(
        r"better +both are lower bounds on the same log p\(x\): the one under the (.+) proposal is better, "
        r"by (\d+\.\d\d) nats",
        better,
    )
    assert found is not None
    assert found[1] == ("Laplace" if means[1] > means[0] else "guide's own")
    assert float(found[2]) == pytest.approx(gap, abs=0.011)
    printed = json.loads(command("evaluate", copy, "--json").stdout)
    assert [estimate["proposal"] for estimate in printed["estimates"]] == ["five", "laplace"]
    assert printed["better"] == better.removeprefix("better").strip()
    assert "per_datum" not in printed["estimates"][0]


@pytest.mark.parametrize(("asked", "name"), [("own", "five"), ("laplace", "laplace")])
def test_one_of_them_may_be_asked_for(copy: Path, asked: str, name: str) -> None:
    result = command("evaluate", copy, "--proposal", asked, "--limit", 6)
    (line,) = result.stdout.splitlines()
    assert f"on 6 data, proposal {name}, " in line
    assert drawn(copy)[2:] == [(asked, name)]
    assert json.loads(command("evaluate", copy, "--proposal", asked, "--json").stdout)["proposal"] == name


def test_any_guide_with_a_location_may_be_scored_under_both(runs: Path, tmp_path: Path) -> None:
    for name in ("laplace-0", "normal-0"):
        run = Path(shutil.copytree(runs / name, tmp_path / name))
        estimates = evaluate(open_run(run), Evaluate(proposal="both", num_particles=30, limit=20))
        assert [estimate.proposal for estimate in estimates][1] == "laplace"
        assert [setting for setting, _ in drawn(run)] == ["own", "laplace"]
    # For a Laplace posterior under N(0, I) they are one and the same.
    records = RunFolder(tmp_path / "laplace-0").read_evaluations()
    assert records[0]["per_datum"]["log_prob"] == pytest.approx(records[1]["per_datum"]["log_prob"], abs=1e-9)


def test_a_prior_that_is_fitted_in_training_can_be_scored_under_both(tmp_path: Path) -> None:
    changes = ["model.parametrisation=whitened", "autoencoder.epochs=1", "evaluate.proposal=both"]
    trained = small(tmp_path / "run", *changes, recipe="x-vae-digits")
    assert [estimate.proposal for estimate in trained.estimates] == [None, "laplace"]
    assert all(estimate.log_prob.isfinite().all() for estimate in trained.estimates)


def test_what_has_no_laplace_proposal_is_refused_before_training(runs: Path, tmp_path: Path) -> None:
    sentence = r"\[evaluate\] proposal = 'both': guide must have an encoder .*, got FlowGuide"
    with pytest.raises(SpecError, match=sentence):
        small(tmp_path / "run", "posterior=flow", "evaluate.proposal=both")
    assert not (tmp_path / "run").exists()
    refused = command("evaluate", runs / "five-0", "--proposal", "laplac")
    assert refused.exit_code == 2
    assert "evaluate.proposal must be 'auto', 'own', 'laplace' or 'both', got 'laplac'" in refused.stderr


def test_train_says_the_same(tmp_path: Path) -> None:
    arguments = ["train", "five-digits", *SMALL, "--out", tmp_path / "run"]
    printed = json.loads(command(*arguments, "--json").stdout)["evaluation"]
    assert [estimate["proposal"] for estimate in printed["estimates"]] == ["five", "laplace"]
    lines = command(*arguments, "--force").stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["test", "test", "better"]
    assert lines[-1] == f"better    {printed['better']}"


def estimate(mean: float, error: float) -> LikelihoodEstimate:
    column = torch.full((4,), mean).double()
    return LikelihoodEstimate(column, column, column, column, torch.full((4,), 2 * error).double(), 30, 0)


@pytest.mark.parametrize(
    ("own", "laplace", "said"),
    [
        (-3.0, -1.5, "log p(x): the one under the Laplace proposal is better, by 1.50 nats"),
        (-1.5, -3.0, "log p(x): the one under the guide's own proposal is better, by 1.50 nats"),
        (-1.5, -1.6, "log p(x) and agree: they differ by 0.10 nats, with a Monte-Carlo error of 0.14"),
    ],
)
def test_the_higher_mean_is_the_better_bound(own: float, laplace: float, said: str) -> None:
    found = better_bound(estimate(own, 0.1), estimate(laplace, 0.1))
    assert found == f"both are lower bounds on the same {said}"


# The table of runs --------------------------------------------------------------------------------------


def test_proposals_are_rows_of_their_own(runs: Path) -> None:
    (rows,) = compare([runs / name for name in ("five-0", "five-1", "laplace-0", "normal-0")]).values()
    found = {(row.name, row.proposal): row for row in rows}
    assert set(found) == {
        ("five", "own (five)"),
        ("five", "laplace"),
        ("laplace", "own (laplace)"),
        ("normal", "own"),
    }
    records = [RunFolder(runs / name).read_evaluations() for name in ("five-0", "five-1")]
    for i, proposal in enumerate(("own (five)", "laplace")):
        row = found["five", proposal]
        assert row.seeds == (0, 1)
        assert row.log_likelihoods == tuple(pair[i]["log_likelihood"] for pair in records)
    table = to_markdown(rows).splitlines()
    assert table[0] == f"| {' | '.join(HEADER)} | proposal |"
    assert table[1] == "|" + "---|" * (len(HEADER) + 1)
    assert {line.split(" | ")[-1] for line in table[2:]} == {f"{p} |" for _, p in found}


def test_without_a_named_proposal_the_table_is_as_it_was(runs: Path) -> None:
    (rows,) = compare([runs / "normal-0"]).values()
    first, rule, line = to_markdown(rows).splitlines()
    assert first == f"| {' | '.join(HEADER)} |"
    assert rule == "|" + "---|" * len(HEADER)
    assert line.count("|") == len(HEADER) + 1


def test_records_from_before_there_was_a_choice_drew_from_the_guide(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "normal-0", tmp_path / "normal-0"))
    (record,) = map(unsealed, json.loads((run / "evaluation.json").read_text()))
    del record["settings"]["proposal"], record["proposal"]
    (run / "evaluation.json").write_text(json.dumps([record]))
    text = unsealed_text((run / "spec.toml").read_text())
    (run / "spec.toml").write_text(text.replace('proposal = "auto"\n', ""))
    ((old,),) = compare([run]).values()
    ((new,),) = compare([runs / "normal-0"]).values()
    assert old == new
    # The same evaluation again takes its place.
    evaluate(open_run(run), load_spec(run).evaluate, progress=False)
    assert drawn(run) == [("own", None)]


def test_the_committed_runs_give_the_table_of_the_readme() -> None:
    tables = compare(sorted((ROOT / "experiments" / "results").glob("va*-mnist-*")))
    (rows,) = tables.values()
    assert {row.proposal for row in rows} == {"own"}
    assert to_markdown(rows) in (ROOT / "README.md").read_text()
