"""What the site makes of the pages, which are written for GitHub first. Called by MkDocs; see mkdocs.yml."""

import html
import re
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)[^)\s]*\)")
_API = re.compile(r"^<!-- api: (\S+)(.*?)-->$", flags=re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"<code>([^\s<]{1,32}|--[^<]{1,32})</code>")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files outside docs/, which the site does not have, in place of linking them; write the API in full."""
    markdown = _OUTSIDE.sub(_named, markdown)
    return _API.sub(r"::: \1\2", markdown)


def _named(match: re.Match[str]) -> str:
    text, path = match.groups()
    return f"`{path}`" if text in (path, PurePosixPath(path).name) else f"{text} (`{path}`)"


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without scripts, and names of settings and files that stay in one piece.

    What is too wide for a phone then scrolls by itself: formulas that stand alone, and tables.
    """

    def formula(match: re.Match[str]) -> str:
        alone = match[1] == "div"
        made = convert(html.unescape(match[2]), display="block" if alone else "inline")
        return f'<div style="overflow: auto hidden">{made}</div>' if alone else made

    content = _WORD.sub(r'<code style="white-space: nowrap">\1</code>', content)
    return _FORMULA.sub(formula, content)
