"""Live lines and metrics.jsonl, driven by a trainer's callback calls."""

import json
from types import SimpleNamespace

import pytest

from recipes import grpo
from rookworld_trl.plugins.live import COLUMNS, LiveReport, live_line

LOGS = {
    "rewards/policy_reward/mean": 0.3124,
    "kl": 0.0021,
    "policy/best_legal": 0.61,
    "groups/informative": 0.94,
    "x": 1.0,
}


def test_a_line_shows_what_was_logged_and_nothing_else():
    own = [("reward P", "rewards/policy_reward/mean", "+.3f"), ("B legal", "policy/best_legal", ".0%"), ("y", "y", "")]
    line = live_line(7, 110, LOGS, [*own, *COLUMNS])
    assert line == "step   7/110  reward P +0.312  B legal 61%  KL 0.0021  informative groups 94%"


def test_the_recipes_line_shows_rewards_legality_skill_and_exactness():
    logs = {"policy/best_legal": 0.9, "policy/skill": -0.0514, "environment/exact": 0.75, "policy/best_value": 0.8}
    assert live_line(1, 2, logs, grpo.COLUMNS) == "step 1/2  B legal 90%  skill -0.051  A exact 75%"
    for form, name in (("", "graduated"), ("_continuous", "continuous")):
        rewards = {f"rewards/environment_reward{form}/mean": -0.3, f"rewards/policy_reward{form}/mean": 0.2}
        assert live_line(1, 2, rewards, grpo.COLUMNS) == f"step 1/2  {name} P +0.200  A -0.300"


@pytest.fixture
def state():
    return SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=3)


def test_metrics_file_holds_each_logged_step_and_not_the_final_totals(tmp_path, state, capsys):
    report = LiveReport(tmp_path)
    control = SimpleNamespace(should_training_stop=False)
    report.on_train_begin(None, state, control)
    for step in (1, 2):
        state.global_step = step
        report.on_step_end(None, state, control)
        report.on_log(None, state, control, logs=LOGS | {"loss": 0.1 * step})
    report.on_log(None, state, control, logs={"train_runtime": 3.0})
    report.on_train_end(None, state, control)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.1), (2, 0.2)]
    assert all(row["seconds"] >= 0 for row in rows)
    assert not control.should_training_stop
    assert "step 2/3" in capsys.readouterr().out


def test_a_resumed_run_adds_to_its_file_and_a_new_one_starts_over(tmp_path, state):
    killed = '{"step": 1, "seconds": 50}\n{"step": 2, "seconds": 60}\n{"step": 3, "sec'  # after a checkpoint at step 1
    (tmp_path / "metrics.jsonl").write_text(killed)
    state.global_step = 1
    report = LiveReport(tmp_path)
    report.on_train_begin(None, state, None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "seconds": 50}\n'
    report.on_log(None, state, None, logs=LOGS)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["seconds"] >= 50, "the time before the restart counts"
    state.global_step = 0
    LiveReport(tmp_path).on_train_begin(None, state, None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_processes_stay_silent(tmp_path, state, capsys):
    state.is_world_process_zero = False
    report = LiveReport(tmp_path)
    report.on_train_begin(None, state, None)
    report.on_log(None, state, None, logs=LOGS)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "sec', b'{"seconds": 5}', b"7", b'{"st\xffep": 2}', b'{"step": NaN}', b'{"step": true}']
)
def test_a_damaged_line_costs_that_line_and_not_the_run(tmp_path, state, line, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "seconds": 50}\n' + line + b'\n{"step": 2, "seconds": "60"}\n')
    state.global_step = 2
    report = LiveReport(tmp_path)
    report.on_train_begin(None, state, None)
    assert [json.loads(row)["step"] for row in file.read_text().splitlines()] == [1, 2]
    assert f"{file}: lines [2] are damaged and left out" in caplog.text
    report.on_log(None, state, None, logs=LOGS)
    assert json.loads(file.read_text().splitlines()[-1])["seconds"] >= 50, "the last time that can be read counts"
