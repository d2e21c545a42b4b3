"""What aligning log p(z) with a density of the data is worth, and on what it hangs (arXiv:2512.03928v1)."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pvae.data
from pvae.alignment import Aligned, FlowTarget
from pvae.data import Data, Split
from pvae.density import CodeProjection, DensityTarget
from pvae.evaluation import (
    LatentScores,
    active_units,
    compare_scores,
    density_agreement,
    latent_scores,
    log_likelihood,
    prior_coverage,
)
from pvae.files import locked
from pvae.inference import fit

from ..aligning import aligned, embedded, estimate
from ..program import Program
from ..spec import AlignKeys, Spec, load_spec
from ..stages import pretrain
from .judge import evenly
from .ledger import Record
from .plots import dots
from .study import Cell, Context, Metrics, Scale, Source, Study, plain
from .tables import Column, differences, markdown, paired, table, verdict

__all__ = ["DiVAEStudy"]


@dataclass(frozen=True)
class _Variant:
    """A value of a factor.

    Attributes:
        words: How it reads.
        overrides: Changes of the recipe.
    """

    words: str
    overrides: tuple[str, ...] = ()


_METHODS = {
    "none": _Variant("none", ("align=none",)),
    "released": _Variant("DIRECT, released", ("align.kind=direct", "align.preset=released")),
    "paper": _Variant("DIRECT, paper", ("align.kind=direct", "align.preset=paper")),
    "matched": _Variant(
        "DIRECT, matched",
        ("align.kind=direct", "align.preset=none", "align.average=mean", "align.offset=entropy"),
    ),
    "flow": _Variant("FLOW", ("align.kind=flow", "align.preset=paper")),
}
_PRIORS = {
    "normal": _Variant("N(0, I)", ("prior=normal",)),
    "mixture": _Variant("mixture", ("prior=mixture",)),
    "vamp": _Variant("VampPrior", ("prior=vamp",)),
}
_AS_IS = "as-is"
# One at a time, of DIRECT as in the paper under a mixture.
_IMAGE_CHANGES = {
    "gamma-0.1": _Variant("γ = 0.1", ("align.gamma=0.1",)),  # noqa: RUF001
    "gamma-3": _Variant("γ = 3", ("align.gamma=3.0",)),  # noqa: RUF001
    "warmup-0": _Variant("no warm-up", ("align.warmup=0.0",)),
    "warmup-1": _Variant("warm-up over all of training", ("align.warmup=1.0",)),
    "kstar": _Variant("density by k*-NN", ("align.estimator=kstar",)),
    "kde": _Variant("density by KDE", ("align.estimator=kde",)),
    "pca-20": _Variant("20 components", ("align.dim=20",)),
    "random": _Variant("10 random directions", ("align.projection=random",)),
    "codes": _Variant("10 codes of an autoencoder", ()),
}
# What is done to the true log-density, each told to have the error of 199 neighbours.
_TRUTH_CHANGES = {
    "exact": _Variant("the truth"),
    "noise-1": _Variant("the truth + noise of 1 nat"),
    "noise-3": _Variant("the truth + noise of 3 nats"),
    "bias-2": _Variant("the truth + 2 nats"),
    "slope-half": _Variant("half of the truth's range"),
}
_ERROR = 0.142  # nats, PAk's standard error with 199 neighbours
_WORDS = {
    name: variant.words
    for variants in (_METHODS, _PRIORS, _IMAGE_CHANGES, _TRUTH_CHANGES)
    for name, variant in variants.items()
} | {_AS_IS: "as it is"}

_SHARED = ("fit.engine=graph", "fit.batch_size=128", "fit.optimizer=adam", "fit.lr=1e-3", "fit.ema=none")
_OUTSIDE = {
    "fashion": ("fashion_mnist", {}),
    "letters": ("emnist", {"parts": "test"}),
    "omniglot": ("omniglot", {}),
}
_DRAWS = 8
_COVERED = 500  # data in the mixture that stands for the aggregate posterior
_FLOW_COST = 2.1  # of a training step, in units of a plain one

_AGREEMENT = (
    Column("ks", "KS"),
    Column("ks_centred", "KS, centred"),
    Column("wasserstein", "W1, nats"),
    Column("wasserstein_centred", "W1, centred"),
    Column("pearson", "Pearson"),
    Column("spearman", "Spearman"),
    Column("slope", "slope"),
    Column("pearson_train", "Pearson, training data"),
    Column("flow_ks", "KS with log det"),
    Column("flow_pearson", "Pearson with log det"),
)
_LATENTS = (
    Column("iwae", "IWAE"),
    Column("elbo", "ELBO"),
    Column("khat_share", "k-hat high, %", 100),
    Column("kl", "KL(q ‖ p)"),
    Column("posterior_to_prior", "KL(q_agg ‖ p)"),
    Column("prior_to_posterior", "KL(p ‖ q_agg)"),
    Column("energy", "energy distance"),
    Column("active", "active units"),
    Column("target_mean", "targets, mean"),
    Column("target_std", "targets, std"),
    Column("prior_mean", "log p(z) of the prior, mean"),
    Column("prior_std", "std"),
    Column("infeasible", "targets above its ceiling, %", 100),
    Column("steps", "steps"),
    Column("train_seconds", "training, CPU s"),
)
# A high score is a sign of strangeness: what is large, or small, of data from elsewhere.
_SIGNED = {"s": "−s", "KL": "KL", "H": "H", "ELBO": "−ELBO"}  # noqa: RUF001
_SCORES = (("log_p_mean", "s"), ("kl", "KL"), ("entropy", "H"), ("elbo", "ELBO"))
_EFFECTS = (
    Column("ks", "KS"),
    Column("ks_centred", "KS, centred"),
    Column("pearson", "Pearson"),
    Column("spearman", "Spearman"),
    Column("iwae", "IWAE"),
    Column("posterior_to_prior", "KL(q_agg ‖ p)"),
    Column("energy", "energy distance"),
)
_PANELS = (_AGREEMENT[0], _AGREEMENT[1], _AGREEMENT[4], _LATENTS[0], _LATENTS[6])
_READING = (
    "log p(z) at one draw of z from the posterior of each held-out datum, beside a log-density of the same "
    "data: the true one in the plane for synthetic data; for images PAk's on ten principal components of the "
    "training images, whatever a run was aligned with. Centred figures take both less their means. *With log "
    "det*: log p(z) plus the flow's log-determinant, which is what FLOW aligns. Energy distances of q_agg "
    "and p are in units of the prior's scale. *Matched*: DIRECT with weights divided by their mean, the mean "
    "of log p(z) over the posterior, and targets moved to have the mean of the prior's log-density. An AUROC "
    "is of the score that grows with strangeness; 0.5 says nothing."
)


@dataclass(frozen=True)
class _Source(Source):
    """A data set; ``seconds`` is that of measuring alone.

    Attributes:
        components: Of the priors that have some.
        changes: What is changed about DIRECT as in the paper under a mixture, one at a time.
        outside: Data from elsewhere: what they are called, name and options.
        step: CPU seconds of a plain training step.
    """

    components: int = 10
    changes: Mapping[str, _Variant] | None = None
    outside: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
    step: float = 0.01


def _synthetic(
    name: str, num: int, dim: int, law: int, steps: int, changes: Mapping[str, _Variant] | None = None
) -> _Source:
    law_of = {"num_components": num, "dim": dim}
    return _Source(
        name,
        "divae-synthetic",
        (
            f"data.num_components={num}",
            f"data.dim={dim}",
            f"data.law={law}",
            f"encoder.hidden=[{dim // 2}]",
            f"decoder.hidden=[{dim // 2}]",
            f"fit.steps={steps}",
            *_SHARED,
        ),
        seconds=6.0,
        components=num,
        changes=changes,
        outside={"other": ("embedded_mixture", {**law_of, "law": law + 1})},
        step=0.0016,
    )


def _mnist(steps: int, seconds: float) -> _Source:
    return _Source(
        "mnist",
        "divae-mnist-direct",
        (f"fit.steps={steps}", "fit.beta_warmup=0", *_SHARED),
        seconds=seconds,
        changes=_IMAGE_CHANGES,
        outside=_OUTSIDE,
        step=0.009,
    )


class DiVAEStudy(Study):
    """Five alignments under three priors, on data of known density and on MNIST, and what they hang on."""

    name = "divae"
    about = (
        "What aligning log p(z) with a density of the data is worth, by prior, weight, density and projection"
    )
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": Scale(
            (
                _Source(
                    "k3",
                    "divae-synthetic",
                    (
                        "data.num_components=3",
                        "data.dim=8",
                        "data.num_train=400",
                        "encoder.hidden=[8]",
                        "decoder.hidden=[8]",
                        "align.max_neighbors=40",
                        "fit.steps=30",
                        "fit.engine=eager",
                    ),
                    seconds=1.0,
                    components=3,
                    changes={name: _TRUTH_CHANGES[name] for name in ("exact", "noise-1")},
                    outside={"other": ("embedded_mixture", {"num_components": 3, "dim": 8, "law": 7})},
                ),
            ),
            seeds=(0,),
            num_data=60,
            num_particles=30,
            num_images=0,
            classifier_epochs=0,
        ),
        "cpu": Scale(
            (
                _mnist(2400, 24.0),
                _synthetic("k4", 4, 50, 2031965, 6000, _TRUTH_CHANGES),
            ),
            seeds=(0, 1, 2),
            num_data=500,
            num_particles=200,
            num_images=0,
            classifier_epochs=0,
        ),
        "full": Scale(
            (
                _synthetic("k4", 4, 50, 2031965, 23000, _TRUTH_CHANGES),
                _synthetic("k8", 8, 50, 6032000, 23000, _TRUTH_CHANGES),
                _synthetic("k12", 12, 30, 14082005, 23000, _TRUTH_CHANGES),
                _mnist(23000, 60.0),
            ),
            seeds=(0, 1, 2, 3, 4),
            num_data=2000,
            num_particles=1000,
            num_images=0,
            classifier_epochs=0,
        ),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List every alignment under every prior, then the changes, by data set; seeds are the slowest."""
        cells = []
        for seed in scale.seeds:
            for source in scale.sources:
                assert isinstance(source, _Source)
                cells += [
                    _cell(source, method, prior, _AS_IS, seed) for prior in _PRIORS for method in _METHODS
                ]
                cells += [_cell(source, "paper", "mixture", change, seed) for change in source.changes or ()]
        return cells

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train one program, aligned or not, and judge its prior's log-density."""
        change, seed = cell.factors["change"], cell.seed
        source = context.scale.source(cell.factors["data"])
        assert isinstance(source, _Source)
        torch.manual_seed(seed)
        program = spec.build(data)
        pair, target = None, None
        for part in program:
            part.to(context.device)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of priors and targets that do not go together: the study's subject
            if spec.align is not None:
                target = _target(spec.align, change, data, context, seed)
                pair = aligned(spec, program, data, target, context.device)
        start = time.process_time()
        model, guide = program if pair is None else pair
        fit(model, guide, data.train, **spec.fit.arguments(), device=context.device, progress=False)
        spent = time.process_time() - start
        scored = evenly(data.test, context.scale.num_data)
        scores, rho = _scores(program, scored, seed), _reference(scored, data, context)
        found = {
            **_agreement(scores, rho, "", seed),
            **_prior(program, pair),
            **_bound(program, scored, context.scale.num_particles, seed),
            **_coverage(program, scored, seed),
            **_outside(program, scores, source, data, context, seed),
            "kl": plain(scores.kl.mean()),
            "steps": float(spec.fit.arguments()["steps"]),
            "train_seconds": round(spent, 3),
        }
        if pair is not None and target is not None:
            found |= _training(program, pair, target, data, context.scale.num_data, seed)
            provider = pair.aligner.target
            if isinstance(provider, FlowTarget):
                log_det = provider.log_det_at(embedded(target, data, scored.clean)).cpu()
                found |= _agreement(scores, rho, "flow_", seed, log_det)
        return found

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write agreement, latents and data from elsewhere by alignment and prior, then what was changed."""
        main = [record for record in records if record.factors["change"] == _AS_IS]
        changed = _changed(records)
        outside = _outside_columns(records)
        factors = ("prior", "method")
        parts = [f"{_READING}\n\n{table(main, factors, _AGREEMENT, _WORDS)}"]
        parts += [table(main, factors, columns, _WORDS) for columns in (_LATENTS, outside) if columns]
        effects = (*_EFFECTS, *(c for c in outside if c.key.startswith("auroc") and c.key.endswith("/s")))
        less = "less no alignment, same seed"
        parts += paired(main, "method", "none", effects, _WORDS, less, within=("prior",))
        parts += _claims(main, outside)
        if len({record.factors["change"] for record in changed}) > 1:
            parts.append(
                "What it hangs on: DIRECT as in the paper under a mixture, changed in one thing.\n\n"
                + table(changed, ("change",), (*_AGREEMENT[:8], *_LATENTS[:2], *_LATENTS[4:10]), _WORDS)
            )
            parts += paired(changed, "change", _AS_IS, effects, _WORDS, "less as it is, same seed")
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw agreement, likelihood and detection of data from elsewhere, by alignment and by change."""
        detection = tuple(c for c in _outside_columns(records) if c.key.endswith("/s") and c.key[0] == "a")
        panels = (*_PANELS, *detection[:1])
        main = [record for record in records if record.factors["change"] == _AS_IS]
        path = stem.with_name(f"{stem.name}-alignment.png")
        drawn = [dots(main, ("prior", "method"), panels, path, title, name=_named)]
        changed = _changed(records)
        if len({record.factors["change"] for record in changed}) > 1:
            path = stem.with_name(f"{stem.name}-changes.png")
            heading = f"{title}: DIRECT under a mixture"
            drawn.append(dots(changed, ("change",), panels, path, heading, name=_named))
        return drawn


