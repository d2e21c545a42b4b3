"""What CVAE-NF's paper (arXiv:2511.08946v3) did not separate: prior, encoder, sigma, way of sampling."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pvae.data import Data
from pvae.evaluation import LabelClassifier, active_units, frechet_distance, mean_pairwise_distance
from pvae.inference import fit
from pvae.inference.isolation import device_of, evaluating

from ..program import Program
from ..spec import Spec
from .judge import Judge, evenly, judge
from .ledger import Record
from .measures import likelihood, posterior, reconstructions, sigma_of
from .plots import dots
from .study import Cell, Context, Metrics, Scale, Source, Study, plain
from .tables import Column, configurations, paired, table

__all__ = ["CVAENF"]

_PRIORS = {
    "normal": ("prior.kind=normal",),
    "gaussian": ("prior.kind=conditional_flow", "prior.num_flows=0"),
    "one-coupling": ("prior.kind=conditional_flow", "prior.num_flows=1", "prior.context=false"),
    "four-couplings-y": ("prior.kind=conditional_flow", "prior.num_flows=4", "prior.context=true"),
}
_FLOWS = ("one-coupling", "four-couplings-y")
_ENCODERS = {"x": ("encoder.label_dim=0",), "x-y": ("encoder.label_dim=64",)}
_SIGMAS = {
    "optimal": ("likelihood.sigma=batch",),
    "one": ("likelihood.sigma=fixed", "likelihood.value=1.0"),
}
_WORDS = {
    "normal": "N(0, I)",
    "gaussian": "Gaussian p(z given y)",
    "one-coupling": "1 coupling, without y",
    "four-couplings-y": "4 couplings, with y",
    "x-y": "x, y",
    "optimal": "σ*",  # noqa: RUF001
    "one": "1",
}
_FACTORS = ("prior", "encoder", "sigma")
_DRAWS = 8
_NUISANCES = 6
_RARE = 500  # samples of rare combinations

_LIKELIHOOD = (
    Column("elbo", "ELBO"),
    Column("iwae", "IWAE"),
    Column("iwae_bits", "bits/dim"),
    Column("khat_share", "k-hat high, %", 100),
    Column("rate", "rate"),
    Column("log_prior", "E_q log p(z given y)"),
    Column("sigma", "σ"),  # noqa: RUF001
    Column("mse", "MSE × 1000", 1000),  # noqa: RUF001
    Column("rho", "ρ"),  # noqa: RUF001
    Column("active_units", "active units"),
)
_PICTURES = (
    Column("frechet_reconstructions", "Fréchet, reconstructions"),
    Column("frechet_exact", "Fréchet, samples"),
    Column("frechet_paper", "Fréchet, paper's sampling"),
    Column("accuracy_exact", "accuracy, %", 100),
    Column("accuracy_paper", "accuracy, paper's sampling, %", 100),
    Column("all_right_exact", "all attributes right, %", 100),
    Column("all_right_paper", "all attributes right, paper's sampling, %", 100),
    Column("rare_exact", "rare pairs right, %", 100),
    Column("rare_paper", "rare pairs right, paper's sampling, %", 100),
    Column("diversity_exact", "diversity given y"),
    Column("diversity_paper", "diversity given y, paper's sampling"),
)
_EFFECTS = (
    Column("iwae", "IWAE"),
    Column("rate", "rate"),
    Column("frechet_reconstructions", "Fréchet, reconstructions"),
    Column("frechet_exact", "Fréchet, samples"),
    Column("accuracy_exact", "accuracy, points", 100),
    Column("rare_exact", "rare pairs right, points", 100),
)


class CVAENF(Study):
    """Four priors, two encoders, two sigmas; every program is sampled exactly and as the paper does."""

    name = "cvae-nf"
    about = "What the flow prior, an encoder that sees y, the optimal sigma and exact sampling are each worth"
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": Scale(
            (Source("digits", "cvae-nf-digits", ("fit.epochs=4", "fit.beta_warmup=1"), 17, 3.0),),
            seeds=(0,),
            num_data=50,
            num_particles=30,
            num_images=150,
            classifier_epochs=5,
        ),
        "cpu": Scale(
            (
                Source("mnist", "cvae-nf-mnist", ("fit.epochs=6", "fit.beta_warmup=1"), seconds=50.0),
                Source(
                    "sprites",
                    "cvae-nf-sprites",
                    ("fit.epochs=30", "fit.beta_warmup=3", "data.num_test=4000"),
                    seconds=42.0,
                ),
            ),
            seeds=(0, 1, 2),
            num_data=1000,
            num_particles=100,
            num_images=2000,
            classifier_epochs=8,
        ),
        "full": Scale(
            (
                Source("mnist", "cvae-nf-mnist", ("fit.epochs=100",), seconds=900.0),
                Source(
                    "sprites", "cvae-nf-sprites", ("fit.epochs=400", "data.num_test=20000"), seconds=900.0
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
        """List a reference and sixteen configurations for each data set; seeds are the slowest."""
        cells = []
        for source in scale.sources:
            reference = {"data": source.name, "reference": "real"}
            cells.append(Cell(reference, 0, source.recipe, source.overrides, source.seconds))
            for seed, prior, encoder, sigma in itertools.product(scale.seeds, _PRIORS, _ENCODERS, _SIGMAS):
                factors = {"data": source.name, "prior": prior, "encoder": encoder, "sigma": sigma}
                changes = (*source.overrides, *_PRIORS[prior], *_ENCODERS[encoder], *_SIGMAS[sigma])
                cells.append(Cell(factors, seed, source.recipe, changes, source.seconds))
        return cells

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train one program and judge its likelihood, its reconstructions and its samples."""
        real = judge(data, context)
        if "reference" in cell.factors:
            return _reference(real, data, cell.seed)
        program = spec.build(data)
        fit(*program, data, **spec.fit.arguments(), device=context.device, progress=False)
        scale, held = context.scale, real.held_out
        levels = scale.source(cell.factors["data"]).levels
        terms = posterior(program, held.scored, _DRAWS, cell.seed)
        sigma = sigma_of(program)
        metrics = likelihood(program, held.scored, levels, scale.num_particles, cell.seed)
        metrics |= {
            "rate": plain(terms.rate),
            "log_prior": plain(terms.log_prior),
            "sigma": sigma,
            "mse": plain(terms.mse),
            "rho": plain(terms.mse / sigma**2),
            "active_units": plain(active_units(*program, held.scored).relative_count),
            "frechet_reconstructions": plain(
                frechet_distance(real.features(reconstructions(program, held.shown)), real.shown)
            ),
        }
        ways = ("exact", "paper") if cell.factors["prior"] in _FLOWS else ("exact",)
        for way in ways:
            measured = _judged(program, real, way, cell.seed)
            metrics |= {f"{name}_{way}": value for name, value in measured.items()}
        return metrics

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write likelihoods, pictures, what real data reach, and the effect of each factor alone."""
        parts = [
            table(records, _FACTORS, _LIKELIHOOD, _WORDS),
            table(records, _FACTORS, _PICTURES, _WORDS),
        ]
        if any("reference" in record.factors for record in records):
            parts.append(
                "Real data: training data against test data of the same number, and the classifier's word on "
                "real test data: samples above it are easier for the classifier than data, not better.\n\n"
                + table(records, ("reference",), _PICTURES)
            )
        for factor, baseline in (("prior", "normal"), ("prior", "gaussian"), ("encoder", "x")):
            less = f"{factor}, less {_WORDS.get(baseline, baseline)}"
            title = "Paired differences, averaged over the other factors"
            parts += paired(records, factor, baseline, _EFFECTS, _WORDS, less, within=("sigma",), title=title)
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw every configuration's likelihood and Fréchet distances."""
        if not configurations(records, _FACTORS):
            return []
        chosen = (_LIKELIHOOD[2], *_PICTURES[:3])
        return [dots(records, _FACTORS, chosen, stem.with_name(f"{stem.name}-factors.png"), title, name=_row)]


