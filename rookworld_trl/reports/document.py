"""A run's report as Markdown, and as one HTML file that carries its picture inside."""

import base64
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rookworld_trl.reports.plots import plot_run
from rookworld_trl.reports.run import GROUPED, Run, losses, read_run, shown, trivial

PLOT, MARKDOWN, HTML = "plot.png", "report.md", "report.html"

Table = tuple[list[str], list[list[str]]]  # header, rows
Block = tuple[str, str, Table | str]  # heading (may be empty), kind: "text", "table" or "code", content

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } h2 { margin-top: 2rem } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
"""


def write_report(folder: Path | str, output: Path | str | None = None) -> list[Path]:
    """Read a run's folder and write `plot.png`, `report.md` and `report.html`.

    Args:
        output: where to write; None: into the run's folder.

    Returns:
        The three files.

    Raises:
        RunError: the folder holds no readable run.
        ValueError: the run logged nothing.
    """
    run = read_run(folder)
    output = Path(folder if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    plot = plot_run(run, output / PLOT)
    markdown, page = output / MARKDOWN, output / HTML
    markdown.write_text(render_markdown(run), encoding="utf-8")
    page.write_text(render_html(run, plot.read_bytes()), encoding="utf-8")
    return [plot, markdown, page]


def render_markdown(run: Run) -> str:
    """The report as GitHub Markdown; the picture is a link to `plot.png` beside it."""
    lines = [f"# {_escape_markdown(run.name)}", "", f"![How the run went]({PLOT})", ""]
    for heading, kind, content in _blocks(run):
        lines += [f"## {heading}", ""] if heading else []
        if isinstance(content, tuple):
            header, rows = content
            lines += [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
            lines += [_markdown_row(map(_escape_markdown, row)) for row in rows]
        else:
            lines += ["```", content, "```"] if kind == "code" else [_escape_markdown(content)]
        lines.append("")
    return "\n".join(lines)


def render_html(run: Run, plot: bytes) -> str:
    """The report as one self-contained HTML page."""
    image = base64.b64encode(plot).decode()
    title = html.escape(run.name)
    body = [f"<h1>{title}</h1>", f'<img alt="How the run went" src="data:image/png;base64,{image}">']
    for heading, kind, content in _blocks(run):
        body += [f"<h2>{html.escape(heading)}</h2>"] if heading else []
        if isinstance(content, tuple):
            header, rows = content
            body += ["<table>", _html_row(header, "th"), *(_html_row(row, "td") for row in rows), "</table>"]
        else:
            tag = "pre" if kind == "code" else "p"
            body.append(f"<{tag}>{html.escape(content)}</{tag}>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _blocks(run: Run) -> Iterator[Block]:
    rows = run.comparisons
    for row in rows:
        if row.get("headline"):
            yield "", "text", _sentence(row)
    header = ["metric", "before", "after", "change", "95 % interval", "p (McNemar)", "trivial players"]
    for of_what, judged_rows in (("metrics", rows), (GROUPED, run.summary.get("groups") or [])):
        found, judged = losses(judged_rows)
        if found:
            named = [[f"{row['task']}, {row['mode']}: {_cells(row)[0]}", *_cells(row)[1:]] for row in found]
            yield f"Significant losses: {len(found)} of {judged} {of_what}", "table", (header, named)
        elif judged:
            yield "", "text", f"Significant losses: none among {judged} {of_what}."
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        yield f"{task}, {mode}, {chosen[0]['items']} items", "table", (header, [_cells(row) for row in chosen])
    if not rows:
        yield "", "text", "The run has no held-out comparison: it did not finish, or was not evaluated."
    if seconds := run.summary.get("seconds"):
        total = sum(seconds.values())
        phases = [[str(phase), f"{value:.1f}"] for phase, value in seconds.items()]
        yield "Time", "table", (["phase", "seconds"], [*phases, ["all", f"{total:.1f}"]])
    if last := run.steps[-1:]:
        yield "Last logged step", "table", (["quantity", "value"], [[k, _plain(v)] for k, v in last[0].items()])
    facts = {
        name: value for name, value in run.summary.items() if name not in ("metrics", "headline", "losses", "seconds")
    }
    if facts:
        yield "Made with", "code", json.dumps(facts, indent=2, default=str)


def _sentence(row: Mapping[str, Any]) -> str:
    _, before, after, change, interval, _, players = _cells(row)
    verdict = "" if row["difference"] is None else f" ({change}, 95 % interval {interval}, {row['items']} items)"
    verdict += f"; {players}" if players else ""
    return f"{row['task']}, {row['mode']}: {row.get('label', row['metric'])} {before} → {after}{verdict}."


def _cells(row: Mapping[str, Any]) -> list[str]:
    spec = row.get("format", ".3f")
    before, after = (shown(row[name], spec, unit=" %") for name in ("before", "after"))
    change, low, high = (shown(row[name], spec, "+") for name in ("difference", "ci_low", "ci_high"))  # in points
    interval = "" if row["difference"] is None else f"[{low}, {high}]"
    p_value = "" if row.get("p_value") is None else f"{row['p_value']:.2g}"
    label = " ".join([*([row["group"]] if "group" in row else []), str(row.get("label", row["metric"]))])
    return [label, before, after, change, interval, p_value, trivial(row)]


def _plain(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape_markdown(text: str) -> str:
    return "".join("\\" + c if c in "|_*`<[" else c for c in text.replace("\n", " "))


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