def _cell(source: _Source, method: str, prior: str, change: str, seed: int) -> Cell:
    factors = {"data": source.name, "prior": prior, "method": method, "change": change}
    components = () if prior == "normal" else (f"prior.components={source.components}",)
    alignment = _METHODS[method].overrides
    shared = tuple(change for change in source.overrides if not change.startswith("align."))
    if method != "none":
        # After the kind, as another kind begins with all else at its default.
        own = tuple(change for change in source.overrides if change.startswith("align."))
        alignment = (*alignment, *own, f"align.dim={2 if source.recipe == 'divae-synthetic' else 10}")
    changes = () if change == _AS_IS else (source.changes or {})[change].overrides
    seconds = source.seconds + _steps(source) * source.step * (_FLOW_COST if method == "flow" else 1.0)
    overrides = (*shared, *_PRIORS[prior].overrides, *components, *alignment, *changes)
    return Cell(factors, seed, source.recipe, overrides, seconds)


def _steps(source: _Source) -> int:
    steps: int = load_spec(source.recipe, source.overrides).fit.arguments()["steps"]
    return steps


def _target(keys: AlignKeys, change: str, data: Data, context: Context, seed: int) -> DensityTarget:
    """Estimate the density that a cell is aligned with, or take what another cell has estimated."""
    if change in _TRUTH_CHANGES:
        return _truth(change, data, seed)
    with locked(context.shared / "densities.lock"):
        if change != "codes":
            return estimate(keys, data, context.shared / "densities", progress=False)
        encoder = _code_encoder(data, context)
        return DensityTarget.fit(
            data.train.clean, projection=CodeProjection(encoder), cache=context.shared / "densities"
        )


