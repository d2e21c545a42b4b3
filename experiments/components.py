"""The table of components: what may stand in a spec, the class behind it, and the paper it comes from."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

from .registry import PARTS, Part

__all__ = ["Component", "components", "to_markdown"]


class Component(NamedTuple):
    """One row of the table."""

    table: str
    kind: str
    name: str
    about: str
    source: str


def components() -> Iterator[Component]:
    """Yield every registered part, in the order of the tables of a spec."""
    for table, kinds in PARTS.items():
        for kind, part in kinds.items():
            if kind == "none":
                continue  # nothing stands there
            built = _class(part)
            # The paper stands in `about` too where the name alone says little.
            about = re.sub(r" \([^()]*\d{4}\)$", "", part.about)
            yield Component(table, kind, built.__name__, about, _source(built))


def to_markdown() -> str:
    """Write the table in Markdown."""
    lines = ["| table | `kind` | class | what it is | source |", "|---|---|---|---|---|"]
    for part in components():
        lines.append(f"| `[{part.table}]` | `{part.kind}` | `{part.name}` | {part.about} | {part.source} |")
    return "\n".join(lines)


def _class(part: Part) -> Any:
    """The class of a part, also where a function builds it."""
    return part.build if inspect.isclass(part.build) else get_type_hints(part.build)["return"]


def _source(built: Any) -> str:
    """The citation in the first paragraph of the docstring of the module that defines a class."""
    module = inspect.getmodule(built)
    paragraph = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
    found = re.search(r"\(([^()]*\b(?:19|20)\d{2}\b[^()]*)\)", paragraph)
    return found.group(1) if found else ""
