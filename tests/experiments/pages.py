"""A page taken apart: its elements, and whether they are closed in the order in which they were opened."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

__all__ = ["Element", "Page"]

# Elements of HTML that have no end.
_VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass
class Element:
    """An element with what is in it."""

    tag: str
    attributes: dict[str, str | None]
    parents: tuple[str, ...]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)


class Page(HTMLParser):
    """Reads a page; ``problems`` says where it is not well-formed.

    Args:
        text: The page.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.problems: list[str] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{element.tag}> is never closed" for element in self._open]

    def all(self, tag: str) -> list[Element]:
        """Every element of a kind, in order."""
        return [element for element in self.elements if element.tag == tag]

    def section(self, name: str) -> Element:
        """The section of that name."""
        (found,) = [e for e in self.all("section") if e.attributes.get("id") == name]
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), tuple(e.tag for e in self._open))
        if len(attrs) != len(element.attributes):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.elements.append(element)
        for parent in self._open:
            parent.inside.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1].tag != tag:
            last = self._open[-1].tag if self._open else "nothing"
            self.problems.append(f"</{tag}> closes <{last}> at {self.getpos()}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for parent in self._open:
            parent.text += data
