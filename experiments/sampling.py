"""What ``pvae sample`` draws: labels or pseudoinputs, under which options of the model, in which rows."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from pvae.data import Data, Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.progress import reporting

from .given import LowPass, evenly
from .program import SpecError
from .registry import PARTS, nearest
from .runs import OpenRun

__all__ = [
    "RARE",
    "SCALES",
    "TEMPERATURES",
    "Drawn",
    "Plan",
    "Row",
    "Wanted",
    "held_out",
    "held_out_labels",
    "plan",
    "rare_pairs",
    "watched",
]

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Rows of a sweep over the scale of the latents."""

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""Rows of a sweep over the temperature of the priors."""

RARE = 0.005
"""Share of the training data below which a pair of attribute values is rare."""

_MOST_RARE = 8
# Draws in all and in a row of a picture: of images, and of points, which only in numbers show where they lie.
_IMAGES, _POINTS = (64, 8), (500, 100)
_CHOICES = {"sampling": ("exact", "paper"), "scale_mode": ("within", "global")}
_SWEEPS = {"scale": SCALES, "temperature": TEMPERATURES}


@dataclass(frozen=True)
class Wanted:
    """What was asked for; ``None`` and empty where nothing was.

    Attributes:
        num: Number of draws, of each row where there are rows; by default more points than images.
        seed: Seed of the draws and of the choice of held-out labels.
        labels: Classes, such as ``"0..9"`` or ``"cat,dog"``.
        attributes: Combinations, such as ``"bordered=1,dotted=1"``, or ``"rare"``.
        sampling: ``"exact"`` or ``"paper"``.
        scale: Factor of the latents' standard deviation.
        scale_mode: ``"within"`` or ``"global"``.
        scale_sweep: One row for each of :data:`SCALES`.
        temperature: Factor of the variances of all priors.
        temperature_sweep: One row for each of :data:`TEMPERATURES`.
        given: Number of held-out images, each a row of draws that share its pseudoinput.
    """

    num: int | None = None
    seed: int = 0
    labels: str | None = None
    attributes: Sequence[str] = ()
    sampling: str | None = None
    scale: float | None = None
    scale_mode: str | None = None
    scale_sweep: bool = False
    temperature: float | None = None
    temperature_sweep: bool = False
    given: int | None = None


@dataclass(frozen=True)
class Row:
    """Samples that share a label, a setting or a pseudoinput.

    Attributes:
        label: What it is called; empty for samples that are not in rows.
        note: A second line beside the row.
        y: Labels of the draws, or ``None`` for a model without labels.
        shown: Image whose pseudoinput u the draws share, and the low-pass picture of u, ``(2, C, H, W)``, or
            ``None``.
        options: Arguments of the model's ``sample`` for this row.
        facts: What else is known of it, for the record.
    """

    label: str = ""
    note: str = ""
    y: Tensor | None = None
    shown: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What stands beside the row."""
        return "\n".join(filter(None, (self.label, self.note)))

    def to_dict(self) -> dict[str, Any]:
        """Return the row in types that JSON knows."""
        label = {"label": self.label} if self.label else {}
        return {**label, **self.facts, **({} if self.y is None else {"y": self.y.tolist()})}


class Plan(NamedTuple):
    """What will be drawn.

    Attributes:
        name: Name of the picture without its ending, one for each way of sampling.
        num: Number of draws of each row.
        rows: At least one; a single row without a label is a plain grid.
        options: Options of the model that all rows share.
        panels: What stands above the means and above the draws.
    """

    name: str
    num: int
    rows: list[Row]
    options: dict[str, Any]
    panels: tuple[str, str]


class Drawn(NamedTuple):
    """A picture and what it shows.

    Attributes:
        path: PNG file.
        plan: What it shows.
        low_pass: What conditioning on pseudoinputs achieved, where they were given.
    """

    path: Path
    plan: Plan
    low_pass: LowPass | None = None