def _truth(change: str, data: Data, seed: int) -> DensityTarget:
    assert data.log_density_intrinsic is not None
    rho = data.log_density_intrinsic(data.train.clean.double())
    kind, _, size = change.partition("-")
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        rho = rho + float(size) * torch.randn(rho.shape, dtype=rho.dtype, generator=generator)
    elif kind == "bias":
        rho = rho + float(size)
    elif kind == "slope":
        rho = rho.mean() + 0.5 * (rho - rho.mean())
    return DensityTarget.known(rho, _ERROR)


def _code_encoder(data: Data, context: Context) -> nn.Module:
    """Train the autoencoder whose codes are a projection, on the grey levels, once for all cells."""
    spec = load_spec(
        "x-vae-mnist", ["z_dim=10", "data.dequantize=false", "autoencoder.epochs=3", "fit.seed=0"]
    )
    grey = spec.load_data(context.root, context.download)
    folder = context.shared / "autoencoder"
    stage = pretrain(spec, spec.build(grey), grey, folder=folder, device=context.device, progress=False)
    return stage.encoder


def _reference(scored: Split, data: Data, context: Context) -> Tensor:
    """Log-densities of held-out data in nats, the same for all cells: true ones, or PAk's by PCA."""
    if data.log_density_intrinsic is not None:
        return data.log_density_intrinsic(scored.clean.double())
    with locked(context.shared / "densities.lock"):
        target = DensityTarget.fit(data.train.clean, dim=10, cache=context.shared / "densities")
    return target.log_prob(scored.clean).log_density


