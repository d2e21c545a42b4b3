"""The judgement of a run part by part: what is kept, computed again or left out, and the line at its end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from typer.testing import CliRunner, Result

from pvae.data import load
from pvae.evaluation import annealed_likelihood, bidirectional, detect, log_likelihood, ood_scores
from pvae.experiments import SpecError, evidence, load_spec, open_run
from pvae.experiments.cli import app
from pvae.experiments.diagnosing import Wanted, spread
from pvae.experiments.evidence import (
    BUDGETS,
    Job,
    Judgement,
    Part,
    Size,
    certificate,
    choose,
    judge,
    kept,
    planned,
)
from pvae.experiments.evidence_parts import PARTS, Annealing, Gaps, Quality
from pvae.experiments.jobs import train
from pvae.experiments.runs import RunFolder
from pvae.files import sealed, unsealed
from pvae.nn import MLPDenoiser
from pvae.priors import DiffusionPrior

pytestmark = pytest.mark.usefixtures("undrawn")

CHEAP = ("pictures", "codes", "likelihood")


@pytest.fixture
def copy(judged: Path, tmp_path: Path) -> Path:
    """The judged run, to be changed."""
    return Path(shutil.copytree(judged, tmp_path / "run"))


@pytest.fixture
def bare(copy: Path) -> Path:
    """The run before it was judged."""
    shutil.rmtree(copy / "evidence")
    return copy


class Seen:
    """Notes which parts are begun and which are taken from the folder."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.before: list[str] = []

    def run(self, path: Path, *only: str, **options: Any) -> Judgement:
        def begin(part: Part, number: int, total: int) -> None:
            self.begun.append(part.name)

        def end(part: Part, record: dict[str, Any], before: bool) -> None:
            if before:
                self.before.append(part.name)

        return judge(open_run(path), only=only, progress=False, begun=begin, ended=end, **options)


def test_every_part_is_kept_in_a_file_and_not_computed_twice(judged: Path) -> None:
    names = [name for name in PARTS if name != "ood"]
    assert sorted(path.stem for path in (judged / "evidence").iterdir()) == sorted(names)
    seen = Seen()
    found = seen.run(judged)
    assert (seen.begun, seen.before) == ([], names)
    for name, record in found.records.items():
        written = json.loads((judged / "evidence" / f"{name}.json").read_text())
        assert len(written.pop("check")) == 64
        assert written == record
        assert record["text"]
        assert "left_out" not in record, name
    assert found.certificate == certificate(kept(RunFolder(judged)))


def test_the_line_holds_the_numbers_of_the_library(judged: Path) -> None:
    run, records = open_run(judged), kept(RunFolder(judged))
    sizes = records["likelihood"]["sizes"]
    own = log_likelihood(*run.program, spread(run.data.test, sizes["data"]), num_particles=sizes["particles"])
    few = spread(run.data.test, records["annealing"]["sizes"]["data"])
    steps = records["annealing"]["sizes"]["steps"]
    annealed = annealed_likelihood(*run.program, few, num_chains=16, num_steps=steps)
    direct = log_likelihood(*run.program, few, num_particles=records["annealing"]["sizes"]["particles"])
    gap = bidirectional(*run.program, few, num_chains=16, num_steps=steps).intervals["gap"]
    gain = float((annealed.log_prob - direct.log_prob).mean())
    line = certificate(records)
    assert line is not None
    assert line.startswith(
        f"log p(x) >= {own.mean:.2f} ± {own.standard_error:.2f} nats (IWAE-100 on 100 data, ELBO "
        f"{own.elbo:.2f}; k-hat high for {100 * own.khat_share:.1f} %; AIS {gain:+.2f} ["
    )
    assert line.endswith(f"on 8 of them; BDMC gap <= {max(0.0, gap.high):.3f} nats on simulated data)")


def test_the_line_says_what_is_missing() -> None:
    estimate = {
        "num_particles": 50,
        "num_data": 7,
        "proposal": "laplace",
        "num_steps": 100,
        "elbo": -2.0,
        "khat_share": None,
        "conditional": True,
        "standard_error": None,
        "log_likelihood": -1.25,
    }
    likelihood: dict[str, Any] = {
        "result": {"estimates": {"own": {}, "laplace": estimate}, "best": "laplace"}
    }
    assert certificate({}) is None
    assert certificate({"likelihood": {"left_out": "no"}}) is None
    expected = "log p(x | y) >= -1.25 nats (IWAE-50 on 7 data, proposal laplace, T = 100, ELBO -2.00"
    assert certificate({"likelihood": likelihood}) == f"{expected})"
    left = {"likelihood": likelihood, "annealing": {"left_out": "no"}, "bidirectional": {"left_out": "no"}}
    assert certificate(left) == f"{expected}; AIS and BDMC left out)"


