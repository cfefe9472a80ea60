"""What tests ask of an HTML page: its elements, and whether its colours can be told apart."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "rect", "line", "polyline", "circle"}


class Document(HTMLParser):
    """All elements with their attributes and text; fails where tags are not closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(markup)
        self.close()
        assert not self._open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        words: list[str] = []
        self.elements.append((name, {key: value or "" for key, value in attributes}, words))
        self._open.append((name, words))

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert name in VOID
        self.elements.append((name, {key: value or "" for key, value in attributes}, []))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop()[0] == name

    def handle_data(self, data: str) -> None:
        for _, words in self._open:
            words.append(data)

    def all(self, *names: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, "".join(words)) for name, attributes, words in self.elements if name in names]

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]


def contrast(one: str, two: str) -> float:
    """WCAG 2's ratio of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)