def _scores(program: Program, split: Split, seed: int) -> LatentScores:
    return latent_scores(*program, split, num_samples=_DRAWS, seed=seed, progress=False)


def _agreement(
    scores: LatentScores, rho: Tensor, prefix: str, seed: int, log_det: Tensor | None = None
) -> Metrics:
    """Compare log p(z) at one draw, or with a log-determinant added, with log-densities of the same data."""
    s = scores.log_p_draw if log_det is None else scores.log_p_draw + log_det.to(scores.log_p_draw)
    found = density_agreement(s, rho, num_bootstrap=0, seed=seed).measures()
    return {f"{prefix}{name}": plain(figure.value) for name, figure in found.items()}


def _prior(program: Program, pair: Aligned | None) -> Metrics:
    """Say where log p(z) of the trained prior lies, and the targets of the training data beside it."""
    if pair is None:
        prior = program.model.prior()  # type: ignore[operator]
        with torch.no_grad():
            s = prior.log_prob(prior.sample((10_000,)))
        return {"prior_mean": plain(s.mean()), "prior_std": plain(s.std())}
    found = pair.report()
    assert found.prior is not None
    return {
        "target_mean": plain(found.target_mean),
        "target_std": plain(found.target_std),
        "infeasible": None if found.infeasible is None else plain(found.infeasible),
        "prior_mean": plain(found.prior.mean),
        "prior_std": plain(found.prior.std),
    }