def test_an_interrupted_diagnosis_goes_on_where_it_stopped(
    bare: Path, least: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    only = (*CHEAP, "gaps", "aggregate")
    with monkeypatch.context() as patch:
        patch.setattr(Gaps, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Seen().run(bare, *only)
    seen = Seen()
    seen.run(bare, *only)
    assert (seen.before, seen.begun) == (list(CHEAP), ["gaps", "aggregate"])


def test_what_was_found_within_a_larger_budget_serves_a_smaller_one(bare: Path, least: None) -> None:
    for budget, begun in (("quick", ["codes"]), ("standard", ["codes"]), ("quick", []), ("standard", [])):
        seen = Seen()
        seen.run(bare, "codes", budget=budget)
        assert seen.begun == begun, budget
    seen = Seen()
    seen.run(bare, "codes", fresh=True)
    assert seen.begun == ["codes"]
    seen.run(bare, "codes", wanted=Wanted(seed=1))
    assert seen.begun == ["codes", "codes"]


def test_what_belongs_to_other_parameters_or_is_damaged_counts_as_absent(copy: Path) -> None:
    folder = RunFolder(copy)
    everything = set(kept(folder))
    (folder.evidence / "codes.json").write_text('{"part": "codes", "parame')
    (folder.evidence / "gaps.json").write_bytes((folder.evidence / "match.json").read_bytes())
    assert set(kept(folder)) == everything - {"codes", "gaps"}
    pointer = folder.checkpoints / "final.json"
    pointer.write_text(json.dumps(sealed(unsealed(json.loads(pointer.read_text())) | {"sha256": "0" * 64})))
    assert kept(folder) == {}
    folder.prepare(load_spec(copy), resume=False, force=True)
    assert not folder.evidence.exists()


def test_nothing_of_the_programs_changes(bare: Path, least: None) -> None:
    run = open_run(bare)
    before = {name: value.clone() for part in run.program for name, value in part.state_dict().items()}
    torch.manual_seed(3)
    pyro.param("mine", torch.ones(2))
    generators = torch.get_rng_state()
    parts = ("pictures", "codes", "likelihood", "calibration", "match", "quality")
    judge(run, only=parts, progress=False)
    after = {name: value for part in run.program for name, value in part.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generators, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["mine"]
    assert run.model.training


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_a_part_that_the_programs_do_not_allow_is_left_out(
    bare: Path, least: None, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refused(*_: object) -> None:
        raise error("latents must be real")

    monkeypatch.setattr(Annealing, "run", refused)
    found = Seen().run(bare, "likelihood", "annealing")
    assert found.records["annealing"]["left_out"] == "latents must be real"
    assert found.certificate is not None
    assert found.certificate.endswith("; AIS left out)")
    seen = Seen()
    seen.run(bare, "annealing")
    assert seen.begun == []


def test_parts_that_do_not_apply() -> None:
    def job(**of_run: Any) -> Job:
        run: Any = SimpleNamespace(**of_run)
        return Job(run, Wanted(), BUDGETS["quick"])

    diffusion = SimpleNamespace(prior=DiffusionPrior(MLPDenoiser((1, 3, 3), hidden=4, blocks=1), (1, 3, 3)))
    for name in ("annealing", "bidirectional"):
        reason = PARTS[name].applies(job(model=diffusion))
        assert reason == "p(u) is a diffusion, whose density is only estimated: it cannot be annealed"
        assert PARTS[name].applies(job(model=SimpleNamespace())) is None
    unlabelled = SimpleNamespace(train=SimpleNamespace(y=None))
    assert Quality().applies(job(data=unlabelled)) is not None
    assert PARTS["ood"].applies(job()) is not None


def test_no_part_is_begun_once_the_budget_is_spent(
    bare: Path, least: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter([0.0, 61.0, 61.0])

    class Clock:
        @property
        def seconds(self) -> float:
            return next(spent, 0.0)

    clocks = iter([Clock()])
    real = evidence._Clock
    monkeypatch.setattr(evidence, "_Clock", lambda: next(clocks, None) or real())
    found = Seen().run(bare, *CHEAP)
    assert list(found.records) == ["pictures"]
    assert list(found.unfinished) == ["codes", "likelihood"]
    assert "the same command goes on" in found.unfinished["codes"]


def test_a_part_dearer_than_the_whole_budget_waits_for_a_larger_one(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "_seconds_of_a_row", lambda run: 0.01)
    found = Seen().run(bare, "codes", "gaps")
    assert list(found.records) == ["codes"]
    rows = PARTS["gaps"].rows({"data": 8, "steps": 100, "particles": 100})
    said = f"it takes about {rows * 0.01 / 60:.1f} minutes at its smallest, give it a larger --budget"
    assert found.unfinished == {"gaps": said}
    assert found.share < 1e-3


def test_sizes_give_way_one_after_another() -> None:
    sizes = {"data": Size(64, 640, 6400, 16), "particles": Size(1000, 2000, 5000, 100)}
    quick, full = BUDGETS["quick"], BUDGETS["full"]
    assert planned(sizes, quick, 1.0) == {"data": 64, "particles": 1000}
    assert planned(sizes, full, 1.0) == {"data": 6400, "particles": 5000}
    assert planned(sizes, quick, 0.5) == {"data": 32, "particles": 1000}
    assert planned(sizes, quick, 1 / 8) == {"data": 16, "particles": 500}
    assert planned(sizes, quick, 1e-6) == {"data": 16, "particles": 100}
    # What there is of data counts, not what there might be.
    assert planned(sizes, full, 1 / 8, {"data": 10}) == {"data": 10, "particles": 625}


def test_every_part_costs_more_within_a_larger_budget() -> None:
    for part in PARTS.values():
        costs = [part.rows(planned(part.sizes, budget, 1.0)) for budget in BUDGETS.values() if part.sizes]
        assert costs == sorted(set(costs)), part.name


def test_choice_of_parts() -> None:
    assert "ood" not in [part.name for part in choose((), Wanted())]
    assert "ood" in [part.name for part in choose((), Wanted(ood=("two_moons",)))]
    assert [part.name for part in choose(("gaps", "codes"), Wanted())] == ["codes", "gaps"]
    with pytest.raises(SpecError, match="there is no part 'gap' of a diagnosis: did you mean 'gaps'"):
        choose(("gap",), Wanted())


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on points in the plane, of which there are others."""
    path = tmp_path_factory.mktemp("points") / "run"
    changes = ["data=gaussian_mixture", "data.binarize=none", "data.num_train=300", "data.num_test=150"]
    changes += ["data.valid=80", "likelihood=normal", "z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]
    changes += ["fit.steps=60", "evaluate.after_training=false"]
    train(load_spec("vae", changes), path, progress=False)
    return path


def test_data_from_elsewhere_are_scored_as_the_library_scores_them(points: Path, least: None) -> None:
    run = open_run(points)
    wanted = Wanted(ood=("two_moons",))
    record = judge(run, wanted, only=("ood",), progress=False).records["ood"]
    table = record["result"]["tables"]["two_moons"]["detectors"]
    assert list(table) == ["log_prob", "elbo", "log_p", "kl", "typicality", "mahalanobis"]
    assert record["result"]["notes"][0].startswith("No score less complexity: ")
    other = load("two_moons").test
    scores = [
        ood_scores(*run.program, spread(split, 100), which=["kl"], seed=stream)
        for stream, split in enumerate((run.data.test, run.data.valid, other))
    ]
    expected = detect(scores[0], scores[2], scores[1])
    assert table["kl"]["auroc"]["value"] == pytest.approx(expected.detectors["kl"].auroc.value)
    assert record["asked"]["ood"] == ["two_moons"]
    found = judge(run, only=("pictures",), progress=False).records
    assert found["pictures"]["result"]["kind"] == "points"
    assert len(found["pictures"]["result"]["draws"]) == 80


def _command(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_command(bare: Path, least: None) -> None:
    text = _command("diagnose", bare, "--only", "likelihood", "--only", "codes").stdout
    assert "\nlikelihood  (100 data, 100 particles, " in text
    assert "budget    quick, about 1 minute on two cores" in text
    assert f"page      pvae report {bare}" in text
    assert text.splitlines()[-1].startswith("certified log p(x) >= -")
    assert ", found before)" in _command("diagnose", bare, "--only", "codes").stdout
    printed = json.loads(_command("diagnose", bare, "--only", "likelihood", "--json").stdout)
    assert printed["certificate"].startswith("log p(x) >= ")
    assert "per_datum" not in printed["evidence"]["likelihood"]["result"]["estimates"]["own"]
    assert printed["unfinished"] == {}


def test_command_refuses(bare: Path) -> None:
    said = _command("diagnose", bare, "--budget", "quik", code=2)
    assert said.stderr == "pvae: unknown --budget 'quik': did you mean 'quick'?\n"
    said = _command("diagnose", bare, "--only", "likelyhood", code=2)
    assert said.stderr == "pvae: there is no part 'likelyhood' of a diagnosis: did you mean 'likelihood'?\n"
    assert not (bare / "evidence").exists()


def test_command_interrupted(bare: Path, least: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gaps, "run", interrupted)
    said = _command("diagnose", bare, "--only", "codes", "--only", "gaps", code=130)
    assert "finished parts are kept in" in said.stderr
    assert (bare / "evidence" / "codes.json").is_file()
