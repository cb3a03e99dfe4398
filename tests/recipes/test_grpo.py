"""recipes/grpo.py end to end on a tiny random model, and every bad input refused before anything trains."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import grpo
from rookworld_trl.files import write_atomically
from rookworld_trl.measuring import read_results, result
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.reports import summary
from tests.recipes.conftest import run, summary_of
from tests.support.disk import full_disk
from tests.support.processes import another_run

ROOT = Path(__file__).parents[2]


def steps_of(arguments: dict) -> list[dict]:
    return [json.loads(line) for line in (arguments["output_dir"] / "metrics.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[Path, int]:
    """Everything below the folder, with the times of its last changes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


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
def test_one_run_at_a_time_in_a_folder(arguments, capsys):
    run(arguments | {"max_steps": 1})
    folder = arguments["output_dir"]
    with another_run(folder) as process:
        before = files_of(folder)
        run(arguments | {"auto_resume": True, "max_steps": 2}, code=2)
        assert f"another run is at work there (process {process.pid} on " in capsys.readouterr().err
        assert files_of(folder) == before
    run(arguments | {"max_steps": 1})
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_folder_deleted_in_mid_run_is_said_and_gets_what_follows(arguments, rewarded, caplog):
    folder = arguments["output_dir"]
    rewarded.happens[2] = lambda: shutil.rmtree(folder)
    run(arguments)
    assert f"{folder} was deleted while this run was at work in it" in caplog.text
    files = {"summary.json", "metrics.jsonl", "report.html", "evaluation_after.parquet", "finished.json"}
    assert {path.name for path in folder.iterdir()} == {"checkpoint", *files}
    assert load_model(folder / "checkpoint")


def full_below(folder: Path, method, times: int):
    """So many saves below the folder stop in the middle, as where its disk is full."""
    left = [times]

    def save(trainer, target):
        if Path(target).is_relative_to(folder) and left[0]:
            left[0] -= 1
            Path(target, "model.safetensors").write_bytes(b"a part")
            full_disk()
        method(trainer, target)

    return save


@pytest.mark.parametrize("times", [1, 9])
def test_a_disk_that_is_full_at_the_end_is_said_and_the_model_is_tried_once_more(
    arguments, rewarded, monkeypatch, capsys, times
):
    folder, trainer = arguments["output_dir"], grpo.RookWorldGRPOTrainer
    monkeypatch.setattr(trainer, "save_merged", full_below(folder, trainer.save_merged, times))
    run(arguments, code=4)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    said = (
        f"error: {folder}/checkpoint could not be written: [Errno 28] No space left on device; earlier checkpoints are "
    )
    said += "untouched. Make room, or make `output_dir` writable. "
    if times > 1:
        assert error == said + "Its model could not be saved either"
        assert not (folder / "checkpoint").exists()
        return
    assert error == said + f"The model as trained so far is whole in {folder}/checkpoint"
    trained, start = load_model(folder / "checkpoint"), load_model(arguments["model"])
    assert not torch.equal(trained.transformer.wte.weight, start.transformer.wte.weight)


def test_a_disk_that_is_full_in_the_first_evaluation_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(result, "write_atomically", full_disk)
    run(arguments, code=4)
    assert "evaluation_before.parquet could not be written: [Errno 28]" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["evaluation_after.parquet", "summary.json"])
def test_a_disk_that_is_full_behind_the_training_costs_a_file_until_there_is_room(arguments, monkeypatch, capsys, lost):
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


@pytest.mark.slow
def test_a_token_is_in_no_file(arguments, monkeypatch):
    """Without a push too: `checkpoint/` is the folder that people publish."""
    monkeypatch.setenv("HF_TOKEN", "")  # so that it is as it was afterwards
    run(arguments | {"hub_token": "hf_abcdefgh12345678", "save_strategy": "steps", "save_steps": 1})
    assert os.environ["HF_TOKEN"] == "hf_abcdefgh12345678"
    files = [path for path in arguments["output_dir"].rglob("*") if path.is_file()]
    assert not [path for path in files if b"abcdefgh12345678" in path.read_bytes()]


@pytest.mark.slow
def test_evaluation_samples_each_task_by_its_own_settings(arguments):
    arguments["task_sampling"] = {"policy": {"max_completion_length": 3}, "environment": {"temperature": 0.5}}
    run(arguments)
    found = read_results(arguments["output_dir"] / "evaluation_before.parquet")
    assert found["environment", "sampled"]["settings"]["temperature"] == 0.5
    tokens = {pair: max(item["scores"]["tokens"] for item in each["items"]) for pair, each in found.items()}
    for mode in ("greedy", "sampled"):
        assert tokens["policy", mode] == 3
        assert tokens["environment", mode] > 3


@pytest.mark.slow
def test_held_out_positions_never_train(arguments, rows_file, held_out, capsys):
    stolen = [dict(held_out[0]), dict(held_out[1])]
    with rows_file.open("a") as file:
        file.writelines(
            json.dumps({k: each[k] for k in ("prompt", "legal_moves", "legal_cp")}) + "\n" for each in stolen
        )
    run(arguments | {"max_steps": 1})
    assert "dropped 2 training prompts whose positions are held out" in capsys.readouterr().out


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
    assert said[0].startswith("11 games: 0 P: and 25 A: rows")
    assert said[1:] == [
        "skipped 2 games: other piece letters than K Q R B N",
        "1 games are used up to their first null, illegal or unreadable move (first: game 11, illegal san: 'Ke5' in "
        "rnbqkbnr/pppppppp/8/8/1P6/8/P1PPPPPP/RNBQKBNR b KQkq - 0 1)",
    ]
    assert said[1] in (arguments["output_dir"] / "checkpoint" / "README.md").read_text()