def _bound(program: Program, split: Split, num_particles: int, seed: int) -> Metrics:
    found = log_likelihood(*program, split, num_particles=num_particles, seed=seed, progress=False)
    return {
        "iwae": plain(found.mean),
        "iwae_error": plain(found.standard_error),
        "elbo": plain(found.elbo),
        "khat_share": plain(found.khat_share),
    }


def _coverage(program: Program, split: Split, seed: int) -> Metrics:
    part = evenly(split, _COVERED)
    found = prior_coverage(*program, part, num_bootstrap=0, seed=seed)
    names = ("posterior_to_prior", "prior_to_posterior", "energy")
    return {
        **{name: plain(getattr(found, name).value) for name in names},
        "active": float(active_units(*program, split).count),
    }


def _outside(
    program: Program, inside: LatentScores, source: _Source, data: Data, context: Context, seed: int
) -> Metrics:
    """Tell data from elsewhere by s, KL, H and ELBO: AUROC, and differences of means from the test data."""
    found: Metrics = {}
    for name, (other, options) in (source.outside or {}).items():
        protocol = data.protocol
        outside = pvae.data.load(
            other,
            binarize=protocol.binarize,
            scale=protocol.scale,
            dequantize=protocol.dequantize,
            root=context.root,
            download=context.download,
            **options,
        )
        scores = _scores(program, evenly(outside.test, context.scale.num_data), seed + 1)
        report = compare_scores(inside, scores, num_bootstrap=0, seed=seed)
        for score, letter in _SCORES:
            detector = report.detectors[score]
            found[f"auroc/{name}/{letter}"] = plain(detector.auroc.value)
            found[f"delta/{name}/{letter}"] = plain(detector.delta)
    return found


