"""The report in a real browser, as wide as a desk's screen and as a phone's: it draws, filters and sorts."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from rookworld_trl.chess import boards
from rookworld_trl.reports.document import write_report
from tests.support.runs import AFTER, BEFORE, write_evaluation, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
requires_browser = pytest.mark.skipif(
    BROWSER is None and os.environ.get("CI") != "true", reason="needs a browser: apt-get install chromium"
)
WIDTHS = (DESK, PHONE) = (1200, 390)

# Runs in the page once all is drawn, and tells the page around it what it found.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const shown = () => [...document.querySelectorAll(".card:not([hidden])")].map((card) => card.dataset);
  const choose = (name, value) => {
    const select = document.querySelector(`#boards [data-filter=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const rows = () => [...document.querySelectorAll("#metrics tbody tr")];
  const column = (place) => rows().map((row) => row.cells[place].textContent);
  const head = document.querySelectorAll("#metrics th")[2];
  const found = { width: innerWidth, needed: document.documentElement.scrollWidth, errors };
  found.plots = [...document.querySelectorAll(".chart")].map((chart) => chart.scrollHeight);
  found.names = [...document.querySelectorAll(".chart h4")].map((each) => each.textContent);
  found.first = shown().map((card) => card.kind);
  choose("kind", "");
  found.all = shown().length;
  choose("task", "environment");
  found.tasks = shown().map((card) => card.task);
  found.count = document.querySelector("#boards .count").textContent;
  choose("task", "");
  choose("kind", "random");
  head.click();
  found.down = column(2);
  head.click();
  found.up = column(2);
  found.board = document.querySelector(".card:not([hidden]) svg").getBoundingClientRect().width;
  parent.postMessage(JSON.stringify(found), "*");
}, 1500));
</script>"""
AROUND = """<script>addEventListener("message", (event) => {
  const found = document.body.appendChild(document.createElement("pre"));
  found.textContent = event.data;
});</script>"""
ERRORS = """<script>const errors = []; addEventListener("error", (event) => errors.push(event.message));</script>"""


def browse(page: Path, width: int, height: int) -> str:
    """Start the browser on the page, without network, and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--log-level=3"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=6000"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "demo")
    write_evaluation(folder, "before", BEFORE)
    write_evaluation(folder, "after", AFTER)
    return write_report(folder, boards=boards)


@requires_browser
def test_it_draws_filters_and_sorts(report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8").replace("<head>", f"<head>{ERRORS}", 1)
    (tmp_path / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" width="{width}" height="900" frameborder="0"></iframe>' for width in WIDTHS
    )
    page = tmp_path / "around.html"
    page.write_text(f"<!doctype html><html><body>{AROUND}{frames}</body></html>", encoding="utf-8")
    texts = re.findall(r"<pre>(.*?)</pre>", browse(page, 1300, 900), flags=re.DOTALL)
    both = sorted((json.loads(html.unescape(each)) for each in texts), key=lambda found: -found["width"])
    assert [found["width"] for found in both] == list(WIDTHS)
    for found in both:
        assert found["errors"] == []
        assert found["needed"] <= found["width"], "nothing sticks out of the screen"
        assert len(found["plots"]) >= 3
        assert min(found["plots"]) > 100, found["names"]
        assert all("improved" in kinds.split() for kinds in found["first"])
        assert (len(found["first"]), found["all"], found["tasks"], found["count"]) == (2, 3, ["environment"], "1")
        assert found["down"] == ["4.00", "70.0 %", "70.0 %", "0.7", "8.6 %", "n/a"]
        assert found["up"] == ["8.6 %", "70.0 %", "70.0 %", "0.7", "4.00", "n/a"], "what is not known stays below"
        assert found["board"] >= 120
