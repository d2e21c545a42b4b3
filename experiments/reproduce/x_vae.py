"""What a prior from an autoencoder's codes is worth (X-VAE, arXiv:2607.01275v1), and how latents match it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pvae.data import Data, Split
from pvae.evaluation import (
    alignment_report,
    classifier_two_sample,
    frechet_distance,
    gaussian_w2,
    mean_pairwise_distance,
    mmd2,
    mmd_permutation,
    nearest_distance,
    whitened,
)
from pvae.files import locked
from pvae.inference import fit
from pvae.inference.isolation import device_of, evaluating
from pvae.models import XVAE

from ..program import Program
from ..spec import Spec, load_spec
from ..stages import FirstStage, install, pretrain
from .judge import Judge, evenly, judge
from .ledger import Record
from .measures import likelihood, posterior, reconstructions, sigma_of
from .plots import curves
from .study import Cell, Context, Metrics, Scale, Source, Study, plain
from .tables import Column, configurations, interval, markdown, paired, table

__all__ = ["XVAEStudy"]


@dataclass(frozen=True)
class _Configuration:
    """A prior and a way to train under it.

    Attributes:
        words: How it reads.
        overrides: Changes of the recipe.
        trained: Whether a VAE is trained at all, or the autoencoder is sampled as it is.
    """

    words: str
    overrides: tuple[str, ...]
    trained: bool = True


def _codes(variant: str, parametrisation: str = "raw", warm_start: bool = False) -> tuple[str, ...]:
    warm = "true" if warm_start else "false"
    return (
        f"prior.variant={variant}",
        f"prior.covariance={'full' if variant == 'gmm' else 'diag'}",
        f"model.parametrisation={parametrisation}",
        f"model.warm_start={warm}",
    )


_CONFIGURATIONS = {
    "vae": _Configuration("standard VAE", ("model.kind=vae", "prior.kind=normal")),
    "diag-raw": _Configuration("X-VAE, diagonal, raw", _codes("diag")),
    "diag-whitened": _Configuration("X-VAE, diagonal, whitened", _codes("diag", "whitened")),
    "full-whitened": _Configuration("X-VAE, full covariance, whitened", _codes("full", "whitened")),
    "gmm-warm": _Configuration("X-VAE, mixture, warm start", _codes("gmm", warm_start=True)),
    "paired": _Configuration("X-VAE, paired", _codes("paired")),
    "ae-gmm": _Configuration("autoencoder + mixture", _codes("gmm", warm_start=True), trained=False),
    "ae-diag": _Configuration(
        "autoencoder + diagonal Gaussian", _codes("diag", warm_start=True), trained=False
    ),
}
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_DRAWS = 8
_SWEEP = 1000  # most samples at each scale
_ROWS = 1000  # data in one pass
_UNTRAINED = 0.25  # time of a cell without a VAE, as a share of that of one with it

_WORDS = {name: configuration.words for name, configuration in _CONFIGURATIONS.items()}
_ALIGNMENT = (
    Column("c2st", "C2ST"),
    Column("mmd2", "MMD² × 1000", 1000),  # noqa: RUF001
    Column("mmd2_null", "of two prior samples", 1000),
    Column("w2", "W2², whitened"),
    Column("code_correlation", "correlation with codes"),
    Column("code_r2", "R² to codes"),
    Column("active_units", "active units"),
    Column("rate", "rate"),
)
_QUALITY = (
    Column("frechet_samples", "Fréchet, samples"),
    Column("frechet_reconstructions", "Fréchet, reconstructions"),
    Column("mse", "MSE × 1000", 1000),  # noqa: RUF001
    Column("elbo", "ELBO"),
    Column("iwae", "IWAE"),
    Column("iwae_bits", "bits/dim"),
    Column("khat_share", "k-hat high, %", 100),
    Column("sigma", "σ"),  # noqa: RUF001
    Column("diversity", "diversity"),
    Column("nearest", "nearest training datum"),
)
_EFFECTS = (
    Column("c2st", "C2ST"),
    Column("mmd2", "MMD² × 1000", 1000),  # noqa: RUF001
    Column("frechet_samples", "Fréchet, samples"),
    Column("mse", "MSE × 1000", 1000),  # noqa: RUF001
    Column("iwae", "IWAE"),
    Column("active_units", "active units"),
)
_SWEPT = (
    Column("frechet", "Fréchet"),
    Column("diversity", "diversity"),
    Column("pixel_std", "pixel std"),
    Column("nearest", "nearest training datum"),
)


class XVAEStudy(Study):
    """A standard VAE, five X-VAEs, and two autoencoders that are sampled without any VAE."""

    name = "x-vae"
    about = (
        "What a prior from an autoencoder's codes is worth beside a standard VAE and the autoencoder alone"
    )
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": Scale(
            (Source("digits", "x-vae-digits", ("fit.epochs=4", "autoencoder.epochs=4"), 17, 3.0),),
            seeds=(0,),
            num_data=50,
            num_particles=30,
            num_images=150,
            classifier_epochs=5,
        ),
        "cpu": Scale(
            (
                Source("mnist", "x-vae-mnist", ("fit.epochs=6", "autoencoder.epochs=5"), seconds=55.0),
                Source("fashion", "x-vae-fashion", ("fit.epochs=6", "autoencoder.epochs=5"), seconds=55.0),
            ),
            seeds=(0, 1, 2),
            num_data=1000,
            num_particles=100,
            num_images=2000,
            classifier_epochs=8,
        ),
        "full": Scale(
            (
                Source("mnist", "x-vae-mnist", ("fit.epochs=100", "autoencoder.epochs=50"), seconds=900.0),
                Source(
                    "fashion", "x-vae-fashion", ("fit.epochs=100", "autoencoder.epochs=50"), seconds=900.0
                ),
            ),
            seeds=(0, 1, 2, 3, 4),
            num_data=1000,
            num_particles=1000,
            num_images=5000,
            classifier_epochs=20,
        ),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List a reference and eight configurations for each data set; seeds are the slowest."""
        cells = []
        for source in scale.sources:
            reference = {"data": source.name, "reference": "real"}
            cells.append(Cell(reference, 0, source.recipe, source.overrides, source.seconds))
            for seed in scale.seeds:
                for name, configuration in _CONFIGURATIONS.items():
                    factors = {"data": source.name, "configuration": name}
                    changes = configuration.overrides
                    if changes[0].startswith("model.kind"):
                        # Another model has no first stage, and would refuse its settings.
                        shared = tuple(o for o in source.overrides if not o.startswith("autoencoder."))
                    else:
                        shared = source.overrides
                    seconds = source.seconds if configuration.trained else _UNTRAINED * source.seconds
                    cells.append(Cell(factors, seed, source.recipe, (*changes, *shared), seconds))
        return cells

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train one program and judge its likelihood, its latents against its prior, and its samples."""
        real = judge(data, context)
        if "reference" in cell.factors:
            return _reference(real, data)
        source = context.scale.source(cell.factors["data"])
        stage = _first_stage(source, cell.seed, data, context)
        program = spec.build(data)
        if isinstance(program.model, XVAE):
            install(stage, spec, program)
        if _CONFIGURATIONS[cell.factors["configuration"]].trained:
            fit(*program, data, **spec.fit.arguments(), device=context.device, progress=False)
            metrics = _of_vae(program, stage, real, context, source, cell.seed)
        else:
            metrics = _of_autoencoder(program, stage, real, cell.seed)
        return metrics | _samples(program, real, cell.seed)

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write alignment, quality, real data, differences from the standard VAE, and the sweep."""
        factors = ("configuration",)
        parts = [
            "Prior against aggregate posterior on held-out data (of an autoencoder: against its codes). A "
            "C2ST of 0.5 is perfect; read it beside active units and rate: a collapsed latent matches its "
            "prior too.\n\n" + table(records, factors, _ALIGNMENT, _WORDS),
            table(records, factors, _QUALITY, _WORDS),
        ]
        if any("reference" in record.factors for record in records):
            parts.append(
                "Real data: training data against test data of the same number.\n\n"
                + table(records, ("reference",), _QUALITY)
            )
        less = "less the standard VAE of the same seed"
        parts += paired(records, "configuration", "vae", _EFFECTS, _WORDS, less)
        parts.append("Scale f of the latents at generation:\n\n" + _sweep_table(records))
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw diversity against fidelity, from scale 0 to 1.5."""
        lines = {
            _WORDS[name]: points
            for (name,), group in configurations(records, ("configuration",)).items()
            if (points := _curve(group))
        }
        if not lines:
            return []
        real = [record.metrics for record in records if "reference" in record.factors]
        point = None
        if real and real[0].get("diversity") is not None and real[0].get("frechet_samples") is not None:
            point = ("real data", float(real[0]["diversity"] or 0), float(real[0]["frechet_samples"] or 0))
        path = stem.with_name(f"{stem.name}-scale.png")
        across, up = "diversity: mean distance of two samples", "Fréchet distance (less is better)"
        return [curves(lines, path, f"{title}: latents scaled by f", across=across, up=up, point=point)]


def _first_stage(source: Source, seed: int, data: Data, context: Context) -> FirstStage:
    """Train the autoencoder of a seed, or take the one that another cell has trained."""
    spec = load_spec(source.recipe, [*source.overrides, f"fit.seed={seed}"])
    folder = context.shared / f"autoencoder-{source.name}-{seed}"
    with locked(folder.with_suffix(".lock")):
        return pretrain(spec, spec.build(data), data, folder=folder, device=context.device, progress=False)


def _of_vae(
    program: Program, stage: FirstStage, real: Judge, context: Context, source: Source, seed: int
) -> Metrics:
    """Judge the likelihood and the reconstructions of a VAE, and its latents against its prior."""
    scale, held = context.scale, real.held_out
    terms = posterior(program, held.scored, _DRAWS, seed)
    found = alignment_report(
        *program, held.shown, codes=_codes_of(stage, held.shown), num_bootstrap=0, seed=seed
    )
    measures = {name: measure.value for name, measure in found.measures().items()}
    kept = ("w2", "c2st", "mmd2", "holes", "code_correlation", "code_r2", "code_cka", "active_units")
    return {
        **likelihood(program, held.scored, source.levels, scale.num_particles, seed),
        "rate": plain(terms.rate),
        "mse": plain(terms.mse),
        "sigma": sigma_of(program),
        **{name: plain(measures[name]) for name in kept},
        "c2st_null": plain(found.c2st.null),
        "mmd2_null": plain(found.mmd2.null),
        "mmd2_p": plain(found.mmd2.p_value),
        "frechet_reconstructions": plain(
            frechet_distance(real.features(reconstructions(program, held.shown)), real.shown)
        ),
    }


def _of_autoencoder(program: Program, stage: FirstStage, real: Judge, seed: int) -> Metrics:
    """Judge the autoencoder's reconstructions, and its held-out codes against the prior of codes."""
    held = real.held_out
    prior = program.model.prior()  # type: ignore[operator]
    with evaluating(*program):
        torch.manual_seed(seed)
        z, null = (prior.sample((len(held.shown),)) for _ in range(2))
        codes = _codes_of(stage, held.shown)
        pictures = torch.cat([program.model.decode(part).mean for part in codes.split(_ROWS)])  # type: ignore[operator]
        scored = _codes_of(stage, held.scored)
        error = program.model.decode(scored).mean - held.scored.x.to(scored.device)  # type: ignore[operator]
    codes, z, null = whitened(torch.cat([z, null]), codes, z, null)
    test = mmd_permutation(codes, z, 100, seed)
    return {
        "mse": plain(error.square().mean()),
        "w2": plain(gaussian_w2(codes, z)),
        "c2st": plain(classifier_two_sample(codes, z, seed).accuracy),
        "c2st_null": plain(classifier_two_sample(null, z, seed).accuracy),
        "mmd2": plain(test.mmd2),
        "mmd2_null": plain(mmd2(null, z, seed=seed)),
        "mmd2_p": plain(test.p_value),
        "code_correlation": 1.0,
        "code_r2": 1.0,
        "code_cka": 1.0,
        "frechet_reconstructions": plain(frechet_distance(real.features(pictures), real.shown)),
    }


