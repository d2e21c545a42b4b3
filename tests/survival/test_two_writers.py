"""Two writers of one run folder: the second is told who the first is; readers read."""

import os
import socket
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pvae.experiments.cli import app
from pvae.experiments.runs import RunFolder
from pvae.files import locked

from .damage import SMALL
from .kill_loop import fingerprint


def _pvae(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stderr


def test_the_second_trainer_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "run"
    who = f"another process is at work in {path} (process {os.getpid()} on {socket.gethostname()})\n"
    with locked(path / ".lock"):  # as a run has it from its first moment on
        assert _pvae("train", "vae", *SMALL, "--out", path) == (2, f"pvae: {who}")
    assert _pvae("train", "vae", *SMALL, "--out", path) == (0, "")
    before = fingerprint(path)
    with locked(path / ".lock"):
        for option in ("--resume", "--force"):
            assert _pvae("train", path, option) == (2, f"pvae: {who}")
        assert fingerprint(path) == before | {".lock": fingerprint(path)[".lock"]}
        for command in ("evaluate", "sample", "report"):
            assert _pvae(command, path) == (0, "")
    assert _pvae("train", path, "--resume") == (0, "")
    assert not list(path.rglob(".*"))


def test_a_lock_that_a_killed_run_left_is_none(tmp_path: Path) -> None:
    """Before it had written anything else, too."""
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").write_text("1 elsewhere\n")
    (path / ".spec.toml.4194305.tmp").write_text("z_d")
    assert _pvae("train", "vae", *SMALL, "evaluate.after_training=false", "--out", path) == (0, "")
    assert not list(path.rglob(".*"))


def test_records_of_two_writers_are_all_kept(tmp_path: Path) -> None:
    """Every record is written with those of others, which must not be lost between reading and writing."""
    pytest.importorskip("fcntl")
    folder = RunFolder(tmp_path)

    def add(first: int) -> None:
        for i in range(first, first + 20):
            folder.add_evaluation({"settings": {"seed": i}})

    writers = [threading.Thread(target=add, args=(first,)) for first in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(record["settings"]["seed"] for record in folder.read_evaluations()) == list(range(60))
