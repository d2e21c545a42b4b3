"""A run folder: what is written beside a trained program, and the way back to the program."""

import json
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pvae
from pvae.data import Data
from pvae.inference import CheckpointError, load_parameters
from pvae.inference.checkpoint import exists, write_atomically

from .program import Program
from .spec import Spec, load_spec

__all__ = ["OpenRun", "RunError", "RunFolder", "environment", "open_run"]


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

    def prepare(self, spec: Spec, *, resume: bool, force: bool) -> None:
        """Make the folder ready for training and write the resolved spec.

        Args:
            spec: What will be trained.
            resume: Go on with the run that is there.
            force: Start afresh: the files of the run that is there are deleted.

        Raises:
            RunError: If the folder holds something else, a run and neither flag is given, no run to
                resume, or a run of another spec.
        """
        if resume:
            self._check_same(spec)
        elif self.spec.is_file():
            if not force:
                raise RunError(
                    f"{self.path} already holds a run: go on with --resume, start afresh with --force, "
                    "or choose another --out"
                )
            self._clear()
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} is in the way and is not a run folder: choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.spec, spec.to_toml().encode())
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}") from None

    def discard_unless_trained(self) -> None:
        """Take back what :meth:`prepare` made, if training never got to a checkpoint."""
        if not exists(self.path):
            self._clear()
            with suppress(OSError):  # something else is in there too
                self.path.rmdir()

    def update_manifest(self, **entries: Any) -> None:
        """Add entries to the manifest."""
        write_atomically(
            self.manifest, (json.dumps(self.read_manifest() | entries, indent=2) + "\n").encode()
        )

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest; empty if there is none yet."""
        return _read_json(self.manifest) if self.manifest.is_file() else {}

    def add_evaluation(self, record: dict[str, Any]) -> None:
        """Append an estimate; an earlier one with the same settings gives way."""
        records = self.read_evaluations()
        kept = [other for other in records if other["settings"] != record["settings"]]
        write_atomically(self.evaluation, (json.dumps([*kept, record]) + "\n").encode())

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Read the estimates; none if the run was never evaluated."""
        records = _read_json(self.evaluation) if self.evaluation.is_file() else []
        for record in records:
            # Before there was a choice, every estimate drew from the guide.
            record["settings"].setdefault("proposal", "own")
        return records

    def add_diagnosis(self, record: dict[str, Any]) -> None:
        """Append a diagnosis; an earlier one with the same settings gives way."""
        records = self.read_diagnoses()
        kept = [other for other in records if other["settings"] != record["settings"]]
        write_atomically(self.diagnosis, (json.dumps([*kept, record]) + "\n").encode())

    def read_diagnoses(self) -> list[dict[str, Any]]:
        """Read the diagnoses; none if the run was never diagnosed."""
        return _read_json(self.diagnosis) if self.diagnosis.is_file() else []

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
            self.spec,
            self.manifest,
            self.metrics,
            self.evaluation,
            self.diagnosis,
            self.density,
            self.report,
        ):
            path.unlink(missing_ok=True)


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
    if not any(exists(folder.path, which) for which in ("final", "best", "last")):
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
        raise RunError(f"the run in {folder.path} cannot be opened: {error}") from error
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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{path} is damaged: it is not JSON") from None


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