def _samples(program: Program, real: Judge, seed: int) -> Metrics:
    """Judge samples of the prior, and a few at every scale of the latents."""
    features = real.features(_draw(program, len(real.real), 1.0, seed))
    metrics: Metrics = {
        "frechet_samples": plain(frechet_distance(features, real.real)),
        **_variety(features, real),
    }
    reference = real.real[:_SWEEP]
    for scale in _SCALES:
        pictures = _draw(program, len(reference), scale, seed)
        features = real.features(pictures)
        found = {
            "frechet": plain(frechet_distance(features, reference)),
            "pixel_std": plain(pictures.double().std(0).mean()),
            **_variety(features, real),
        }
        metrics |= {f"scale/{scale:g}/{name}": value for name, value in found.items()}
    return metrics


def _variety(features: Tensor, real: Judge) -> Metrics:
    return {
        "diversity": plain(mean_pairwise_distance(features)),
        "nearest": plain(nearest_distance(features[:_SWEEP], real.train).mean()),
    }


def _reference(real: Judge, data: Data) -> Metrics:
    """Judge training data as if they were samples; their distance to the nearest one is that of test data."""
    train = evenly(data.train, len(real.real)).x
    return {
        "frechet_samples": plain(frechet_distance(real.classifier.features(train), real.real)),
        **_variety(real.real, real),
    }


