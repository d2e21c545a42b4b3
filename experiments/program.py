"""From a checked spec to a model and its guide: each part is built when another first asks for it."""

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from pvae.data import Data
from pvae.models import XVAE
from pvae.nn import LabelEmbedding, LabelSpace, WhitenedDecoder, WhitenedEncoder
from pvae.priors import CodePrior

from .registry import PARTS, PartKeys

__all__ = ["Program", "SpecError", "build"]

# Kinds that are made for each other: if one of them stands in a spec, all must.
_TOGETHER: tuple[dict[str, str], ...] = (
    {"model": "ladder", "posterior": "ladder", "encoder": "ladder", "decoder": "ladder"},
    {"model": "hvae", "posterior": "hvae", "decoder": "pair"},
)

_VALUES = {"binary": "x in {0, 1}", "unit": "x in [0, 1]", "count": "counts", "real": "real x"}

# How data with levels are loaded with other values: (what they have, what is needed) -> keys to set.
_BINARIZE = "data.binarize = 'dynamic', 'static' or 'threshold'"
_LOADED_AS = {
    ("unit", "binary"): _BINARIZE,
    ("unit", "count"): "data.scale = 'count'",
    ("binary", "unit"): "data.binarize = 'none'",
    ("binary", "count"): "data.scale = 'count' with data.binarize = 'none'",
    ("count", "unit"): "data.scale = 'unit'",
    ("count", "binary"): f"data.scale = 'unit' with {_BINARIZE}",
}


class SpecError(ValueError):
    """A spec that cannot be read, checked or built; the message is one sentence."""


class Program(NamedTuple):
    """A model p(x, z | y) and its guide q(z | x, y)."""

    model: nn.Module
    guide: nn.Module


def build(parts: Mapping[str, PartKeys], data: Data, z_dim: int, seed: int) -> Program:
    """Build the parts of a spec for some data.

    Args:
        parts: Keys of every table that holds a part.
        data: The data: their shape, range and levels, and training data where a part starts from them.
        z_dim: Number of latent dimensions.
        seed: Seed of the initialisation.

    Raises:
        SpecError: If a part refuses its arguments, or the likelihood the values of the data.
    """
    _check_values(parts["likelihood"].kind, data)
    _check_together({table: keys.kind for table, keys in parts.items()})
    workshop = _Workshop(parts, {"data": data, **_facts(data)}, z_dim, seed)
    program = Program(workshop["model"], workshop["posterior"])
    _check_labels(parts, program)
    if isinstance(getattr(program.model, "prior", None), CodePrior) and not isinstance(program.model, XVAE):
        raise SpecError(
            "[prior] kind = 'codes' is fitted to the codes of an autoencoder: set model.kind = 'x_vae', "
            "which trains one first"
        )
    return program


def _check_together(kinds: Mapping[str, str]) -> None:
    """Refuse a part beside others that it is not made for."""
    for family in _TOGETHER:
        ours = {table: kind for table, kind in family.items() if kinds[table] == kind}
        if ours and ours != family:
            table, kind = next(iter(ours.items()))
            other, wanted = next(pair for pair in family.items() if pair[0] not in ours)
            raise SpecError(
                f"[{table}] kind = '{kind}' needs [{other}] kind = '{wanted}', got '{kinds[other]}'"
            )
    # The plain ladder alone has its priors in the network, and a ladder alone has pseudoinputs.
    odd = {"prior": kinds["prior"] == "none", "pseudoinput": kinds["pseudoinput"] != "none"}
    for table, is_odd in odd.items():
        if is_odd and kinds["model"] != "ladder":
            raise SpecError(
                f"[{table}] kind = '{kinds[table]}' needs [model] kind = 'ladder', got '{kinds['model']}'"
            )


