"""Runs side by side: one table for each protocol, one row for each experiment, spread over its seeds."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runs import RunError, RunFolder
from .spec import load_spec

__all__ = ["HEADER", "Row", "compare", "to_markdown"]

HEADER = (
    "experiment",
    "seeds",
    "epochs",
    "log p(x), nats",
    "over seeds",
    "over data",
    "ELBO",
    "particles",
    "data",
    "k-hat high",
    "minutes",
    "device",
)


@dataclass(frozen=True)
class Row:
    """One experiment: runs whose specs differ in the seed alone, evaluated in the same way.

    Attributes:
        name: Name of the run folders, without the seed.
        protocol: Name, part and hash of the data that were scored, and whether given their labels.
        seeds: The runs' seeds.
        epochs: Length of training.
        log_likelihoods: Mean bound of each seed, nats per datum.
        elbos: Mean evidence lower bound of each seed, nats per datum.
        standard_error: Mean standard error over data, nats.
        num_particles: Particles per datum.
        num_data: Data scored.
        khat_shares: Share of data with an unreliable k-hat, each seed.
        minutes: Mean wall time of training.
        device: Where the runs were trained.
        proposal: What z was drawn from: ``"own"`` or ``"laplace"``, with the name of the guide's own where it
            has one. Different ones are rows of their own and never averaged.
    """

    name: str
    protocol: str
    seeds: tuple[int, ...]
    epochs: float
    log_likelihoods: tuple[float, ...]
    elbos: tuple[float, ...]
    standard_error: float
    num_particles: int
    num_data: int
    khat_shares: tuple[float, ...]
    minutes: float
    device: str
    proposal: str

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of :data:`HEADER`."""
        spread = f"± {statistics.stdev(self.log_likelihoods):.2f}" if len(self.seeds) > 1 else "one seed"
        return (
            self.name,
            ", ".join(map(str, self.seeds)),
            f"{self.epochs:g}",
            f"{statistics.fmean(self.log_likelihoods):.2f}",
            spread,
            f"± {self.standard_error:.2f}",
            f"{statistics.fmean(self.elbos):.2f}",
            str(self.num_particles),
            str(self.num_data),
            f"{100 * statistics.fmean(self.khat_shares):.0f} %",
            f"{self.minutes:.1f}",
            self.device,
        )


def compare(paths: Sequence[str | Path]) -> dict[str, list[Row]]:
    """Read the evaluations of some runs and put what may be compared together.

    Args:
        paths: Run folders; their checkpoints are not needed.

    Returns:
        Rows by protocol; numbers of different protocols never share a table. The best row comes first.

    Raises:
        RunError: If a folder is no run, or was never evaluated.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        for record in _records(Path(path)):
            groups[record["key"]].append(record)
    tables: dict[str, list[Row]] = defaultdict(list)
    for records in groups.values():
        row = _row(records)
        tables[row.protocol].append(row)
    return {
        protocol: sorted(rows, key=lambda row: -statistics.fmean(row.log_likelihoods))
        for protocol, rows in sorted(tables.items())
    }


def to_markdown(rows: Iterable[Row]) -> str:
    """Write rows as a Markdown table, with a last column for the proposals where any is named."""
    rows = list(rows)
    named = any(row.proposal != "own" for row in rows)
    header = (*HEADER, *["proposal"] * named)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join((*row.cells(), *[row.proposal] * named))} |" for row in rows]
    return "\n".join(lines)


def _records(path: Path) -> list[dict[str, Any]]:
    """The evaluations of one run, each with what makes it comparable as its key."""
    folder = RunFolder(path)
    if not folder.spec.is_file():
        raise RunError(f"{path} is not a run folder: it has no spec.toml")
    evaluations, manifest = folder.read_evaluations(), folder.read_manifest()
    if not evaluations:
        raise RunError(f"the run in {path} was never evaluated: pvae evaluate {path}")
    spec = load_spec(path).model_dump(mode="json")
    seed = spec["fit"].pop("seed")
    spec.pop("evaluate")
    name = path.resolve().name.removesuffix(f"-{seed}")
    return [
        {
            "key": (name, json.dumps(spec, sort_keys=True), json.dumps(e["settings"], sort_keys=True)),
            "name": name,
            "seed": seed,
            "epochs": _epochs(manifest, spec),
            "evaluation": e,
            "minutes": manifest["seconds"] / 60,
            "device": f"{manifest['device']['name']}, {manifest['threads']} thread(s)",
        }
        for e in evaluations
    ]


def _epochs(manifest: dict[str, Any], spec: dict[str, Any]) -> float:
    """Passes over the training data that were really made."""
    per_epoch = manifest["data"]["sizes"]["train"] // spec["fit"]["batch_size"]
    return round(manifest["steps"] / per_epoch, 1)


def _row(records: list[dict[str, Any]]) -> Row:
    records = sorted(records, key=lambda record: record["seed"])
    first, estimates = records[0], [record["evaluation"] for record in records]
    protocol = estimates[0]["protocol"]
    return Row(
        name=first["name"],
        protocol=f"{protocol['name']} {protocol['part']}, {protocol['subset'] or 'all'}, {protocol['hash']}"
        # Densities of x and of x given y are different quantities of the same data.
        + (", given y" if estimates[0].get("conditional", False) else ""),
        seeds=tuple(record["seed"] for record in records),
        epochs=statistics.fmean(record["epochs"] for record in records),
        log_likelihoods=tuple(e["log_likelihood"] for e in estimates),
        elbos=tuple(e["elbo"] for e in estimates),
        standard_error=statistics.fmean(e["standard_error"] for e in estimates),
        num_particles=estimates[0]["num_particles"],
        num_data=estimates[0]["num_data"],
        khat_shares=tuple(e["khat_share"] for e in estimates if e["khat_share"] is not None)
        or (float("nan"),),
        minutes=statistics.fmean(record["minutes"] for record in records),
        device=first["device"],
        proposal=_proposal(estimates[0]),
    )


def _proposal(evaluation: dict[str, Any]) -> str:
    """What z was drawn from; a guide without a name for its own has nothing to tell apart."""
    drawn, name = evaluation["settings"]["proposal"], evaluation.get("proposal")
    return drawn if name in (None, drawn) else f"{drawn} ({name})"
