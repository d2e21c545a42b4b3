"""The table of parts: which kinds a spec may name, what builds them, and how they read in symbols.

A part is registered with a callable. Those of its arguments that the spec's other tables or the data
supply (:data:`SUPPLIED`) are filled in; every other argument is a key of the TOML table, with its name,
type and default. Adding a prior is thus one class and one :func:`register` call.
"""

import difflib
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    create_model,
)

__all__ = [
    "PARTS",
    "SUPPLIED",
    "TABLES",
    "Keys",
    "Part",
    "PartKeys",
    "keys_of",
    "nearest",
    "none_word",
    "register",
]

TABLES: dict[str, str] = {
    "model": "vae",
    "prior": "normal",
    "posterior": "normal",
    "encoder": "mlp",
    "decoder": "mlp",
    "likelihood": "bernoulli",
    "pseudoinput": "none",
}
"""The tables that hold parts, each with the kind it has when the spec does not say."""

SUPPLIED: dict[str, str] = {
    "data": "[data]",
    "x_shape": "[data]",
    "levels": "[data]",
    "bounds": "[data]",
    "z_dim": "z_dim",
    "out_shape": "[likelihood]",
    "label_space": "[data]",
    **{table: f"[{table}]" for table in TABLES},
}
"""Arguments that are never keys, each with where its value comes from."""


class Keys(BaseModel):
    """Keys of one table: unknown ones are refused, and nothing changes after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def arguments(self) -> dict[str, Any]:
        """The keys as arguments of what the table builds."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}


class PartKeys(Keys):
    """Keys of a table that holds a part."""

    kind: str


@dataclass(frozen=True)
class Part:
    """One entry of the table.

    Attributes:
        table: Name of the TOML table.
        kind: Value of its ``kind``.
        build: Callable that returns the part.
        keys: Pydantic model of the table, derived from the arguments of ``build``.
        supplied: Arguments of ``build`` that are filled in.
        about: What it is, one line without a full stop.
        symbols: What it stands for, a format string over the keys and the shapes; lines beyond the first
            explain its symbols.
    """

    table: str
    kind: str
    build: Callable[..., Any]
    keys: type[PartKeys]
    supplied: tuple[str, ...]
    about: str
    symbols: str


PARTS: dict[str, dict[str, Part]] = {table: {} for table in TABLES}
"""Every registered part: ``PARTS[table][kind]``."""


def register(
    table: str, kind: str, build: Callable[..., Any], *, about: str, symbols: str, **annotations: Any
) -> Part:
    """Enter a part.

    Args:
        table: One of :data:`TABLES`.
        kind: Name that a spec gives in the table's ``kind``; a kind entered again replaces the first.
        build: Class or function. Its arguments named in :data:`SUPPLIED` are filled in, the others are keys.
        about: What it is, one line without a full stop.
        symbols: What it stands for in symbols, a format string (see :class:`Part`).
        **annotations: Narrower types for some of the keys, such as a ``Literal`` for a ``str``.

    Raises:
        ValueError: If there is no such table.
        TypeError: If an argument is neither supplied nor of a type that TOML can hold.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    supplied = tuple(name for name in inspect.signature(build).parameters if name in SUPPLIED)
    fields = keys_of(build, omit=supplied, **annotations)
    keys = create_model(
        f"{table.title()}_{kind}",
        __base__=PartKeys,
        __doc__=about,
        kind=(Literal[kind], kind),  # type: ignore[arg-type]  # known at run time alone
        **fields,
    )
    entry = Part(table, kind, build, keys, supplied, about, symbols)
    PARTS[table][kind] = entry
    return entry


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or name all of them."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f": did you mean '{close[0]}'?" if close else f": choose from {', '.join(known)}"


def keys_of(build: Callable[..., Any], omit: Iterable[str] = (), **annotations: Any) -> dict[str, Any]:
    """Read a callable's arguments as fields for :func:`pydantic.create_model`.

    Args:
        build: Class or function with annotated arguments; ``*args`` and ``**kwargs`` are no keys.
        omit: Arguments that are no keys.
        **annotations: Types that replace those of the signature.

    Raises:
        TypeError: If the type of an argument is missing or not one that TOML can hold.
    """
    hints = get_type_hints(build.__init__ if inspect.isclass(build) else build, include_extras=True)
    fields = {}
    for name, parameter in inspect.signature(build).parameters.items():
        if name in omit or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        try:
            annotation = _toml_type(annotations.get(name, hints.get(name)))
        except TypeError as error:
            raise TypeError(
                f"argument {name!r} of {build.__name__} cannot be a key of a spec: {error}"
            ) from None
        required = parameter.default is inspect.Parameter.empty
        fields[name] = (annotation, ... if required else parameter.default)
    return fields


def _toml_type(annotation: Any) -> Any:
    """Translate a type hint into one for values read from TOML: strict, without members TOML cannot hold.

    ``None``, which TOML lacks, is written ``"none"``.
    """
    scalars = {bool: StrictBool, int: StrictInt, float: float, str: StrictStr}
    if annotation in scalars:
        # A strict float still takes an integer, but neither a string nor a truth value.
        return Annotated[float, Field(strict=True)] if annotation is float else scalars[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin is Annotated:
        return Annotated[_toml_type(arguments[0]), *arguments[1:]]
    if origin in (tuple, list, Sequence):
        members = tuple(a if a is Ellipsis else _toml_type(a) for a in arguments)
        # Called by name, since the members are known at run time alone.
        return tuple.__class_getitem__(members if origin is tuple else (*members, ...))
    if origin in (Union, types.UnionType):
        members = tuple(m for m in map(_member, arguments) if m is not None)
        if not members:
            raise TypeError(f"TOML has no values of type {annotation}")
        union: Any = functools.reduce(operator.or_, members)
        return Annotated[union | None, BeforeValidator(none_word)] if type(None) in arguments else union
    raise TypeError(f"TOML has no values of type {annotation}")


def _member(annotation: Any) -> Any:
    """One member of a union, or nothing where TOML cannot hold it."""
    try:
        return _toml_type(annotation)
    except TypeError:
        return None


def none_word(value: object) -> object:
    """Read ``"none"`` as ``None``."""
    return None if value == "none" else value
