"""The whole judgement of a run, part by part within a budget; what was found is kept, whatever happens."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn

from pvae.data import DataError, Split
from pvae.evaluation import log_likelihood
from pvae.files import DamagedFile, read_json, sealed, unsealed, write_atomically

from .diagnosing import Wanted, spread
from .evidence_figures import Drawing, Raster
from .program import SpecError
from .registry import nearest
from .runs import OpenRun, RunError, RunFolder

__all__ = [
    "BUDGETS",
    "Budget",
    "Job",
    "Judgement",
    "Part",
    "Size",
    "certificate",
    "choose",
    "judge",
    "kept",
    "planned",
]


class Budget(NamedTuple):
    """How long a diagnosis may take.

    Attributes:
        name: What it is called.
        minutes: About so many, of one core's time where the machine is busy with other things.
        rank: Its place among the budgets: what was found within a larger one serves a smaller one.
    """

    name: str
    minutes: int
    rank: int


BUDGETS: dict[str, Budget] = {
    name: Budget(name, minutes, rank)
    for rank, (name, minutes) in enumerate((("quick", 1), ("standard", 10), ("full", 60)))
}
"""The budgets by name."""

# Sizes are halved until a part fits, so that they do not hang on the noise of a timing.
_LEAST_SHARE = 2.0**-10
# A pilot's data, its particles to begin with (enough for a k-hat, whose package is slow to load), and the
# seconds that tell more than a timer's noise.
_PILOT_DATA, _PILOT_PARTICLES, _PILOT_SECONDS = 8, 32, 0.2


class Size(NamedTuple):
    """A number that costs time.

    Attributes:
        quick: Its value within the quick budget.
        standard: Within the standard one.
        full: Within the full one.
        least: Its least value, where a pass of the networks is slow.
    """

    quick: int
    standard: int
    full: int
    least: int


Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Job:
    """A run and what is wanted of it.

    Attributes:
        run: The run.
        wanted: What was asked for.
        budget: The budget.
        root: Folder of the data files.
        download: Whether missing outside data may be fetched.
        progress: Whether to show bars; by default on a terminal only.
        records: What other parts have found so far, by name.
    """

    run: OpenRun
    wanted: Wanted
    budget: Budget
    root: Path | None = None
    download: bool = False
    progress: bool | None = None
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def test(self, num: int | None = None) -> Split:
        """The test part, or at most so many data spread evenly over it."""
        whole = self.run.data.test
        return whole if num is None else spread(whole, num)

    def found(self, name: str) -> Mapping[str, Any] | None:
        """What a part has found, if it is there and was not left out."""
        record = self.records.get(name)
        return None if record is None or "left_out" in record else record["result"]


class Part(Protocol):
    """One part of a judgement.

    Attributes:
        name: Names its file.
        heading: Stands above what it found.
        about: What it is, in a few words.
        sizes: What makes it dear.
    """

    name: ClassVar[str]
    heading: ClassVar[str]
    about: ClassVar[str]
    sizes: ClassVar[Mapping[str, Size]]

    def applies(self, job: Job) -> str | None:
        """Say in one sentence why the part is left out; ``None`` if it is not."""

    def rows(self, sizes: Sizes) -> float:
        """How many passes of one datum through the decoder it takes, about."""

    def asked(self, wanted: Wanted) -> dict[str, Any]:
        """What of the wishes it depends on."""

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Compute it: ``text`` for a reader, ``result`` in types that JSON knows.

        Raises:
            ValueError: If the programs do not allow it; the message is the reason.
            NotImplementedError: The same.
        """

    def drawings(self, record: Mapping[str, Any]) -> list[Drawing | Raster]:
        """What to draw of what it found."""


