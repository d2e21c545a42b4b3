"""What a diffusion over pseudoinputs is worth above a ladder of latents (DVP-VAE, arXiv:2412.01373v1)."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pvae import canvas
from pvae.data import Data, Split
from pvae.evaluation import log_likelihood, nested_likelihood
from pvae.inference import fit
from pvae.inference.program import parameters_of
from pvae.models import Ladder
from pvae.priors import DiffusionPrior

from ..ladder_report import LadderReport, ladder_report
from ..program import Program
from ..spec import Spec
from .judge import evenly
from .ledger import Record
from .overstated import overstated
from .plots import Trend, dots, trends
from .study import Cell, Context, Metrics, Scale, Source, Study, plain
from .tables import Column, configurations, differences, interval, markdown, paired, table, verdict

__all__ = ["DVPStudy"]


@dataclass(frozen=True)
class _Model:
    """A model that is compared.

    Attributes:
        recipe: Where it starts from.
        overrides: Changes of the recipe.
        warmup: Share of training over which the weight of the KL rises.
        epochs: Length of training in units of the others'.
        step: CPU seconds of a step on one core.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    warmup: float = 0.0
    epochs: float = 1.0
    step: float = 0.02


@dataclass(frozen=True)
class _Change:
    """What is changed about a model, one thing at a time.

    Attributes:
        words: How it reads.
        overrides: Changes of the recipe.
        models: The models that it is tried on.
    """

    words: str
    overrides: tuple[str, ...]
    models: tuple[str, ...] = ("dvp",)


@dataclass(frozen=True)
class _Source(Source):
    """A data set; ``seconds`` is that of measuring alone, ``overrides`` are those of every model.

    Attributes:
        models: What is trained on it.
        changes: What is changed.
        epochs: Length of training.
        steps: Training steps of an epoch, for the expected time alone.
        seeds: Seeds of its configurations.
    """

    models: Mapping[str, _Model] = field(default_factory=dict)
    changes: Mapping[str, _Change] = field(default_factory=dict)
    epochs: int = 10
    steps: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class _Scale(Scale):
    """How large a study is, with the sizes of the nested bound and of the authors' evaluation.

    Attributes:
        u_draws: Draws of u for each datum of the nested bound.
        u_times: Times of the diffusion's bound for each of them.
        code_steps: Points of the grid on which the authors' code evaluates the density of u.
    """

    u_draws: int = 4
    u_times: int = 32
    code_steps: int = 25


_AS_IS = "as-is"
_PLAIN = ("prior=none", "pseudoinput=none")
_NAMES = {
    "dvp": "DVP-VAE",
    "ladder": "ladder",
    "vae": "VAE",
    "vae-time": "VAE, equal time",
    "vampprior": "VampPrior",
    "hvae": "HVAE, VampPrior",
}
_CHANGES = {
    "no-aggregate": _Change("no aggregation", ("decoder.aggregate=false",), ("dvp", "ladder")),
    "postprocess-0": _Change("linear read-out", ("decoder.postprocess=0",)),
    "downsampled": _Change("u: small image", ("pseudoinput=downsampled", "pseudoinput.size=3")),
    "linear": _Change("u: learned map", ("pseudoinput=linear", "pseudoinput.size=3")),
    **{
        f"size-{size}": _Change(f"u: {size}×{size}", (f"pseudoinput.size={size}",))  # noqa: RUF001
        for size in (2, 4, 5)
    },
    **{
        f"gamma-{end}": _Change(f"γ₀ = −{end}", (f"prior.gamma_min=-{end}.0",))  # noqa: RUF001
        for end in (5, 9)
    },
    "u-normal": _Change("p(u): N(0, I)", ("prior=normal",)),
    "u-mixture": _Change("p(u): mixture", ("prior=mixture",)),
    "narrow-range": _Change("log var r in [−12, −5]", ("posterior.log_variance_range=[-12.0, -5.0]",)),  # noqa: RUF001
}
_SIZES = {_AS_IS: 3.0, "size-2": 2.0, "size-4": 4.0, "size-5": 5.0}
_ENDS = {_AS_IS: 7.0, "gamma-5": 5.0, "gamma-9": 9.0}
_WORDS = _NAMES | {_AS_IS: "as it is"} | {name: change.words for name, change in _CHANGES.items()}

