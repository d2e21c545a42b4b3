"""What a covariance implied by a Jacobian is worth (FIVE, arXiv:2506.01522v1), under two proposals."""

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.data import Data, Split
from pvae.evaluation import active_units, jacobian_report
from pvae.guides import FiveGuide, LaplaceGuide, laplace_proposal
from pvae.inference import Run, fit
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import SiteRecorder

from ..program import Program
from ..spec import Spec, load_spec
from .judge import evenly
from .ledger import Record
from .measures import likelihood, posterior, sigma_of
from .plots import Trend, trends
from .study import Cell, Context, Metrics, Scale, Source, Study, plain
from .tables import Column, OverSeeds, configurations, differences, interval, markdown, paired, table, verdict

__all__ = ["FiveStudy", "step_seconds"]


@dataclass(frozen=True)
class _Guide:
    """A posterior that is compared.

    Attributes:
        words: How it reads.
        overrides: Changes of the recipe.
        costs: CPU time of a training step by ``z_dim``, in units of the diagonal guide's: measured by
            :func:`step_seconds` on MNIST's networks on one core; between them the next larger one counts.
    """

    words: str
    overrides: tuple[str, ...]
    costs: Mapping[int, float]

    def cost(self, z_dim: int) -> float:
        """Cost of a step relative to the diagonal guide's."""
        return self.costs[min((d for d in self.costs if d >= z_dim), default=max(self.costs))]


_GUIDES = {
    "diagonal": _Guide("diagonal", ("posterior.kind=normal",), {64: 1.0}),
    "full": _Guide("full, Cholesky", ("posterior.kind=full_covariance",), {16: 1.1, 32: 1.3, 64: 2.0}),
    "fif": _Guide(
        "FIF", ("posterior.kind=five", "posterior.objective=fif", "posterior.probe=latent"), {64: 2.15}
    ),
    "laplace": _Guide("Laplace", ("posterior.kind=laplace",), {2: 2.5, 8: 6.0, 16: 9.4, 32: 24.0, 64: 65.0}),
    "five": _Guide(
        "FIVE", ("posterior.kind=five", "posterior.objective=five", "posterior.probe=latent"), {64: 2.5}
    ),
    "five-data": _Guide(
        "FIVE, data probe",
        ("posterior.kind=five", "posterior.objective=five", "posterior.probe=data"),
        {64: 1.85},
    ),
}
_TIME = ("diagonal", "full", "fif", "laplace")
_LONG = ("diagonal", "five")
_LONGER = 5

# All that a number could depend on, whatever the recipe says.
_COMMON = (
    "data.binarize=none",
    "data.dequantize=true",
    "prior.kind=normal",
    "encoder.kind=mlp",
    "encoder.activation=silu",
    "encoder.gated=false",
    "decoder.kind=mlp",
    "decoder.activation=silu",
    "decoder.gated=false",
    "likelihood.kind=normal",
    "likelihood.sigma=learned",
    "likelihood.value=0.1",  # Adam moves its logarithm by the learning rate: a far start never arrives
    "fit.objective=elbo",
    "fit.batch_size=128",
    "fit.optimizer=adam",
    "fit.lr=1e-3",
    "fit.schedule=cosine",
    "fit.grad_clip=100.0",
    "fit.beta_warmup=0",
    "fit.ema=none",
)
_WIDE = ("encoder.hidden=[256, 256]", "decoder.hidden=[256, 256]")
_NARROW = ("encoder.hidden=[64]", "decoder.hidden=[64]")

