"""Checkpoints: a safetensors file and a JSON pointer to it, replaced atomically; nothing is unpickled."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pvae.files import DamagedFile, read_json, sealed, unsealed, write_atomically

from .program import load_program_state

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "adopt",
    "exists",
    "load",
    "load_parameters",
    "load_tensors_of",
    "most_bytes",
    "pointer",
    "save",
]

_FOLDER = "checkpoints"
# What a pointer may name: a file of ours, beside it.
_FILE = re.compile(r"step-\d{8,}-[0-9a-f]{8}\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another program."""


class CheckpointWarning(UserWarning):
    """Something was damaged, and training goes on from what is sound; the message is one sentence."""


def save(
    out: Path, which: str, tensors: dict[str, Tensor], meta: dict[str, Any], *, previous: str | None = None
) -> dict[str, Any]:
    """Save a checkpoint under ``out/checkpoints``.

    The tensors go to a file named after the step; then the pointer ``<which>.json``, with their checksum and
    its own, is replaced; only then are files that no pointer names removed.

    Args:
        out: The run's folder.
        which: Name of the pointer: ``"last"``, ``"best"`` or ``"final"``.
        tensors: Contiguous or not, on any device; tensors that share memory are written twice.
        meta: What is no tensor, as JSON; must hold ``"step"``. Under ``"best_state"`` it may hold what
            another call returned: the file of that pointer is kept with this one.
        previous: Name of a pointer that takes over the checkpoint which gives way, if there is one of another
            content.

    Returns:
        The file's name and checksum, and the step: enough to read the tensors back.

    Raises:
        pvae.files.WriteError: If a file cannot be written; the checkpoint that was there stands.
    """
    folder = out / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    content = save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"step-{meta['step']:08d}-{digest[:8]}.safetensors"
    body = {"file": name, "sha256": digest, **meta}
    try:
        # One of that name that is damaged is written again.
        if _digest_of(folder / name) != digest:
            write_atomically(folder / name, content)
        if previous is not None and _other(folder / f"{which}.json", body):
            write_atomically(folder / f"{previous}.json", (folder / f"{which}.json").read_bytes())
        write_atomically(folder / f"{which}.json", json.dumps(sealed(body)).encode())
    finally:
        # After a failure too: what was begun takes the place that the next attempt needs.
        _remove_unnamed(folder)
    return {"file": name, "sha256": digest, "step": meta["step"]}


def exists(out: Path, *which: str) -> bool:
    """Whether the run in ``out`` has a checkpoint of one of these names, by default one to go on from."""
    return any((out / _FOLDER / f"{name}.json").exists() for name in which or ("last", "previous"))


def pointer(out: Path, which: str = "last") -> dict[str, Any]:
    """Read what a checkpoint has beside its tensors.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = out / _FOLDER / f"{which}.json"
    try:
        meta = unsealed(read_json(path))
        _check(meta)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint must exist, but {error.filename} is missing") from None
    except DamagedFile as error:
        raise CheckpointError(f"checkpoint pointer must be sound, but {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"checkpoint pointer {path} is damaged: {reason}") from None
    return meta


def load(
    out: Path, which: str = "last", *, most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, on the CPU.

    Args:
        out: The run's folder.
        which: Name of the pointer.
        most: See :func:`load_tensors_of`.

    Raises:
        CheckpointError: If it is missing, or its checksum shows that it is damaged.
    """
    meta = pointer(out, which)
    return load_tensors_of(out, meta, which, most=most), meta


def most_bytes(*programs: nn.Module) -> int:
    """How large a checkpoint of these programs may be: parameters, what an optimiser keeps of each, averages,
    all of it in double precision if need be, and losses.
    """
    tensors = [t for program in programs for t in program.state_dict().values() if isinstance(t, Tensor)]
    return 16 * sum(t.numel() * t.element_size() for t in tensors) + 2**26