def plan(run: OpenRun, wanted: Wanted) -> Plan:
    """Decide what to draw from the model of a run.

    Raises:
        SpecError: If the model has no such option, the data no such labels, or an expression is malformed.
    """
    by = {
        "labels": wanted.labels is not None,
        "attributes": bool(wanted.attributes),
        "scale-sweep": wanted.scale_sweep,
        "temperature-sweep": wanted.temperature_sweep,
        "given": wanted.given is not None,
    }
    chosen = [name for name, given in by.items() if given]
    if len(chosen) > 1:
        flags = " and ".join(f"--{name}" for name in chosen)
        raise SpecError(f"{flags} each make the rows of the picture: give one of them")
    swept = next((name for name in _SWEEPS if getattr(wanted, f"{name}_sweep")), None)
    if swept is not None and getattr(wanted, swept) is not None:
        raise SpecError(f"--{swept} is one of the rows of --{swept}-sweep: give one of the two")
    for name in {"labels", "attributes"} & set(chosen):
        _need_labels(run, name)
    if wanted.given is not None:
        _need_pseudoinput(run)
    options = _options(run, wanted, swept)

    in_all, in_a_row = _IMAGES if len(run.data.x_shape) == 3 else _POINTS
    num = wanted.num or (in_a_row if chosen else in_all)
    if wanted.labels is not None:
        rows = _class_rows(run.data, wanted.labels, num)
    elif wanted.attributes:
        rows = _attribute_rows(run.data, wanted.attributes, num, wanted.seed)
    elif wanted.given is not None:
        rows = _given_rows(run, wanted.given, wanted.seed)
    elif swept is not None:
        y = _labels_for(run, num, wanted.seed)
        rows = [
            Row(f"{swept} {value:g}", y=y, options={swept: value}, facts={swept: value})
            for value in _SWEEPS[swept]
        ]
    else:
        rows = [Row(y=_labels_for(run, num, wanted.seed))]
    return Plan(_name(chosen, options), num, rows, options, _panels(run.model, options, swept, wanted.given))


def held_out(data: Data) -> Split:
    """Return the data to show: those that the program was not fitted to, where there are any to spare."""
    return data.valid if "valid" in data.parts else data.train


def held_out_labels(data: Data, num: int, seed: int = 0) -> Tensor:
    """Draw labels from held-out rows, ``(num,)`` or ``(num, L)``; a row returns once all have been drawn.

    Labels drawn one attribute at a time would be combinations that the data do not have.

    Raises:
        SpecError: If the data have no labels.
    """
    split = held_out(data)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return _labels(split[order[torch.arange(num) % len(split)]])