_BUDGETS = {
    "steps": "Equal steps.",
    "time": (
        "Equal time: every guide takes as many steps as fit into FIVE's time, by costs of a step that were "
        "measured beforehand; what training took in fact is in the table. FIVE's cells are those of equal "
        "steps."
    ),
    "long": "Five times the steps.",
    "long-time": "Equal time, that of FIVE's five times the steps, by the same costs of a step.",
}
_TIME_OF = {"time": "steps", "long-time": "long"}  # where FIVE's own cell is that of another budget
_READING = (
    "IWAE and ELBO are lower bounds on log p(x) under either proposal: the guide's own normal (own Σ), and "
    "Laplace's around the same location (Σ_L). The better proposal is, cell by cell, the one with the higher "
    "mean IWAE. A latent direction is active by Σ_L where the mean of Σ_L over the data has an eigenvalue "
    "below 0.9; a latent is active by means where its mean varies over the data by more than 0.01. J and G "
    "are the Jacobians of encoder and decoder, whatever the guide."
)
_WORDS = {name: guide.words for name, guide in _GUIDES.items()} | {
    f"d{z_dim}": str(z_dim) for z_dim in (2, 8, 16, 32, 64, 128)
}
_SECONDS = Column("train_seconds", "training, CPU s")
_ACTIVE = Column("active_laplace", "latents active by Σ_L")
_CHECKED = (
    Column("iwae_better", "IWAE, better proposal"),
    Column("iwae_laplace", "IWAE, Σ_L"),
    Column("iwae_own", "IWAE, own Σ"),
)
_HEADLINES = (_CHECKED[0], _ACTIVE)
_BOUNDS = (
    *_CHECKED,
    Column("elbo_laplace", "ELBO, Σ_L"),
    Column("elbo_own", "ELBO, own Σ"),
    Column("elbo_laplace_train", "ELBO, Σ_L, training data"),
    Column("iwae_bits_better", "bits/dim, better proposal"),
    Column("khat_share_laplace", "k-hat high, Σ_L, %", 100),
    Column("khat_share_own", "k-hat high, own Σ, %", 100),
)
_LATENTS = (
    _ACTIVE,
    Column("active_means", "active by means"),
    Column("sigma", "σ"),  # noqa: RUF001
    Column("mse", "MSE × 1000", 1000),  # noqa: RUF001
    Column("rate", "rate"),
    Column("diagonal_gap_laplace", "nats that a diagonal loses on Σ_L"),
    Column("diagonal_gap_own", "on own Σ"),
    Column("steps", "steps"),
    _SECONDS,
)
_JACOBIANS = (
    Column("health", "tr(J G) / d"),
    Column("inconsistency", "J G against I − Σ_L"),  # noqa: RUF001
    Column("residual", "residual²"),
    Column("half_log_det", "½ log det σ² J Jᵀ"),
    Column("log_det_laplace", "½ log det Σ_L"),
)
_EFFECTS = (*_CHECKED, Column("elbo_laplace", "ELBO, Σ_L"), Column("elbo_own", "ELBO, own Σ"), _ACTIVE)
_CLAIMED = (("five", "diagonal"), ("diagonal", "full"), ("five", "fif"))
_BOUND_PANELS = _CHECKED[1:]
_LATENT_PANELS = (_LATENTS[0], _LATENTS[1], _LATENTS[5])

_DRAWS = 8
_UNCOUNTED = 10  # first steps of a timing
_INACTIVE = 0.9  # of the prior's variance, 1
_REPORTED = 64  # data at which whole Jacobians are compared
_ROWS = 100  # data in one pass of the decoder's Jacobian
_TRAIN_PARTICLES = 20


@dataclass(frozen=True)
class _Source(Source):
    """A data set and the latent sizes that are tried on it; ``seconds`` is that of measuring alone.

    Attributes:
        z_dims: Latent sizes under the budget of steps.
        laplace: Those at which the Laplace guide, which takes a pass for every latent, is trained as well.
        timed: Those at which the other guides get the time that FIVE takes.
        long: Those at which the diagonal guide and FIVE get five times the steps, and the diagonal guide then
            the time that these take FIVE.
        probed: Those at which FIVE's probe in data space is trained as well.
        step: CPU seconds of a step of the diagonal guide.
    """

    z_dims: tuple[int, ...] = ()
    laplace: tuple[int, ...] = ()
    timed: tuple[int, ...] = ()
    long: tuple[int, ...] = ()
    probed: tuple[int, ...] = ()
    step: float = 0.01

    @property
    def steps(self) -> int:
        """Training steps of the budget of steps."""
        steps: int = load_spec(self.recipe, self.overrides).fit.arguments()["steps"]
        return steps