# Recipes of 100 epochs begin with five of a rising weight of the KL, those of 200 with 20. Seconds of a step
# were taken in turn on one core of a busy machine.
_MNIST = {
    "dvp": _Model("dvp-mnist-small", step=0.23),
    "ladder": _Model("dvp-mnist-small", _PLAIN, step=0.18),
    "vae": _Model("vae-mnist", warmup=0.05, step=0.014),
    "vampprior": _Model("vampprior-mnist", warmup=0.05, step=0.045),
    "hvae": _Model("hvae-mnist", warmup=0.05, step=0.059),
}
_DIGITS = {
    "dvp": _Model("dvp-tiny", warmup=0.1, step=0.045),
    "ladder": _Model("dvp-tiny", _PLAIN, warmup=0.1, step=0.035),
    "vae": _Model("vae", ("posterior=normal",), warmup=0.1, step=0.003),
}
_TINY = ("decoder.channels=4",)
_NARROW = ("encoder.hidden=[8]", "decoder.hidden=[8]")
_SMOKE = {
    "dvp": _Model("dvp-tiny", (*_TINY, "prior.hidden=8", "prior.num_steps=4"), warmup=0.1),
    "ladder": _Model("dvp-tiny", (*_PLAIN, *_TINY), warmup=0.1),
    "vae": _Model("vae", ("posterior=normal", *_NARROW), warmup=0.1),
    "vampprior": _Model("vampprior-mnist", (*_NARROW, "prior.components=5"), warmup=0.05),
    "hvae": _Model(
        "hvae-mnist",
        ("encoder.hidden=[8]", "decoder.hidden=8", "posterior.hidden=8", "prior.components=5"),
        warmup=0.05,
    ),
}


def _at_equal_time(models: Mapping[str, _Model], times: float) -> dict[str, _Model]:
    """Add the VAE that is trained for as many times the epochs as one of DVP-VAE's takes it."""
    vae = models["vae"]
    return {**models, "vae-time": _Model(vae.recipe, vae.overrides, vae.warmup, times, vae.step)}


_READING = (
    "All are lower bounds on log p(x). The ELBO and the nested bound of DVP-VAE are those of its diffusion "
    "in continuous time, its IWAE that of the chain of steps that is sampled, calibrated on training data; u "
    "is inside the logarithm of IWAE and outside of that of the nested bound. Data, batches and epochs are "
    "the same for all models, but for the VAE that is trained for about the CPU time of DVP-VAE."
)
_LATENT_READING = (
    "The rate of u is the mean of log r(u | x) - log p(u), in continuous time; beside it those on training "
    "data, of the chain, and of one Gaussian fitted to u of the training data. The rise is what the KLs of "
    "the layers below gain when every datum is given the u of another one. Active: the variance of a "
    "posterior mean is above 0.01; collapsed: KL below 0.01 nats for 95 % of the data; both without u."
)
_CODE_READING = (
    "The authors' procedure is no bound: closed-form KLs and a density of u on a grid, with new noise for "
    "every particle, inside a log-mean-exp. It stands here to show by how much it overstates; with sampled "
    "ratios of z in place of the KLs the density of u alone is wrong, and with one particle the noise is not "
    "exponentiated."
)
_ELBO, _NESTED, _IWAE = Column("elbo", "ELBO"), Column("nested", "nested bound"), Column("iwae", "IWAE")
_BOUNDS = (
    _ELBO,
    _NESTED,
    _IWAE,
    Column("khat_share", "k-hat high, %", 100),
    Column("reconstruction", "reconstruction"),
    Column("rate", "KL of all"),
    Column("parameters", "parameters"),
    Column("steps", "steps"),
    Column("train_seconds", "training, CPU s"),
)
_U = (
    Column("rate_u", "rate of u"),
    Column("rate_u_train", "on training data"),
    Column("rate_u_steps", "of the chain"),
    Column("rate_u_gaussian", "of a Gaussian fit"),
    Column("u_log_variance", "mean log var r"),
    Column("u_at_bounds", "at an end, %", 100),
    Column("u_clipped", "clipped, %", 100),
    Column("rise", "rise with another u"),
)
_CODE = (
    _ELBO,
    _NESTED,
    _IWAE,
    Column("code", "the authors' procedure"),
    Column("code_above", "less IWAE"),
    Column("code_sampled", "with sampled ratios"),
    Column("code_sampled_above", "less IWAE"),
    Column("code_elbo", "with one particle"),
    Column("code_elbo_above", "less ELBO"),
)
_EFFECTS = (
    _ELBO,
    _NESTED,
    _IWAE,
    Column("code", "the authors' procedure"),
    Column("reconstruction", "reconstruction"),
    Column("rate", "KL of all"),
    Column("rate_u", "rate of u"),
    Column("active", "active"),
    Column("train_seconds", "training, CPU s"),
)
_PANELS = (_ELBO, _IWAE, Column("code", "the authors' procedure, no bound"))
_LINES = (_ELBO, _NESTED, _IWAE)
_RATES = (Column("rate_u", "rate of u"), Column("rate_u_gaussian", "rate under a Gaussian fit"))
_FITTED = 10_000  # training data that a Gaussian is fitted to u of


