"""What a study is: configurations times seeds, each cell run once, in any order."""

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pvae.data
from pvae.data import Data
from pvae.inference import NonFiniteLoss

from ..spec import Spec, load_spec

if TYPE_CHECKING:
    from .ledger import Record

__all__ = [
    "SCALES",
    "AnyStudy",
    "Cell",
    "Context",
    "Metrics",
    "Outcome",
    "Scale",
    "Source",
    "Study",
    "plain",
]

SCALES = ("smoke", "cpu", "full")
"""How much is spent: seconds, under two hours of two cores, or a day or a GPU."""

# Engines that train to the same bytes: which of them did is no part of a cell.
_SAME_BYTES = ("auto", "traced", "eager")

Metrics = dict[str, float | None]
"""What a cell measured, by name; ``None`` where a number does not exist."""


@dataclass(frozen=True)
class Source:
    """A data set of a study, with the recipe that trains on it.

    Attributes:
        name: Value of the factor ``data``.
        recipe: Name of the recipe.
        overrides: Changes of the recipe that all cells share, such as the length of training.
        levels: Grey levels that the data were recorded in, for bits per dimension.
        seconds: Expected wall time of a cell on one core, before any cell has been timed.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    levels: int = 256
    seconds: float = 60.0


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        sources: The data sets.
        seeds: Seeds of every configuration.
        num_data: Held-out data whose likelihood is estimated, spread evenly over the test split.
        num_particles: Importance samples for each of them.
        num_images: Images on each side of a Fréchet distance, at most half of the test split.
        classifier_epochs: Training of the classifier whose features carry the Fréchet distances.
    """

    sources: tuple[Source, ...]
    seeds: tuple[int, ...]
    num_data: int
    num_particles: int
    num_images: int
    classifier_epochs: int

    def settings(self) -> dict[str, int]:
        """What changes the meaning of a number: cells that differ in it never share a table."""
        return {key: value for key, value in asdict(self).items() if key not in ("sources", "seeds")}

    def source(self, name: str) -> Source:
        """Return a data set by its name."""
        return next(source for source in self.sources if source.name == name)


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed, or one reference measurement.

    Attributes:
        factors: What sets the configuration apart, ``data`` first.
        seed: Seed of training and measurement.
        recipe: Recipe that it starts from; empty where nothing is trained.
        overrides: Changes of the recipe.
        seconds: Expected wall time on one core.
    """

    factors: Mapping[str, str]
    seed: int
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    seconds: float = field(default=60.0, compare=False)

    @property
    def name(self) -> str:
        """Values of the factors and the seed, such as ``mnist/normal/x/batch/0``."""
        return "/".join([*self.factors.values(), str(self.seed)])

    def spec(self) -> Spec:
        """Return the checked spec.

        Raises:
            SpecError: If the recipe or a change of it is wrong.
        """
        return load_spec(self.recipe, [*self.overrides, f"fit.seed={self.seed}"])

    def key(self, settings: Mapping[str, int]) -> str:
        """Twelve hexadecimal digits that change with all that the cell's numbers depend on but code.

        Keys at their defaults are left out, so that a ledger outlives new ones, as are engines that train to
        the same bytes.
        """
        spec = self.spec().model_dump(mode="json", exclude_defaults=True) if self.recipe else {}
        for table in ("description", "evaluate"):  # a study measures by itself
            spec.pop(table, None)
        if spec.get("fit", {}).get("engine") in _SAME_BYTES:
            del spec["fit"]["engine"]
        text = json.dumps([dict(self.factors), self.seed, spec, dict(settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Context:
    """Where cells run.

    Attributes:
        out: Folder of the study.
        scale: Its size.
        device: Where programs are trained and measured.
        root: Folder of the data files, the environment's ``PVAE_DATA`` if absent.
        download: Whether missing data files may be fetched.
    """

    out: Path
    scale: Scale
    device: torch.device
    root: Path | None = None
    download: bool = False

    @property
    def shared(self) -> Path:
        """Folder of what several cells use: classifiers, autoencoders."""
        return self.out / "shared"


@dataclass(frozen=True)
class Outcome:
    """What came of running a cell.

    Attributes:
        protocol: Name and hash of the data; records that share them stand in one table.
        metrics: What was measured; empty where training diverged.
        failure: Why there are no metrics, or ``None``.
    """

    protocol: dict[str, str]
    metrics: Metrics
    failure: str | None = None


class AnyStudy(ABC):
    """The cells of a study, how one is run, and what is reported of all.

    A study is sent to worker processes, so it lives in a module that can be imported.

    Attributes:
        name: Name on the command line.
        about: What it asks, one line without a full stop.
        scales: Its sizes, by the names in :data:`SCALES`.
    """

    name: str
    about: str
    scales: Mapping[str, Scale]

    @abstractmethod
    def cells(self, scale: Scale) -> list[Cell]:
        """List the cells in the order in which they run."""

    @abstractmethod
    def run(self, cell: Cell, context: Context) -> Outcome:
        """Do all the work of one cell.

        Raises:
            SpecError: If it cannot be built.
            pvae.data.DataError: If its data cannot be loaded.
        """

    @abstractmethod
    def tables(self, records: Sequence["Record"]) -> list[str]:
        """Write Markdown tables of records that may be compared with one another."""

    @abstractmethod
    def figures(self, records: Sequence["Record"], stem: Path, title: str) -> list[Path]:
        """Draw records that may be compared with one another, into PNG files named ``stem-*``."""

    def selected(self, scale: Scale, only: Iterable[str] = ()) -> list[Cell]:
        """List the cells whose name has every part that is asked for.

        Args:
            scale: Size of the study.
            only: Parts of the names, such as ``mnist`` or ``mnist/normal``; all cells if empty.
        """
        parts = list(only)
        return [cell for cell in self.cells(scale) if all(_within(part, cell.name) for part in parts)]


class Study(AnyStudy):
    """A study whose cells are trainings of a recipe."""

    @abstractmethod
    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train and measure one cell.

        Raises:
            pvae.inference.NonFiniteLoss: If training diverges, which is recorded as the cell's result.
        """

    def run(self, cell: Cell, context: Context) -> Outcome:
        """Load the data of a cell's spec, train and measure; see :meth:`AnyStudy.run`."""
        spec = cell.spec()
        data = _load(json.dumps(spec.data.arguments()), context.root, context.download)
        protocol = {"name": data.name, "hash": data.test.protocol.hash}
        try:
            return Outcome(protocol, self.measure(cell, spec, data, context))
        except NonFiniteLoss as error:
            return Outcome(protocol, {}, " ".join(str(error).split()))


@functools.lru_cache(maxsize=1)
def _load(arguments: str, root: Path | None, download: bool) -> Data:
    """Load data once for a process: neighbouring cells mostly share them."""
    return pvae.data.load(**json.loads(arguments), root=root, download=download)


def _within(part: str, name: str) -> bool:
    """Whether ``part`` stands in ``name`` between slashes: ``x`` is in ``mnist/x/0``, not in ``max/0``."""
    return f"/{part.strip('/')}/" in f"/{name}/"


def plain(value: Any) -> float | None:
    """Turn a number, or a tensor that holds one, into what JSON can hold: neither NaN nor infinity."""
    number = float(value)
    return number if math.isfinite(number) else None
