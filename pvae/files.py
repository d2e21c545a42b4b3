"""Files that survive: written whole or not at all, sealed with a checksum, locked against other writers."""

import errno
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "Busy",
    "DamagedFile",
    "WriteError",
    "append",
    "check_writable",
    "locked",
    "read_json",
    "remove_leftovers",
    "sealed",
    "sealed_text",
    "sync",
    "unsealed",
    "unsealed_text",
    "write_atomically",
]

_CHECK = "check"
# Bytes of a JSON file of a run; those of full diagnoses, with their pictures, have a few million.
_LARGEST = 2**26
_TEXT_CHECK = "# sha256 "
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")
# Bytes of a lock file beyond what its holder writes there: on Windows a locked range cannot be read.
_LOCKED_AT = 1 << 20
# Descriptors of the locks of this process.
_held: set[int] = set()


class WriteError(OSError):
    """A file could not be written: names the file and the reason; what stood there before still stands."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


class DamagedFile(ValueError):
    """A file is not what was written; the message names it and says how."""


class Busy(RuntimeError):
    """Another process holds the lock; the message names it."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, whatever happens in between.

    The content reaches the disk before the name does, and a kill at any moment leaves at most a temporary
    file, which :func:`remove_leftovers` finds.

    Raises:
        WriteError: If it cannot be written; the old content stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            # On a read-only file system even a file that is not there cannot be removed.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error
    _sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file; a kill may leave a part of it.

    Raises:
        WriteError: If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise WriteError(path, error) from error


def sync(path: Path) -> None:
    """Make what was appended to a file survive a loss of power.

    Raises:
        WriteError: If it cannot be written.
    """
    try:
        with path.open("ab") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(path, error) from error


def check_writable(folder: Path) -> None:
    """Write and remove a file of no content, to know now what would else be known after hours.

    Raises:
        WriteError: If nothing can be written there.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WriteError(folder, error) from error


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files that killed writers left in some folders, not in folders below them.

    Those of other processes that are alive on this machine are left alone. One of this process' number is of
    an earlier process: call it before anything is written.
    """
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            found = _LEFTOVER.fullmatch(path.name)
            if found is not None and not _is_alive(int(found["pid"])):
                with suppress(OSError):
                    path.unlink()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record for JSON with a checksum of its content, which :func:`unsealed` takes off again."""
    plain: dict[str, Any] = json.loads(json.dumps(record))  # as it will be read
    return plain | {_CHECK: _digest(plain)}


def unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """Check the content of a record against its checksum and return it without.

    A record without one, as earlier versions wrote them, is returned as it is.

    Raises:
        ValueError: If its content has changed.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a record")
    rest = {key: value for key, value in record.items() if key != _CHECK}
    if _CHECK in record and record[_CHECK] != _digest(rest):
        raise ValueError("its content does not have the checksum written with it")
    return rest


def sealed_text(text: str) -> str:
    """Return a text with a comment as its first line that holds the checksum of the lines after it."""
    return f"{_TEXT_CHECK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def unsealed_text(text: str) -> str:
    """Check a text against its first line, where :func:`sealed_text` wrote that, and return it without.

    Raises:
        ValueError: If it has changed.
    """
    first, _, rest = text.partition("\n")
    if not first.startswith(_TEXT_CHECK):
        return text
    if first != _TEXT_CHECK + hashlib.sha256(rest.encode()).hexdigest():
        raise ValueError("its content does not have the checksum in its first line")
    return rest


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFile: If it cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise DamagedFile(f"{path} must have at most {_LARGEST} bytes, got more")
        return json.loads(content)
    except DamagedFile:
        raise
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise DamagedFile(f"{path} is a folder, where a file must be") from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON") from None


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system takes back when the process ends, however it ends.

    The file holds the process and the machine of its holder, and is removed with the lock. Between machines
    that share a folder it works as far as their file system passes locks on (NFS does since version 4).

    Args:
        path: Lock file, made if absent, with its folder.
        wait: Whether to wait for another holder.

    Raises:
        Busy: If another process holds it and ``wait`` is false.
        WriteError: If the file cannot be made.
    """
    file = _locked_file(path, wait)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile finds it gone, and makes another one.
        with suppress(OSError):
            path.unlink()
        _held.discard(file)
        os.close(file)


def _locked_file(path: Path, wait: bool) -> int:
    """Open and lock a file, and write down who holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _lock(file, wait):
                    raise Busy(f"another process is at work in {path.parent}{_holder(file)}")
                if _is_still(file, path):
                    os.truncate(file, 0)
                    os.lseek(file, 0, os.SEEK_SET)
                    os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
                    _held.add(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
    except OSError as error:
        raise WriteError(path, error) from error


if sys.platform == "win32":
    import msvcrt
    import time

    def _lock(file: int, wait: bool) -> bool:
        while True:
            os.lseek(file, _LOCKED_AT, os.SEEK_SET)
            try:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    raise
            if not wait:
                return False
            time.sleep(0.1)

else:
    import fcntl

    def _lock(file: int, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


def _let_go() -> None:
    """Close what a forked process has of its parent's locks, as it must not hold them when that is dead."""
    for file in _held:
        with suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _is_still(file: int, path: Path) -> bool:
    """Whether the file that was locked is the one of that name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: int) -> str:
    """Who holds a lock, as far as is known."""
    os.lseek(file, 0, os.SEEK_SET)
    pid, _, host = os.read(file, 300).decode(errors="replace").strip().partition(" ")
    return f" (process {pid} on {host})" if pid.isdigit() and host else ""


def _is_alive(pid: int) -> bool:
    """Whether another process of that number runs here."""
    if pid == os.getpid() or sys.platform == "win32":  # there, a file that is open cannot be removed anyhow
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):  # nor sync one
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
