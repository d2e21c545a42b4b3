"""What ``pvae diagnose`` does: prior against codes, layers, log p(z) and a density, data from elsewhere."""

import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import pvae.data
from pvae.data import CorruptData, Data, DataError, MissingData, Split
from pvae.evaluation import (
    Activity,
    AlignmentReport,
    DensityAgreement,
    LatentScores,
    OODReport,
    PriorCoverage,
    active_units,
    alignment_report,
    best_labels,
    compare_scores,
    density_agreement,
    label_candidates,
    latent_scores,
    prior_coverage,
)
from pvae.inference import CheckpointError
from pvae.models import Ladder
from pvae.priors import DiffusionPrior

from . import diagnosis_figures as drawn
from .aligning import density_of_run, log_det_of_run
from .ladder_report import LadderReport, ladder_report
from .program import SpecError
from .registry import nearest
from .runs import OpenRun, RunError

__all__ = [
    "LABELS",
    "Density",
    "Diagnosis",
    "Exact",
    "Known",
    "Wanted",
    "compare_with_density",
    "density_of",
    "diagnose",
    "load_outside",
    "spread",
]

# Data in the mixture that stands for the aggregate posterior: its cost is quadratic.
_MIXTURE = 1000
# Training data that a Gaussian is fitted to pseudoinputs of.
_FIT = 20_000
_NO_MIXTURE = (
    "not computed: the density of a latent under the mixture of all posteriors takes a pass of the ladder "
    "for each pair of data"
)
_NO_DENSITY = "not compared: p(u) is a diffusion, whose density is only estimated"
_NOISY = (
    "log p(z) holds an estimate of log p(u) by one noising path for each draw, which lies below log p(u) on "
    "average; KL and ELBO are those of the chain of {} steps"
)
# Ends the name of a comparison in which a flow's log-determinant is added to log p(z).
_WITH_FLOW = ", with log det"
_WHAT = "log p(z)"
_WHAT_FLOW = "log p(z) + log det g'(u)"
# What an outside data set takes over from the run, and so may not be asked for.
_FROM_RUN = ("binarize", "scale", "dequantize", "root", "download", "valid")
# Data sets that can be loaded without the parts that nobody scores.
_TEST_ALONE = {"emnist": {"parts": "test"}}
LABELS = 64
"""Scored under a label each, data from elsewhere take the best of at most so many."""


class Known(NamedTuple):
    """Log-densities of data in nats ``(N,)``, and their standard errors where they have any."""

    log_density: Tensor
    standard_error: Tensor | None


class Density(Protocol):
    """A log-density of data outside of the model, such as a density target of the training data."""

    def log_prob(self, x: Tensor) -> Any:
        """Return ``log_density`` and ``standard_error`` (or ``None``) of data ``(N, *x_shape)``."""


