"""What pydantic finds wrong with a spec, in one sentence that names the nearest match."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .registry import PARTS, SUPPLIED, TABLES, nearest
from .toml import shown

__all__ = ["sentence"]

_TOML_WORDS = {
    "a valid string": "a string",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
}


def sentence(error: ValidationError, spec_type: type[BaseModel], raw: dict[str, Any]) -> str:
    """Report one fault: an unknown kind if there is one, else an unknown key, else the first.

    Args:
        error: What pydantic raised.
        spec_type: The model that refused.
        raw: The tables as read, each part's with its ``kind``.
    """
    faults = error.errors()
    first = min(faults, key=_rank)
    table, given = str(first["loc"][0]), raw.get(str(first["loc"][0]))
    kind = str(given.get("kind")) if table in TABLES and isinstance(given, dict) else None
    path = _path(first["loc"], kind)
    if _rank(first) == 0:
        return f"unknown [{table}] kind {shown(kind)}{nearest(str(kind), PARTS[table])}"
    if first["type"] == "extra_forbidden":
        return _unknown(path, kind, spec_type)
    if first["type"] == "missing":
        return f"[{table}] needs {path[1]}"
    keys = _keys(table, spec_type, kind)
    if keys is not None and not isinstance(given, dict):
        return f"{table} must be a table, got {shown(given)}"
    alike = [fault for fault in faults if _path(fault["loc"], kind)[:2] == path[:2]]
    wants = dict.fromkeys(_wants(fault["msg"]) for fault in alike)
    annotation = keys.model_fields[path[1]].annotation if keys is not None else None
    if type(None) in get_args(annotation):
        wants["'none'"] = None
    place = f"[{path[2]}]" if len(path) > 2 and path[2].isdecimal() else ""
    return f"{'.'.join(path[:2])}{place} must be {' or '.join(wants)}, got {shown(first['input'])}"


def _rank(fault: Any) -> int:
    table, *rest = fault["loc"]
    if fault["type"] == "union_tag_invalid" or (table in TABLES and rest == ["kind"]):
        return 0
    return 1 if fault["type"] == "extra_forbidden" else 2


def _path(loc: tuple[int | str, ...], kind: str | None) -> list[str]:
    """Where the fault is, without the kind that pydantic puts between a table and its key."""
    path = [str(name) for name in loc]
    return path[:1] + path[2:] if len(path) > 2 and path[1] == kind else path


def _wants(message: str) -> str:
    for start in ("Input should be ", "Value should be "):
        message = message.removeprefix(start)
    return _TOML_WORDS.get(message, message)


def _keys(table: str, spec_type: type[BaseModel], kind: str | None = None) -> type[BaseModel] | None:
    """The model of a table's keys, or nothing for a key that stands outside the tables."""
    if table in TABLES:
        return PARTS[table][kind].keys if kind in PARTS[table] else BaseModel
    annotation = spec_type.model_fields[table].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _unknown(path: list[str], kind: str | None, spec_type: type[BaseModel]) -> str:
    if len(path) == 1:
        return f"unknown key or table '{path[0]}'{nearest(path[0], spec_type.model_fields)}"
    table, key = path[:2]
    if kind is not None and key in PARTS[table][kind].supplied:
        return f"{table}.{key} is no key: it comes from {SUPPLIED[key]}"
    owners = [k for k, part in PARTS.get(table, {}).items() if key in part.keys.model_fields]
    if owners:
        return f"{table}.{key} belongs to kind {' or '.join(map(repr, owners))}, not to '{kind}'"
    keys = _keys(table, spec_type, kind)
    known = [name for name in (keys.model_fields if keys else ()) if name != "kind"]
    if not known:
        return f"unknown key {table}.{key}: kind '{kind}' has no keys"
    return f"unknown key {table}.{key}{nearest(key, known)}"