class DVPStudy(Study):
    """DVP-VAE beside a ladder, VAEs, VampPrior and HVAE on MNIST, and what it is made of on digits."""

    name = "dvp"
    about = "What a diffusion over pseudoinputs is worth above a ladder of latents, and on what it hangs"
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": _Scale(
            (
                _Source(
                    "digits",
                    "dvp-tiny",
                    ("data.name=digits", "fit.batch_size=100", "fit.engine=eager"),
                    levels=2,
                    seconds=3.0,
                    models=_at_equal_time(_SMOKE, 2.0),
                    changes={name: _CHANGES[name] for name in ("no-aggregate", "u-mixture", "size-2")},
                    epochs=2,
                    steps=12,
                    seeds=(0,),
                ),
            ),
            seeds=(0,),
            num_data=20,
            num_particles=6,
            num_images=0,
            classifier_epochs=0,
            u_draws=2,
            u_times=2,
            code_steps=3,
        ),
        "cpu": _Scale(
            (
                _Source(
                    "mnist",
                    "dvp-mnist-small",
                    ("fit.batch_size=100", "fit.engine=eager"),
                    levels=2,
                    seconds=100.0,
                    models=_at_equal_time(_MNIST, 14.0),
                    epochs=10,
                    steps=500,
                    seeds=(0, 1),
                ),
                _Source(
                    "digits",
                    "dvp-tiny",
                    ("fit.batch_size=64", "fit.engine=eager"),
                    levels=2,
                    seconds=30.0,
                    models=_DIGITS,
                    changes=_CHANGES,
                    epochs=60,
                    steps=20,
                ),
            ),
            seeds=(0, 1, 2),
            num_data=300,
            num_particles=50,
            num_images=0,
            classifier_epochs=0,
        ),
        "full": _Scale(
            (
                _Source(
                    "mnist",
                    "dvp-mnist-small",
                    ("fit.batch_size=100", "fit.engine=graph"),
                    levels=2,
                    seconds=1500.0,
                    models=_at_equal_time(_MNIST, 14.0),
                    epochs=100,
                    steps=500,
                ),
                _Source(
                    "digits",
                    "dvp-tiny",
                    ("fit.batch_size=64", "fit.engine=graph"),
                    levels=2,
                    seconds=300.0,
                    models=_DIGITS,
                    changes=_CHANGES,
                    epochs=400,
                    steps=20,
                ),
            ),
            seeds=(0, 1, 2),
            num_data=1000,
            num_particles=1000,
            num_images=0,
            classifier_epochs=0,
        ),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List every model of a data set, then the changes, by data set; seeds are the slowest."""
        cells = []
        for seed in scale.seeds:
            for source in scale.sources:
                assert isinstance(source, _Source)
                if seed not in source.seeds:
                    continue
                cells += [_cell(source, name, _AS_IS, seed) for name in source.models]
                cells += [
                    _cell(source, name, change, seed)
                    for change, changed in source.changes.items()
                    for name in changed.models
                ]
        return cells

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train one program; bound its likelihood and measure its layers on held-out data."""
        program, scale = spec.build(data), context.scale
        assert isinstance(scale, _Scale)
        settings = spec.fit.arguments()
        start = time.process_time()
        run = fit(*program, data.train, **settings, device=context.device, progress=False)
        trained = time.process_time()
        scored, seen = (evenly(split, scale.num_data) for split in (data.test, data.train))
        layers = ladder_report(
            *program,
            scored,
            seen,
            evenly(data.train, _FITTED),
            num_train=len(data.train),
            seed=cell.seed,
            progress=False,
        )
        metrics: Metrics = {
            **_layers(layers),
            **_bounds(program, scored, scale, cell.seed),
            "parameters": float(sum(p.numel() for _, p in parameters_of(*program))),
            "steps": float(run.steps),
            "train_seconds": round(trained - start, 3),
        }
        metrics["rate"] = _sum(value for key, value in metrics.items() if key.startswith("kl/"))
        return metrics | {"eval_seconds": round(time.process_time() - trained, 3)}

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write models, what was changed, and how much the authors' evaluation overstates either."""
        main = [record for record in records if record.factors["change"] == _AS_IS]
        parts = [f"{_READING}\n\n{table(main, ('model',), _BOUNDS, _WORDS)}"]
        parts += paired(main, "model", "dvp", _EFFECTS, _WORDS, "less DVP-VAE, same seed")
        parts += _claims(main)
        parts.append(f"{_LATENT_READING}\n\n{table(main, ('model',), _latents(main), _WORDS)}")
        if len(records) > len(main):
            both = ("model", "change")
            parts.append("Changed in one thing:\n\n" + table(records, both, _BOUNDS, _WORDS))
            parts += paired(
                records, "change", _AS_IS, _EFFECTS, _WORDS, "less as it is, same seed", within=("model",)
            )
            parts.append(table(records, both, _latents(records), _WORDS))
        ladders = [record for record in records if record.metrics.get("code") is not None]
        if ladders:
            parts.append(f"{_CODE_READING}\n\n{table(ladders, ('model', 'change'), _CODE, _WORDS)}")
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw bounds by model, the KL of each layer, and bounds against what u is."""
        main = [record for record in records if record.factors["change"] == _AS_IS]
        drawn = []
        if main:
            path = stem.with_name(f"{stem.name}-models.png")
            drawn.append(dots(main, ("model",), _PANELS, path, title, name=_named))
        if any(record.failure is None for record in records):
            path = stem.with_name(f"{stem.name}-layers.png")
            drawn.append(_layer_bars(records, path, f"{title}: KL of each layer, nats"))
        for name, levels, across in (
            ("size", _SIZES, "size of u, k of k×k"),  # noqa: RUF001
            ("gamma", _ENDS, "−γ₀, where the diffusion ends at the data"),  # noqa: RUF001
        ):
            panels = {"bounds, nats": _along(records, levels, _LINES)}
            panels["rate, nats"] = _along(records, levels, _RATES)
            if any(len(line.points) > 1 for line in panels["bounds, nats"]):
                path = stem.with_name(f"{stem.name}-{name}.png")
                drawn.append(trends(panels, path, title, across=across, ticks=sorted(levels.values())))
        return drawn


def _cell(source: _Source, name: str, change: str, seed: int) -> Cell:
    model = source.models[name]
    epochs = round(source.epochs * model.epochs)
    overrides = (
        *source.overrides,
        *model.overrides,
        f"fit.epochs={epochs}",
        f"fit.beta_warmup={model.warmup * epochs:g}",
        *(() if change == _AS_IS else source.changes[change].overrides),
    )
    seconds = source.seconds + model.step * source.steps * epochs
    factors = {"data": source.name, "model": name, "change": change}
    return Cell(factors, seed, model.recipe, overrides, seconds)


def _bounds(program: Program, split: Split, scale: _Scale, seed: int) -> Metrics:
    """Bound log p(x) in every valid way, and evaluate ladders in the authors' way beside it."""
    particles = scale.num_particles
    full = log_likelihood(*program, split, num_particles=particles, seed=seed, progress=False)
    usual = overstated(program, split, num_particles=particles, num_steps=scale.code_steps, seed=seed)
    found: Metrics = {
        "elbo": plain(full.elbo),
        "iwae": plain(full.mean),
        "iwae_error": plain(full.standard_error),
        "particle_error": plain(full.monte_carlo_error),
        "khat_share": plain(full.khat_share),
        "reconstruction": plain(-usual.reconstruction.mean()),
    }
    if _has_diffusion(program.model):
        nested = nested_likelihood(
            *program,
            split,
            num_particles=particles,
            num_draws=scale.u_draws,
            num_times=scale.u_times,
            seed=seed,
            progress=False,
        )
        found |= {
            "elbo": plain(nested.elbo),
            "elbo_steps": plain(full.elbo),
            "nested": plain(nested.mean),
            "nested_error": plain(nested.standard_error),
            "kl/u": plain(nested.rate),  # of more times than that of the report
            "rate_u": plain(nested.rate),
            "num_steps": float(full.num_steps or 0),
            "calibrated": float(bool(full.calibrated)),
        }
    if isinstance(program.model, Ladder):
        for name, values in (
            ("code", usual.log_prob),
            ("code_sampled", usual.log_prob_sampled),
            ("code_elbo", usual.elbo),
        ):
            found[name] = plain(values.mean())
            found[f"{name}_above"] = _less(found[name], found["elbo" if name == "code_elbo" else "iwae"])
        found["code_above_error"] = plain(_error(usual.log_prob - full.log_prob))
    return found


