"""Reports from run folders written by hand: whole, unfinished, torn and malformed ones."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from rookworld_trl.chess import boards
from rookworld_trl.reports.charts import smooth, thinned
from rookworld_trl.reports.document import write_report
from rookworld_trl.reports.run import RunError, read_run
from tests.support.runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


def read_page(path: Path) -> tuple[str, dict[str, list[list[str]]]]:
    """The visible text with its spaces run together, and the tables by section; a browser would fetch nothing."""
    whole = re.sub(r"(<(script|style)\b[^>]*>).*?</\2>", r"\1", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="[^#]', whole)
    tables = {}
    for section, body in re.findall(r'<section id="(metrics|strata)"(.*?)</section>', whole, flags=re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL)
        tables[section] = [[unescape(each) for each in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", whole)).split()), tables


def test_series_are_what_was_logged(tmp_path: Path) -> None:
    """NaN is left out, a step that was logged twice counts as last, and what was never logged is empty."""
    lines = ['{"step": 2, "kl": 1}', '{"step": 1, "kl": NaN}', '{"step": 2, "kl": 3}', '{"step": 2, "runtime": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    steps, values = read_run(tmp_path).series("kl")
    assert (steps.tolist(), values.tolist()) == ([2], [3])
    assert len(read_run(tmp_path).series("never_logged")[0]) == 0


def test_smoothing_and_thinning_by_hand() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0]), 1), [1.0, 2.0])
    np.testing.assert_allclose(thinned(np.array([1.0, 3.0, 5.0, 9.0, 4.0]), 3), [2.0, 7.0, 4.0])
    np.testing.assert_allclose(thinned(np.array([1.0, 3.0]), 3), [1.0, 3.0])


def test_the_page_holds_the_numbers_and_stands_alone(run: Path) -> None:
    path = write_report(run, boards=boards)
    assert path == run / "report.html"
    text, tables = read_page(path)
    assert "P: win-chance value of B, greedy 70.0 % → 75.0 % +5.0 [+2.0, +8.0] 500 items" in text
    assert "n/a → 75.0 %" in text
    assert "exact | <b>" in text  # a label is text, not markup
    assert '"beta": 0.04' in text
    assert "train 1.0 min, evaluate 0.3 min" in text
    assert "Significant losses: 1 of 4 metrics; 1 of 2 headline metrics by group" in text
    assert "P: B is best, greedy: 8.6 % → 7.3 %, -1.3 [-2.4, -0.1]" in text
    assert "P: win-chance value of B, greedy stratum=check" in text
    head, *rows = tables["metrics"]
    assert head == ["metric", "decoding", "before", "after", "change", "trivial players", "items"]
    assert ["P: candidates", "greedy", "4.00", "4.50", "+0.05 [+0.02, +0.08]", "", "500"] in rows
    assert ["P: B is best", "greedy", "8.6 %", "7.3 %", "-1.3 [-2.4, -0.1]", "random legal 9.0", "500"] in rows
    assert tables["strata"][1][:3] == ["color=white", "P: win-chance value of B", "greedy"]


def test_a_run_that_is_going_on_is_reported_too(run: Path) -> None:
    """No summary, the last lines of both logs torn, the evaluation after training not there yet."""
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')  # killed while writing
    (run / "health.jsonl").write_text(
        json.dumps({"step": 9, "metric": "kl", "value": 0.2, "from": "green", "to": "yellow"}) + '\n{"step": 12, "me'
    )
    text, _ = read_page(write_report(run, boards=boards))
    for said in ("40 steps · not finished", "No held-out comparison yet", "KL to the reference"):
        assert said in text
    assert [event["step"] for event in read_run(run).events] == [9]


def test_a_run_that_has_just_begun_is_a_page_whatever_its_name(run: Path) -> None:
    folder = run.rename(run.with_name("run$\\frac$_%s {{x}} <i>"))
    (folder / "summary.json").unlink()
    for line, said in (("", "0 steps · not finished"), ('{"step": 1, "reward": 0.5}\n', "Mean reward")):
        (folder / "metrics.jsonl").write_text(line)
        text, _ = read_page(write_report(folder, boards=boards))
        assert folder.name in text
        assert said in text


def test_every_quantity_that_is_logged_has_its_curve(run: Path) -> None:
    """One panel or more for each line of the page's contract; the held-out metrics of training among them."""
    keys = ["entropy", "kl/coefficient", "clip_ratio/region_mean", "learning_rate", "step_time", "perf/memory_gb"]
    keys += ["policy/best_legal", "environment/exact", "eval_policy/skill", "eval_best", "eval_best_step"]
    rows = [{"step": step, **dict.fromkeys(keys, 0.1 * step)} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = read_page(write_report(run, boards=boards))
    titles = ["Entropy", "β, the KL", "Clipped tokens", "Learning rate", "Time of a step", "Memory", "P: by field"]
    for title in [*titles, "A: by field", "Held-out metrics while training"]:
        assert title in text, title
    assert "KL of a completion" not in text  # not logged
    assert "best held-out value 0.3 at step 0.3" in text  # as `eval_best_step` has it


BAD = [
    ("metrics.jsonl", '{"step": 1}\n{oops\n{"step": 2}\n', r"metrics\.jsonl, line 2"),
    ("metrics.jsonl", '{"reward": 1}\n{"step": 2}\n', r"metrics\.jsonl, line 1.*step"),
    ("metrics.jsonl", "[1]\n[2]\n", r"metrics\.jsonl, line 1"),
    ("health.jsonl", '{"step": 1}\n{"ö": 1, "step": 1}\n{"step": 2}\n', r"health\.jsonl, line 2"),
    ("evaluation_after.parquet", "PAR1", r"evaluation_after\.parquet: no evaluation that this version wrote"),
    ("summary.json", "{", r"summary\.json is no JSON object"),
    ("summary.json", '{"ö": 1}', r"summary\.json is no JSON"),
    ("summary.json", '{"metrics": {}}', r"summary\.json is no JSON object with a list `metrics`"),
]


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nowhere", "no folder"), (tmp_path, "neither")):
        with pytest.raises(RunError, match=message):
            read_run(folder)
    for number, (file, content, message) in enumerate(BAD):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "summary.json").write_text("{}")
        (folder / file).write_text(content, encoding="latin-1")
        with pytest.raises(RunError, match=message):
            read_run(folder)