class FiveStudy(Study):
    """Five posteriors from two to 64 latents, at equal steps and at equal time, scored with two proposals."""

    name = "five"
    about = "What a full covariance from the encoder's Jacobian is worth, by latent size, steps and time"
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": Scale(
            (
                _Source(
                    "digits",
                    "five-digits",
                    ("data.name=digits", *_COMMON, *_NARROW, "fit.steps=40"),
                    levels=17,
                    seconds=1.0,
                    z_dims=(2, 8),
                    laplace=(2,),
                    timed=(8,),
                    long=(2,),
                    probed=(8,),
                    step=0.005,
                ),
            ),
            seeds=(0,),
            num_data=40,
            num_particles=40,
            num_images=0,
            classifier_epochs=0,
        ),
        "cpu": Scale(
            (
                _Source(
                    "mnist",
                    "five-digits",
                    ("data.name=mnist", *_COMMON, *_WIDE, "fit.steps=2000"),
                    seconds=15.0,
                    z_dims=(2, 8, 16, 32, 64),
                    laplace=(2, 8),
                    timed=(8, 64),
                    long=(64,),
                    probed=(16, 64),
                    step=0.0095,
                ),
                _Source(
                    "cifar10",
                    "five-digits",
                    ("data.name=cifar10", "data.source=subset", *_COMMON, *_WIDE, "fit.steps=1500"),
                    seconds=50.0,
                    z_dims=(16, 64),
                    step=0.0105,
                ),
            ),
            seeds=(0, 1, 2),
            num_data=500,
            num_particles=500,
            num_images=0,
            classifier_epochs=0,
        ),
        "full": Scale(
            (
                _Source(
                    "mnist",
                    "five-digits",
                    ("data.name=mnist", *_COMMON, *_WIDE, "fit.steps=40000"),
                    seconds=400.0,
                    z_dims=(2, 8, 16, 32, 64, 128),
                    laplace=(2, 8, 16, 32),
                    timed=(8, 64),
                    probed=(16, 64),
                    step=0.0095,
                ),
                _Source(
                    "cifar10",
                    "five-digits",
                    ("data.name=cifar10", "data.source=auto", *_COMMON, *_WIDE, "fit.steps=40000"),
                    seconds=1000.0,
                    z_dims=(16, 64, 128),
                    timed=(64,),
                    step=0.0105,
                ),
            ),
            seeds=(0, 1, 2, 3, 4),
            num_data=1000,
            num_particles=5000,
            num_images=0,
            classifier_epochs=0,
        ),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List guides and latent sizes under every budget for each data set; seeds are the slowest.

        The budget of many steps comes after all others, so that it may be left out.
        """
        cells, long = [], []
        for seed, source in itertools.product(scale.seeds, scale.sources):
            assert isinstance(source, _Source)
            steps, only = source.steps, {"laplace": source.laplace, "five-data": source.probed}
            for z_dim in source.z_dims:
                for name in _GUIDES:
                    if z_dim in only.get(name, source.z_dims):
                        cells.append(_cell(source, "steps", name, z_dim, seed, steps))
                if z_dim in source.timed:
                    for name in _TIME:
                        number = _steps_in_the_time_of_five(name, z_dim, steps)
                        cells.append(_cell(source, "time", name, z_dim, seed, number))
                if z_dim in source.long:
                    long += [_cell(source, "long", name, z_dim, seed, _LONGER * steps) for name in _LONG]
                    number = _steps_in_the_time_of_five("diagonal", z_dim, _LONGER * steps)
                    long.append(_cell(source, "long-time", "diagonal", z_dim, seed, number))
        return cells + long

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        """Train one program and score it with its own proposal and with Laplace's."""
        program = spec.build(data)
        settings = spec.fit.arguments()
        start = time.process_time()
        # Without the validation data, whose exact density would cost FIVE more than its steps.
        fit(*program, data.train, **settings, device=context.device, progress=False)
        trained = time.process_time()
        scale, seed = context.scale, cell.seed
        levels = scale.source(cell.factors["data"]).levels
        scored, seen = (evenly(split, scale.num_data) for split in (data.test, data.train))
        laplace = Program(program.model, laplace_proposal(*program))
        own = likelihood(program, scored, levels, scale.num_particles, seed)
        if isinstance(program.guide, LaplaceGuide):
            other = own
        else:
            other = likelihood(laplace, scored, levels, scale.num_particles, seed)
        terms = posterior(program, scored, _DRAWS, seed)
        sigma = sigma_of(program)
        activity = active_units(*laplace, scored)
        train = likelihood(laplace, seen, levels, _TRAIN_PARTICLES, seed)
        metrics = {
            **{f"{name}_own": value for name, value in own.items()},
            **{f"{name}_laplace": value for name, value in other.items()},
            **_better(own, other),
            "elbo_laplace_train": train["elbo"],
            "rate": plain(terms.rate),
            "log_prior": plain(terms.log_prior),
            "mse": plain(terms.mse),
            "rho": plain(terms.mse / sigma**2),
            "sigma": sigma,
            "active_means": float(activity.count),
            "active_relative": float(activity.relative_count),
            **_covariances(program.guide, laplace.guide, scored),
            **_jacobian(program, scored),
            "steps": float(settings["steps"]),
            "train_seconds": round(trained - start, 3),
        }
        return metrics | {"eval_seconds": round(time.process_time() - trained, 3)}

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write bounds and active latents by size, then all that was measured, and the paper's claims."""
        parts = [_READING]
        for budget, cells in _by_budget(records).items():
            measured = [
                f"{column.title}, by latent size:\n\n" + _by_size(cells, column) for column in _HEADLINES
            ]
            factors = ("z_dim", "guide")
            parts += [
                f"{_BUDGETS[budget]}\n\n{measured[0]}",
                *measured[1:],
                *(table(cells, factors, columns, _WORDS) for columns in (_BOUNDS, _LATENTS, _JACOBIANS)),
            ]
            less = "less the diagonal guide of the same seed"
            parts += paired(cells, "guide", "diagonal", _EFFECTS, _WORDS, less, within=("z_dim",))
            parts += _claims(cells)
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw bounds and latents against the latent size, and bounds against the time of training."""
        budgets = _by_budget(records)
        drawn = []
        if cells := budgets.get("steps"):
            sizes = sorted({_size(cell) for cell in cells})
            for name, columns in (("bounds", _BOUND_PANELS), ("latents", _LATENT_PANELS)):
                panels = {column.title: _trends(cells, column) for column in columns}
                if name == "bounds":
                    panels["IWAE, better proposal, less diagonal"] = _gains(cells)
                path = stem.with_name(f"{stem.name}-{name}.png")
                heading = f"{title}: equal steps"
                drawn.append(trends(panels, path, heading, across="latent size", ticks=sizes))
        if "steps" in budgets and len(budgets) > 1:
            sizes = sorted({_size(cell) for name in budgets for cell in budgets[name] if name != "steps"})
            panels = {
                f"IWAE, better proposal, {z_dim} latents": _against_time(
                    [cell for cells in budgets.values() for cell in cells if _size(cell) == z_dim]
                )
                for z_dim in sizes
            }
            path = stem.with_name(f"{stem.name}-time.png")
            heading = f"{title}: equal steps, as long as FIVE, and both at five times the steps"
            drawn.append(trends(panels, path, heading, across="CPU seconds of training"))
        return drawn


def step_seconds(
    overrides: Iterable[str],
    names: Sequence[str] = tuple(_GUIDES),
    *,
    data: Data | None = None,
    rounds: int = 3,
    steps: int = 30,
) -> dict[str, float]:
    """Measure the CPU seconds of a training step of each guide, all in turn, so that all share a busy hour.

    Args:
        overrides: What is trained: changes of the recipe that all share, the latent size among them.
        names: Guides of the study.
        data: The data, loaded if absent.
        rounds: How often every guide has its turn.
        steps: Steps of one turn, 15 or more; the first ten are not counted.

    Returns:
        Of each guide the fastest five steps in a row, seconds per step.
    """
    shared = tuple(overrides)
    fastest = dict.fromkeys(names, math.inf)
    for _, name in itertools.product(range(rounds), names):
        spec = load_spec("five-digits", [*shared, *_GUIDES[name].overrides, f"fit.steps={steps}"])
        data = data or spec.load_data()
        fastest[name] = min(fastest[name], _fastest(spec, data))
    return fastest


def _fastest(spec: Spec, data: Data) -> float:
    marks: list[tuple[float, float]] = []

    def mark(run: Run, row: dict[str, float]) -> None:
        marks.append((row["step"], time.process_time()))

    settings = spec.fit.arguments() | {"log_every": 5}
    fit(*spec.build(data), data.train, **settings, callbacks=[mark], progress=False)
    counted = itertools.pairwise(mark for mark in marks if mark[0] >= _UNCOUNTED)
    return min((after - before) / (to - at) for (at, before), (to, after) in counted)


def _steps_in_the_time_of_five(name: str, z_dim: int, steps: int) -> int:
    return round(steps * _GUIDES["five"].cost(z_dim) / _GUIDES[name].cost(z_dim))


def _cell(source: _Source, budget: str, name: str, z_dim: int, seed: int, steps: int) -> Cell:
    guide = _GUIDES[name]
    factors = {"data": source.name, "budget": budget, "guide": name, "z_dim": f"d{z_dim}"}
    changes = (*source.overrides, *guide.overrides, f"z_dim={z_dim}", f"fit.steps={steps}")
    seconds = source.seconds + steps * source.step * guide.cost(z_dim)
    return Cell(factors, seed, source.recipe, changes, seconds)


def _better(own: Metrics, other: Metrics) -> Metrics:
    """Take the proposal with the higher IWAE: both bound the same log p(x) from below."""
    best = max((own, other), key=lambda found: found["iwae"] if found["iwae"] is not None else -math.inf)
    return {f"{name}_better": best[name] for name in ("iwae", "iwae_error", "iwae_bits", "khat_share")}


def _covariances(own: Any, laplace: Any, split: Split) -> Metrics:
    r"""Say how far from the prior, and from a diagonal, the covariances of some data are.

    Returns:
        ``active_laplace``: number of eigenvalues of the mean of Laplace's covariances below 0.9.
        ``diagonal_gap_laplace``, ``diagonal_gap_own``: mean of
        :math:`\frac12 \log(\prod_i H_{ii} / \det H)` for :math:`H = \Sigma^{-1}`, the nats that the best
        diagonal normal loses on a posterior of that covariance, Laplace's or the guide's.
        ``log_det_laplace``: mean of :math:`\frac12 \log\det \Sigma_L`.
    """
    total: Any = 0.0
    gaps, own_gaps, log_dets = [], [], []
    with evaluating(own, laplace):
        for part in split.batches(_ROWS, seed=0, epoch=0, drop_last=False, shuffle=False):
            x = part.x.to(device_of(laplace))
            tril = laplace.posterior(x).scale_tril.double().cpu()
            total = total + (tril @ tril.mT).sum(0)
            log_dets.append(tril.diagonal(dim1=-2, dim2=-1).log().sum(-1))
            gaps.append(_diagonal_gap(tril))
            with SiteRecorder() as q:
                own(x)
            tril = getattr(q.sites["z"].fn, "scale_tril", None)
            own_gaps.append(x.new_zeros(len(x)) if tril is None else _diagonal_gap(tril.double().cpu()))
    eigenvalues = torch.linalg.eigvalsh(total / len(split))
    return {
        "active_laplace": float((eigenvalues < _INACTIVE).sum()),
        "diagonal_gap_laplace": plain(torch.cat(gaps).mean()),
        "diagonal_gap_own": plain(torch.cat(own_gaps).mean()),
        "log_det_laplace": plain(torch.cat(log_dets).mean()),
    }


def _diagonal_gap(tril: Tensor) -> Tensor:
    """Nats that the best diagonal normal loses on normals with these Cholesky factors, shape ``(B,)``."""
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype)
    inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * inverse.square().sum(-2).log().sum(-1) + log_det


def _jacobian(program: Program, split: Split) -> Metrics:
    """Compare the Jacobians of encoder and decoder, of whatever guide: FIVE's suppositions, met or not."""
    model: Any = program.model
    guide = FiveGuide(program.guide.encoder, model.decoder, model.likelihood)  # type: ignore[arg-type]
    found = jacobian_report(guide, split, num_data=_REPORTED, warn=False)
    names = ("health", "half_log_det", "inconsistency", "residual")
    return {name: plain(getattr(found, name)) for name in names}