def _draw(program: Program, number: int, scale: float, seed: int) -> Tensor:
    """Draw means of p(x | z) with z ``scale`` times as far from its centre as under the prior."""
    with evaluating(*program):
        torch.manual_seed(seed)
        if isinstance(program.model, XVAE):
            with warnings.catch_warnings():  # that small scales memorise is what the sweep measures
                warnings.simplefilter("ignore")
                return program.model.sample(number, mean=True, scale=scale)
        # Of the standard VAE, whose prior is N(0, I).
        z = scale * program.model.prior().sample((number,))  # type: ignore[operator]
        return program.model.decode(z).mean  # type: ignore[operator]


@torch.no_grad()
def _codes_of(stage: FirstStage, split: Split) -> Tensor:
    """Return the autoencoder's codes of held-out data, shape ``(N, z_dim)``."""
    device = device_of(stage.encoder)
    return torch.cat([stage.encoder(part.to(device))[0] for part in split.x.split(_ROWS)])


def _sweep_table(records: Sequence[Record]) -> str:
    """Write one row for each configuration and scale."""
    rows = []
    for (name,), group in configurations(records, ("configuration",)).items():
        for scale in _SCALES:
            measured = [
                interval(record.metrics.get(f"scale/{scale:g}/{column.key}") for record in group)
                for column in _SWEPT
            ]
            if any(mean.n for mean in measured):
                rows.append([_WORDS[name], f"{scale:g}", *map(str, measured)])
    return markdown(["configuration", "f", *(column.title for column in _SWEPT)], rows)


def _curve(group: Sequence[Record]) -> list[tuple[str, float, float]]:
    """Return diversity and Fréchet distance at every scale, means over seeds; ends are marked."""
    points = []
    for scale in _SCALES:
        across, up = (
            interval(record.metrics.get(f"scale/{scale:g}/{key}") for record in group)
            for key in ("diversity", "frechet")
        )
        if across.n and up.n:
            text = f"{scale:g}" if scale in (_SCALES[0], 1.0, _SCALES[-1]) else ""
            points.append((text, across.mean, up.mean))
    return points