class _Workshop:
    """What builders may ask for, by the names in ``SUPPLIED``."""

    def __init__(self, parts: Mapping[str, PartKeys], made: dict[str, Any], z_dim: int, seed: int) -> None:
        self._parts = parts
        self._made = made
        self._size = z_dim
        self._seed = seed
        self._waiting: list[str] = []
        self._derived = {"out_shape": self._out_shape, "z_dim": self._z_dim}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._derived[name]() if name in self._derived else self._build(name)
        return self._made[name]

    def _out_shape(self) -> tuple[int, ...]:
        return tuple(self["likelihood"].param_shape(self["x_shape"]))

    def _z_dim(self) -> int:
        """Size of what the prior is of."""
        pseudoinput = self["pseudoinput"]
        return self._size if pseudoinput is None else math.prod(pseudoinput.u_shape)

    def _build(self, table: str) -> Any:
        keys = self._parts[table]
        part = PARTS[table][keys.kind]
        if table in self._waiting:
            raise SpecError(f"[{table}] and [{self._waiting[-1]}] of this spec each need the other first")
        self._waiting.append(table)
        arguments = {name: self[name] for name in part.supplied} | keys.arguments()
        try:
            # Random numbers of the part's own: exchanging the prior leaves the networks at the same start.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{self._seed} {table}".encode()))
                return self._in_units(table, part.build(**arguments))
        except (TypeError, ValueError) as error:
            raise SpecError(f"[{table}] kind = '{part.kind}': {error}") from error
        finally:
            self._waiting.pop()

    def _in_units(self, table: str, built: Any) -> Any:
        """Let both networks see z in the units of the codes, where the model asks for it."""
        if self._parts["model"].arguments().get("parametrisation") != "whitened":
            return built
        return {"encoder": WhitenedEncoder, "decoder": WhitenedDecoder}.get(table, _same)(built)


def _same(built: Any) -> Any:
    return built


def _facts(data: Data) -> dict[str, Any]:
    """What the data say about the parts: shape, number of levels, range."""
    values, levels = data.protocol.values, data.protocol.levels
    top = 1.0 if values in ("binary", "unit") else levels - 1.0 if values == "count" and levels else None
    return {
        "x_shape": tuple(data.x_shape),
        "levels": levels,
        "bounds": None if top is None else (0.0, top),
        "label_space": LabelSpace.of(data.num_classes, _num_attributes(data)),
    }


def _num_attributes(data: Data) -> int | None:
    y = data.train.y
    if y is not None and y.ndim > 1:
        return y.shape[-1]
    return None if data.attribute_names is None else len(data.attribute_names)


def _check_labels(parts: Mapping[str, PartKeys], program: Program) -> None:
    """Refuse a conditional model in which nothing sees y, and another one in which something does."""
    sees = any(isinstance(m, LabelEmbedding) for module in program for m in module.modules())
    conditional = getattr(program.model, "conditional", False)
    if sees and not conditional:
        kind = parts["model"].kind
        raise SpecError(
            f"[model] kind = '{kind}' knows no labels, but another part sees them: set model.kind = "
            "'conditional', or label_dim = 0 there and an unconditional prior"
        )
    if conditional and not sees:
        raise SpecError(
            "[model] kind = 'conditional' needs a part that sees the labels: set encoder.label_dim and "
            "decoder.label_dim, such as 64, or prior.kind = 'conditional_flow'"
        )


def _check_values(kind: str, data: Data) -> None:
    """Refuse a likelihood for values that it gives no probability, and name the choices."""
    parts = PARTS["likelihood"]
    values, levels = data.protocol.values, data.protocol.levels
    accepted: frozenset[str] = parts[kind].build.values  # type: ignore[attr-defined]
    if values not in accepted:
        needs = " or ".join(_VALUES[want] for want in sorted(accepted))
        choices = [_LOADED_AS[values, want] for want in sorted(accepted) if (values, want) in _LOADED_AS]
        if levels is None or (values == "binary" and data.protocol.binarize is None):
            choices = []  # there are no levels to be loaded in another way
        *others, last = [f"'{k}'" for k, part in parts.items() if values in part.build.values]  # type: ignore[attr-defined]
        choices.append(f"likelihood.kind = {', '.join(others)}{' or ' if others else ''}{last}")
        raise SpecError(
            f"[likelihood] kind = '{kind}' needs {needs}, but {data.name} comes as {_VALUES[values]}: "
            f"set {', or '.join(choices)}"
        )
    if levels is None and "levels" in parts[kind].supplied:
        raise SpecError(
            f"[likelihood] kind = '{kind}' needs data with a known number of levels, but {data.name} has none"
            f"{': set data.dequantize = false' if data.protocol.dequantize else ''}"
        )
