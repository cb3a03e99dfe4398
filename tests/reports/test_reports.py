"""Reports from run folders written by hand: whole, unfinished, torn and malformed ones."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from recipes import report as recipe
from rookworld_trl.reports import RunError, plot_run, read_run, write_report
from rookworld_trl.reports.plots import _loss_lines, smooth


def comparison(**changes: Any) -> dict[str, Any]:
    row = {
        "task": "policy",
        "mode": "greedy",
        "metric": "best_value",
        "label": "win-chance value of B",
        "headline": True,
        "format": "percent",
        "before": 0.7,
        "after": 0.75,
        "difference": 0.05,
        "ci_low": 0.02,
        "ci_high": 0.08,
        "p_value": None,
        "items": 500,
        "significant": True,
    }
    return {**row, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            row = {"step": step, "reward": 0.01 * step, "kl": 0.001 * step, "groups/informative": 0.75}
            row |= {"rewards/policy_reward/mean": 0.02 * step, "rewards/environment_reward/mean": 0.5}
            file.write(json.dumps(row) + "\n")
    rows = [
        comparison(),
        comparison(metric="n_candidates", label="candidates", headline=False, format=".2f", before=4.0, after=4.5),
        comparison(task="environment", metric="exact", label="exact | <b>", p_value=0.03125),
        comparison(
            metric="top1",
            label="B is best",
            headline=False,
            before=0.086,
            after=0.073,
            difference=-0.013,
            ci_low=-0.0243,
            ci_high=-0.0013,
            better=1,
            loss=True,
            baselines={"random legal": 0.09},
        ),
        comparison(metric="tokens", difference=-3.0, ci_low=-4.0, ci_high=-2.0, format=".1f", better=0, loss=False),
        comparison(metric="f1", headline=True, before=None, difference=None, ci_low=None, ci_high=None),
    ]
    groups = [comparison(group="color=white", loss=False), comparison(group="stratum=check", loss=True, better=1)]
    summary = {
        "groups": groups,
        "metrics": rows,
        "seconds": {"train": 60.0, "evaluate": 15.5},
        "seed": 3,
        "config": {"beta": 0.04},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_series_are_what_was_logged(run: Path) -> None:
    steps, values = read_run(run).series("kl")
    np.testing.assert_allclose(steps, np.arange(1, 41))
    np.testing.assert_allclose(values, 0.001 * np.arange(1, 41))
    assert len(read_run(run).series("never_logged")[0]) == 0


def test_nan_is_left_out_and_a_step_logged_twice_counts_as_last(tmp_path: Path) -> None:
    lines = ['{"step": 2, "kl": 1}', '{"step": 1, "kl": NaN}', '{"step": 2, "kl": 3}', '{"step": 2, "runtime": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    steps, values = read_run(tmp_path).series("kl")
    assert (steps.tolist(), values.tolist()) == ([2], [3])


def test_smoothing_by_hand() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0]), 1), [1.0, 2.0])


def test_report_holds_the_numbers(run: Path) -> None:
    plot, markdown, page = write_report(run)
    pixels = imread(plot)
    assert pixels.shape[1] == 1650
    assert pixels[..., :3].std() > 0.05  # not a blank page
    text = markdown.read_text()
    assert "policy, greedy: win-chance value of B 70.0 % → 75.0 % (+5.0, 95 % interval" in text
    assert "| candidates | 4.00 | 4.50 | +0.05 |" in text
    assert "| 0.031 |" in text
    assert "| all | 75.5 |" in text
    assert "n/a → 75.0 %." in text
    assert r"exact \| \<b>" in text  # a label cannot break the table
    assert '"beta": 0.04' in text
    # Headings with what was lost come before the gains' tables: of 4 metrics that are defined and have a direction.
    losses = text.index("## Significant losses: 1 of 4 metrics")
    assert losses < text.index("## policy, greedy")
    line = "| policy, greedy: B is best | 8.6 % | 7.3 % | -1.3 | \\[-2.4, -0.1] |  | random legal 9.0 |"
    assert line in text[losses : text.index("## policy, greedy")]
    assert "## Significant losses: 1 of 2 headline metrics by colour, stake and stratum" in text
    assert "| policy, greedy: stratum=check win-chance value of B |" in text
    content = page.read_text()
    assert "data:image/png;base64," in content
    assert "exact | &lt;b&gt;" in content
    assert "<b>" not in content
    assert "http" not in content  # stands alone


def test_no_loss_is_said_too(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics"] = [row for row in summary["metrics"] if row["metric"] != "top1"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Significant losses: none among 3 metrics." in write_report(run)[1].read_text()


def test_the_picture_says_what_was_lost(run: Path) -> None:
    rows = read_run(run).comparisons
    assert _loss_lines(rows) == [
        "Significant losses: 1 of 4 metrics",
        "P: B is best, greedy -1.3 [-2.4, -0.1]",
    ]
    assert _loss_lines([row for row in rows if row["metric"] != "top1"]) == ["Significant losses: none among 3 metrics"]
    # An older summary, which doesn't say what is better: less counts as a loss.
    old = [{key: row[key] for key in row if key not in ("better", "loss")} for row in rows]
    assert len(_loss_lines(old)) == 2
    assert _loss_lines(old)[0] == "Significant losses: 2 of 5 metrics"


def test_an_unfinished_run_is_reported_too(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')  # killed while writing
    assert len(read_run(run).steps) == 40
    assert "no held-out comparison" in write_report(run)[1].read_text()


def test_bars_alone_and_single_steps_can_be_drawn(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert plot_run(read_run(run), tmp_path / "one.png").exists()
    (run / "metrics.jsonl").unlink()
    assert plot_run(read_run(run), tmp_path / "bars.png").exists()


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{oops\n{"step": 2}\n', r"metrics\.jsonl, line 2"),
        ("metrics.jsonl", '{"step": 1}\n{"ö": 1, "step": 1}\n{"step": 2}\n', r"metrics\.jsonl, line 2 is no JSON"),
        ("metrics.jsonl", '{"reward": 1}\n', r"metrics\.jsonl, line 1.*step"),
        ("metrics.jsonl", "[1]\n", r"metrics\.jsonl, line 1"),
        ("summary.json", "{", r"summary\.json is no JSON"),
        ("summary.json", '{"ö": 1}', r"summary\.json is no JSON"),
        ("summary.json", "[]", r"summary\.json: expected an object"),
        ("summary.json", '{"metrics": {}}', r"summary\.json, field 'metrics'"),
        ("summary.json", '{"metrics": [{"task": "policy"}]}', r"entry 0 lacks mode"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)


def test_a_folder_may_have_any_name(run: Path) -> None:
    """Two dollar signs would begin and end a formula of matplotlib's, and this one is none."""
    folder = run.rename(run.with_name(r"run$\frac$_%s {}"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"model": r"models/$^$"}))
    assert all(path.exists() for path in write_report(folder))


def test_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match="neither"):
        read_run(tmp_path)


def test_recipe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main([str(run), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("plot.png", "report.md", "report.html")
    ]
    with pytest.raises(SystemExit) as exit_:
        recipe.main([str(tmp_path / "nowhere")])
    assert exit_.value.code == 2
    assert "no folder" in capsys.readouterr().err


def test_reports_read_files_only() -> None:
    """The layer rule: no other part of the package is imported."""
    import subprocess

    code = "import sys, rookworld_trl.reports; print([m for m in sys.modules if m.startswith('rookworld_trl.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(part.startswith("rookworld_trl.reports") for part in eval(loaded))
