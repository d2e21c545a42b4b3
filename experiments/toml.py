"""TOML that somebody else wrote: read within limits of size, depth, names and values, and written back."""

import json
import math
import re
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

from .program import SpecError

__all__ = ["LARGEST", "check", "dumps", "loads", "one_line", "read_text", "shown"]

LARGEST = 2**16
"""Bytes of a spec; the recipes have at most 2,000."""

# Dots of one line. The parser keeps every beginning of a dotted key: its memory grows with their square.
_DOTS = 255
# Lists within lists in a value, and characters of a text.
_DEEPEST, _LONGEST = 4, 1000
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Characters that no line of text holds: control characters, surrogates, separators of lines and paragraphs.
_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}


def read_text(path: Path) -> str:
    """Read a spec's file, and no more of it than a spec can have.

    Raises:
        SpecError: If it cannot be read, is too long or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise SpecError(f"cannot read the spec {one_line(path)}: {error.strerror}") from None
    except ValueError:  # a null character in the name
        raise SpecError(f"cannot read the spec {one_line(path)}: it is no name of a file") from None
    if len(content) > LARGEST:
        raise SpecError(f"the spec {one_line(path)} must have at most {LARGEST} bytes, got more")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise SpecError(f"the spec {one_line(path)} is not UTF-8 text") from None


def loads(text: str, what: str = "the spec") -> dict[str, Any]:
    """Parse TOML in time and memory that its length bounds.

    Args:
        text: The text.
        what: Name for messages.

    Raises:
        SpecError: If it is not TOML, or larger or more deeply nested than any spec.
    """
    if len(text) > LARGEST:
        raise SpecError(f"{what} must have at most {LARGEST} characters, got {len(text)}")
    dots = max((line.count(".") for line in text.split("\n")), default=0)
    if dots > _DOTS:
        raise SpecError(f"{what} must have at most {_DOTS} dots in a line, got {dots}")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SpecError(f"{what} is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{what} is not valid TOML: {one_line(error)}") from None
    except ValueError:  # Python refuses to read a whole number of thousands of digits, or a 30th of February
        raise SpecError(f"{what} is not valid TOML: it has a number or a date that is none") from None


def check(tables: dict[str, Any]) -> None:
    """Refuse names and values that no spec has, wherever they stand, before anything is made of them.

    Raises:
        SpecError: Names the first.
    """
    for name, table in tables.items():
        _check_key(name)
        if not isinstance(table, dict):
            _check_value(name, table)
            continue
        for key, value in table.items():
            _check_key(key)
            _check_value(f"{name}.{key}", value)


def shown(value: object, most: int = 80) -> str:
    """What a message shows of a value from outside: in one line, and no more of it than names it."""
    text = one_line(repr(value)[: most + 1])
    return text if len(text) <= most else f"{text[:most]} ..."


def one_line(text: object) -> str:
    """Write text in one line, its control characters as Python writes them."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _UNSEEN else c for c in str(text))


def dumps(value: object) -> str:
    """Write one value; ``None``, which TOML lacks, as ``"none"``."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(dumps, value))}]"
    return repr(value)


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise SpecError(
            f"a key of a spec must be a letter and then at most 63 letters, digits, _ or -, got {shown(key)}"
        )


def _check_value(name: str, value: object, depth: int = 0) -> None:
    if isinstance(value, list):
        if depth == _DEEPEST:
            raise SpecError(f"{name} must hold lists at most {_DEEPEST} deep, got more")
        for item in value:
            _check_value(name, item, depth + 1)
    elif isinstance(value, dict):
        # A list of tables in place of one is told of by the table's own check.
        if "." in name or depth > 1:
            raise SpecError(f"{name} must be a value, got a table")
    elif isinstance(value, str):
        if len(value) > _LONGEST or any(unicodedata.category(c) in _UNSEEN for c in value):
            raise SpecError(
                f"{name} must be one line of at most {_LONGEST} characters, none of them a control "
                f"character, got {shown(value)}"
            )
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SpecError(f"{name} must be a whole number of 64 bits, got {shown(value)}")
    elif isinstance(value, float) and math.isnan(value):
        raise SpecError(f"{name} must be a number, got nan")
    elif not isinstance(value, int | float):
        raise SpecError(f"{name} must be a text, a number, a truth value or a list, got {shown(value)}")
