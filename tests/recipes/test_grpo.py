"""recipes/grpo.py end to end on a tiny random model, and every bad input refused before anything trains."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rookworld_trl.files import write_atomically
from rookworld_trl.measuring import result
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.reports import summary
from tests.recipes.conftest import run, summary_of
from tests.support.disk import full_disk


def steps_of(arguments: dict) -> list[dict]:
    return [json.loads(line) for line in (arguments["output_dir"] / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(arguments, capsys):
    run(arguments)
    folder = arguments["output_dir"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {"checkpoint", "summary.json", "metrics.jsonl", "report.html", "evaluation_before.parquet"}

    summary = summary_of(arguments)
    assert set(summary["seconds"]) == {"setup", "evaluate_before", "train", "evaluate_after"}
    assert (summary["seed"], summary["steps"], summary["mix_env_ratio"]) == (42, 2, 0.2)
    assert (summary["objective"], summary["trained_on"].split(",")[0]) == ("sampled", "`graduated`")
    assert summary["versions"]["trl"].startswith("1.16")
    headline = {(row["task"], row["mode"], row["metric"], row["items"]) for row in summary["headline"]}
    assert headline == {
        *(("policy", mode, metric, 4) for mode in ("greedy", "sampled") for metric in ("best_legal", "skill")),
        ("environment", "greedy", "exact", 4),
        ("environment", "sampled", "exact", 4),
    }
    for row in summary["metrics"]:
        assert {"before", "after", "difference", "ci_low", "ci_high", "better", "loss", "baselines"} <= {*row}
        assert set(row["baselines_after"]) <= set(row["baselines"]) or row["metric"] in ("skill", "legal_value")
    assert summary["losses"] == [row for row in summary["metrics"] if row["loss"]]
    assert {row["group"] for row in summary["groups"]} >= {"color=black", "stake=something"}

    steps = steps_of(arguments)
    assert [row["step"] for row in steps] == [1, 2]
    assert all("kl" in row and "rewards/policy_reward/mean" in row for row in steps)

    shown = capsys.readouterr().out
    assert "step 1/2  graduated P -0.3" in shown
    assert "before    after" in shown
    assert shown.count("Significant losses: ") == 3, "below the table of all metrics, below the headlines, of groups"
    assert shown.count("trivial players, same items") == 4

    card = (folder / "checkpoint" / "README.md").read_text()
    assert "| policy | best_legal | greedy |" in card
    assert "### Significant losses" in card
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert AutoTokenizer.from_pretrained(folder / "checkpoint").pad_token == "<pad>"
    start = load_model(arguments["model"])
    assert trained.config.vocab_size == start.config.vocab_size


def test_json_and_quiet(arguments, monkeypatch, capsys):
    """With a setting from the environment, which the card's command line has too."""
    del arguments["max_steps"]
    monkeypatch.setenv("ROOKWORLD_MAX_STEPS", "1")
    run(arguments | {"json": True, "quiet": True, "auto_resume": True})
    folder, shown = arguments["output_dir"], capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["output_dir"], result["steps"], result["stop_reason"]) == (str(folder), 1, "")
    summary = summary_of(arguments)
    assert result["metrics"] == summary["metrics"]
    assert summary["command"].startswith("ROOKWORLD_MAX_STEPS=1 ")
    assert "evaluate" not in shown.err
    run(arguments | {"json": True, "auto_resume": True})
    assert json.loads(capsys.readouterr().out) == {"output_dir": str(folder)}, "it was finished"


