"""A full disk and a read-only folder: one sentence, the last good checkpoint intact, and the way on."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pvae.experiments.cli import app

from .damage import SMALL
from .kill_loop import fingerprint

TRAIN = ["train", "vae", *SMALL, "fit.schedule=none", "fit.ema=none"]


def _pvae(*arguments: object, code: int = 0) -> str:
    """Run a command; return the sentence of one that fails, or what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    if not code:
        return result.stdout
    assert result.stderr.startswith("pvae: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.strip().removeprefix("pvae: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    _pvae(*TRAIN, "--out", path)
    return path


@contextmanager
def full(name: str, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> Iterator[None]:
    """A disk on which a file of the run finds no room, from its so-and-so-many-th time on."""
    replace, path_open, calls = os.replace, Path.open, [0]

    def refuse(path: Any) -> None:
        if Path(path).name.startswith(name) or Path(path).match(f"*/{name}/*"):
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replacing(source: Any, target: Any) -> None:
        refuse(target)
        replace(source, target)

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            refuse(self)
        return path_open(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        patch.setattr(Path, "open", opening)
        yield


@pytest.mark.parametrize(
    ("name", "after", "kept"),
    [
        ("metrics.jsonl", 2, "the last checkpoint is kept"),
        ("step-", 2, "the last checkpoint is kept"),
        ("step-", 0, "before the first checkpoint"),
        ("last.json", 1, "the last checkpoint is kept"),
        ("previous.json", 0, "the last checkpoint is kept"),
        ("final.json", 0, "the last checkpoint is kept"),
        ("manifest.json", 1, "the last checkpoint is kept"),
        ("evaluation.json", 0, "the last checkpoint is kept"),
        ("figures", 1, "the last checkpoint is kept"),
    ],
)
def test_a_disk_that_fills_at_any_file(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int, kept: str
) -> None:
    path = tmp_path / "run"
    with full(name, monkeypatch, after):
        said = _pvae(*TRAIN, "--out", path, code=1)
    shown = {"figures": "figures/"}.get(name, name)
    assert said.startswith(f"cannot write {path}/")
    assert shown in said
    assert said.endswith(f": No space left on device, {kept}: go on with  pvae train {path} --resume")
    assert not list(path.rglob("*.tmp"))
    _pvae("train", path, "--resume")
    assert fingerprint(path) == fingerprint(whole)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    with full("spec.toml", monkeypatch):
        said = _pvae(*TRAIN, "--out", path, code=2)
    assert said == f"cannot write to {path}/spec.toml: No space left on device"
    assert not path.exists()


def test_a_limit_of_the_system_within_a_file(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system itself stops a write in the middle of a file; no root is needed for that."""
    path = tmp_path / "run"
    with full("step-", monkeypatch, after=2):
        _pvae(*TRAIN, "--out", path, code=1)
    before = {one.name: one.read_bytes() for one in (path / "checkpoints").iterdir()}
    largest = max(map(len, before.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        said = _pvae("train", path, "--resume", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.endswith(
        f"File too large, the last checkpoint is kept: go on with  pvae train {path} --resume"
    )
    assert {one.name: one.read_bytes() for one in (path / "checkpoints").iterdir()} == before
    _pvae("train", path, "--resume")
    assert fingerprint(path) == fingerprint(whole)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount a file system of memory, where that is allowed."""
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("needs root to mount a file system")
    done = subprocess.run([mount, "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_full(whole: Path, tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "size=1m"):
        path, filler = tmp_path / "run", tmp_path / "filler"
        _pvae(*TRAIN, "fit.steps=6", "evaluate.after_training=false", "--out", path)
        shutil.rmtree(path / "figures")
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        filler.write_bytes(bytes(free - 16_384))
        said = _pvae("train", path, "--resume", "fit.steps=12", code=1)
        assert said.startswith(f"cannot write {path}/")
        assert said.endswith(
            f"No space left on device, the last checkpoint is kept: go on with  pvae train {path} --resume"
        )
        filler.unlink()
        assert "12 steps" in _pvae("train", path, "--resume")
        assert not list(tmp_path.rglob("*.tmp"))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that cannot be written to: by its mode, or for root, who need not mind, by its mount."""
    if os.geteuid():
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path in folders:
                path.chmod(0o755)
        return
    with mounted(folder):
        # A tmpfs over it, with the content that was there, made read-only.
        hidden = folder.with_name("content")
        shutil.copytree(hidden, folder, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield


def test_a_folder_that_cannot_be_written_to_is_said_at_the_start(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    content = folder if os.geteuid() else tmp_path / "content"
    folder.mkdir()
    shutil.copytree(whole, content / "run")
    with read_only(folder):
        path = folder / "run"
        for command in (["train", path, "--resume"], ["train", path, "--force"], ["evaluate", path]):
            assert "cannot write to" in _pvae(*command, code=2)
        assert "cannot write to" in _pvae(*TRAIN, "--out", folder / "new", code=2)
        assert "cannot write to" in _pvae("diagnose", path, "--only", "likelihood", code=2)
        assert "cannot write the page to" in _pvae("report", path, code=2)
        assert "cannot write" in _pvae("sample", path, code=1)
        # Readers that write elsewhere need no leave.
        _pvae("sample", path, "--out", tmp_path / "samples.png")
        _pvae("report", path, "--out", tmp_path / "page.html")
        assert fingerprint(path) == fingerprint(whole)