def _size(record: Record) -> int:
    return int(record.factors["z_dim"].removeprefix("d"))


def _by_budget(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Put records of a budget together, by size and guide; FIVE's cells at given steps are its own time."""
    timed = {(record.factors["budget"], _size(record)) for record in records}
    shared = [
        replace(record, factors={**record.factors, "budget": time_of})
        for time_of, budget in _TIME_OF.items()
        for record in records
        if record.factors["budget"] == budget
        and record.factors["guide"] == "five"
        and (time_of, _size(record)) in timed
    ]
    order = list(_GUIDES)
    budgets: dict[str, list[Record]] = {}
    for record in sorted([*records, *shared], key=lambda r: (_size(r), order.index(r.factors["guide"]))):
        budgets.setdefault(record.factors["budget"], []).append(record)
    return {name: budgets[name] for name in _BUDGETS if name in budgets}


def _by_size(records: Sequence[Record], column: Column) -> str:
    """Write one row for each guide and one column for each latent size."""
    sizes = list(dict.fromkeys(record.factors["z_dim"] for record in records))
    groups = configurations(records, ("guide", "z_dim"))
    rows = [
        [
            guide.words,
            *(str(_over_seeds(groups.get((name, z_dim), []), column)) for z_dim in sizes),
        ]
        for name, guide in _GUIDES.items()
        if any((name, z_dim) in groups for z_dim in sizes)
    ]
    return markdown(["guide", *(_WORDS[z_dim] for z_dim in sizes)], rows)


def _over_seeds(records: Sequence[Record], column: Column) -> OverSeeds:
    values = (record.metrics.get(column.key) for record in records)
    return interval(None if value is None else column.factor * value for value in values)


def _claims(records: Sequence[Record]) -> list[str]:
    """Check the paper's claims one by one; a claim holds where the interval of a difference is above zero."""
    rows = []
    for better, worse in _CLAIMED:
        pair = [record for record in records if record.factors["guide"] in (better, worse)]
        for (z_dim, _), row in differences(pair, "guide", worse, _CHECKED, within=("z_dim",)).items():
            rows.append([f"{_WORDS[better]} > {_WORDS[worse]}", _WORDS[z_dim], *map(verdict, row)])
    if not rows:
        return []
    header = ["claim", "z_dim", *(column.title for column in _CHECKED)]
    parts = [
        "The paper's order of likelihoods, as differences of IWAE with the verdict of their interval:\n\n"
        + markdown(header, rows)
    ]
    growth = _growth(records)
    if growth:
        header = ["z_dim", *(column.title for column in _CHECKED)]
        parts.append(
            "The paper's claim that the gap grows with the latent size, FIVE less diagonal: that of the "
            "larger size less that of the smaller, with the verdict of its interval:\n\n"
            + markdown(header, growth)
        )
    return parts


def _growth(records: Sequence[Record]) -> list[list[str]]:
    """One row for each step from a latent size to the next."""
    at: dict[tuple[str, int, int], Metrics] = {
        (record.factors["guide"], _size(record), record.seed): record.metrics for record in records
    }
    sizes, seeds = sorted({key[1] for key in at}), sorted({key[2] for key in at})
    rows = []
    for small, large in itertools.pairwise(sizes):
        row = []
        for column in _CHECKED:
            found = []
            for seed in seeds:
                four = [
                    at.get((name, z_dim, seed), {}).get(column.key)
                    for z_dim in (large, small)
                    for name in ("five", "diagonal")
                ]
                known = [value for value in four if value is not None]
                if len(known) == len(four):
                    found.append(known[0] - known[1] - known[2] + known[3])
            row.append(interval(found))
        if any(cell.n for cell in row):
            rows.append([f"{small} to {large}", *map(verdict, row)])
    return rows


def _trends(records: Sequence[Record], column: Column) -> list[Trend]:
    """One line for each guide, against the latent size."""
    return [
        Trend(_WORDS[name], [(_size(at[0]), _over_seeds(at, column)) for at in groups])
        for name, groups in _by_guide(records).items()
    ]


def _by_guide(records: Sequence[Record]) -> dict[str, list[list[Record]]]:
    """Records of every guide, those of a latent size together."""
    groups: dict[str, list[list[Record]]] = {}
    for (name, _), group in configurations(records, ("guide", "z_dim")).items():
        groups.setdefault(name, []).append(group)
    return {name: groups[name] for name in _GUIDES if name in groups}


def _gains(records: Sequence[Record]) -> list[Trend]:
    """Differences from the diagonal guide of the same seed, one line for each other guide."""
    found = differences(records, "guide", "diagonal", _CHECKED[:1], within=("z_dim",))
    lines: dict[str, list[tuple[float, OverSeeds]]] = {name: [] for name in _GUIDES}
    for (z_dim, name), (gain,) in found.items():
        lines[name].append((float(z_dim.removeprefix("d")), gain))
    return [Trend(_WORDS[name], points) for name, points in lines.items()]


def _against_time(records: Sequence[Record]) -> list[Trend]:
    """One line for each guide through its budgets, against the CPU time of training."""
    lines: dict[str, list[tuple[float, OverSeeds]]] = {name: [] for name in _GUIDES}
    for (name, _), group in configurations(records, ("guide", "budget")).items():
        seconds = _over_seeds(group, _SECONDS)
        if seconds.n:
            lines[name].append((seconds.mean, _over_seeds(group, _CHECKED[0])))
    return [Trend(_WORDS[name], sorted(points, key=lambda point: point[0])) for name, points in lines.items()]