@pytest.mark.slow
def test_a_disk_that_is_full_behind_the_training_costs_a_file_until_there_is_room(arguments, monkeypatch, capsys):
    lost = "evaluation_after.parquet"

    def full(path, text):
        (full_disk if path.name == lost else write_atomically)(path, text)

    command = arguments | {"auto_resume": True, "save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        for module in (result, summary):
            patch.setattr(module, "write_atomically", full)
        run(command, code=4)
    shown, folder = capsys.readouterr(), arguments["output_dir"]
    assert f"error: {lost}: " in shown.err
    assert "No space left on device" in shown.err
    assert "before    after" in shown.out
    written = {"checkpoint", "evaluation_after.parquet", "summary.json"}
    assert written & {path.name for path in folder.iterdir()} == written - {lost}
    trained = (folder / "metrics.jsonl").read_bytes()
    run(command)
    assert written | {"finished.json"} <= {path.name for path in folder.iterdir()}
    assert summary_of(arguments)["steps"] == 2
    assert (folder / "metrics.jsonl").read_bytes() == trained


def test_what_became_of_a_users_games_stands_in_summary_and_card(arguments, tmp_path, monkeypatch):
    """Eleven games, one of them in German, one in no language, one with an illegal move."""
    games = [f"1. {move} e5 2. Nc3 *" for move in ("e4", "d4", "c4", "f4", "b3", "g3", "e3", "d3")]
    games += ["1. h3 Sf6 2. Sc3 *", "1. h4 Xf6 *", "1. b4 Ke5 *"]
    mine = tmp_path / "mine.pgn"
    mine.write_text("\n\n".join(games))
    monkeypatch.chdir(tmp_path)
    run(arguments | {"dataset": "mine.pgn", "mix_env_ratio": 1, "max_steps": 1})
    summary = summary_of(arguments)
    assert summary["dataset_path"] == str(mine)
    said = summary["data_report"].splitlines()
    assert said == [
        "11 games",
        "25 A: rows",
        "2 games skipped: other piece letters than K Q R B N",
        "1 games used up to their first null, illegal or unreadable move (first: game 11, illegal san: 'Ke5' in "
        "rnbqkbnr/pppppppp/8/8/1P6/8/P1PPPPPP/RNBQKBNR b KQkq - 0 1)",
    ]
    assert said[2] in (arguments["output_dir"] / "checkpoint" / "README.md").read_text()


def test_a_stop_is_reported_and_has_its_own_exit_code(arguments, rewarded):
    run(arguments | {"max_steps": 20, "learning_rate": 0.01, "kl_stop_threshold": 1e-6}, code=3)  # any move is too far
    assert "kl_stop_threshold" in summary_of(arguments)["stop_reason"]
    assert summary_of(arguments)["steps"] < 20


@pytest.mark.slow
def test_preempted_resumed_finished_and_damaged(arguments, rewarded, capsys):
    """The same command each time, as a scheduler would repeat it; each outcome has its exit code."""
    rewarded.happens[1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    folder, command, calls = arguments["output_dir"], arguments | {"auto_resume": True}, rewarded.calls
    run(command | {"json": True}, code=75)
    assert json.loads(capsys.readouterr().out) == {"output_dir": str(folder)}
    assert (folder / "checkpoint-1" / "manifest.json").exists()
    assert not (folder / "summary.json").exists()

    run(command)
    assert summary_of(arguments)["steps"] == 2
    assert ([row["step"] for row in steps_of(arguments)], len(calls)) == ([1, 2], 2)

    written = (folder / "summary.json").stat().st_mtime_ns
    run(command)
    assert ((folder / "summary.json").stat().st_mtime_ns, len(calls)) == (written, 2)

    (folder / "finished.json").unlink()
    (folder / "checkpoint-1" / "optimizer.pt").unlink()
    run(command, code=2)
    assert "holds no checkpoint that verifies (checkpoint-1" in capsys.readouterr().err


WATCHING = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps"}
BAD = [
    ({"learning_rat": 1}, "unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"),
    ({"model": "./nowhere"}, "`model` is './nowhere': ./nowhere is no folder, and the Hub's"),
    ({"dataset": "nowhere.parquet"}, "`dataset` is 'nowhere.parquet': there is no such file, or it is empty"),
    ({"mix_env_ratio": 0.3}, "`mix_env_ratio` is 0.3: 1.5 of 5 prompts"),
    ({"max_completion_length": 300}, "`max_completion_length` is 300: with the longest prompt"),
    ({"eval_batch_size": 0}, "`eval_batch_size` is 0: nothing would be measured"),
    ({"max_train_minutes": -1}, "`max_train_minutes` is -1.0: it must be above 0"),
    ({"task_sampling": "{go: {temperature: 0.5}}"}, "`task_sampling`: there is no task go. Choose from policy"),
    ({"engine_nodes": 0, "best_move": "engine"}, "`engine_nodes` is 0: nothing would be read"),
    ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    (WATCHING | {"metric_for_best_model": "policy/skil"}, "no such metric is measured. Choose one of reward, policy/"),
    (WATCHING | {"eval_dataset": "nowhere.jsonl"}, "`eval_dataset` is 'nowhere.jsonl': there is no such file"),
    (WATCHING | {"eval_items": 0}, "`eval_items` is 0"),
]


def test_bad_settings(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for change, message in [*BAD, ({"output_dir": tmp_path / "file" / "run"}, "file")]:
        run(arguments | change, code=2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert not arguments["output_dir"].exists() or not list(arguments["output_dir"].iterdir())


def test_held_out_rows_are_watched_on_the_way_and_the_best_step_is_the_result(arguments, rows_file, tmp_path, capsys):
    """The user's own rows, whose positions are not trained on: in the log, the line, the summary, card and report."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    best = {"metric_for_best_model": "policy/tokens", "load_best_model_at_end": True}
    run(arguments | WATCHING | best | {"eval_dataset": mine, "eval_items": 1})
    folder, out = arguments["output_dir"], capsys.readouterr().out
    found = [row for row in steps_of(arguments) if "eval_reward" in row]
    assert [row["step"] for row in found] == [1, 2]
    # A random model writes nothing that can be read: -0.3 for either task's one row.
    assert [row["eval_reward"] for row in found] == [-0.3, -0.3]
    assert {"eval_policy/best_legal", "eval_environment/exact"} <= set(found[0])
    assert "step 1/2  held out: reward -0.300" in out
    assert "dropped 4 training prompts whose positions are held out" in out
    step = summary_of(arguments)["best_step"]
    assert step == found[-1]["eval_best_step"]
    assert (
        f"weights: those after step {step}, the best on held-out rows by `policy/tokens`"
        in (folder / "checkpoint" / "README.md").read_text()
    )
    assert "Held-out metrics while training" in (folder / "report.html").read_text()
    kept = load_model(folder / f"checkpoint-{step}").state_dict()
    result = load_model(folder / "checkpoint").state_dict()
    assert all(torch.equal(result[name], weight) for name, weight in kept.items())