@contextmanager
def watched(model: Any, plan: Plan, show: bool | None = None) -> Iterator[None]:
    """Show a bar while what is planned is drawn inside, which counts the passes of the slow networks.

    Those are the denoiser of a diffusion, once for each step, and the layers of a ladder; there is no bar for
    a model without either, which draws at once.

    Args:
        model: The model of the run.
        plan: What is drawn, the means and the draws of each row in a pass of their own.
        show: Whether to show it; by default on a terminal only.
    """
    layers = getattr(getattr(model, "top_down", None), "priors", ())
    diffuses = hasattr(getattr(model, "prior", None), "denoiser")
    given = any("u" in row.options for row in plan.rows)
    passes = dict.fromkeys(layers, 1) | (
        {model.prior.denoiser: model.prior.num_steps} if diffuses and not given else {}
    )
    total, done = 2 * len(plan.rows) * sum(passes.values()), 0
    with reporting("sampling", total, show if passes else False) as report:

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            report(done)

        handles = [network.register_forward_hook(count) for network in passes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rare_pairs(y: Tensor, below: float = RARE, most: int = _MOST_RARE) -> list[tuple[dict[int, int], float]]:
    """Find the pairs of attribute values with the lowest rates, among values that each occur.

    A value that never occurs alone would be missing from every pair, which says nothing about pairs.

    Args:
        y: Attributes of the training data, shape ``(N, L)``, values 0 or 1.
        below: Rates are lower than this.
        most: Number of pairs, the rarest first.

    Returns:
        Of each pair its values by column, and its share of the rows.
    """
    held = torch.stack((1 - y, y)).double()  # (value, N, L)
    together = torch.einsum("anl,bnm->ablm", held, held) / len(y)
    alone = held.mean(1)
    columns = y.shape[1]
    pairs = [
        ({first: a, second: b}, float(together[a, b, first, second]))
        for first in range(columns)
        for second in range(first + 1, columns)
        for a in (1, 0)
        for b in (1, 0)
        if alone[a, first] > 0 and alone[b, second] > 0
    ]
    return sorted((pair for pair in pairs if pair[1] < below), key=lambda pair: pair[1])[:most]


def _need_labels(run: OpenRun, option: str) -> None:
    """Refuse rows of labels for a model that sees none, or of the other kind of label."""
    if not getattr(run.model, "conditional", False):
        raise SpecError(_lacking(option, run, lambda model: getattr(model, "conditional", False)))
    classes = _labels(run.data.train[:1]).ndim == 1
    if classes != (option == "labels"):
        has, use = ("classes", "--labels") if classes else ("attributes", "--attributes")
        raise SpecError(f"the labels of {run.data.name} are {has}: use {use}, not --{option}")


def _need_pseudoinput(run: OpenRun) -> None:
    """Refuse pseudoinputs as conditions for a model that has none."""
    if not hasattr(run.model, "sample_given"):
        raise SpecError(_lacking("given", run, lambda model: hasattr(model, "sample_given")))
    if run.model.pseudoinput is None:
        raise SpecError("--given needs a model with a pseudoinput, but this run's has none")


def _options(run: OpenRun, wanted: Wanted, swept: str | None) -> dict[str, Any]:
    """Collect the options of ``model.sample``, and refuse those that this model's does not have."""
    names = ("sampling", "scale", "scale_mode", "temperature")
    asked = {name: getattr(wanted, name) for name in names}
    options = {name: value for name, value in asked.items() if value is not None}
    for name in [*options, *([] if swept is None else [swept])]:
        if not _takes(type(run.model), name):
            raise SpecError(_lacking(_flag(name, swept), run, functools.partial(_takes, option=name)))
    # A prior that lies in the model's networks has the model's temperature.
    prior = getattr(run.model, "prior", None) if wanted.given is None else None
    if "temperature" in (*options, swept) and prior is not None and not _takes(prior, "temperature"):
        has = functools.partial(_takes, option="temperature")
        raise SpecError(_lacking(_flag("temperature", swept), run, has, "prior"))
    for name, known in _CHOICES.items():
        if name in options and options[name] not in known:
            flag = _flag(name, swept)
            raise SpecError(f"unknown --{flag} '{options[name]}'{nearest(str(options[name]), known)}")
    for name in _SWEEPS:
        if not 0 <= options.get(name, 0) < math.inf:
            raise SpecError(f"--{name} must be a finite number of at least 0, got {options[name]:g}")
    return options


def _flag(option: str, swept: str | None) -> str:
    """What an option is called on the command line."""
    return f"{option}-sweep" if option == swept else option.replace("_", "-")


def _takes(model: Any, option: str) -> bool:
    """Whether a model or a prior can be sampled with an option."""
    return hasattr(model, "sample") and option in inspect.signature(model.sample).parameters


def _lacking(option: str, run: OpenRun, has: Callable[[Any], bool], table: str = "model") -> str:
    """Say which kinds of model, or of another part, have what this one lacks."""
    kinds = [f"'{kind}'" for kind, part in PARTS[table].items() if has(_built(part.build))]
    ours = getattr(run.spec, table).kind
    return f"--{option} needs a {table} of kind {' or '.join(kinds)}, but this run's is '{ours}'"


def _built(build: Callable[..., Any]) -> Any:
    """The class that a part's callable makes."""
    return build if inspect.isclass(build) else get_type_hints(build).get("return")


def _class_rows(data: Data, expression: str, num: int) -> list[Row]:
    """One row for each class that is named."""
    names = data.class_names or tuple(str(label) for label in range(data.num_classes or 0))
    y = _labels(data.train)
    rows = []
    for label in _classes(expression, names, data.name):
        rate = float((y == label).double().mean())
        rows.append(Row(names[label], y=torch.full((num,), label), facts={"rate": rate}))
    return rows


def _classes(expression: str, names: Sequence[str], where: str) -> list[int]:
    """Read ``"0..9"``, ``"0,3,7"``, ``"cat,dog"``: each class once, in the order given."""
    found: list[int] = []
    for item in (part.strip() for part in expression.split(",")):
        ends = [item] if item in names else [end.strip() for end in item.split("..", 1)]
        if not all(ends):
            first, last = names[0], names[-1]
            raise SpecError(
                f"--labels must read such as {first}..{last} or {first},{last}, got '{expression}'"
            )
        numbers = [_class(end, names, where) for end in ends]
        if numbers[0] > numbers[-1]:
            raise SpecError(f"a range of --labels must go upwards, got '{item}'")
        found.extend(range(numbers[0], numbers[-1] + 1))
    return list(dict.fromkeys(found))


def _class(name: str, names: Sequence[str], where: str) -> int:
    """Number of a class, by its name, or by its number where no name is one."""
    if name in names:
        return names.index(name)
    numbered = all(known.isdecimal() for known in names)
    if name.isdecimal() and not numbered and int(name) < len(names):
        return int(name)
    # By its letters the nearest to 12 would be 1 or 2.
    span = f": choose from {names[0]} to {names[-1]}"
    raise SpecError(f"{where} has no label '{name}'{span if numbered else nearest(name, names)}")


def _attribute_rows(data: Data, expressions: Sequence[str], num: int, seed: int) -> list[Row]:
    """One row for each combination: labels of held-out rows with the named attributes set."""
    trained, known = _labels(data.train), _labels(held_out(data))
    names = data.attribute_names or tuple(str(column) for column in range(trained.shape[1]))
    combinations: list[dict[int, int]] = []
    for expression in expressions:
        if expression.strip() == "rare":
            combinations += _rare(trained, names, data.name)
        else:
            combinations.append(_combination(expression, names, data.name))
    rows: dict[str, Row] = {}
    for values in combinations:
        label = _spelled(values, names)
        rate = float(_mismatches(trained, values).eq(0).double().mean())
        y, as_found = _completed(known, values, num, seed)
        note = f"{100 * rate:.2g} % of training" if rate else "none in training"
        rows[label] = Row(label, note, y, facts={"rate": rate, "as_found": as_found})
    return list(rows.values())


def _rare(y: Tensor, names: Sequence[str], where: str) -> list[dict[int, int]]:
    pairs = rare_pairs(y)
    if not pairs:
        rarest = rare_pairs(y, below=math.inf, most=1)
        least = [
            f": the rarest is {_spelled(values, names)} with {100 * rate:.2g} %" for values, rate in rarest
        ]
        raise SpecError(
            f"no pair of attributes of {where} has a rate below {100 * RARE:g} % in training{''.join(least)}"
        )
    return [values for values, _ in pairs]


def _combination(expression: str, names: Sequence[str], where: str) -> dict[int, int]:
    """Read ``"bordered=1,dotted=1"`` as values by column."""
    values: dict[int, int] = {}
    for item in expression.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name:
            raise SpecError(f"--attributes must read such as {names[0]}=1,{names[-1]}=0, got '{expression}'")
        if name not in names:
            raise SpecError(f"{where} has no attribute '{name}'{nearest(name, names)}")
        if value not in ("0", "1"):
            raise SpecError(f"attribute {name} must be 0 or 1, got '{value}'")
        column = names.index(name)
        if values.setdefault(column, int(value)) != int(value):
            raise SpecError(f"attribute {name} cannot be both 0 and 1, got '{expression}'")
    return values


def _spelled(values: Mapping[int, int], names: Sequence[str]) -> str:
    return ", ".join(f"{names[column]}={value}" for column, value in values.items())


def _mismatches(y: Tensor, values: Mapping[int, int]) -> Tensor:
    """Number of the named attributes that each row has otherwise, shape ``(N,)``."""
    columns = torch.tensor(list(values))
    return (y[:, columns] != torch.tensor([float(value) for value in values.values()])).sum(1)


def _completed(y: Tensor, values: Mapping[int, int], num: int, seed: int) -> tuple[Tensor, int]:
    """Set the named attributes in held-out labels, those first that have to be changed least.

    Returns:
        Labels ``(num, L)``, and how many of them are held-out rows as they were.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[_mismatches(y[order], values).argsort(stable=True)]
    found = y[order[torch.arange(num) % len(y)]]
    completed = found.clone()
    completed[:, list(values)] = torch.tensor([float(value) for value in values.values()])
    return completed, int((found == completed).all(1).sum())


def _given_rows(run: OpenRun, num: int, seed: int) -> list[Row]:
    """One row for each of ``num`` held-out images: draws that share its pseudoinput."""
    split = held_out(run.data)
    least = max(num, 2)  # two to compare with one another
    if len(split) < least:
        raise SpecError(
            f"--given {num} needs at least {least} held-out images, but {run.data.name} has {len(split)}"
        )
    at = evenly(len(split), num, seed)
    x = split[at].x.to(device_of(run.model))
    reduce: Any = run.model.pseudoinput
    with evaluating(run.model):
        u = reduce(x)
        shown = torch.stack((x, reduce.context(u)), 1)
    return [
        Row(f"{split.name} {i}", shown=shown[k], options={"u": u[k]}, facts={"position": i})
        for k, i in enumerate(at.tolist())
    ]


def _labels_for(run: OpenRun, num: int, seed: int) -> Tensor | None:
    conditional = getattr(run.model, "conditional", False)
    return held_out_labels(run.data, num, seed) if conditional else None


def _labels(split: Split) -> Tensor:
    """Labels of a split, on the CPU."""
    y = split.y
    if y is None:
        raise SpecError(f"{split.protocol.name} has no labels")
    return y.cpu()


def _name(chosen: Sequence[str], options: Mapping[str, Any]) -> str:
    """Name of the picture: samples drawn otherwise do not replace those of training."""
    how = [f"{name}-{value:g}" if name in _SWEEPS else str(value) for name, value in options.items()]
    return "-".join([*(chosen or ["samples"]), *how])


def _panels(
    model: Any, options: Mapping[str, Any], swept: str | None, conditioned: int | None
) -> tuple[str, str]:
    """What stands above the panels, in symbols."""
    conditional = getattr(model, "conditional", False)
    given = "z, y" if conditional else "z"
    prior = "p(z | y)" if conditional and getattr(model.prior, "conditional", True) else "p(z)"
    latents = f"z ~ {prior}" if conditioned is None else "z ~ p(z | u)"
    if options.get("sampling") == "paper" and hasattr(model.prior, "base"):
        latents = "z ~ base of p(z | y)"
    for name, participle in {"scale": "scaled", "temperature": "tempered"}.items():
        if name == swept:
            latents += f", {participle}"
        elif name in options:
            latents += f" at {name} {options[name]:g}"
    if "scale_mode" in options and (swept == "scale" or "scale" in options):
        latents += f" ({options['scale_mode']})"
    return f"mean of p(x | {given}),  {latents}", f"draw  x ~ p(x | {given}), same z"