def _has_diffusion(model: nn.Module) -> bool:
    return isinstance(getattr(model, "prior", None), DiffusionPrior)


def _layers(report: LadderReport) -> Metrics:
    """What every layer costs and shows, and what u does."""
    found: Metrics = {}
    for layer in report.test.layers:
        found[f"kl/{layer.name}"] = plain(layer.mean)
        found[f"active/{layer.name}"] = float(layer.active)
        found[f"collapsed/{layer.name}"] = layer.collapsed
    rest = [layer for layer in report.test.layers if layer.name != "u"]
    shares = [(layer.size, layer.collapsed) for layer in rest]
    known = [(size, share) for size, share in shares if share is not None]
    found |= {
        "active": float(sum(layer.active for layer in rest)),
        "units": float(sum(layer.size for layer in rest)),
        "collapsed": (
            sum(size * share for size, share in known) / sum(size for size, _ in known)
            if len(known) == len(shares)
            else None
        ),
    }
    u = report.u
    if u is not None:
        found |= {
            "rate_u": plain(u.rate.mean()),
            "rate_u_train": plain(u.rate_train.mean()),
            "rate_u_steps": None if u.rate_steps is None else plain(u.rate_steps.mean()),
            "rate_u_gaussian": plain(u.gaussian.mean()),
            "u_log_variance": plain(u.log_variance.mean()),
            "u_at_bounds": u.share_at_bounds,
            "u_clipped": None if u.clipped is None else u.clipped[0],
            "rise": plain(u.exchange.rise.mean()),
        }
    return found


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _latents(records: Sequence[Record]) -> tuple[Column, ...]:
    """Columns of u, of all units, and of every layer."""
    names = _layer_names(records)
    return (
        *_U,
        Column("active", "active"),
        Column("units", "of"),
        Column("collapsed", "collapsed, %", 100),
        *(Column(f"kl/{name}", f"KL {name}") for name in names if name != "u"),
        *(Column(f"active/{name}", f"active {name}") for name in names if name != "u"),
    )