@dataclass(frozen=True)
class Exact:
    """The true density of synthetic data.

    Attributes:
        function: Its logarithm in nats, ``(N, *x_shape) -> (N,)``.
    """

    function: Callable[[Tensor], Tensor]

    def log_prob(self, x: Tensor) -> Known:
        """Return the log-density, without an error."""
        return Known(self.function(x.double()), None)


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        ood: Outside data sets, each a name with options: ``"emnist"``, ``"gaussian_mixture,components=4"``.
        num_data: At most so many data of each part, spread evenly over it.
        num_samples: Draws of the latents for each datum.
        num_particles: Particles of an importance-weighted bound as one more score, ``None`` for none.
        calibration: What conformal tests are calibrated on: the validation part, or half of the test part;
            ``None`` for the validation part if there is one.
        seed: Seed of every draw.
    """

    ood: Sequence[str] = ()
    num_data: int = 2000
    num_samples: int = 16
    num_particles: int | None = None
    calibration: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        settings: What was asked for.
        alignment: Aggregate posterior against prior; ``None`` for a ladder.
        coverage: Their divergences; ``None`` for a ladder.
        activity: Which latents the data move; ``None`` for a ladder, whose layers have theirs.
        agreement: log p(z) against the density, at a draw of z and at the mean; for a run that was aligned
            through a flow both also with its log-determinant. ``None`` without a density.
        ood: Outside data sets, by what they were asked for as.
        calibration: Scores of the validation part, where conformal tests were calibrated on it.
        pictures: PNG files.
        seconds: Wall time.
        no_flow: Why the flow of a run that was aligned through one is not in ``agreement``.
        layers: What each latent of a model of several carries.
        notes: What was left out and why, or how a part is to be read, by its heading.
    """

    settings: Wanted
    alignment: AlignmentReport | None
    coverage: PriorCoverage | None
    activity: Activity | None
    agreement: dict[str, DensityAgreement] | None
    ood: dict[str, OODReport]
    calibration: LatentScores | None
    pictures: list[Path]
    seconds: float
    no_flow: str | None = None
    layers: LadderReport | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self, per_datum: bool = True) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold.

        Args:
            per_datum: Whether the scores of every datum are among them.
        """
        scores = {name: report.outside for name, report in self.ood.items()}
        if self.ood:
            scores["inside"] = next(iter(self.ood.values())).inside
        if self.calibration is not None:
            scores["calibration"] = self.calibration
        tables = {name: report.to_dict() for name, report in self.ood.items()}
        for table in tables.values():
            del table["inside"], table["outside"]  # among the scores, once
        records = {name: found.to_dict() for name, found in scores.items()}
        if not per_datum:
            for record in records.values():
                del record["per_datum"]
        density = None
        if self.agreement is not None:
            density = {at: found.to_dict() for at, found in self.agreement.items()}
        return {
            "settings": asdict(self.settings) | {"ood": list(self.settings.ood)},
            "alignment": None if self.alignment is None else self.alignment.to_dict(),
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "activity": None if self.activity is None else self.activity.to_dict(),
            "layers": None if self.layers is None else self.layers.to_dict(),
            "notes": dict(self.notes),
            "density": density,
            "no_flow": self.no_flow,
            "ood": tables,
            "scores": records,
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Return the tables, each under its heading."""
        return "\n\n".join(f"{heading}\n\n{text}" for heading, text in self.sections())

    def sections(self) -> list[tuple[str, str]]:
        """Return the tables with their headings."""
        parts = []
        if self.alignment is not None:
            parts.append(("prior against aggregate posterior", self.alignment.to_markdown()))
        if self.coverage is not None:
            parts.append(("coverage", self.coverage.to_markdown()))
        if self.activity is not None:
            parts.append(("activity", str(self.activity)))
        if self.layers is not None:
            parts.append(("layers", self.layers.to_text()))
            if self.layers.u is not None:
                parts.append(("pseudoinput", self.layers.u.to_text()))
        for name, found in (self.agreement or {}).items():
            at, with_flow, _ = name.partition(_WITH_FLOW)
            what = _WHAT_FLOW if with_flow else _WHAT
            table = found.to_markdown().replace(_WHAT, what)
            parts.append((f"{what} against the density, z {at}", table))
        if self.no_flow is not None:
            parts.append((f"{_WHAT_FLOW} against the density", f"not scored: {self.no_flow}"))
        parts += [(f"inside against {name}", report.to_markdown()) for name, report in self.ood.items()]
        return [*parts, *self.notes.items()]


def diagnose(
    run: OpenRun,
    wanted: Wanted | None = None,
    *,
    target: Density | None = None,
    root: Path | None = None,
    download: bool = False,
    progress: bool | None = None,
) -> Diagnosis:
    """Judge the prior of a run and what it makes of strange data; keep the record and draw the pictures.

    Everything is measured on the test part; the layers of a model of several latents are on the training
    part, too. For a ladder they take the place of what is quadratic in the data. The record goes to
    ``diagnosis.json`` of the run folder, where one with the same settings gives way.

    Args:
        run: The run.
        wanted: What to do; without outside data if absent.
        target: A density of the training data that log p(z) is compared with; by default that of
            :func:`density_of`.
        root: Folder of the data files.
        download: Whether missing outside data may be fetched.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        SpecError: If the run's programs have no densities, or an outside data set does not fit.
        pvae.data.DataError: If outside data cannot be loaded.
    """
    wanted = wanted or Wanted()
    if wanted.calibration not in ("valid", "test", None):
        raise SpecError(
            f"--calibration must be valid or test{nearest(wanted.calibration, ('valid', 'test'))}, "
            f"got '{wanted.calibration}'"
        )
    start = time.monotonic()
    # Before the long part, so that a name that is wrong is said at once.
    outside = {name: load_outside(run, name, root, download).test for name in wanted.ood}
    try:
        return _diagnose(run, wanted, target, outside, progress, start)
    except (SpecError, DataError, RunError):
        raise
    except ValueError as error:
        raise SpecError(f"the run in {run.folder.path} cannot be diagnosed: {error}") from error


def density_of(run: OpenRun) -> Density | None:
    """Return the density of the run's data where there is one.

    Synthetic data have theirs, which is known (on a plane, that of their coordinates in it); else it is the
    estimate that the run was aligned with.
    """
    known = run.data.log_density_intrinsic or run.data.log_density
    if known is not None:
        return Exact(known)
    return density_of_run(run)


