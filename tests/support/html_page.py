"""Reads an HTML page for tests: its text and the addresses of its resources."""

import collections
import html.parser


class HtmlPage(html.parser.HTMLParser):
    """Parses a page and asserts that every element is closed."""

    _VOID_ELEMENTS = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self._open_elements: list[str] = []
        self._words: list[str] = []
        self.sources: list[str] = []
        """values of all src and href attributes"""
        self.elements: collections.Counter[str] = collections.Counter()
        """number of elements by tag and names of their attributes"""
        self.feed(text)
        assert not self._open_elements, f"not closed: {self._open_elements}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._count(tag, attributes)
        if tag not in self._VOID_ELEMENTS:
            self._open_elements.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._count(tag, attributes)

    def _count(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.elements[" ".join([tag, *sorted(name for name, _ in attributes)])] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID_ELEMENTS:
            assert self._open_elements.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open_elements:
            self._words.append(data)

    @property
    def text(self) -> str:
        """The visible text, with single spaces."""
        return " ".join(" ".join(self._words).split())
