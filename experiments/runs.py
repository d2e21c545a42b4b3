"""A run folder: what is written beside a trained program, and the way back to the program."""

import hashlib
import json
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pvae
from pvae import files
from pvae.data import Data
from pvae.inference import CheckpointError, checkpoint, load_parameters

from .figures import read_metrics
from .program import Program
from .spec import Spec, load_spec

__all__ = ["Onlooker", "OpenRun", "RunError", "RunFolder", "environment", "open_run"]


class RunError(ValueError):
    """A run folder that is missing, incomplete, damaged or in the way; the message is one sentence."""


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def spec(self) -> Path:
        """The resolved spec."""
        return self.path / "spec.toml"

    @property
    def manifest(self) -> Path:
        """Versions, device, seed, hashes of the data, wall time."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One row for each interval of training, written by :func:`pvae.fit`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Last and best state, written by :func:`pvae.fit`."""
        return self.path / "checkpoints"

    @property
    def autoencoder(self) -> Path:
        """The run of a first stage, if there is one."""
        return self.path / "autoencoder"

    @property
    def evaluation(self) -> Path:
        """A list of likelihood estimates, the newest last."""
        return self.path / "evaluation.json"

    @property
    def diagnosis(self) -> Path:
        """A list of diagnoses, the newest last."""
        return self.path / "diagnosis.json"

    @property
    def evidence(self) -> Path:
        """What each part of a diagnosis found, a file for each."""
        return self.path / "evidence"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def density(self) -> Path:
        """Log-density of the training data, for a run that is aligned with one."""
        return self.path / "density.safetensors"

    @property
    def figures(self) -> Path:
        """Pictures."""
        return self.path / "figures"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in the folder while the block runs; readers need no leave.

        Raises:
            RunError: If it cannot be written to, or is no run's.
            pvae.files.Busy: If another process is at work there.
        """
        self._check_free()
        try:
            with files.locked(self.path / ".lock", wait=False):
                yield
        except files.WriteError as error:
            if error.filename != str(self.path / ".lock"):
                raise
            raise RunError(f"cannot write to {self.path}: {error.strerror}") from None
        finally:
            with suppress(OSError):  # training was refused, and nothing else is there
                self.path.rmdir()

    def prepare(self, spec: Spec, *, resume: bool, force: bool) -> None:
        """Make the folder ready for training and write the resolved spec.

        What killed writers left behind is removed.

        Args:
            spec: What will be trained.
            resume: Go on with the run that is there.
            force: Start afresh: the files of the run that is there are deleted.

        Raises:
            RunError: If the folder holds something else, a run and neither flag is given, no run to
                resume, a run of another spec, or a damaged one; or if it cannot be written to.
        """
        if resume:
            self._check_same(spec)
            self._check_sound()
        elif self.spec.is_file():
            if not force:
                raise RunError(
                    f"{self.path} already holds a run: go on with --resume, start afresh with --force, "
                    "or choose another --out"
                )
            self._clear()
        else:
            self._check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self.path, self.figures, self.evidence)
            files.write_atomically(self.spec, files.sealed_text(spec.to_toml()).encode())
            for folder in (self.checkpoints, self.figures, self.autoencoder, self.evidence):
                if folder.exists():
                    files.check_writable(folder)
        except OSError as error:
            raise RunError(f"cannot write to {error.filename or self.path}: {error.strerror}") from None

    def discard_unless_trained(self) -> None:
        """Take back what :meth:`prepare` made, if training never got to a checkpoint."""
        if not checkpoint.exists(self.path):
            self._clear()
            with suppress(OSError):  # something else is in there too
                self.path.rmdir()

    def update_manifest(self, **entries: Any) -> None:
        """Add entries to the manifest."""
        record = files.sealed(self.read_manifest() | entries)
        files.write_atomically(self.manifest, (json.dumps(record, indent=2) + "\n").encode())

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest; empty if there is none yet.

        Raises:
            RunError: If it is damaged.
        """
        found: dict[str, Any] = _read(self.manifest, {}, "go on without it, and training writes another one")
        return found

    def add_evaluation(self, record: dict[str, Any]) -> None:
        """Append an estimate; an earlier one with the same settings gives way."""
        with self._adding():
            _add(self.evaluation, self.read_evaluations(), record)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Read the estimates; none if the run was never evaluated.

        Raises:
            RunError: If the file is damaged.
        """
        records: list[dict[str, Any]]
        records = _read(self.evaluation, [], "have them estimated again by pvae evaluate")
        for record in records:
            # Before there was a choice, every estimate drew from the guide.
            record["settings"].setdefault("proposal", "own")
        return records

    def add_diagnosis(self, record: dict[str, Any]) -> None:
        """Append a diagnosis; an earlier one with the same settings gives way."""
        with self._adding():
            _add(self.diagnosis, self.read_diagnoses(), record)

    def read_diagnoses(self) -> list[dict[str, Any]]:
        """Read the diagnoses; none if the run was never diagnosed.

        Raises:
            RunError: If the file is damaged.
        """
        found: list[dict[str, Any]] = _read(self.diagnosis, [], "have them made again by pvae diagnose")
        return found

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the rows of training; none if there are none yet.

        A last line that a kill cut off is left out.

        Raises:
            RunError: If rows that a checkpoint counts are missing or damaged.
        """
        # The final one may be of before the run was made longer.
        which = next((name for name in ("last", "final") if checkpoint.exists(self.path, name)), None)
        counted = {} if which is None else self._pointer(which)
        content = b""
        with suppress(FileNotFoundError):
            try:
                content = self.metrics.read_bytes()
            except IsADirectoryError:
                raise RunError(f"{self.metrics} is a folder, where a file must be: move it away") from None
        lines = content.splitlines(keepends=True)[: counted.get("rows", 0)]
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        if counted.get("rows_sha256", digest) != digest:
            raise RunError(
                f"{self.metrics} is damaged: its rows are not those that training wrote (once it is moved "
                f"away, pvae train {self.path} --resume goes on without them)"
            )
        return read_metrics(self.metrics) if content else []

    def checkpoint_used(self) -> dict[str, Any] | None:
        """What the checkpoint that the run is judged by has beside its tensors; ``None`` before there is any.

        It is the final one, or of a run that is not finished the best or the last.

        Raises:
            RunError: If it is damaged, or missing though the run is finished.
        """
        which = next((name for name in ("final", "best", "last") if checkpoint.exists(self.path, name)), None)
        if which not in ("final", None) and self.read_manifest().get("status") in ("finished", "early"):
            raise RunError(
                f"the run in {self.path} is finished, but {self.checkpoints / 'final.json'} is missing: "
                f"{self._again}"
            )
        return None if which is None else self._pointer(which)

    @property
    def _again(self) -> str:
        return f"pvae train {self.path} --resume makes it again from the last sound checkpoint"

    def _pointer(self, which: str) -> dict[str, Any]:
        try:
            return checkpoint.pointer(self.path, which)
        except CheckpointError as error:
            raise RunError(f"the run in {self.path} cannot be read: {error} ({self._again})") from None

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Let one process at a time add a record: each writes the records of the others too."""
        with files.locked(self.path / ".records.lock"):
            yield

    def check_ready(self, read: Callable[[], Any], *folders: Path) -> None:
        """Find out now, not after hours, whether a record can be added.

        Args:
            read: The method that reads the records that are there.
            *folders: Where else something will be written; made if absent.

        Raises:
            RunError: If they are damaged, or nothing can be written to a folder.
        """
        read()
        for folder in (self.path, *folders):
            try:
                files.check_writable(folder)
            except files.WriteError as error:
                raise RunError(f"cannot write to {folder}: {error.strerror}") from None

    def _check_free(self) -> None:
        """Refuse a folder that is somebody else's."""
        if self.spec.exists() or not self.path.exists():
            return
        if not self.path.is_dir() or any(not _is_ours(path) for path in self.path.iterdir()):
            raise RunError(f"{self.path} is in the way and is not a run folder: choose another --out")

    def _check_sound(self) -> None:
        """Refuse now what would end the run later, when it writes to these files."""
        self.read_manifest()
        self.read_evaluations()
        if not self.manifest.exists() and checkpoint.exists(self.path):
            warnings.warn(
                f"{self.manifest} is missing: the number of threads is chosen anew, and with another one the "
                "last digits of what is trained from here on may differ",
                checkpoint.CheckpointWarning,
                stacklevel=3,
            )
        kept = [*self.checkpoints.glob("*.json"), *self.checkpoints.glob("*.safetensors")]
        for path in (self.spec, self.metrics, self.density, self.report, *kept):
            if path.exists() and not path.is_file():
                raise RunError(f"{path} is a folder, where a file must be: move it away")
        for path in (self.checkpoints, self.figures, self.autoencoder, self.evidence):
            if path.exists() and not path.is_dir():
                raise RunError(f"{path} is a file, where a folder must be: move it away")

    def _check_same(self, spec: Spec) -> None:
        """Refuse to go on with other parts or other data; length and evaluation may change."""
        if not self.spec.is_file():
            raise RunError(f"there is no run to resume in {self.path}")
        before, now = load_spec(self.path).model_dump(), spec.model_dump()
        for table in before:
            if table in ("description", "evaluate"):
                continue
            old, new = before[table], now[table]
            if not (isinstance(old, dict) and isinstance(new, dict)):
                old, new = {"": old}, {"": new}
            for key in {**old, **new}:
                if old.get(key) != new.get(key) and (table, key) not in (("fit", "epochs"), ("fit", "steps")):
                    name = f"{table}.{key}" if key else table
                    raise RunError(
                        f"the run in {self.path} has {name} = {old.get(key)!r}, not {new.get(key)!r}: "
                        "resume it as it is, or choose another --out"
                    )

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for path in (self.checkpoints, self.figures, self.autoencoder, self.evidence):
            shutil.rmtree(path, ignore_errors=True)
        for path in (
            self.manifest,
            self.metrics,
            self.evaluation,
            self.diagnosis,
            self.density,
            self.report,
            self.spec,  # last, as without it the rest is no run's
        ):
            path.unlink(missing_ok=True)


