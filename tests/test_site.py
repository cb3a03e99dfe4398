"""The site that MkDocs makes of docs/: built strictly, readable without a network; what its pages quote is there."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

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
    """What a page fetches, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in FETCHED and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given.get(FETCHED[tag]) or "")

    def handle_data(self, data: str) -> None:
        self.text += data


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


@pytest.mark.parametrize("package", [chess, rewards, measuring, training], ids=lambda each: each.__name__)
def test_the_api_page_has_every_public_name(package) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    modules = {"policy", "environment", "PREFIXES", "TaskName"}  # of `chess`: the two formats have names of their own
    assert not [name for name in set(package.__all__) - modules if not re.search(rf"\b{name}\b", page)]


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


def messages(page: Path) -> list[str]:
    """What the first column of the page's tables quotes, of those that say `it says`."""
    found, says = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if line.startswith("| "):
            says = says or cells[1].strip() == "it says"
            found += re.findall("`([^`]+)`", cells[1]) if says else []
        elif not line.startswith("|"):
            says = False
    return found


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_has() -> None:
    quoted, texts = messages(DOCS / "troubleshooting.md"), literals()
    assert len(quoted) > 30
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in texts), message


def test_metrics_of_the_troubleshooting_page_have_bands() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    _, table = page.split("| metric | because | do |")
    named = re.findall(r"^\| `([^`]+)`", table.split("\n\n")[0], flags=re.MULTILINE)
    assert set(named) == set(DEFAULT_BANDS)
