"""SIGINT and SIGTERM, wherever they come: exit code 130, one sentence, and the way on."""

import os
import signal
from pathlib import Path

import pytest

from .kill_loop import SMOKE, fingerprint, whole
from .worker import Moment, Worker

STEP = "pvae.inference.trainer:Trainer.step"


def test_a_run_that_is_interrupted_everywhere_ends_as_one_that_is_not(worker: Worker, tmp_path: Path) -> None:
    smoke, path = SMOKE["x-vae-digits"], tmp_path / "run"
    whole(worker, smoke, tmp_path / "whole")
    kept = ", the last checkpoint is kept"
    first = ", before the first checkpoint"
    moments = [
        # Within the autoencoder's training, as its codes are collected, at the first batch, within training,
        # at the last step, between training and evaluation, within the evaluation.
        (Moment(STEP, 5, signal=signal.SIGTERM), first),
        (Moment("pvae.experiments.stages:collect_codes", signal=signal.SIGINT), first),
        (Moment("pvae.inference.trainer:Trainer.check", 2, signal=signal.SIGTERM), first),
        (Moment(STEP, 3, signal=signal.SIGINT), kept),
        (Moment(STEP, 9, signal=signal.SIGTERM), kept),
        (Moment("pvae.experiments.jobs:_pictures", signal=signal.SIGTERM), kept),
        (Moment("pvae.experiments.jobs:log_likelihood", signal=signal.SIGINT), kept),
    ]
    start: tuple[object, ...] = (smoke.recipe, *smoke.changes, "--out", path)
    for moment, left in moments:
        ended = worker.run("train", *start, moment=moment)
        said = f"pvae: interrupted{left}: go on with  pvae train {path} --resume\n"
        assert (ended.code, ended.stdout, ended.stderr) == (130, "", said), moment
        start = (path, "--resume")
    ended = worker.run("train", *start)
    assert ended.code == 0, ended.stderr
    assert fingerprint(path) == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_judges_a_run_can_be_interrupted(worker: Worker, tmp_path: Path, number: int) -> None:
    smoke, path = SMOKE["vae"], tmp_path / "run"
    whole(worker, smoke, path)
    before = fingerprint(path)
    for moment, command, said in (
        (Moment("pvae.experiments.jobs:log_likelihood", signal=number), ["evaluate", path], "interrupted"),
        (
            Moment("pvae.experiments.evidence:_record", signal=number),
            ["diagnose", path, "--only", "likelihood"],
            f"interrupted, finished parts are kept in {path / 'evidence'}: the same command goes on",
        ),
        (Moment("pvae.experiments.figures:samples", signal=number), ["sample", path], "interrupted"),
    ):
        ended = worker.run(*command, moment=moment)
        assert (ended.code, ended.stdout, ended.stderr) == (130, "", f"pvae: {said}\n")
    assert fingerprint(path) == before


def test_a_second_signal_does_not_wait_for_the_step(worker: Worker, tmp_path: Path) -> None:
    """As while a graph is compiled, which takes a minute: the checkpoint before it is kept."""
    smoke, path = SMOKE["vae"], tmp_path / "run"
    moment = Moment(STEP, 7, signal=signal.SIGTERM)
    said = f"pvae: interrupted, the last checkpoint is kept: go on with  pvae train {path} --resume\n"
    arguments = ("train", smoke.recipe, *smoke.changes, "--out", path)
    ended = worker.run(*arguments, moment=moment, prepare="tests.survival.test_signals:twice")
    assert (ended.code, ended.stdout, ended.stderr) == (130, "", said)
    assert worker.run("train", path, "--resume").code == 0
    whole(worker, smoke, tmp_path / "whole")
    assert fingerprint(path) == fingerprint(tmp_path / "whole")


def twice() -> None:
    """Let every signal of this process be sent two times."""
    kill = os.kill

    def both(pid: int, number: int) -> None:
        kill(pid, number)
        kill(pid, number)

    os.kill = both