def _row(factors: tuple[str, ...]) -> str:
    prior, encoder, sigma = (_WORDS.get(value, value) for value in factors)
    return f"{prior};  encoder sees {encoder};  σ {'= 1' if sigma == '1' else 'optimal'}"  # noqa: RUF001


def _judged(program: Program, real: Judge, way: str, seed: int) -> Metrics:
    """Judge samples for held-out labels, and for rare pairs of attribute values."""
    y = real.held_out.shown.y
    assert y is not None
    pictures = _draw(program, y, way, seed)
    features = real.features(pictures)
    return {
        "frechet": plain(frechet_distance(features, real.real)),
        "diversity": plain(mean_pairwise_distance(features, y)),
        **_accuracy(real.classifier, pictures, y),
        "rare": _rare(real, y, lambda rows: _draw(program, rows, way, seed)),
    }


def _reference(real: Judge, data: Data, seed: int) -> Metrics:
    """Judge real data as if they were samples."""
    held = real.held_out
    assert held.real.y is not None
    train = evenly(data.train, len(held.real)).x
    return {
        "frechet_exact": plain(frechet_distance(real.classifier.features(train), real.real)),
        "diversity_exact": plain(mean_pairwise_distance(real.real, held.real.y)),
        **{
            f"{name}_exact": value
            for name, value in _accuracy(real.classifier, held.real.x, held.real.y).items()
        },
        "rare_exact": None if data.truth is None else _rare(real, held.real.y, _renderer(data, seed)),
    }


def _draw(program: Program, y: Tensor, way: str, seed: int) -> Tensor:
    """Draw means of p(x | z, y), one for each label, with the same noise for both ways."""
    with evaluating(*program):
        torch.manual_seed(seed)
        y = y.to(device_of(*program))
        return program.model.sample(len(y), y, mean=True, sampling=way)  # type: ignore[operator]


def _accuracy(classifier: LabelClassifier, x: Tensor, y: Tensor) -> Metrics:
    found = classifier.accuracy(x.clamp(0, 1), y)
    return {
        "accuracy": plain(found.overall),
        # For classes the same as the accuracy.
        "all_right": plain(found.exact) if y.ndim == 2 else None,
    }


def _rare(real: Judge, y: Tensor, draw: Callable[[Tensor], Tensor]) -> float | None:
    """Share of pictures in which the classifier sees both values of the rare pair that they were drawn for.

    The other attributes are those of held-out data, so that the pair alone is unusual.
    """
    if not real.rare:
        return None
    number = max(1, _RARE // len(real.rare))
    found = []
    for pair in real.rare:
        rows = y[torch.arange(number) % len(y)].clone()
        rows[:, list(pair.columns)] = torch.tensor(pair.values, dtype=rows.dtype, device=rows.device)
        seen = real.classifier.predict(draw(rows).clamp(0, 1))
        found.append(pair.matches(seen).double().mean())
    return plain(torch.stack(found).mean())


def _renderer(data: Data, seed: int) -> Callable[[Tensor], Tensor]:
    """Draw true pictures of attributes."""

    def draw(y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        nuisance = torch.rand(len(y), _NUISANCES, generator=generator, dtype=torch.float64)
        return (data.truth.render(y, nuisance).float() + 0.5) / 256

    return draw