class Onlooker(RunFolder):
    """The folder of a run that another process writes to: this one reads it, and writes nothing."""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Do nothing: the other process has claimed it."""
        yield

    def prepare(self, spec: Spec, *, resume: bool, force: bool) -> None:
        """Do nothing."""

    def discard_unless_trained(self) -> None:
        """Do nothing."""

    def update_manifest(self, **entries: Any) -> None:
        """Do nothing."""

    def check_ready(self, read: Callable[[], Any], *folders: Path) -> None:
        """Do nothing."""

    def add_evaluation(self, record: dict[str, Any]) -> None:
        """Do nothing."""


class OpenRun(NamedTuple):
    """A trained program with everything it was made from."""

    folder: RunFolder
    spec: Spec
    data: Data
    model: Any
    guide: Any

    @property
    def program(self) -> Program:
        """Model and guide as a pair."""
        return Program(self.model, self.guide)


def open_run(
    path: str | Path, *, root: str | Path | None = None, device: str | torch.device = "cpu"
) -> OpenRun:
    """Build the program of a run again, with the parameters that training left in it.

    Of a run that is not finished these are the best so far, or else the last.

    Args:
        path: The run folder.
        root: Folder of the data.
        device: Where the program goes.

    Raises:
        RunError: If the folder is no run, holds no checkpoint or a damaged one, or its data have changed.
        pvae.data.DataError: If the data cannot be loaded.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise RunError(f"there is no run folder {folder.path}")
    if not folder.spec.is_file():
        raise RunError(f"{folder.path} is not a run folder: it has no spec.toml")
    spec = load_spec(folder.path)
    if folder.checkpoint_used() is None:
        raise RunError(f"the run in {folder.path} has no checkpoint yet: train it with --resume")
    data = spec.load_data(root)
    trained_on = folder.read_manifest().get("data", {}).get("hash")
    if trained_on is not None and trained_on != data.protocol.hash:
        raise RunError(
            f"the run in {folder.path} was trained on protocol {trained_on}, but {data.name} is now "
            f"{data.protocol.hash}"
        )
    model, guide = spec.build(data)
    try:
        load_parameters(folder.path, model, guide)
    except CheckpointError as error:
        raise RunError(f"the run in {folder.path} cannot be opened: {error} ({folder._again})") from error
    return OpenRun(folder, spec, data, model.to(device), guide.to(device))


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a run depends on beside its spec: versions, commit, device, threads."""
    packages = {"pyro": "pyro-ppl", "numpy": "numpy", "safetensors": "safetensors"}
    # Only torch itself knows its build: the metadata of a CUDA wheel do not.
    versions = {"torch": str(torch.__version__)} | {
        name: metadata.version(package) for name, package in packages.items()
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": {"pvae": pvae.__version__, "python": platform.python_version(), **versions},
        "platform": f"{platform.system()} {platform.release()}",
        "git": _commit(),
        "device": {"type": device.type, "name": name},
        "threads": torch.get_num_threads(),
    }


def _read(path: Path, default: Any, remedy: str) -> Any:
    """Read a file of sealed records, one or a list of them; the default if there is none."""
    try:
        found = files.read_json(path)
        if type(found) is not type(default):
            raise files.DamagedFile(f"{path} is damaged: it holds something else")
        try:
            if isinstance(found, dict):
                return files.unsealed(found)
            records = [files.unsealed(record) for record in found]
            if not all(isinstance(record.get("settings"), dict) for record in records):
                raise ValueError("a record of it has no settings")
            return records
        except ValueError as error:
            raise files.DamagedFile(f"{path} is damaged: {error}") from None
    except FileNotFoundError:
        return default
    except files.DamagedFile as error:
        raise RunError(f"{error}: move it away to {remedy}") from None


def _add(path: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    kept = [other for other in records if other["settings"] != record["settings"]]
    content = json.dumps([files.sealed(one) for one in (*kept, record)]) + "\n"
    files.write_atomically(path, content.encode())


def _is_ours(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it had written anything."""
    return path.name == ".lock" or (path.name.startswith(".spec.toml.") and path.suffix == ".tmp")


def _commit() -> dict[str, Any] | None:
    """The commit of the checkout that the library runs from, if it is one."""
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str:
        done = subprocess.run([git, "-C", folder, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not ask("ls-files", "--", Path(__file__).name):
            return None  # installed below some other repository
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