@dataclass(frozen=True)
class Judgement:
    """What is known of a run after a diagnosis.

    Attributes:
        records: By part what it found, or why it was left out.
        unfinished: Parts that the budget left no time for, by name, with what would.
        certificate: The likelihood with its evidence in one line; ``None`` without a likelihood.
        seconds: Wall time of this call.
        share: Share of the usual sizes that fitted into the budget.
    """

    records: dict[str, dict[str, Any]]
    unfinished: dict[str, str]
    certificate: str | None
    seconds: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold, without those of every datum."""
        return {
            "evidence": {name: _brief(record) for name, record in self.records.items()},
            "unfinished": self.unfinished,
            "certificate": self.certificate,
            "share": self.share,
            "seconds": self.seconds,
        }


def judge(
    run: OpenRun,
    wanted: Wanted | None = None,
    *,
    budget: str = "quick",
    only: Sequence[str] = (),
    fresh: bool = False,
    root: Path | None = None,
    download: bool = False,
    progress: bool | None = None,
    begun: Callable[[Part, int, int], None] | None = None,
    ended: Callable[[Part, dict[str, Any], bool], None] | None = None,
) -> Judgement:
    """Judge a run part by part; what is there already, of the same parameters, is not computed again.

    Each part has a file in the ``evidence`` folder of the run. Parts are taken in their order; none is begun
    once the budget is spent, and the same call goes on with those that are left. A part that does not apply
    is left out, with its reason. Where the networks are slow, all sizes are cut by one power of two, found by
    a short pilot, down to their least values; they are in the record. A part that would take more than the
    whole budget by itself waits for a larger one.

    Args:
        run: The run.
        wanted: What to do; without outside data if absent.
        budget: ``"quick"``, ``"standard"`` or ``"full"``.
        only: Names of the parts; all that were asked for if empty.
        fresh: Whether to compute again what is there.
        root: Folder of the data files.
        download: Whether missing outside data may be fetched.
        progress: Whether to show bars; by default on a terminal only.
        begun: Told of every part that is begun, with its number and how many there are.
        ended: Told of every part's record, and whether it was there before.

    Raises:
        SpecError: If there is no such budget or part, or as :func:`pvae.experiments.diagnosing.diagnose`.
        RunError: If a file of the run is damaged, or nothing can be written to its folder.
        pvae.data.DataError: If outside data cannot be loaded.
    """
    wanted = wanted or Wanted()
    within, chosen = _budget(budget), choose(only, wanted)
    start, clock = time.monotonic(), _Clock()
    store, state = run.folder.evidence, parameters_of(run.folder)
    run.folder.check_ready(run.folder.read_diagnoses, store, run.folder.figures)
    records: dict[str, dict[str, Any]] = {} if fresh else dict(kept(run.folder))
    job = Job(run, wanted, within, root, download, progress, records)
    known = {part.name for part in chosen if _serves(records.get(part.name), part.asked(wanted), within)}
    found: dict[str, dict[str, Any]] = {}
    unfinished: dict[str, str] = {}
    pace: _Pace | None = None
    for number, part in enumerate(chosen, 1):
        if part.name in known:
            found[part.name] = records[part.name]
            if ended is not None:
                ended(part, records[part.name], True)
            continue
        if clock.seconds > 60 * within.minutes:
            unfinished[part.name] = "the budget was spent, the same command goes on with it"
            continue
        reason, sizes = part.applies(job), {}
        if reason is None and part.sizes:
            if pace is None:
                left = [one for one in chosen if one.name not in known and one.applies(job) is None]
                pace = _Pace.measured(run, left, within)
            sizes = pace.sizes(part)
            seconds = pace.seconds(part)
            if seconds > 60 * within.minutes:
                unfinished[part.name] = (
                    f"it takes about {seconds / 60:.1f} minutes at its smallest, give it a larger --budget"
                )
                continue
        if begun is not None:
            begun(part, number, len(chosen))
        record = _record(part, job, reason, sizes, state)
        store.mkdir(parents=True, exist_ok=True)
        write_atomically(store / f"{part.name}.json", (json.dumps(sealed(record)) + "\n").encode())
        records[part.name] = found[part.name] = record
        if ended is not None:
            ended(part, record, False)
    seconds = round(time.monotonic() - start, 3)
    share = 1.0 if pace is None else pace.share
    return Judgement(found, unfinished, certificate(records), seconds, share)


def choose(only: Sequence[str], wanted: Wanted) -> list[Part]:
    """Return the parts by their names, in their order; by default all that have what they need.

    Raises:
        SpecError: If there is no such part.
    """
    from .evidence_parts import PARTS

    for name in only:
        if name not in PARTS:
            raise SpecError(f"there is no part '{name}' of a diagnosis{nearest(name, PARTS)}")
    if only:
        return [part for name, part in PARTS.items() if name in only]
    return [part for name, part in PARTS.items() if name != "ood" or wanted.ood]


def planned(
    sizes: Mapping[str, Size], budget: Budget, share: float, limits: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the sizes of a part within a budget.

    Args:
        sizes: The usual ones.
        budget: The budget.
        share: What they are cut to: the first gives way first, to its least value.
        limits: What there is of some of them.
    """
    found = {}
    for name, size in sizes.items():
        usual = min(size[budget.rank], (limits or {}).get(name, size[budget.rank]))
        found[name] = min(usual, max(size.least, math.ceil(usual * share)))
        share = min(1.0, share * usual / found[name]) if usual else share
    return found


