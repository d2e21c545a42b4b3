"""Options of data sets, which may come from somebody else's spec, checked against the signatures."""

import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from .errors import DataError

__all__ = ["check_options"]

_WORDS = {
    bool: "True or False",
    int: "a whole number of 64 bits",
    float: "a number",
    str: "a text",
    types.NoneType: "None",
}


def check_options(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse values that are not of the type that a signature says.

    Args:
        hints: Type of each parameter.
        values: Value of some of them.

    Raises:
        DataError: Names the first that is not.
    """
    for name, value in values.items():
        if not _fits(value, hints[name]):
            wanted = dict.fromkeys(_word(member) for member in _members(hints[name]))
            shown = repr(value)
            raise DataError(
                f"{name} must be {' or '.join(wanted)}, got {shown[:80]}{' ...' if len(shown) > 80 else ''}"
            )


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _word(hint: Any) -> str:
    return f"a list, each of it {_word(get_args(hint)[0])}" if get_origin(hint) is Sequence else _WORDS[hint]


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, member) for member in members)
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
    if hint is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and -(2**63) <= value < 2**63
    return isinstance(value, hint)