@pytest.mark.slow
def test_a_finished_run_goes_on_where_it_is_asked_for_more(arguments, caplog):
    run(arguments | {"save_strategy": "steps", "save_steps": 1})
    again = arguments | {"save_strategy": "steps", "save_steps": 1, "auto_resume": True, "max_steps": 3}
    run(again)
    assert [row["step"] for row in steps_of(arguments)] == [1, 2, 3]
    assert summary_of(arguments)["steps"] == 3


CHANGES = {
    "leading_eos": ({"leading_eos": True}, "`tokenizer` was"),
    "model": ({"model": "another"}, "`starting_weights` was"),
    "ratio": ({"mix_env_ratio": 0.4}, "`mix_env_ratio` was 0.2 and is 0.4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_a_refused_resume_has_measured_and_written_nothing(arguments, tiny_model, tiny_tokenizer, capsys, case):
    """Without a reference too: nothing else would show that another model goes on."""
    change, message = CHANGES[case]
    arguments |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "beta": 0.0}
    run(arguments)
    if case == "model":
        change = {"model": arguments["output_dir"].parent / "another"}
        with torch.no_grad():
            tiny_model.transformer.wte.weight[0, 0] += 1
        tiny_model.save_pretrained(change["model"])
        tiny_tokenizer.save_pretrained(change["model"])
    folder = arguments["output_dir"]
    before = files_of(folder)
    capsys.readouterr()
    run(arguments | change | {"max_steps": 2, "resume_from_checkpoint": folder / "checkpoint-1"}, code=2)
    shown = capsys.readouterr()
    assert message in shown.err
    assert "held-out evaluation" not in shown.out
    assert files_of(folder) == before


@pytest.mark.slow
def test_a_time_limit_stops_early(arguments):
    run(arguments | {"max_steps": 50, "max_train_minutes": 1e-6})
    assert summary_of(arguments)["steps"] == 1


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
    run(command, code=4)
    assert "holds no checkpoint that verifies (quarantined-checkpoint-1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_signal_during_an_evaluation_loses_nothing(arguments, rewarded, monkeypatch, phase):
    """Even where no checkpoints are asked for: what was trained is one, and the run goes on with the evaluation."""
    calls, evaluations, evaluate = rewarded.calls, [], grpo.evaluate

    def signalled(*args, **kwargs):
        evaluations.append(len(calls))
        if len(evaluations) == (1 if phase == "before" else 2):
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(grpo, "evaluate", signalled)
    folder, command = arguments["output_dir"], arguments | {"auto_resume": True}
    run(command, code=75)
    assert not (folder / f"evaluation_{phase}.parquet").exists()
    assert not (folder / "summary.json").exists()
    assert (len(calls), len(list(folder.glob("checkpoint-2")))) == ((0, 0) if phase == "before" else (2, 1))
    run(command)
    assert len(calls) == 2
    assert summary_of(arguments)["steps"] == 2


@pytest.mark.slow
def test_ctrl_c_twice_is_no_bug(arguments, monkeypatch, capsys):
    def interrupted(prompts, completions, **columns):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one does not wait")

    monkeypatch.setitem(grpo.REWARDS, "graduated", [interrupted])
    run(arguments, code=130)
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in error


WATCHING = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps"}
BAD = {
    "unknown key": ({"learning_rat": 1}, "unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"),
    "no checkpoint": ({"model": "./nowhere"}, "`model` is './nowhere': ./nowhere is no folder, and the Hub's"),
    "no data": ({"dataset": "nowhere.parquet"}, "nowhere.parquet: no such file"),
    "impossible ratio": ({"mix_env_ratio": 0.3}, "`mix_env_ratio` is 0.3: 1.5 of 5 prompts"),
    "too long": ({"max_completion_length": 300}, "`max_completion_length` is 300: with the longest prompt"),
    "nothing measured": ({"eval_batch_size": 0}, "`eval_batch_size` is 0: nothing would be measured"),
    "no time": ({"max_train_minutes": -1}, "`max_train_minutes` is -1.0: it must be above 0"),
    "no step": ({"max_steps": 0}, "`max_steps` is 0: transformers would take `num_train_epochs`"),
    "another game": ({"task_sampling": "{go: {temperature: 0.5}}"}, "`task_sampling` is {'go': {'temperature': 0.5}}"),
    "no kernel": ({"attn_implementation": "flash_attention_2"}, "`attn_implementation` is 'flash_attention_2': "),
    "no nodes": ({"engine_nodes": 0, "best_move": "engine"}, "`engine_nodes` is 0: nothing would be read"),
    "no such config": ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    "no such metric": (
        WATCHING | {"metric_for_best_model": "policy/skil"},
        "no such metric is measured. Choose one of reward, policy/best_legal",
    ),
    "nothing to watch": (WATCHING | {"eval_dataset": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "no items": (WATCHING | {"eval_items": 0}, "`eval_items` is 0"),
}


def refused(arguments: dict, capsys, message: str) -> None:
    run(arguments, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not arguments["output_dir"].exists() or not list(arguments["output_dir"].iterdir())


def test_bad_settings(arguments, tmp_path, capsys):
    for change, message in BAD.values():
        refused(arguments | change, capsys, message)
    (tmp_path / "file").write_text("")
    refused(arguments | {"output_dir": tmp_path / "file" / "run"}, capsys, "file")


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
