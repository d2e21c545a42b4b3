"""Training that is killed goes on to the bytes of a run that was not; the long loop is run by hand."""

import random
from itertools import chain, repeat
from pathlib import Path

import pytest

from .kill_loop import SMOKE, _moments, fingerprint, kill_and_resume, main, whole
from .worker import Moment, Worker

# Within the first stage, with half of a file written, between a file and its pointer, at a random time (as
# a share of an uninterrupted run), after the last checkpoint, within the evaluation.
KILLS: tuple[Moment | float, ...] = (
    Moment("pvae.inference.trainer:Trainer.step", 7),
    Moment("os:fsync", 25, "half"),
    Moment("os:replace", 10, "after"),
    0.4,
    Moment("pvae.experiments.jobs:_pictures"),
    Moment("pvae.experiments.jobs:log_likelihood", 1, "after"),
)


def test_a_run_that_is_killed_six_times_ends_as_one_that_is_not(worker: Worker, tmp_path: Path) -> None:
    smoke = SMOKE["x-vae-digits"]
    seconds, _ = whole(worker, smoke, tmp_path / "whole")
    moments = (kill * seconds if isinstance(kill, float) else kill for kill in KILLS)
    kills, problem = kill_and_resume(worker, smoke, tmp_path / "killed", chain(moments, repeat(None)))
    assert problem is None
    assert len(kills) >= 5  # the random time may lie after the end
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


def test_the_fingerprint_sees_every_file_and_no_clock(tmp_path: Path) -> None:
    for name, content in (("a/b", "1"), ("manifest.json", "2"), (".lock", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "evaluation.json").write_text('[{"seconds": 1.5, "check": "x", "log_likelihood": -3.0}]')
    before = fingerprint(tmp_path)
    assert set(before) == {"a/b", ".lock", "evaluation.json"}
    (tmp_path / "evaluation.json").write_text('[{"seconds": 2.5, "check": "y", "log_likelihood": -3.0}]')
    assert fingerprint(tmp_path) == before
    (tmp_path / "evaluation.json").write_text('[{"seconds": 2.5, "check": "y", "log_likelihood": -3.1}]')
    (tmp_path / "a" / "b").write_text("2")
    after = fingerprint(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"a/b", "evaluation.json"}


def test_moments_are_of_every_kind_and_follow_from_the_seed() -> None:
    smoke = SMOKE["divae-synthetic"]
    counts = {"os:replace": 40, "os:fsync": 90}
    drawn = []
    for _ in range(2):
        endless = _moments(smoke, 2.0, counts, random.Random(3))
        drawn.append([next(endless) for _ in range(60)])
    assert drawn[0] == drawn[1]
    assert set(smoke.moments) <= set(drawn[0])
    times = [moment for moment in drawn[0] if isinstance(moment, float)]
    assert all(0 <= moment <= 2 for moment in times)
    writes = [moment for moment in drawn[0] if isinstance(moment, Moment) and moment.of in counts]
    assert {moment.when for moment in writes} == {"before", "after", "half"}
    assert len(times) >= 10
    assert len(writes) >= 25


def test_the_loop_refuses_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--recipes", "vea"])
    assert "invalid choice: 'vea'" in capsys.readouterr().err
