"""What is read of a run folder for its page; nothing is computed, and only the spec has to be there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvae.data import Data, DataError

from ..evidence import kept
from ..explain import explain
from ..program import SpecError
from ..runs import RunError, RunFolder
from ..spec import Spec, load_spec

__all__ = ["RunView", "view"]


@dataclass(frozen=True)
class RunView:
    """A run as its folder tells of it.

    Attributes:
        folder: The folder.
        name: What the page calls it.
        prefix: Begins the names of its pictures: letters, digits and hyphens.
        spec: The spec.
        symbols: The spec explained in symbols.
        unsized: Why sizes are missing there; empty where they are not.
        manifest: Versions, device, data; empty for a run that never began.
        metrics: Rows of training.
        evaluations: Likelihood estimates.
        records: What the parts of a diagnosis found for the run's parameters, by name.
    """

    folder: RunFolder
    name: str
    prefix: str
    spec: Spec
    symbols: str
    unsized: str
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    records: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """What the spec says it is."""
        return self.spec.description or f"{self.spec.model.kind} on {self.spec.data.name}"

    def found(self, name: str) -> Mapping[str, Any] | None:
        """The record of a part, if it is there and was not left out."""
        record = self.records.get(name)
        return None if record is None or "left_out" in record else record


def view(path: Path, name: str, prefix: str, root: Path | None = None) -> RunView:
    """Read a run folder.

    Args:
        path: The folder.
        name: What the page calls it.
        prefix: Begins the names of its pictures.
        root: Folder of the data files, without which the spec is explained without sizes.

    Raises:
        RunError: If it is no run folder, or a file in it is damaged.
        SpecError: If its spec cannot be read.
    """
    folder = RunFolder(path)
    if not folder.spec.is_file():
        raise RunError(f"{path} is not a run folder: it has no spec.toml")
    spec = load_spec(path)
    if folder.checkpoint_used() is not None and not folder.manifest.exists():
        raise RunError(f"{folder.manifest} is missing: pvae train {path} --resume writes another one")
    data: Data | None = None
    unsized = ""
    try:
        data = spec.load_data(root)
        symbols = explain(spec, data)
    except (DataError, SpecError) as error:
        symbols, unsized = explain(spec, None), str(error)
    return RunView(
        folder,
        name,
        prefix,
        spec,
        symbols,
        unsized,
        folder.read_manifest(),
        folder.read_metrics(),
        folder.read_evaluations(),
        kept(folder, strict=True),
    )