def _layer_names(records: Sequence[Record]) -> list[str]:
    """Layers of all models from the top: u, z_L to z_1, and z of models with one."""
    keys = {key.removeprefix("kl/") for record in records for key in record.metrics if key.startswith("kl/")}
    return sorted(keys, key=lambda name: (name != "u", name == "z", -int(name.partition("_")[2] or 0)))


def _claims(records: Sequence[Record]) -> list[str]:
    """Ask of every model whether DVP-VAE has the higher bound."""
    rows = [
        [f"DVP-VAE > {_WORDS[name]}", *(verdict(replace(found, mean=-found.mean)) for found in row)]
        for (name,), row in differences(records, "model", "dvp", (_ELBO, _IWAE)).items()
    ]
    if not rows:
        return []
    header = ["claim", _ELBO.title, _IWAE.title]
    title = "DVP-VAE less each model, with the verdict of the interval over seeds"
    return [f"{title}:\n\n{markdown(header, rows)}"]


def _along(records: Sequence[Record], levels: Mapping[str, float], columns: Sequence[Column]) -> list[Trend]:
    """One line for each column, against what a change of DVP-VAE is."""
    groups = configurations(records, ("model", "change"))
    at = {x: groups[("dvp", name)] for name, x in levels.items() if ("dvp", name) in groups}
    return [
        Trend(
            column.title,
            [(x, interval(record.metrics.get(column.key) for record in at[x])) for x in sorted(at)],
        )
        for column in columns
    ]


def _layer_bars(records: Sequence[Record], path: Path, title: str) -> Path:
    """Draw one bar for each configuration, made of the mean KLs of its layers."""
    groups = configurations([r for r in records if r.failure is None], ("model", "change"))
    names = _layer_names(records)
    with canvas.look():
        figure = canvas.figure(7.2, 1.1 + 0.26 * len(groups))
        axes: Any = figure.subplots()
        left = [0.0] * len(groups)
        for i, name in enumerate(names):
            means = [interval(r.metrics.get(f"kl/{name}") for r in group) for group in groups.values()]
            widths = [mean.mean if mean.n else 0.0 for mean in means]
            colour = canvas.series(i)["color"]
            axes.barh(range(len(groups)), widths, left=left, color=colour, label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(groups)), [_named(values) for values in groups], color=canvas.INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=min(len(names), 8))
        return canvas.save(figure, path, title)


def _named(values: tuple[str, ...]) -> str:
    return ", ".join(_WORDS[value] for value in values if value != _AS_IS)
