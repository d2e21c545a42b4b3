# ruff: noqa: RUF001  (mathematical symbols)
r"""Data from elsewhere: how well scores of the latents tell them from familiar data, with what error.

The differences of means are those of DiVAE (2025, arXiv:2512.03928v1); AUROC and conformal tests say whether
single data can be told apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.program import Program

from .auroc import auroc_interval
from .conformal import ConformalTest, conformal_test
from .interval import Interval
from .latent_scores import LatentScores, best_labels, latent_scores

__all__ = ["Detector", "OODReport", "compare_scores", "label_candidates", "ood_report"]

LABELS = {
    "log_p_mean": "−log p(z), z = E z",
    "log_p": "−E log p(z)",
    "kl": "KL(q ‖ p)",
    "entropy": "H(q)",
    "elbo": "−ELBO",
    "log_prob": "−log p(x)",
}
"""The scores that data are told apart by, as they are written: all are larger for stranger data."""

_SIGNS = {"kl": 1.0, "entropy": 1.0}  # of a quantity that is larger outside; the others are smaller there
_DELTAS = {
    "log_p_mean": "delta s",
    "log_p": "delta E s",
    "kl": "delta KL",
    "entropy": "delta H",
    "elbo": "delta ELBO",
    "log_prob": "delta log p(x)",
}
_LEAST = 2
_HIGH = 0.05


@dataclass(frozen=True)
class Detector:
    """What one score makes of inside and outside data.

    Attributes:
        name: Column of :class:`LatentScores`.
        auroc: Area under the ROC curve of the score, signed so that larger is stranger: 0.5 says nothing, 0
            is a score that takes strange data for familiar ones throughout.
        delta: Mean of the quantity itself outside less inside, nats. A model that knows its data has it
            negative for log-densities and the ELBO, positive for KL and entropy.
        standard_error: Of ``delta``, over data.
        conformal: The calibrated test on the score.
    """

    name: str
    auroc: Interval
    delta: float
    standard_error: float
    conformal: ConformalTest

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold."""
        ends = {key: v if math.isfinite(v) else None for key, v in vars(self.auroc).items()}
        return {
            "auroc": ends,
            "delta": self.delta,
            "delta_standard_error": self.standard_error,
            "conformal": self.conformal.to_dict(),
        }


@dataclass(frozen=True)
class OODReport:
    """How well data from elsewhere are told from familiar data.

    Attributes:
        detectors: One for each score, by the name of its column.
        inside: Scores of held-out familiar data.
        outside: Scores of data from elsewhere.
        calibration: What the conformal tests are calibrated on, in words.
        best_labels: Whether inside and outside data were given the label of highest ELBO.
    """

    detectors: dict[str, Detector]
    inside: LatentScores
    outside: LatentScores
    calibration: str
    best_labels: bool = False

    @property
    def delta_s(self) -> float:
        """Mean log p(z) at the posterior mean, outside less inside; wanted: below 0."""
        return self.detectors["log_p_mean"].delta

    @property
    def delta_kl(self) -> float:
        """Mean KL(q ‖ p), outside less inside; wanted: above 0."""
        return self.detectors["kl"].delta

    @property
    def delta_entropy(self) -> float:
        """Mean entropy of q, outside less inside; wanted: above 0."""
        return self.detectors["entropy"].delta

    @property
    def delta_elbo(self) -> float:
        """Mean ELBO, outside less inside; wanted: below 0."""
        return self.detectors["elbo"].delta

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        return {
            "detectors": {name: detector.to_dict() for name, detector in self.detectors.items()},
            "calibration": self.calibration,
            "best_labels": self.best_labels,
            "inside": self.inside.to_dict(),
            "outside": self.outside.to_dict(),
        }

    def to_markdown(self) -> str:
        """Return two tables: AUROC and difference of means, and the conformal tests; a row for each score."""
        lines = [
            "| score | AUROC | 95 % interval | difference of means | value, nats | wanted |",
            "| --- | ---: | ---: | --- | ---: | ---: |",
        ]
        for name, found in self.detectors.items():
            area = found.auroc
            reach = "" if math.isnan(area.low) else f"{area.low:.3f} to {area.high:.3f}"
            wanted = "> 0" if name in _SIGNS else "< 0"
            lines.append(
                f"| {LABELS[name]} | {area.value:.3f} | {reach} | {_DELTAS[name]} | "
                f"{found.delta:+.2f} ± {found.standard_error:.2f} | {wanted} |"
            )
        alphas = [level.alpha for level in next(iter(self.detectors.values())).conformal.levels]
        head = [f"{what} at {alpha:g}" for what in ("false alarms", "detected") for alpha in alphas]
        lines += ["", f"| conformal test | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
        for name, found in self.detectors.items():
            levels = found.conformal.levels
            alarms = [(level.false_alarms, "" if level.holds else " (!)") for level in levels]
            cells = [f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]{mark}" for a, mark in alarms]
            cells += [f"{level.detections.value:.3f}" for level in levels]
            lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self.notes()])

    def notes(self) -> list[str]:
        """Return what a reader of the tables should know, one sentence each."""
        test = next(iter(self.detectors.values())).conformal
        said = [
            f"{len(self.inside)} data inside, {len(self.outside)} outside; calibrated on {self.calibration}, "
            f"false alarms counted on {len(test.p_inside)} other data."
        ]
        said += conformal_notes({LABELS[name]: found.conformal for name, found in self.detectors.items()})
        if self.best_labels:
            said.append("Every datum, inside or outside, has the label of highest ELBO, not its own.")
        said += khat_notes(self.inside.khat_share, self.outside.khat_share)
        for name, found in self.detectors.items():
            if found.conformal.fdr is not None:
                said.append(
                    f"{LABELS[name]}: {found.conformal.discoveries} discoveries at a false discovery rate of "
                    f"{found.conformal.fdr:g}, {found.conformal.false_discoveries} of them false."
                )
        return said

    def __str__(self) -> str:
        return self.to_markdown()