def load_outside(run: OpenRun, asked: str, root: Path | None = None, download: bool = False) -> Data:
    """Load a data set as the run's own is loaded: same binarisation, scale, dequantisation and seed.

    A set of values that are binary as they come counts as binarised in any way.

    Args:
        run: The run.
        asked: A name with options of the data set, such as ``"gaussian_mixture,components=4"``.
        root: Folder of the data files.
        download: Whether missing files may be fetched.

    Raises:
        SpecError: If there is no such data set, or its data have another shape or other values, or are the
            run's own.
        pvae.data.DataError: If it cannot be loaded.
    """
    name, options = _options(asked)
    own = run.data.protocol
    options = {"seed": run.spec.data.arguments()["seed"], "root": root, "download": download, **options}
    try:
        data = pvae.data.load(
            name, binarize=own.binarize, scale=own.scale, dequantize=own.dequantize, **options
        )
    except (MissingData, CorruptData):
        raise
    except DataError as error:
        data = _as_it_comes(run, name, options, error)
    _check_shape(run, data)
    if data.protocol.values != own.values:
        raise SpecError(
            f"--ood {name} must have {own.values} values as {own.name} has, got {data.protocol.values} ones"
        )
    if data.protocol.sha256 == own.sha256:
        raise SpecError(f"--ood {name} must be other data than the run's own")
    return data


def _as_it_comes(run: OpenRun, name: str, options: dict[str, Any], error: DataError) -> Data:
    """Load what cannot be loaded as the run's own data are, if it is like them anyhow."""
    try:
        data = pvae.data.load(name, **options)
    except DataError:
        raise error from None  # what is wrong is no matter of the protocol
    _check_shape(run, data)
    own, theirs = run.data.protocol, data.protocol
    if (theirs.values, theirs.dequantize) != (own.values, own.dequantize):
        raise SpecError(f"--ood {name} cannot be loaded as {own.name} is: {error}") from error
    return data


def _check_shape(run: OpenRun, data: Data) -> None:
    own, theirs = tuple(run.data.x_shape), tuple(data.x_shape)
    if own != theirs:
        raise SpecError(
            f"--ood {data.name} must have data of shape {own} as {run.data.name} has, got {theirs}"
        )


