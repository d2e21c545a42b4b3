"""Export to ArviZ: draws, predictions, pointwise log-likelihoods and weights under the names it knows."""

import importlib.metadata
import json
import math
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, SiteRecorder, particle_plate
from pvae.inference.progress import reporting

from .blocks import BLOCK, BLOCK_NUMBERS, block_of, block_seed, rows_per_pass
from .latents import _call, _run, latent_names
from .likelihood import _summary, looked_at
from .memory import Budget, check_memory
from .sample_quality import Shown, shown
from .weights import draw, held_out, log_weights

__all__ = ["to_arviz"]

Container = Literal["auto", "datatree", "inference_data"]

_MOST = 2**27  # numbers of x, or of the latents, in one group: half a gibibyte of floats
_SAMPLE = ("chain", "draw")

# One variable: its dimensions and its values.
_Variable = tuple[tuple[str, ...], Tensor]


def to_arviz(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_draws: int = 200,
    num_particles: int = 25,
    num_data: int | None = 500,
    predictive: Shown | None = "draws",
    container: Container = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> Any:
    r"""Collect what ArviZ plots and compares, for S draws of each datum and K particles behind each draw.

    - ``posterior``: a variable for each latent site, draws of q(z | x), ``(chain, draw, datum, *z)``.
    - ``prior``: the same sites from the prior, ``(chain, draw, *z)``.
    - ``posterior_predictive``: ``x`` from p(x | z) at the posterior's draws, ``(chain, draw, datum, *x)``.
    - ``prior_predictive``: ``x`` at the prior's draws, ``(chain, draw, *x)``.
    - ``log_likelihood``, ``(chain, draw, datum)``, nats: ``x``, log p(x | z) at the posterior's draws;
      ``marginal``, for each draw an importance-weighted lower bound on log p(x) from K particles.
    - ``sample_stats``: ``log_weight``, log p(x, z) - log q(z | x) of the posterior's draws, ``(chain, draw,
      datum)``; and for each ``datum``, from all S K particles, ``log_p_x`` (the bound that
      :func:`log_likelihood` gives for as many) with ``log_p_x_error``, ``elbo``, ``pareto_k`` and ``ess``.
    - ``observed_data``: ``x``, ``(datum, *x)``; ``constant_data``: ``y``, where the model is given any.

    There is one chain, for draws are independent. ``datum`` holds positions in the whole part of the data
    set, so that a row is found again. A model with contexts draws from its prior under those of the data,
    each as often as the others; the coordinate ``context`` says whose.

    **What leave-one-out means here.** The latents are local: without datum n nothing is known of z_n beyond
    its prior, and at the trained parameters the leave-one-out density is p(x_n) itself.

    - ``az.loo(tree, var_name="marginal")`` estimates the sum of its logarithms: in expectation no more than
      the sum of ``log_p_x``, and nearer to it as K grows, with the standard error over data; its ``p`` is
      Monte-Carlo noise alone. On held-out data that is their log score. On training data it is no
      leave-one-out score, as the parameters have seen datum n and are not refitted. Where a guide is exact
      its weights are constant: ArviZ finds no tail to fit and raises.
    - ``az.loo(tree, var_name="x")`` takes draws of q for those of the exact posterior and averages
      1 / p(x | z). Those weights have no finite mean or a tail so heavy (its k-hat says so) that the figure
      may be wrong by any amount to either side: it is no score of a latent variable model.

    Model and guide run in evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``, with the data at site ``"x"``.
        guide: The guide program.
        x: Data, shape ``(N, *x_shape)``, or a split, which brings its protocol along.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_draws: Draws S of each datum's posterior and of the prior.
        num_particles: Particles K behind each draw of ``marginal``, the draw itself among them.
        num_data: Most data to export, chosen at random; ``None`` for all.
        predictive: ``"draws"`` of x, ``"means"`` of p(x | z), or ``None`` for neither predictive group, where
            S N images are too many.
        container: ``"datatree"`` for ArviZ 1 and its parts (``arviz_base``, ``arviz_stats``,
            ``arviz_plots``), ``"inference_data"`` for ArviZ 0.x, ``"auto"`` for the one whose ``arviz`` is
            installed, or a tree where none is.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        An ``xarray.DataTree``, or an ``arviz.InferenceData``, with seed, particles and protocol among its
        attributes.

    Raises:
        ValueError: For sizes out of range, groups that would be larger than 2^27 numbers, or programs outside
            the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
        ImportError: If xarray is missing, or ArviZ 0.x where it is asked for.

    Example:
        >>> tree = to_arviz(model, guide, data.test, num_draws=200, num_particles=50)  # doctest: +SKIP
        >>> arviz_stats.loo(tree, var_name="marginal")  # doctest: +SKIP
    """
    if num_draws < 1 or num_particles < 1 or (num_data is not None and num_data < 1):
        raise ValueError(
            "num_draws, num_particles and num_data must be positive, "
            f"got {num_draws}, {num_particles} and {num_data}"
        )
    if predictive not in ("draws", "means", None):
        raise ValueError(f"predictive must be 'draws', 'means' or None, got {predictive!r}")
    build = _builder(container)
    positions = x.positions if isinstance(x, Split) else None
    x, y, protocol = held_out(model, x, y)
    num = len(x) if num_data is None else min(num_data, len(x))
    _check_size("posterior_predictive", 0 if predictive is None else num_draws * num * x[0].numel())
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    positions = rows if positions is None else positions[rows]
    x, y = x[rows.to(x.device)], None if y is None else y[rows.to(y.device)]
    device = device_of(model, guide)
    with evaluating(model, guide), reporting("ArviZ", num, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        found = _Posterior(model, guide, x, y, num_draws, num_particles, predictive, seed)
        for done in found.blocks():
            report(done)
        prior, contexts = _prior(model, x, y, names, num_draws, predictive, seed)
    groups: dict[str, dict[str, _Variable]] = {
        "posterior": {name: _named(name, found.values[name], "datum") for name in names},
        "posterior_predictive": {"x": _named("x", found.predicted, "datum")} if found.predicted else {},
        "log_likelihood": {
            "x": _named("x", found.log_x, "datum"),
            "marginal": _named("marginal", found.marginal, "datum"),
        },
        "sample_stats": {
            "log_weight": _named("log_weight", found.log_w, "datum"),
            **{
                name: (("datum",), torch.cat(column))
                for name, column in zip(_COLUMNS, zip(*found.columns, strict=True), strict=True)
            },
        },
        "prior": {name: _named(name, [prior[name]]) for name in names},
        "prior_predictive": {"x": _named("x", [prior["x"]])} if predictive is not None else {},
        "observed_data": {"x": (("datum", *_dims("x", x[0])), x.cpu())},
        "constant_data": {} if y is None else {"y": (("datum", *_dims("y", y[0])), y.cpu())},
    }
    attributes = {
        "inference_library": "pvae",
        "num_particles": num_particles,
        "seed": seed,
        "predictive": str(predictive),
        "protocol": json.dumps(protocol),
    }
    return build(
        {
            name: _dataset(
                variables, positions, contexts if name.startswith("prior") and y is not None else None
            )
            for name, variables in groups.items()
            if variables
        },
        attributes,
    )


_COLUMNS = ("log_p_x", "elbo", "pareto_k", "ess", "log_p_x_error")


class _Posterior:
    """Draws, weights and predictions, block by block; lists hold ``(S, B, ...)``."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        x: Tensor,
        y: Tensor | None,
        num_draws: int,
        num_particles: int,
        predictive: Shown | None,
        seed: int,
    ) -> None:
        self.model, self.guide, self.x, self.y = model, guide, x, y
        self.num_draws, self.num_particles = num_draws, num_particles
        self.predictive, self.seed = predictive, seed
        self.door = looked_at(model, guide, x, y)
        self.size, self.noisy = self.door.size, self.door.noisy
        _check_size("posterior", num_draws * len(x) * self.size)
        self.values: dict[str, list[Tensor]] = {}
        self.predicted: list[Tensor] = []
        self.log_x: list[Tensor] = []
        self.log_w: list[Tensor] = []
        self.marginal: list[Tensor] = []
        self.columns: list[tuple[Tensor, ...]] = []

    def blocks(self) -> Any:
        """Go through the data with the draws of :func:`log_likelihood`; yield how many are done."""
        total = self.num_draws * self.num_particles
        block = min(BLOCK, max(1, BLOCK_NUMBERS // (total * self.size)))
        rounding = 64 * torch.finfo(self.x.dtype if self.x.is_floating_point() else torch.float32).eps
        rows = rows_per_pass(self.x)
        budget = Budget(check_memory(None, self.x.device), self.x.device)
        through_guide, through_model = self.door.rows(budget, total, block)
        for start in range(0, len(self.x), block):
            part = slice(start, min(start + block, len(self.x)))
            width = part.stop - part.start
            padded = block_of(self.x, self.y, start, block)
            own = block_seed(self.seed, start // block)
            drawn = draw(self.guide, *padded, total, own, rows=through_guide)
            data = self.x[part], None if self.y is None else self.y[part]
            scored = padded if self.noisy else data
            log_w = log_weights(self.model, *scored, [drawn], rows, fitting=through_model)[:, :width]
            log_w = log_w.cpu().double()
            self.columns.append(_summary(log_w.T, rounding, start))
            log_w = log_w.reshape(self.num_draws, self.num_particles, width)
            self.log_w.append(log_w[:, 0])
            self.marginal.append(_settled(log_w.logsumexp(1) - math.log(self.num_particles), rounding))
            # Of the particles of a group one is shown.
            first = {name: value[:: self.num_particles, :width] for name, value in drawn[0].items()}
            for name, value in first.items():
                self.values.setdefault(name, []).append(value.cpu())
            torch.manual_seed(own + 1)
            self._predict(first, *data, max(1, rows // width))
            yield part.stop

    def _predict(self, values: dict[str, Tensor], x: Tensor, y: Tensor | None, size: int) -> None:
        """Score and replicate the data under every draw, ``size`` draws in one pass."""
        log_x, predicted = [], []
        for start in range(0, self.num_draws, size):
            some = {name: value[start : start + size] for name, value in values.items()}
            shape = (min(size, self.num_draws - start), len(x))
            with SiteRecorder(some) as p, particle_plate(shape[0]):
                _call(self.model, x, y)
            site = p.sites["x"]
            log_x.append(site.log_prob().expand(shape).cpu().double())
            if self.predictive is not None:
                predicted.append(shown(site.fn.expand(shape), self.predictive).cpu())
        self.log_x.append(torch.cat(log_x))
        if predicted:
            self.predicted.append(torch.cat(predicted))


def _settled(log_p: Tensor, rounding: float) -> Tensor:
    """Make columns ``(S, B)`` constant that are so but for rounding, whose tail ArviZ would fit."""
    spread = log_p.amax(0) - log_p.amin(0)
    return torch.where(spread <= rounding * log_p.abs().amax(0).clamp(min=1), log_p.mean(0), log_p)


def _prior(
    model: Program,
    x: Tensor,
    y: Tensor | None,
    names: tuple[str, ...],
    num: int,
    predictive: Shown | None,
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model freely under contexts of the data; values ``(S, ...)`` by site, and whose contexts."""
    torch.manual_seed(block_seed(seed + 1, 0))
    rows = torch.cat([torch.randperm(len(x)) for _ in range(-(-num // len(x)))])[:num]
    found: list[dict[str, Tensor]] = []
    for part in rows.split(BLOCK):
        where = part.to(x.device)
        sites = _run(model, x[where], None if y is None else y[where])
        values = {name: sites[name].value.cpu() for name in names}
        if predictive is not None:
            values["x"] = shown(sites["x"].fn, predictive).cpu()
        found.append(values)
    return {name: torch.cat([values[name] for values in found]) for name in found[0]}, rows


def _named(name: str, parts: list[Tensor], *inner: str) -> _Variable:
    """Join blocks ``(S, B, ...)``, or one ``(S, ...)``, and put the one chain in front."""
    value = torch.cat(parts, len(inner)).unsqueeze(0)
    event = value[(0,) * (2 + len(inner))]
    return (*_SAMPLE, *inner, *_dims(name, event)), value


def _dims(name: str, event: Tensor) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{i}" for i in range(event.ndim))


def _dataset(variables: dict[str, _Variable], positions: Tensor, contexts: Tensor | None) -> Any:
    import xarray

    dataset = xarray.Dataset({name: (dims, value.numpy()) for name, (dims, value) in variables.items()})
    coordinates: dict[Any, Any] = {dim: range(size) for dim, size in dataset.sizes.items() if dim != "datum"}
    if "datum" in dataset.sizes:
        coordinates["datum"] = positions.numpy()
    dataset = dataset.assign_coords(coordinates)
    if contexts is not None:
        dataset = dataset.assign_coords(context=("draw", positions[contexts.cpu()].numpy()))
    return dataset


def _builder(container: str) -> Any:
    """What makes the container from data sets by group and attributes; found before the long part."""
    if container not in ("auto", "datatree", "inference_data"):
        raise ValueError(f"container must be 'auto', 'datatree' or 'inference_data', got {container!r}")
    try:
        import xarray
    except ImportError:
        raise ImportError(
            "to_arviz needs xarray, which comes with ArviZ: pip install 'pyro-pvae[arviz]'"
        ) from None
    version = _version()
    old = version is not None and int(version.split(".")[0]) < 1
    if container == "datatree" or (container == "auto" and not old):
        return lambda groups, attributes: xarray.DataTree.from_dict(
            {"/": xarray.Dataset(attrs=attributes), **groups}
        )
    if not old:
        raise ImportError(f"container 'inference_data' needs arviz below 1, got {version or 'none'}")
    import arviz

    return lambda groups, attributes: arviz.InferenceData(attrs=attributes, **groups)


def _version() -> str | None:
    try:
        return importlib.metadata.version("arviz")
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_size(group: str, numbers: int) -> None:
    if numbers > _MOST:
        less = ", or predictive=None" if group == "posterior_predictive" else ""
        raise ValueError(
            f"num_draws and num_data must be such that {group} has at most {_MOST} numbers, got {numbers}: "
            f"take fewer{less}"
        )
