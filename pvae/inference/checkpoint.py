"""Checkpoints: a safetensors file and a JSON pointer to it, replaced atomically; nothing is unpickled."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .program import load_program_state

__all__ = ["CheckpointError", "exists", "load", "load_parameters", "save", "write_atomically"]

_FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another program."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save(out: Path, which: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Save a checkpoint under ``out/checkpoints``.

    The tensors go to a file named after the step; then the pointer ``<which>.json``, with their checksum, is
    replaced; only then are files that no pointer names removed.

    Args:
        out: The run's folder.
        which: Name of the pointer: ``"last"``, ``"best"`` or ``"final"``.
        tensors: Contiguous or not, on any device; tensors that share memory are written twice.
        meta: What is no tensor, as JSON; must hold ``"step"``.
    """
    folder = out / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    content = save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"step-{meta['step']:08d}-{digest[:8]}.safetensors"
    if not (folder / name).exists():
        write_atomically(folder / name, content)
    pointer = {"file": name, "sha256": digest, **meta}
    write_atomically(folder / f"{which}.json", json.dumps(pointer).encode())
    _remove_unnamed(folder)


def exists(out: Path, which: str = "last") -> bool:
    """Whether the run in ``out`` has a checkpoint of that name."""
    return (out / _FOLDER / f"{which}.json").is_file()


def load(out: Path, which: str = "last") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, on the CPU.

    Raises:
        CheckpointError: If it is missing, or its checksum shows that it is damaged.
    """
    pointer = out / _FOLDER / f"{which}.json"
    try:
        meta: dict[str, Any] = json.loads(pointer.read_text())
        content = (pointer.parent / meta["file"]).read_bytes()
        digest = meta["sha256"]
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint must exist, but {error.filename} is missing") from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint pointer {pointer} must be JSON written by pvae, got {error}"
        ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint {meta['file']} is damaged: its checksum is not that in {which}.json"
        )
    return load_tensors(content), meta


def load_parameters(
    out: Path | str, model: nn.Module, guide: nn.Module, which: str = "final"
) -> dict[str, Any]:
    """Load the parameters and buffers of a run into its programs.

    Args:
        out: The run's folder.
        model: A model of the run's shape; changed in place.
        guide: A guide of the run's shape; changed in place.
        which: ``"final"`` (what ``fit`` returned; for an unfinished run the best, else the last checkpoint),
            ``"best"`` or ``"last"``.

    Returns:
        The checkpoint's own notes: step, epoch, validation loss.

    Raises:
        CheckpointError: If there is no sound checkpoint, or it belongs to another program.
    """
    out = Path(out)
    if which == "final":
        which = next((w for w in ("final", "best", "last") if exists(out, w)), "final")
    tensors, meta = load(out, which)
    try:
        load_program_state(model, guide, tensors)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {meta['file']} must be of these programs, but {error}") from None
    return meta


def _remove_unnamed(folder: Path) -> None:
    named = {json.loads(pointer.read_text())["file"] for pointer in folder.glob("*.json")}
    for file in folder.glob("step-*.safetensors"):
        if file.name not in named:
            file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