def _training(
    program: Program, pair: Aligned, target: DensityTarget, data: Data, num_data: int, seed: int
) -> Metrics:
    """Compare log p(z) of training data with what it was aligned with, a flow's log-determinant added."""
    rows = torch.linspace(0, len(data.train) - 1, min(num_data, len(data.train)), dtype=torch.float64).long()
    scores = _scores(program, data.train[rows], seed)
    log_det = pair.log_det()[rows.to(pair.log_det().device)].cpu()
    found = _agreement(scores, target.log_density[rows], "", seed, log_det)
    return {"pearson_train": found["pearson"], "spearman_train": found["spearman"]}


def _changed(records: Sequence[Record]) -> list[Record]:
    """DIRECT as in the paper under a mixture, as it is and with every change."""
    return [r for r in records if (r.factors["prior"], r.factors["method"]) == ("mixture", "paper")]


def _outside_columns(records: Sequence[Record]) -> tuple[Column, ...]:
    """AUROC of every score for each outside set, and the differences of means."""
    keys = dict.fromkeys(key for record in records for key in record.metrics if key.startswith("auroc/"))
    columns = []
    for key in keys:
        _, name, score = key.split("/")
        columns.append(Column(key, f"AUROC of {_SIGNED[score]}, {name}"))
        if score != "ELBO":
            columns.append(Column(f"delta/{name}/{score}", f"Δ{score}, {name}"))
    return tuple(columns)


def _claims(records: Sequence[Record], outside: Sequence[Column]) -> list[str]:
    """Check what is known of the paper's claims: one holds where a difference's interval is beyond zero."""
    scores = [column for column in outside if column.key.startswith("auroc") and column.key.endswith("/s")]
    ks, pearson = _AGREEMENT[0], _AGREEMENT[4]
    coverage, energy = _LATENTS[4], _LATENTS[6]
    asked: list[tuple[str, str, str, list[tuple[Column, int]]]] = [
        ("DIRECT agrees better than none", "paper", "none", [(ks, -1), (pearson, 1)]),
        ("FLOW agrees worse than DIRECT", "flow", "paper", [(ks, 1), (pearson, -1)]),
        ("DIRECT covers better than none", "paper", "none", [(coverage, -1), (energy, -1)]),
        ("DIRECT tells strange data better than none", "paper", "none", [(c, 1) for c in scores]),
        ("FLOW tells strange data better than DIRECT", "flow", "paper", [(c, 1) for c in scores]),
    ]
    rows = []
    for claim, better, worse, wanted in asked:
        pair = [record for record in records if record.factors["method"] in (better, worse)]
        columns = [column for column, _ in wanted]
        for (prior, _), row in differences(pair, "method", worse, columns, within=("prior",)).items():
            for (column, sign), found in zip(wanted, row, strict=True):
                rows.append([claim, _WORDS[prior], column.title, verdict(found, sign)])
    if not rows:
        return []
    header = ["claim", "prior", "figure", "difference, and whether the claim holds"]
    return ["What is known of the paper's claims, one by one:\n\n" + markdown(header, rows)]


def _named(values: tuple[str, ...]) -> str:
    return ", ".join(_WORDS[value] for value in values)