def ood_report(
    model: Program,
    guide: Program,
    inside: Tensor | Split,
    outside: Tensor | Split,
    *,
    calibration: Tensor | Split | None = None,
    labels: Tensor | None = None,
    num_samples: int = 16,
    num_particles: int | None = None,
    num_bootstrap: int = 1000,
    levels: Sequence[float] = (0.01, 0.05, 0.1),
    fdr: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> OODReport:
    """Tell data from elsewhere from familiar ones by the scores of :func:`latent_scores`.

    A conditional model scores a datum under a label, which data from elsewhere do not have: every datum,
    inside and outside, is given the one of highest ELBO (:func:`best_labels`).

    Args:
        model: The model program; its prior must have a density.
        guide: The guide program, with a density.
        inside: Familiar data that the model was not trained on, shape ``(N, *x_shape)``, or a split.
        outside: Data from elsewhere, of the same shape and binarisation.
        calibration: More familiar data, for the conformal tests; without them ``inside`` is cut at random in
            halves, one for calibration and one to count false alarms on.
        labels: The labels to choose from where the model is conditional, shape ``(K, ...)``; by default those
            of ``inside``, a split (:func:`label_candidates`).
        num_samples: Draws of the latents for each datum.
        num_particles: Particles of an importance-weighted bound, ``None`` for none.
        num_bootstrap: Resamples behind an interval of an AUROC; 0 leaves the intervals out.
        levels: Levels of the conformal tests.
        fdr: Also count discoveries at this false discovery rate (:func:`benjamini_hochberg`).
        seed: Seed of every draw.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        ValueError: If the shapes differ, labels are missing, for sizes out of range, or as
            :func:`latent_scores`.
        TypeError: If data are neither a tensor nor a split.

    Example:
        >>> report = ood_report(model, guide, data.test, other.test)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    samples: dict[str, Tensor | Split] = {"inside": inside, "outside": outside}
    if calibration is not None:
        samples["calibration"] = calibration
    shapes = {name: _shape(name, sample) for name, sample in samples.items()}
    for name, shape in shapes.items():
        if shape != shapes["inside"]:
            raise ValueError(f"{name} must have data of shape {shapes['inside']}, got {shape}")
    conditional = bool(getattr(model, "conditional", False))
    if conditional and labels is None:
        if not isinstance(inside, Split) or inside.y is None:
            raise ValueError("labels must be given for a conditional model: inside is no split with labels")
        labels = label_candidates(inside.y)
    found = {}
    for i, (name, sample) in enumerate(samples.items()):
        y = None
        if conditional and labels is not None:
            y = best_labels(model, guide, sample, labels, seed=seed + i)
        found[name] = latent_scores(
            model,
            guide,
            sample,
            y,
            num_samples=num_samples,
            num_particles=num_particles,
            seed=seed + i,
            progress=progress,
        )
    return compare_scores(
        found["inside"],
        found["outside"],
        found.get("calibration"),
        num_bootstrap=num_bootstrap,
        levels=levels,
        fdr=fdr,
        seed=seed,
        labelled=conditional,
    )


def compare_scores(
    inside: LatentScores,
    outside: LatentScores,
    calibration: LatentScores | None = None,
    *,
    num_bootstrap: int = 1000,
    levels: Sequence[float] = (0.01, 0.05, 0.1),
    fdr: float | None = None,
    seed: int = 0,
    labelled: bool = False,
) -> OODReport:
    """Make the report of :func:`ood_report` from scores that are there: one inside for many outside sets.

    Args:
        inside: Scores of held-out familiar data, at least two.
        outside: Scores of data from elsewhere, at least two.
        calibration: Scores of other familiar data; without them ``inside`` is cut at random in halves.
        num_bootstrap: As in :func:`ood_report`.
        levels: As in :func:`ood_report`.
        fdr: As in :func:`ood_report`.
        seed: Seed of the cut and of the resamples.
        labelled: Whether the data were given the label of highest ELBO.

    Raises:
        ValueError: If there are fewer than two data, or the samples were scored differently.
    """
    for name, scores in (("inside", inside), ("outside", outside), ("calibration", calibration)):
        if scores is None:
            continue
        if len(scores) < _LEAST:
            raise ValueError(f"{name} must hold at least {_LEAST} data, got {len(scores)}")
        for key in ("num_samples", "num_particles"):
            if getattr(scores, key) != getattr(inside, key):
                raise ValueError(
                    f"{name} must be scored with the same {key} as inside, {getattr(inside, key)}, "
                    f"got {getattr(scores, key)}"
                )
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    half = len(inside) // 2
    detectors = {}
    for name in LABELS:
        if name not in inside.columns():
            continue
        here, there = inside.columns()[name], outside.columns()[name]
        if calibration is None:
            known, checked = here[order[:half]], here[order[half:]]
        else:
            known, checked = calibration.columns()[name], here
        sign = _SIGNS.get(name, -1.0)
        samples = known, checked, here, there
        detectors[name] = detector_of(
            name, *samples, sign=sign, num_bootstrap=num_bootstrap, levels=levels, fdr=fdr, seed=seed
        )
    words = f"{half} of the inside data" if calibration is None else _words(calibration)
    return OODReport(detectors, inside, outside, words, labelled)


def detector_of(
    name: str,
    known: Tensor,
    checked: Tensor,
    here: Tensor,
    there: Tensor,
    *,
    sign: float,
    num_bootstrap: int,
    levels: Sequence[float],
    fdr: float | None,
    seed: int,
) -> Detector:
    """Say what a score makes of inside data ``here`` and outside data ``there``.

    Args:
        name: Name of the score.
        known: Scores of inside data that the conformal test is calibrated on.
        checked: Scores of other inside data, on which its false alarms are counted.
        here: Scores of inside data.
        there: Scores of outside data.
        sign: 1 for a score that is larger for stranger data, else -1.
        num_bootstrap: As in :func:`ood_report`.
        levels: As in :func:`ood_report`.
        fdr: As in :func:`ood_report`.
        seed: Seed of the resamples.
    """
    return Detector(
        name,
        auroc_interval(sign * here, sign * there, num_bootstrap=num_bootstrap, seed=seed),
        float(there.mean() - here.mean()),
        math.hypot(*(float(column.std()) / math.sqrt(len(column)) for column in (here, there))),
        conformal_test(sign * known, sign * checked, sign * there, levels=levels, fdr=fdr),
    )


def conformal_notes(tests: Mapping[str, ConformalTest]) -> list[str]:
    """What a reader of conformal tests should know, one sentence each."""
    said = []
    broken = [name for name, test in tests.items() if not all(level.holds for level in test.levels)]
    if broken:
        said.append(
            f"(!) more false alarms than chance explains, for {', '.join(broken)}: calibration data and "
            "test data differ."
        )
    test = next(iter(tests.values()))
    if any(level.alpha * (test.num_calibration + 1) < 1 for level in test.levels):
        said.append(
            f"No p-value is below 1/{test.num_calibration + 1}: more calibration data are needed for the "
            "smallest level."
        )
    return said


def khat_notes(inside: float, outside: float) -> list[str]:
    """What high k-hats of log p(x) mean for a score made of it, where a share of more than 5 % is high."""
    if not (inside > _HIGH or outside > _HIGH):
        return []
    return [
        f"k-hat of log p(x) is high for {100 * inside:.1f} % of the inside and {100 * outside:.1f} % of the "
        "outside data: the bound is low there, so that it scores how well the guide knows a datum too; more "
        "particles make it less so."
    ]


def label_candidates(y: Tensor, num: int = 64) -> Tensor:
    """Return the different labels among some, the most frequent first.

    Args:
        y: Class numbers ``(N,)`` or attributes ``(N, L)``.
        num: At most so many.
    """
    found, counts = torch.unique(y, dim=0, return_counts=True)
    return found[counts.argsort(descending=True, stable=True)[:num]]


def _words(calibration: LatentScores) -> str:
    part = (calibration.protocol or {}).get("part")
    return f"{len(calibration)} data" + (f" of the {part} part" if part else " of another sample")


def _shape(name: str, sample: Any) -> tuple[int, ...]:
    if isinstance(sample, Split):
        return tuple(sample.x_shape)
    if not isinstance(sample, Tensor):
        raise TypeError(f"{name} must be a tensor or a split such as data.test, got {type(sample).__name__}")
    return tuple(sample.shape[1:])
