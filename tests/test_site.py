"""The site that MkDocs makes of docs/: built strictly, readable without a network; what its pages quote is there."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rookworld_trl import chess, measuring, training
from rookworld_trl.chess import rewards
from rookworld_trl.plugins.health import DEFAULT_BANDS
from tests.support.documents import ROOT

DOCS = ROOT / "docs"
# Attributes that make a browser fetch something.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages, by name."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search("WARNING|ERROR", done.stderr), done.stderr
    return {page.stem: page.read_text(encoding="utf-8") for page in folder.glob("*.html")}


class Page(HTMLParser):
    """What a page fetches."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in FETCHED and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given.get(FETCHED[tag]) or "")


@pytest.mark.slow
def test_every_page_is_there_needs_no_network_and_draws_its_formulas(site: dict[str, str]) -> None:
    for file in DOCS.glob("*.md"):
        page = Page(site[file.stem])
        assert page.fetched
        assert not [address for address in page.fetched if "//" in address], file
        prose = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, flags=re.DOTALL)
        assert site[file.stem].count("<math ") == len(formulas), file
        assert 'href="../' not in site[file.stem], "a file outside of the site is named, not linked"
    named = re.findall(r"<!-- api: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"))
    assert len(named) > 60
    assert not [name for name in named if f'id="{name}"' not in site["api"]]


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names = {name for package in (chess, rewards, measuring, training) for name in package.__all__}
    modules = {"policy", "environment", "PREFIXES", "TaskName"}  # of `chess`: the two formats have names of their own
    assert not [name for name in names - modules if not re.search(rf"\b{name}\b", page)]


def literals() -> list[str]:
    """The texts that the code holds, docstrings left out, with `…` where an f-string puts a value in."""
    found = []
    for file in [*ROOT.glob("rookworld_trl/**/*.py"), *ROOT.glob("recipes/*.py")]:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in (node for node in nodes if id(node) not in docstrings):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return [text for text in found if " " in text]


def test_messages_and_metrics_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """What the first column quotes of the tables that say `it says`, and the metrics that have bands."""
    quoted, says, texts = [], False, literals()
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        first = line.split("|")[1] if line.startswith("| ") else ""
        says = line.startswith("|") and (says or first.strip() == "it says")
        quoted += re.findall("`([^`]+)`", first) if says else []
    assert len(quoted) > 30
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in texts), message
    _, table = page.split("| metric | because | do |")
    assert {*re.findall(r"^\| `([^`]+)`", table.split("\n\n")[0], flags=re.MULTILINE)} == set(DEFAULT_BANDS)