def kept(folder: RunFolder, *, strict: bool = False) -> dict[str, dict[str, Any]]:
    """Read what the parts found for the parameters that the run has now.

    A file that is damaged, or of other parameters, counts as absent: its part is to be computed.

    Args:
        folder: The run folder.
        strict: Whether a damaged file is refused instead.

    Raises:
        RunError: If the run's checkpoint is damaged, or a file is and ``strict`` is true.
    """
    found: dict[str, dict[str, Any]] = {}
    state = parameters_of(folder)
    if state is None or not folder.evidence.is_dir():
        return found
    for path in sorted(folder.evidence.glob("*.json")):
        try:
            record = _unsealed(path)
        except DamagedFile as error:
            if strict:
                raise RunError(
                    f"{error}: pvae diagnose {folder.path} --only {path.stem} computes it again"
                ) from None
            continue
        if record.get("parameters") == state and record.get("part") == path.stem:
            found[path.stem] = record
    return found


def parameters_of(folder: RunFolder) -> str | None:
    """Name the parameters that a run has now, by their checksum; ``None`` before the first checkpoint.

    Raises:
        RunError: If the checkpoint is damaged.
    """
    used = folder.checkpoint_used()
    return None if used is None else str(used["sha256"])


def certificate(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Write the likelihood of a run with its evidence in one line.

    The bound is importance-weighted. ``AIS`` is what an annealed bound of the same data adds to it, ``BDMC``
    the upper end of the interval of what that bound can miss on data that the model made.

    Args:
        records: What the parts found.

    Returns:
        The line; ``None`` without a likelihood.
    """
    found = {name: record["result"] for name, record in records.items() if "left_out" not in record}
    if "likelihood" not in found:
        return None
    own = found["likelihood"]["estimates"][found["likelihood"]["best"]]
    drawn = f", proposal {own['proposal']}" if own["proposal"] else ""
    if own.get("num_steps") is not None:
        drawn += f", T = {own['num_steps']}"
    said = [f"IWAE-{own['num_particles']} on {own['num_data']} data{drawn}, ELBO {own['elbo']:.2f}"]
    if own["khat_share"] is not None:
        said.append(f"k-hat high for {100 * own['khat_share']:.1f} %")
    if "annealing" in found:
        gain = found["annealing"]["gain"]
        said.append(
            f"AIS {gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] on "
            f"{found['annealing']['num_data']} of them"
        )
    if "bidirectional" in found:
        said.append(
            f"BDMC gap <= {max(0.0, found['bidirectional']['gap']['high']):.3f} nats on simulated data"
        )
    missing = {"annealing": "AIS", "bidirectional": "BDMC"}
    left = [word for name, word in missing.items() if "left_out" in records.get(name, {})]
    if left:
        said.append(f"{' and '.join(left)} left out")
    density = "log p(x | y)" if own["conditional"] else "log p(x)"
    error = "" if own["standard_error"] is None else f" ± {own['standard_error']:.2f}"
    return f"{density} >= {own['log_likelihood']:.2f}{error} nats ({'; '.join(said)})"


def proposals_of(job: Job) -> dict[str, nn.Module]:
    """What latents of a run are drawn from, by name, as ``pvae evaluate`` has it by default."""
    from .jobs import proposals

    return proposals(job.run.program, job.run.spec.evaluate.model_copy(update={"proposal": "auto"}))


class _Clock:
    """Seconds spent: by the wall, or of the processor where others keep it busy."""

    def __init__(self) -> None:
        self._wall, self._processor = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        return min(time.monotonic() - self._wall, time.process_time() - self._processor)


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise SpecError(f"unknown --budget '{name}'{nearest(name, BUDGETS)}")
    return BUDGETS[name]


def _serves(record: Mapping[str, Any] | None, asked: Mapping[str, Any], budget: Budget) -> bool:
    """Whether what is kept answers what is asked."""
    if record is None:
        return False
    rank = BUDGETS[record["budget"]].rank if record["budget"] in BUDGETS else -1
    return bool(record["asked"] == _plain(asked)) and rank >= budget.rank


@dataclass(frozen=True)
class _Pace:
    """How fast a run's networks are, and what follows for the sizes."""

    seconds_of_a_row: float
    share: float
    budget: Budget
    limits: Mapping[str, int]

    @classmethod
    def measured(cls, run: OpenRun, parts: Sequence[Part], budget: Budget) -> "_Pace":
        """Time a pass, and cut all sizes by the least power of two by which the parts fit."""
        test, train = len(run.data.test), len(run.data.train)
        limits = {"data": test, "samples": min(test, train), "training": train}
        pace = cls(_seconds_of_a_row(run), 1.0, budget, limits)
        while sum(map(pace.seconds, parts)) > 60 * budget.minutes and pace.share > _LEAST_SHARE:
            pace = replace(pace, share=pace.share / 2)
        return pace

    def sizes(self, part: Part) -> dict[str, int]:
        return planned(part.sizes, self.budget, self.share, self.limits)

    def seconds(self, part: Part) -> float:
        return part.rows(self.sizes(part)) * self.seconds_of_a_row if part.sizes else 0.0


def _seconds_of_a_row(run: OpenRun) -> float:
    """Time a pass of one datum through the model, as one of many in a batch."""
    some, particles = run.data.test[:_PILOT_DATA], _PILOT_PARTICLES
    try:
        # The first pass loads what it needs, and larger ones cost less for each row.
        while True:
            clock = _Clock()
            log_likelihood(*run.program, some, num_particles=particles, progress=False)
            seconds = clock.seconds
            if (seconds > _PILOT_SECONDS and particles > _PILOT_PARTICLES) or particles >= 4096:
                return seconds / (len(some) * particles)
            particles *= 4
    except ValueError:
        return 0.0  # no likelihood, of which its own part says why


def _record(part: Part, job: Job, reason: str | None, sizes: Sizes, state: str | None) -> dict[str, Any]:
    """Run a part, or write down why it is left out."""
    start, clock = time.monotonic(), _Clock()
    found: dict[str, Any] = {}
    if reason is None:
        try:
            found = part.run(job, sizes)
        except (SpecError, DataError, RunError):
            raise
        except (ValueError, NotImplementedError) as error:
            reason = str(error)
    plain: dict[str, Any] = _plain(
        {
            "part": part.name,
            "parameters": state,
            "budget": job.budget.name,
            "asked": part.asked(job.wanted),
            "sizes": dict(sizes),
            "seconds": round(time.monotonic() - start, 3),
            "processor_seconds": round(clock.seconds, 3),
            **({"left_out": reason} if reason is not None else found),
        }
    )
    return plain


def _unsealed(path: Path) -> dict[str, Any]:
    """Read the file of a part.

    Raises:
        DamagedFile: If it is damaged.
    """
    try:
        return unsealed(read_json(path))
    except DamagedFile:
        raise
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None


def _plain(value: Any) -> Any:
    """Replace what JSON does not know: numbers that are not finite by ``None``, tuples by lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what there is of every datum, wherever in it."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items() if key not in ("per_datum", "pictures")}
        return value

    return {key: cut(value) for key, value in record.items() if key != "text"}


def asked_of(wanted: Wanted) -> dict[str, Any]:
    """All wishes in types that JSON knows."""
    return asdict(wanted) | {"ood": list(wanted.ood)}