def load_tensors_of(
    out: Path, meta: Mapping[str, Any], which: str = "last", *, most: int | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        out: The run's folder.
        meta: With the file's name and checksum, as :func:`pointer` and :func:`save` return them.
        which: The pointer they come from, for the message.
        most: Bytes beyond which the file is refused unread, see :func:`most_bytes`; ``None`` for any number.

    Raises:
        CheckpointError: If the file is missing, larger, elsewhere, or its checksum shows that it is damaged.
    """
    path = out / _FOLDER / meta["file"]
    try:
        if path.resolve().parent != path.parent.resolve():
            raise CheckpointError(f"checkpoint {path} must lie in its folder, but is a link to elsewhere")
        size = path.stat().st_size
        if most is not None and size > most:
            raise CheckpointError(
                f"checkpoint {meta['file']} must have at most {most} bytes for these programs, got {size}"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint must exist, but {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != meta["sha256"]:
        raise CheckpointError(
            f"checkpoint {meta['file']} is damaged: its checksum is not that in {which}.json"
        )
    try:
        return load_tensors(content)
    # Names of types that torch does not know are looked up in a table.
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {meta['file']} must be a safetensors file, but is not: {_shown(error)}"
        ) from None


def adopt(out: Path, which: str, instead_of: str) -> None:
    """Let a pointer name what another one names."""
    folder = out / _FOLDER
    write_atomically(folder / f"{instead_of}.json", (folder / f"{which}.json").read_bytes())


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
    tensors, meta = load(out, which, most=most_bytes(model, guide))
    try:
        load_program_state(model, guide, tensors)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {meta['file']} must be of these programs, but {error}") from None
    return meta


# What is written beside the tensors, and its type. Whoever reads it counts on that.
_TYPES: dict[str, type] = dict.fromkeys(("file", "sha256", "rows_sha256"), str)
_TYPES |= dict.fromkeys(("names", "streams"), list) | {"rng": dict}
_TYPES |= dict.fromkeys(("step", "rows", "waited", "seed", "batch_size", "num_data", "processes"), int)
_NEEDED = ("file", "sha256", "step")


def _check(meta: Any) -> None:
    """Refuse what :func:`save` does not write.

    Raises:
        KeyError: If something is missing.
        ValueError: If something is of another type, or names a file that is not beside the pointer.
    """
    if not isinstance(meta, dict):
        raise ValueError("it is not a record")
    for name, kind in _TYPES.items():
        if name not in _NEEDED and name not in meta:
            continue
        value: Any = meta[name]
        if type(value) is not kind or (kind is int and not -(2**63) <= meta[name] < 2**63):
            raise ValueError(f"its {name} is {_shown(value)}")
    for name in ("best", "valid_loss"):
        if not isinstance(meta.get(name, 0.0), int | float | None):
            raise ValueError(f"its {name} is {_shown(meta[name])}")
    if not _FILE.fullmatch(meta["file"]) or meta["step"] < 0:
        raise ValueError(f"it names {_shown(meta['file'])}")
    if meta.get("best_state") is not None:
        _check(meta["best_state"])


def _shown(value: object) -> str:
    """What a message shows of a value from a file: one line, and not all of a long one."""
    text = " ".join(ascii(value)[:100].split()) if not isinstance(value, Exception) else str(value)
    return " ".join(text.split())[:200]


def _digest_of(path: Path) -> str | None:
    """Checksum of a file; ``None`` if there is none that can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _other(path: Path, body: dict[str, Any]) -> bool:
    """Whether a pointer is there, sound, and of another content."""
    try:
        before = unsealed(read_json(path))
    except (FileNotFoundError, ValueError):
        return False
    return before != unsealed(sealed(body))


def _remove_unnamed(folder: Path) -> None:
    try:
        named = {name for path in folder.glob("*.json") for name in _names(path.read_bytes())}
    except OSError:  # somebody's file that cannot be read may name any
        return
    for file in folder.glob("step-*.safetensors"):
        if file.name not in named:
            with suppress(OSError):
                file.unlink()


def _names(content: bytes) -> Iterator[str]:
    """Files that a pointer needs; a damaged one, which nobody can follow, needs none."""
    with suppress(ValueError, KeyError, TypeError):
        meta = json.loads(content)
        yield meta["file"]
        if meta.get("best_state") is not None:
            yield meta["best_state"]["file"]
