# ruff: noqa: RUF001  (mathematical symbols)
"""Scores of strangeness under one interface, all larger for stranger data, and how well they tell."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program

from .complexity import compressed_bits, pixel_levels
from .estimate import LikelihoodEstimate
from .latent_scores import best_labels, latent_scores
from .latents import latent_names, means
from .likelihood import log_likelihood
from .likelihood_regret import likelihood_regret
from .mahalanobis import CodeCloud, fit_cloud
from .ood import Detector, conformal_notes, detector_of, khat_notes, label_candidates
from .typicality import typicality
from .weights import held_out

__all__ = ["FamiliarData", "OODDetection", "OODScore", "OODScores", "detect", "familiar_data", "ood_scores"]

OODScore = Literal["log_prob", "elbo", "log_p", "kl", "typicality", "regret", "mahalanobis", "complexity"]

_ALL: tuple[OODScore, ...] = get_args(OODScore)
_DEFAULT: tuple[OODScore, ...] = ("log_prob", "elbo", "log_p", "typicality", "mahalanobis")
_WORDS: Mapping[OODScore, str] = {
    "log_prob": "−log p(x)",
    "elbo": "−ELBO",
    "log_p": "−log p(z), z = E z",
    "kl": "KL(q ‖ p)",
    "typicality": "typicality",
    "regret": "likelihood regret",
    "mahalanobis": "Mahalanobis distance of the code",
    "complexity": "−log p(x) less complexity",
}
_LIKELIHOODS = ("log_prob", "typicality", "complexity")
_LATENT = ("elbo", "log_p", "kl")
_TRAINED = ("typicality", "mahalanobis")
_CODE_DRAWS = 16
_LEAST = 2


@dataclass(frozen=True)
class FamiliarData:
    """What scores need to know of training data.

    Attributes:
        log_prob: Importance-weighted bounds on log p(x), nats, shape ``(M,)``; ``None`` where not asked for.
        cloud: Their codes' mean and covariance; ``None`` where not asked for.
        num_particles: Particles of the bounds.
    """

    log_prob: Tensor | None
    cloud: CodeCloud | None
    num_particles: int


@dataclass(frozen=True)
class OODScores(Mapping[str, Tensor]):
    """Scores of some data by name, each of shape ``(N,)``, float64, all larger for stranger data.

    Attributes:
        scores: The scores.
        likelihood: The estimate that ``"log_prob"``, ``"typicality"`` and ``"complexity"`` are made of, with
            its k-hats; ``None`` where none of them was asked for.
        seed: Seed of all draws.
        protocol: What the data were, if known.
        labelled: Whether every datum was given the label of highest ELBO.
    """

    scores: dict[str, Tensor]
    likelihood: LikelihoodEstimate | None
    seed: int
    protocol: dict[str, Any] | None = None
    labelled: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_data(self) -> int:
        """Number of data."""
        return len(next(iter(self.scores.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        share = math.nan if self.likelihood is None else self.likelihood.khat_share
        return {
            "means": {name: float(score.mean()) for name, score in self.items()},
            "num_data": self.num_data,
            "num_particles": None if self.likelihood is None else self.likelihood.num_particles,
            "khat_share": share if math.isfinite(share) else None,
            "seed": self.seed,
            "protocol": self.protocol,
            "best_labels": self.labelled,
            "per_datum": {name: score.tolist() for name, score in self.items()},
        }

    def __str__(self) -> str:
        said = ", ".join(
            f"{name} {float(score.mean()):.2f} ± {float(score.std()) / math.sqrt(len(score)):.2f}"
            if len(score) > 1
            else f"{name} {float(score):.2f}"
            for name, score in self.items()
        )
        evidence = "" if self.likelihood is None else f"; {self.likelihood.khat_sentence}"
        return f"{said} on {self.num_data} data, larger for stranger ones{evidence}"


def familiar_data(
    model: Program,
    guide: Program,
    training: Tensor | Split,
    y: Tensor | None = None,
    *,
    which: Sequence[OODScore] = ("typicality", "mahalanobis"),
    num_particles: int = 100,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> FamiliarData:
    """Score training data once, for as many calls of :func:`ood_scores` as there are.

    Args:
        model: The model program.
        guide: The guide program.
        training: Training data, shape ``(M, *x_shape)``, or a split; a few thousand are enough.
        y: Contexts, first dimension ``M``. A split's own labels are used if ``model.conditional`` is true.
        which: The scores that will be asked for; those that need no training data are passed over.
        num_particles: Particles of the bound on log p(x), as those of the data to score.
        labels: Labels to choose from, as for the data to score.
        seed: Seed of the draws.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        ValueError: As :func:`ood_scores`.
        TypeError: If ``training`` is neither a tensor nor a split.
    """
    _check_names(which)
    y = _context(model, guide, training, y, labels, seed)
    log_prob = cloud = None
    if "typicality" in which:
        log_prob = log_likelihood(
            model, guide, training, y, num_particles=num_particles, seed=seed, progress=progress
        ).log_prob
    if "mahalanobis" in which:
        cloud = fit_cloud(_codes(model, guide, training, y, seed))
    return FamiliarData(log_prob, cloud, num_particles)


def ood_scores(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    which: Sequence[OODScore] = _DEFAULT,
    training: Tensor | Split | FamiliarData | None = None,
    num_particles: int = 100,
    num_samples: int = 16,
    num_steps: int = 100,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> OODScores:
    r"""Score how strange data are, in as many ways as asked for; larger is always stranger.

    - ``"log_prob"``: :math:`-\log p(x)`, by :func:`log_likelihood`; an upper bound in expectation.
    - ``"elbo"``, ``"log_p"``, ``"kl"``: minus the ELBO, :math:`-\log p(z)` at the posterior mean, the rate,
      by :func:`latent_scores`.
    - ``"typicality"``: :math:`|\log p(x) - \overline{\log p}|`, with the mean over training data
      (:func:`typicality`).
    - ``"regret"``: what the guide's family gains when it is optimised for the datum alone
      (:func:`likelihood_regret`); by far the dearest.
    - ``"mahalanobis"``: squared Mahalanobis distance of the posterior mean from those of training data
      (:class:`CodeCloud`).
    - ``"complexity"``: :math:`-\log_2 p(x) - L(x)` with the bits L of a lossless compressor
      (:func:`compressed_bits`; Serrà et al. 2020, arXiv:1909.11480, eq. 1). The units of x add a constant,
      which tells no datum from another.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program, with a density.
        x: Data, shape ``(N, *x_shape)``, or a split; ``"complexity"`` needs a split, or zeros and ones.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true;
            data from elsewhere have none, for which see ``labels``.
        which: Names of the scores.
        training: Training data for ``"typicality"`` and ``"mahalanobis"``, or what :func:`familiar_data` made
            of them. Those the model was trained on are meant: nothing is calibrated on them.
        num_particles: Particles of the bound on log p(x).
        num_samples: Draws of the latents behind ``"elbo"``, ``"log_p"`` and ``"kl"``.
        num_steps: Steps behind ``"regret"``.
        labels: Labels to choose from where the model is conditional: every datum is then given the one of
            highest ELBO (:func:`best_labels`), whatever its own.
        seed: Seed of all draws.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        ValueError: If there is no such score, or none is asked for, training data are missing or were scored
            with other particles, both ``y`` and ``labels`` are given, or as the functions above.
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> known = familiar_data(model, guide, data.train[:2000])  # doctest: +SKIP
        >>> inside = ood_scores(model, guide, data.test, training=known)  # doctest: +SKIP
        >>> outside = ood_scores(model, guide, other.test, training=known)  # doctest: +SKIP
        >>> print(detect(inside, outside))  # doctest: +SKIP
    """
    _check_names(which)
    given = [name for name in which if name in _TRAINED]
    if given and training is None:
        raise ValueError(f"training must be given for {given[0]!r}")
    y = _context(model, guide, x, y, labels, seed)
    programs = (model, guide)
    known = training
    if given and training is not None and not isinstance(training, FamiliarData):
        known = familiar_data(
            *programs,
            training,
            which=which,
            num_particles=num_particles,
            labels=labels,
            seed=seed,
            progress=progress,
        )
    likelihood = None
    found: dict[str, Tensor] = {}
    if any(name in _LIKELIHOODS for name in which):
        likelihood = log_likelihood(
            *programs, x, y, num_particles=num_particles, seed=seed, progress=progress
        )
        found["log_prob"] = -likelihood.log_prob
    if any(name in _LATENT for name in which):
        latent = latent_scores(*programs, x, y, num_samples=num_samples, seed=seed, progress=progress)
        found |= {"elbo": -latent.elbo, "log_p": -latent.log_p_mean, "kl": latent.kl}
    if "typicality" in which and likelihood is not None:
        assert isinstance(known, FamiliarData)
        if known.log_prob is None or known.num_particles != num_particles:
            had = "no likelihoods" if known.log_prob is None else f"{known.num_particles} particles"
            raise ValueError(f"training must be scored with {num_particles} particles as x is, got {had}")
        found["typicality"] = typicality(likelihood.log_prob, known.log_prob)
    if "regret" in which:
        found["regret"] = likelihood_regret(
            *programs, x, y, num_steps=num_steps, seed=seed, progress=progress
        ).regret
    if "mahalanobis" in which:
        assert isinstance(known, FamiliarData)
        if known.cloud is None:
            raise ValueError("training must hold codes for 'mahalanobis', got none")
        found["mahalanobis"] = known.cloud.distance(_codes(*programs, x, y, seed))
    if "complexity" in which and likelihood is not None:
        found["complexity"] = -likelihood.log_prob / math.log(2) - compressed_bits(*pixel_levels(x))
    protocol = x.protocol.to_dict() if isinstance(x, Split) else None
    scores: dict[str, Tensor] = {name: found[name] for name in which}
    labelled = labels is not None and bool(getattr(model, "conditional", False))
    return OODScores(scores, likelihood, seed, protocol, labelled)


@dataclass(frozen=True)
class OODDetection:
    """How well each score tells data from elsewhere from familiar ones.

    Attributes:
        detectors: One for each score; ``delta`` is the mean of the score outside less inside.
        num_inside: Number of inside data.
        num_outside: Number of outside data.
        calibration: What the conformal tests are calibrated on, in words.
        khat_share: Share of the inside and of the outside data whose log p(x) has a high k-hat; NaN where it
            was not estimated.
    """

    detectors: dict[str, Detector]
    num_inside: int
    num_outside: int
    calibration: str
    khat_share: tuple[float, float] = (math.nan, math.nan)

    @property
    def best(self) -> str:
        """Name of the score with the largest AUROC; chosen on these data, it does less well on others."""
        return max(self.detectors, key=lambda name: self.detectors[name].auroc.value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        shares = [share if math.isfinite(share) else None for share in self.khat_share]
        return {
            "detectors": {name: found.to_dict() for name, found in self.detectors.items()},
            "num_inside": self.num_inside,
            "num_outside": self.num_outside,
            "calibration": self.calibration,
            "khat_share": dict(zip(("inside", "outside"), shares, strict=True)),
        }

    def to_markdown(self) -> str:
        """Return a table, a row for each score: AUROC, false alarms and detections of the conformal tests."""
        alphas = [level.alpha for level in next(iter(self.detectors.values())).conformal.levels]
        head = [f"{what} at {alpha:g}" for alpha in alphas for what in ("false alarms", "detected")]
        lines = [
            f"| score | AUROC | 95 % interval |{''.join(f' {cell} |' for cell in head)}",
            f"| --- | ---: | ---: |{' ---: |' * len(head)}",
        ]
        for name, found in self.detectors.items():
            area = found.auroc
            cells = [f"{area.value:.3f}"]
            cells.append("" if math.isnan(area.low) else f"{area.low:.3f} to {area.high:.3f}")
            for level in found.conformal.levels:
                alarms = level.false_alarms
                mark = "" if level.holds else " (!)"
                cells.append(f"{alarms.value:.3f} [{alarms.low:.3f}, {alarms.high:.3f}]{mark}")
                cells.append(f"{level.detections.value:.3f}")
            lines.append(f"| {_label(name)} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self.notes()])

    def notes(self) -> list[str]:
        """Return what a reader of the table should know, one sentence each."""
        first = next(iter(self.detectors.values())).conformal
        said = [
            f"{self.num_inside} data inside, {self.num_outside} outside; calibrated on {self.calibration}, "
            f"false alarms counted on {len(first.p_inside)} other data."
        ]
        said += conformal_notes({_label(name): found.conformal for name, found in self.detectors.items()})
        said += khat_notes(*self.khat_share)
        return said

    def __str__(self) -> str:
        return self.to_markdown()


def detect(
    inside: Mapping[str, Tensor],
    outside: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor] | None = None,
    *,
    num_bootstrap: int = 1000,
    levels: Sequence[float] = (0.01, 0.05, 0.1),
    fdr: float | None = None,
    seed: int = 0,
) -> OODDetection:
    """Say how well scores tell outside from inside data, with conformal tests whose false alarms are counted.

    Args:
        inside: Scores of held-out familiar data by name, larger for stranger data, shape ``(N,)`` each.
        outside: The same scores of data from elsewhere.
        calibration: The same of other familiar data that nothing was fitted to; without them the inside data
            are cut at random in halves, one for calibration and one to count false alarms on.
        num_bootstrap: Resamples behind an interval of an AUROC; 0 leaves the intervals out.
        levels: Levels of the conformal tests.
        fdr: Also count discoveries at this false discovery rate (:func:`benjamini_hochberg`).
        seed: Seed of the cut and of the resamples.

    Raises:
        ValueError: If the samples have different scores or none, or fewer than two data.
    """
    samples = {"inside": inside, "outside": outside}
    if calibration is not None:
        samples["calibration"] = calibration
    for name, sample in samples.items():
        if not sample or set(sample) != set(inside):
            raise ValueError(f"{name} must have the scores {sorted(inside)}, got {sorted(sample)}")
        sizes = {len(score) for score in sample.values()}
        if len(sizes) > 1 or min(sizes) < _LEAST:
            raise ValueError(f"{name} must have scores of one number of data, at least {_LEAST}, got {sizes}")
    num = len(next(iter(inside.values())))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    detectors = {}
    for name, here in inside.items():
        known, checked = here[order[: num // 2]], here[order[num // 2 :]]
        if calibration is not None:
            known, checked = calibration[name], here
        detectors[name] = detector_of(
            name,
            known,
            checked,
            here,
            outside[name],
            sign=1.0,
            num_bootstrap=num_bootstrap,
            levels=levels,
            fdr=fdr,
            seed=seed,
        )
    words = f"{num // 2} of the inside data"
    if calibration is not None:
        words = f"{len(next(iter(calibration.values())))} data of another sample"
    shares = (_khat_share(inside), _khat_share(outside))
    return OODDetection(detectors, num, len(next(iter(outside.values()))), words, shares)


def _check_names(which: Sequence[str]) -> None:
    unknown = [name for name in which if name not in _ALL]
    if unknown or not which:
        raise ValueError(
            f"which must name some of {', '.join(_ALL)}, got {unknown[0] if unknown else 'none'}"
        )


def _context(
    model: Program, guide: Program, x: Tensor | Split, y: Tensor | None, labels: Tensor | None, seed: int
) -> Tensor | None:
    """The contexts to score data under, where they are not a split's own."""
    if labels is None or not getattr(model, "conditional", False):
        return y
    if y is not None:
        raise ValueError("y and labels must not both be given: labels takes the one of highest ELBO")
    return best_labels(model, guide, x, label_candidates(labels), seed=seed)


def _codes(model: Program, guide: Program, x: Tensor | Split, y: Tensor | None, seed: int) -> Tensor:
    """Posterior means, all sites side by side, shape ``(N, d)``."""
    x, y, _ = held_out(model, x, y)
    device = device_of(model, guide)
    with evaluating(model, guide):
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        return means(guide, x, y, names, seed, _CODE_DRAWS)[0]


def _khat_share(scores: Mapping[str, Tensor]) -> float:
    likelihood = scores.likelihood if isinstance(scores, OODScores) else None
    return math.nan if likelihood is None else likelihood.khat_share


def _label(name: str) -> str:
    return next((words for known, words in _WORDS.items() if known == name), name)
