"""Runs side by side: one table for each protocol, one row for each experiment, spread over its seeds."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
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
        num_steps: Steps T of the chain along which a density was estimated, where one was.
        calibrated: Whether that chain's reverse variances were measured.
        num_draws: Draws of u of a nested bound, which is a row of its own; ``None`` for the full one.
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
    num_steps: int | None = None
    calibrated: bool | None = None
    num_draws: int | None = None

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
            f"{100 * statistics.fmean(self.khat_shares):.0f} %" if self.num_draws is None else "-",
            f"{self.minutes:.1f}",
            self.device,
        )

    @property
    def bound(self) -> str:
        """Which bound it is."""
        return "full" if self.num_draws is None else f"nested, {self.num_draws} of u"

    @property
    def steps(self) -> str:
        """T, as text; a dash where every density is exact."""
        if self.num_draws is not None:
            return "continuous"
        if self.num_steps is None:
            return "-"
        return f"{self.num_steps} {'calibrated' if self.calibrated else 'uncalibrated'}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, without those of a chain or of a nested bound where there
        is none.
        """
        values = asdict(self)
        if self.num_draws is not None:
            del values["khat_shares"]
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in ("num_steps", "calibrated", "num_draws")
        }


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
    """Write rows as a Markdown table, with last columns for what only some models have: a density along a
    chain of T steps, under which bounds are of two kinds, and named proposals.
    """
    rows = list(rows)
    columns = [(name, [row.cells()[i] for row in rows]) for i, name in enumerate(HEADER)]
    if any(row.steps != "-" for row in rows):
        columns += [("bound", [row.bound for row in rows]), ("T", [row.steps for row in rows])]
    if any(row.proposal != "own" for row in rows):
        columns += [("proposal", [row.proposal for row in rows])]
    lines = [[name for name, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    written = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([written[0], f"|{'---|' * len(columns)}", *written[1:]])


def _records(path: Path) -> list[dict[str, Any]]:
    """The evaluations of one run, each with what makes it comparable as its key."""
    folder = RunFolder(path)
    if not folder.spec.is_file():
        raise RunError(f"{path} is not a run folder: it has no spec.toml")
    evaluations, manifest = folder.read_evaluations(), folder.read_manifest()
    if not evaluations:
        raise RunError(f"the run in {path} was never evaluated: pvae evaluate {path}")
    if "steps" not in manifest:
        raise RunError(
            f"{folder.manifest} is missing or of a run that is not finished: pvae train {path} --resume"
        )
    spec = load_spec(path).model_dump(mode="json")
    seed = spec["fit"].pop("seed")
    spec.pop("evaluate")
    name = path.resolve().name.removesuffix(f"-{seed}")
    return [
        {
            "key": (
                name,
                *(json.dumps(part, sort_keys=True) for part in (spec, e["settings"], _chain(e))),
            ),
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
        khat_shares=tuple(e["khat_share"] for e in estimates if e.get("khat_share") is not None)
        or (float("nan"),),
        minutes=statistics.fmean(record["minutes"] for record in records),
        device=first["device"],
        proposal=_proposal(estimates[0]),
        **_chain(estimates[0]),
    )


def _chain(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What a bound on a density that is only estimated depends on, beside its settings."""
    return {name: evaluation.get(name) for name in ("num_steps", "calibrated", "num_draws")}


def _proposal(evaluation: dict[str, Any]) -> str:
    """What z was drawn from; a guide without a name for its own has nothing to tell apart."""
    drawn, name = evaluation["settings"]["proposal"], evaluation.get("proposal")
    return drawn if name in (None, drawn) else f"{drawn} ({name})"
