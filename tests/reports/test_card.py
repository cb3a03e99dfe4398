"""The model card: every fact of the summary is in it, and its example runs."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from rookworld_trl.reports.card import fingerprint, write_card
from tests.support.runs import comparison

SUMMARY: dict[str, Any] = {
    "command": "recipes/grpo.py --config recipes/nano/grpo/config_cpu.yaml --seed 7",
    "model": "jrahn/RookWorld-LM-124M",
    "model_revision": "abc123",
    "dataset": "jrahn/rookworld_7m",
    "mix_env_ratio": 0.2,
    "reward": "graduated",
    "eval_split": "test",
    "seed": 7,
    "steps": 80,
    "stop_reason": "",
    "versions": {"python": "3.12", "trl": "1.16.0"},
    "identity": {
        "learning_rate": 1e-5,
        "train_dataset": {"1": "0a1b", "12": "0123456789abcdef"},
        "rewards": ["policy_reward"],
    },
}
BOTH = ("baselines", "baselines_after")
GAIN = comparison(
    metric="best_legal", label="B legal", before=0.7243, after=0.7454, difference=0.0211, ci_low=0.001, ci_high=0.0323,
    items=1000, clusters=1000, **{side: {"random legal": 1.0, "first legal": 1.0} for side in BOTH},
)  # fmt: skip
LOSS = GAIN | {"before": 0.21, "after": 0.16, "difference": -0.05, "ci_low": -0.081, "ci_high": -0.012, "loss": True}
LOSS |= {"metric": "skill", "format": ".3f", **{side: {"random legal": 0.0, "first legal": 0.125} for side in BOTH}}
TEXT = {**GAIN, "metric": "tokens", "format": ".1f", "better": 0}
SUMMARY |= {"headline": [GAIN, LOSS], "metrics": [GAIN, LOSS, TEXT]}


def card(tmp_path: Path, **changes: Any) -> str:
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    return write_card(tmp_path, tmp_path / "checkpoint").read_text()


def test_it_says_what_was_done_and_what_came_of_it(tmp_path: Path) -> None:
    text = card(tmp_path)
    gain = "| policy | best_legal | greedy | 72.4 | 74.5 | +2.1 [+0.1, +3.2] |"
    assert f"{gain} random legal 100.0, first legal 100.0 | 1000 |" in text
    loss = "| policy | skill | greedy | 0.210 | 0.160 | -0.050 [-0.081, -0.012] |"
    assert f"{loss} random legal 0.000, first legal 0.125 | 1000 |" in text
    assert text.split("### Significant losses\n\n")[1].startswith("1 of 2 metrics:\n")
    assert text.count(loss) == 2
    assert text.count(gain) == 1
    assert "None among 1 metrics." in card(tmp_path, metrics=[GAIN, TEXT])
    grouped = card(tmp_path, groups=[{**GAIN, "group": "color=black"}, {**LOSS, "group": "stratum=check"}])
    assert "1 of 2 headline metrics by group:" in grouped
    assert "| policy | stratum=check skill | greedy | 0.210 | 0.160 |" in grouped
    assert "color=black" not in grouped
    for fact in (SUMMARY["command"], "seed: 7", "`jrahn/rookworld_7m`", "20%", "graduated", "steps: 80", "trl 1.16.0"):
        assert fact in text
    assert "`jrahn/RookWorld-LM-124M` at abc123" in text
    assert f"config fingerprint: `{fingerprint(SUMMARY['identity'])}`" in text
    assert "prompts in their order `0123456789abcdef`" in text
    assert "## Limits" in text


DECISIONS = "what every legal move adds to `continuous`, and 1 for the right answer, summed exactly"
CONTINUOUS = "from -0.3 (unparsable) to 1.0, by what move, candidates and evals gain"


REWARDS: list[tuple[dict[str, str], list[str], list[str]]] = [  # settings, what is said, and what is not
    ({}, ["- rewards: `graduated`, six levels", "of sampled completions"], ["adds to", "continuous"]),
    ({"objective": "sampled", "reward": "continuous"}, [f"`continuous`, {CONTINUOUS}"], ["adds to", "graduated"]),
    ({"objective": "exact", "reward": "continuous"}, [f"- rewards: {DECISIONS}"], [CONTINUOUS, "only measured"]),
    (
        {"objective": "exact", "reward": "graduated"},
        [f"- rewards: {DECISIONS}", "`graduated` was only measured"],
        [CONTINUOUS],
    ),
    (
        {"objective": "mixed", "reward": "continuous"},
        [f"- rewards: {DECISIONS}; and `continuous`, {CONTINUOUS}", "sampled completions that they leave out"],
        ["only measured"],
    ),
    ({"reward": "mine.py"}, ["- rewards: own functions (`policy_reward`), of sampled completions"], ["mine"]),
]


def test_it_names_the_reward_that_was_trained_on(tmp_path: Path) -> None:
    for settings, said, unsaid in REWARDS:
        line = next(line for line in card(tmp_path, **settings).splitlines() if line.startswith("- rewards: "))
        assert all(words in line for words in said), line
        assert not any(words in line for words in unsaid), line


def test_its_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    head = yaml.safe_load(card(tmp_path).split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert {"chess", "grpo"} <= set(head["tags"])
    assert head["base_model"] == "jrahn/RookWorld-LM-124M"
    (tmp_path / "here").mkdir()
    for model in ("nano", str(tmp_path / "here")):  # nothing that the Hub knows
        assert "base_model" not in card(tmp_path, model=model)


LOST = "the training data 'games.pgn' of runs/a/checkpoint (it is not there any more)"
LINES: list[tuple[dict[str, Any], str]] = [
    ({"stop_reason": "KL over 50"}, "steps: 80, stopped: KL over 50"),
    ({"dataset": "shipped"}, "`shipped` (comes with rookworld-trl)"),
    ({"best_move": "evals"}, "- values of moves: those that the rows bring\n"),
    (
        {"best_move": "engine", "engine_nodes": 8_000},
        "- values of moves: Stockfish (8,000 nodes a position) where a row brings none\n",
    ),
    (
        {"unknown_training": [LOST]},
        f"this run trained on; whether its start was trained on some is unknown, for this is: {LOST}), shares",
    ),
    (
        {"dataset": "games.pgn", "data_report": "9 games: 0 P: and 80 A: rows\nskipped 2 games: no moves"},
        "(9 games: 0 P: and 80 A: rows; skipped 2 games: no moves); 20% of the prompts",
    ),
]


def test_it_says_what_is_known_of_data_and_start(tmp_path: Path) -> None:
    for changes, said in LINES:
        assert said in card(tmp_path, **changes)
    plain = card(tmp_path, unknown_training=[], data_report="", identity=None)
    assert not [words for words in ("unknown", "()", "stopped", "fingerprint") if words in plain]


def test_a_fingerprint_follows_every_field() -> None:
    identity = SUMMARY["identity"]
    assert fingerprint(identity) == fingerprint(dict(reversed(identity.items())))
    assert len({fingerprint({**identity, name: "other"}) for name in identity} | {fingerprint(identity)}) == 4


def test_its_example_runs_as_it_stands(tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    code = re.search(r"```python\n(.*?)```", card(tmp_path), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tiny_checkpoint)
    exec(compile(code[1].replace("max_new_tokens=144", "max_new_tokens=4"), "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 2