def _options(asked: str) -> tuple[str, dict[str, Any]]:
    """Take a name and its options apart."""
    name, *pairs = (part.strip() for part in asked.split(","))
    known = pvae.data.names()
    if name not in known:
        raise SpecError(f"--ood must name a data set, got '{name}'{nearest(name, known)}")
    options: dict[str, Any] = dict(_TEST_ALONE.get(name, {}))
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key or not text:
            raise SpecError(f"an option of --ood must read key=value, such as components=4, got '{pair}'")
        if key in _FROM_RUN:
            raise SpecError(f"--ood takes {key} from the run, got '{pair}'")
        try:
            options[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = text  # a bare word
    return name, options


def _diagnose(
    run: OpenRun,
    wanted: Wanted,
    target: Density | None,
    outside: Mapping[str, Split],
    progress: bool | None,
    start: float,
) -> Diagnosis:
    test = spread(run.data.test, wanted.num_data)
    few, seed, folder = spread(test, _MIXTURE), wanted.seed, run.folder.figures
    title = run.spec.description or f"{run.spec.model.kind} on {run.spec.data.name}"
    alignment = coverage = activity = layers = agreement = no_flow = None
    pictures: list[Path] = []
    notes: dict[str, str] = {}
    ladder = run.model if isinstance(run.model, Ladder) else None
    if ladder is None:
        alignment = alignment_report(*run.program, few, seed=seed)
        coverage = prior_coverage(*run.program, few, seed=seed)
        activity = active_units(*run.program, test, seed=seed)
        pictures.append(alignment.plot(folder / "alignment.png", title))
    else:
        notes["prior against aggregate posterior"] = _NO_MIXTURE
    if activity is None or len(activity.sites) > 1:
        train = run.data.train
        layers = ladder_report(
            *run.program,
            test,
            spread(train, wanted.num_data),
            spread(train, _FIT),
            num_train=len(train),
            seed=seed,
            progress=progress,
        )
        pictures.append(drawn.layer_bars(layers, folder / "layers.png", title))

    estimated = ladder is not None and isinstance(ladder.prior, DiffusionPrior)
    density = density_of(run) if target is None else target
    if density is not None and estimated:
        notes[f"{_WHAT} against the density"] = _NO_DENSITY
    elif density is not None:
        own = latent_scores(*run.program, test, num_samples=wanted.num_samples, seed=seed, progress=progress)
        path = folder / "density.png"
        log_det, no_flow = _log_det(run, test.clean)
        agreement, picture = compare_with_density(own, density, test.clean, path, title, seed, log_det)
        pictures.append(picture)

    reports, calibration = {}, None
    if outside:
        score = _scorer(run, wanted, test, progress)
        inside = score(test, 0)
        part = wanted.calibration or ("valid" if "valid" in run.data.parts else "test")
        if part == "valid":
            calibration = score(spread(run.data.valid, wanted.num_data), 1)
        for i, (name, split) in enumerate(outside.items()):
            reports[name] = compare_scores(
                inside,
                score(spread(split, wanted.num_data), 2 + i),
                calibration,
                seed=seed,
                labelled=inside.conditional,
            )
        own_name = run.data.name
        pictures += [
            drawn.score_histograms(reports, folder / "ood-scores.png", own_name, title),
            drawn.roc_curves(reports, folder / "ood-roc.png", title),
            drawn.conformal_curves(reports, folder / "conformal.png", title),
        ]
        if ladder is not None and isinstance(ladder.prior, DiffusionPrior):
            notes["scores of a diffusion"] = _NOISY.format(ladder.prior.num_steps)
    found = Diagnosis(
        wanted,
        alignment,
        coverage,
        activity,
        agreement,
        reports,
        calibration,
        pictures,
        round(time.monotonic() - start, 3),
        no_flow,
        layers,
        notes,
    )
    run.folder.add_diagnosis(found.to_dict())
    return found


def compare_with_density(
    scores: LatentScores,
    density: Density,
    x: Tensor,
    path: Path,
    title: str = "",
    seed: int = 0,
    log_det: Tensor | None = None,
) -> tuple[dict[str, DensityAgreement], Path]:
    """Compare log p(z) of data with a density of the same data, and draw the picture.

    Args:
        scores: Scores of the data.
        density: The density.
        x: The data without the noise of their protocol, shape ``(N, *x_shape)``.
        path: PNG to write.
        title: Line above the panels.
        seed: Seed of the intervals.
        log_det: What a flow adds to log p(z) of each datum to make it a log-density of x, nats, ``(N,)``.

    Returns:
        The agreement at a draw of z for each datum (``"drawn"``) and at the posterior mean (``"at the
        mean"``), then both with ``log_det`` where it is given (``"drawn, with log det"``); and the picture.
    """
    known = density.log_prob(x)
    compared = {"drawn": scores.log_p_draw, "at the mean": scores.log_p_mean}
    if log_det is not None:
        compared |= {f"{at}{_WITH_FLOW}": s + log_det.to(s) for at, s in compared.items()}
    agreement = {
        name: density_agreement(s, known.log_density, known.standard_error, seed=seed)
        for name, s in compared.items()
    }
    rho = known.log_density.detach().cpu().double()
    return agreement, drawn.density_scatter(scores.log_p_mean, rho, path, title, law=scores.log_p_draw)


def _log_det(run: OpenRun, x: Tensor) -> tuple[Tensor | None, str | None]:
    """The log-determinant of the flow that a run was aligned through, or why it cannot be had."""
    if run.spec.align is None or run.spec.align.kind != "flow":
        return None, None
    try:
        return log_det_of_run(run, x), None
    except (CheckpointError, ValueError) as error:
        return None, str(error)


def _scorer(
    run: OpenRun, wanted: Wanted, test: Split, progress: bool | None
) -> Callable[[Split, int], LatentScores]:
    """Return what scores a split; under a conditional model, each datum has its label of highest ELBO."""
    labels = None
    if getattr(run.model, "conditional", False):
        assert test.y is not None
        labels = label_candidates(test.y, LABELS)

    def score(split: Split, stream: int) -> LatentScores:
        seed = wanted.seed + stream
        y = None if labels is None else best_labels(*run.program, split, labels, seed=seed)
        return latent_scores(
            *run.program,
            split,
            y,
            num_samples=wanted.num_samples,
            num_particles=wanted.num_particles,
            seed=seed,
            progress=progress,
        )

    return score


def spread(split: Split, num: int) -> Split:
    """Return at most ``num`` data, evenly spread, since some sets are sorted by class."""
    if num >= len(split):
        return split
    return split[torch.linspace(0, len(split) - 1, num, dtype=torch.float64).long()]
