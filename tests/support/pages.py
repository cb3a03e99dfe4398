"""A written report as a parser of HTML finds it."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Page:
    """The visible text (spaces run together), links to other places, tables by section, and the plots' legends."""

    text: str = ""
    links: set[str] = field(default_factory=set)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    legends: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    VOID = ("meta", "link", "br", "img", "input", "hr", "use", "path", "rect", "line", "polygon", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.page, self.words, self.open, self.section, self.scripts = Page(), [], [], "", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "xlink:href"):
            if (target := named.get(name)) and not target.startswith("#"):
                self.page.links.add(target)
        if tag == "section":
            self.section = named.get("id") or ""
        if "class" in named and "sortable" in str(named["class"]):
            self.page.tables[self.section] = []
        rows = self.page.tables.get(self.section)
        if rows is not None and tag == "tr":
            rows.append([])
        if rows and tag in ("td", "th"):
            rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts += data
        elif "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] in ("td", "th") and self.section in self.page.tables:
                self.page.tables[self.section][-1][-1] += data


def read_page(path: Path) -> Page:
    """Parse a report strictly: every element is closed where it was opened."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    page = reader.page
    page.text = re.sub(r"\s+", " ", " ".join(reader.words))
    page.legends = re.findall(r'"LegendItem".*?"label":{"type":"value","value":"(.*?)"', reader.scripts)
    return page
