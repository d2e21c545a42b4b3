"""Files that survive: atomic writes, seals, leftovers, locks that die with their holder."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvae import files
from pvae.files import (
    Busy,
    DamagedFile,
    WriteError,
    append,
    check_writable,
    locked,
    read_json,
    remove_leftovers,
    sealed,
    sealed_text,
    sync,
    unsealed,
    unsealed_text,
    write_atomically,
)

RECORD = {"step": 12, "best": -1.5e-7, "none": None, "rng": [1, [2, 3], True], "name": "z ≥ 0"}


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, _full)
            with pytest.raises(WriteError, match=rf"^cannot write {path}: No space left on device$"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "rows"
    for write in (
        lambda: append(missing, "row"),
        lambda: sync(missing),
        lambda: write_atomically(missing, b""),
    ):
        with pytest.raises(WriteError, match=rf"^cannot write {missing}: No such file or directory$"):
            write()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path / 'file'}: File exists"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    append(tmp_path / "rows", "a\n")
    append(tmp_path / "rows", "b\n")
    sync(tmp_path / "rows")
    assert (tmp_path / "rows").read_text() == "a\nb\n"


def test_a_seal_comes_off_again() -> None:
    plain = json.loads(json.dumps(RECORD))
    assert unsealed(json.loads(json.dumps(sealed(RECORD)))) == plain
    assert unsealed(sealed({"t": (1, 2), "n": {3: 0.1}})) == {
        "t": [1, 2],
        "n": {"3": 0.1},
    }  # as JSON has them
    assert unsealed(plain) == plain  # of an earlier version
    assert unsealed_text(sealed_text("a = 1\n")) == "a = 1\n"
    assert unsealed_text("a = 1\n# sha256 of something\n") == "a = 1\n# sha256 of something\n"


def test_no_flipped_bit_goes_unseen() -> None:
    """Of every bit of a sealed record, and of a sealed text: refused, or read as it was."""
    content = json.dumps(sealed(RECORD)).encode()
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        try:
            found = unsealed(json.loads(flipped))
        except ValueError:
            continue
        # The name of the checksum may have changed, nothing else.
        assert {key: found[key] for key in RECORD} == RECORD
    text = sealed_text("lr = 0.002\n")
    for i in range(8 * len(text)):
        flipped = bytearray(text.encode())
        flipped[i // 8] ^= 1 << i % 8
        try:
            rest = unsealed_text(flipped.decode())
        except ValueError:
            continue
        assert rest.endswith("lr = 0.002\n")
    for length in range(len("# sha256 "), len(text)):
        with pytest.raises(ValueError, match="checksum"):
            unsealed_text(text[:length])


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=f"{path} is damaged: it is not JSON"):
        read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path)
    path.mkdir()
    with pytest.raises(DamagedFile, match=f"{path} is a folder, where a file must be"):
        read_json(path)


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = [tmp_path / f".a.json.{pid}.tmp" for pid in (dead.pid, os.getpid())]
    others = [tmp_path / name for name in (".a.tmp", "a.json.1.tmp", f".a.json.{os.getppid()}.tmp", "a.json")]
    (tmp_path / "below").mkdir()
    others.append(tmp_path / "below" / ours[0].name)
    for path in (*ours, *others):
        path.touch()
    remove_leftovers(tmp_path, tmp_path / "none")
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with locked(path, wait=False):
        said = rf"another process is at work in {path.parent} \(process {os.getpid()} on "
        with pytest.raises(Busy, match=said + socket.gethostname()), locked(path, wait=False):
            pass
    assert list(path.parent.iterdir()) == []
    with locked(path):
        assert path.exists()


HOLD = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.locked(files.Path(sys.argv[2]), wait=False):
    child = os.fork() or time.sleep(60)  # a worker that outlives its parent
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_holder_though_a_forked_child_lives(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLD, str(files.__file__), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(Busy, match=f"process {holder.pid} on"), locked(path, wait=False):
                pass
            holder.kill()
            holder.wait()
            with locked(path, wait=False):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_waited_for_and_never_held_twice(tmp_path: Path) -> None:
    """Four processes add to a number under a lock whose file comes and goes."""
    pytest.importorskip("fcntl")
    program = HOLD.partition("with files")[0] + (
        "number = files.Path(sys.argv[3])\n"
        "for _ in range(100):\n"
        "    with files.locked(files.Path(sys.argv[2])):\n"
        "        number.write_text(str(int(number.read_text()) + 1))\n"
    )
    number = tmp_path / "number"
    number.write_text("0")
    command = [sys.executable, "-c", program, str(files.__file__), str(tmp_path / ".lock"), str(number)]
    workers = [subprocess.Popen(command) for _ in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert number.read_text() == "400"


def test_a_kill_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    """A writer that replaces one file all the time is killed at random moments."""
    path = tmp_path / "a"
    program = HOLD.partition("with files")[0] + (
        "path = files.Path(sys.argv[2])\n"
        "print(flush=True)\n"
        "for i in range(10**9):\n"
        "    files.write_atomically(path, str(i).encode() * 10_000)\n"
    )
    chance = random.Random(0)
    for _ in range(8):
        command = [sys.executable, "-c", program, str(files.__file__), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.05))
            writer.kill()
        if path.exists():
            content = path.read_text()
            assert content == content[: len(content) // 10_000] * 10_000
        remove_leftovers(tmp_path)
        assert {one.name for one in tmp_path.iterdir()} <= {"a"}
    assert path.exists()
