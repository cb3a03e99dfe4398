"""Metrics on rows whose results are counted by hand, and generation on a tiny random model."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from rookworld_trl.chess import rewards
from rookworld_trl.chess.accuracy import Evaluation, evaluate, score
from rookworld_trl.measuring.metrics import METRICS
from rookworld_trl.measuring.tables import evaluation_table
from rookworld_trl.modeling.tokens import CUT_OFF
from tests.support.stockfish import requires_stockfish

SETTINGS = {"temperature": 1.0, "max_new_tokens": 99, "seed": 0}


def test_gold_completions_are_right_in_every_metric(rows: list[dict[str, Any]], gold: list[str]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, gold))
    environment = evaluation.estimates("environment", "greedy")
    for name in (
        "exact",
        "fen_exact",
        "first_four",
        "placement_exact",
        "reward_exact",
        "terminated_f1",
        "truncated_f1",
    ):
        assert environment[name]["value"] == 1.0, name
    assert environment["unparsable"]["value"] == 0.0
    policy = evaluation.estimates("policy", "greedy")
    for name in ("best_value", "parsed", "best_legal", "candidates_legal_distinct", "best_in_top5", "top1", "reward"):
        assert policy[name]["value"] == 1.0, name
    assert policy["n_candidates"]["value"] == 5.0


@pytest.fixture
def faulty(rows: list[dict[str, Any]]) -> list[str]:
    """Completions of the rows, each with something right and something wrong."""
    return [
        rows[0]["target"].replace(" 0 1+", " 1 1+"),  # half-move clock wrong
        rows[1]["target"].replace("+1.0+1+0", "+0.001+0+0"),  # mate overlooked
        rows[2]["target"].replace("+-1.0+0+1", "+-1.0+1+1"),  # illegal seen, a game end invented
        rows[3]["target"].replace("B: a2b3", "B: a2a1"),  # -60 against +40
        " M: a5b4 a5b5 E: 1000.0 0.5 B: a1a1",
    ]


def test_an_item_has_the_reward_that_training_pays(rows: list[dict[str, Any]], faulty: list[str]) -> None:
    columns = {name: [row[name] for row in rows] for name in ("target", "legal_moves", "legal_cp")}
    prompts = [row["prompt"] for row in rows]
    for name, policy, environment in (
        ("reward", rewards.policy_reward, rewards.environment_reward),
        ("continuous", rewards.policy_reward_continuous, rewards.environment_reward_continuous),
    ):
        found = [item.scores[name] for item in score(rows, faulty)]
        paid = environment(prompts, faulty, **columns)[:3] + policy(prompts, faulty, **columns)[3:]
        assert found == paid
        assert len(set(found)) >= 3, "so that they could differ"


def test_metrics_counted_by_hand(rows: list[dict[str, Any]], faulty: list[str]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, faulty))
    got = evaluation.estimates("environment", "greedy")
    assert [got[name]["value"] for name in ("exact", "fen_exact", "first_four", "reward_exact")] == pytest.approx(
        [0, 2 / 3, 1, 2 / 3]
    )
    # Terminated: one true (missed), one predicted (wrong). Truncated: one true, found.
    assert [got[f"terminated_{name}"]["value"] for name in ("recall", "precision", "f1")] == [0, 0, 0]
    assert [got[f"truncated_{name}"]["value"] for name in ("recall", "precision", "f1")] == [1, 1, 1]
    assert (got["exact"]["numerator"], got["exact"]["denominator"]) == (0, 3)

    got = evaluation.estimates("policy", "greedy")
    loss = 1 / (1 + math.exp(-0.00368208 * 40)) - 1 / (1 + math.exp(0.00368208 * 60))
    assert got["best_value"]["value"] == pytest.approx((1 - loss) / 2)
    assert got["best_legal"]["value"] == 0.5
    assert got["candidates_legal_distinct"]["value"] == 0.5
    assert got["n_candidates"]["value"] == 3.5


def test_f1_is_between_precision_and_recall(rows: list[dict[str, Any]]) -> None:
    """Flags over 6 rows: 2 true, 3 predicted, 1 hit: recall 1/2, precision 1/3, F1 = 2 * 1 / (2 + 3)."""
    quiet, mate = rows[0], rows[1]
    flagged = quiet["target"].replace("+0+0", "+1+0")
    missed = mate["target"].replace("+1+0", "+0+0")
    data = [quiet, quiet, quiet, quiet, mate, mate]
    items = score(data, [quiet["target"], quiet["target"], flagged, flagged, mate["target"], missed])
    got = Evaluation(SETTINGS, items).estimates("environment", "greedy")
    values = [got[f"terminated_{name}"]["value"] for name in ("recall", "precision", "f1")]
    assert values == pytest.approx([1 / 2, 1 / 3, 2 / 5])
    assert got["truncated_recall"]["value"] is None  # nothing was truncated: undefined, not 0 and not 1


def test_unparsable_counts_as_wrong_everywhere(rows: list[dict[str, Any]]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, ["nonsense"] * 5))
    assert evaluation.estimates("environment", "greedy")["unparsable"]["value"] == 1.0
    assert evaluation.estimates("environment", "greedy")["terminated_recall"]["value"] == 0.0
    assert evaluation.estimates("environment", "greedy")["terminated_precision"]["value"] is None
    assert evaluation.estimates("policy", "greedy")["best_value"]["value"] == 0.0


def test_groups_split_by_mover_and_stratum(rows: list[dict[str, Any]], gold: list[str]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, [*gold[:1], "wrong", *gold[2:]]))
    assert evaluation.groups("environment") == [
        ("color", "black"),
        ("color", "white"),
        ("stratum", "illegal"),
        ("stratum", "mate"),
        ("stratum", "quiet"),
    ]
    assert evaluation.estimates("environment", "greedy", color="black")["exact"]["value"] == 0.0
    assert evaluation.estimates("environment", "greedy", color="white")["exact"]["denominator"] == 2
    assert evaluation.estimates("environment", "greedy", stratum="illegal")["exact"]["value"] == 1.0
    with pytest.raises(ValueError, match="opening"):
        evaluation.estimates("policy", "greedy", stratum="opening")


def test_every_metric_has_finite_terms_and_a_bounded_interval(rows: list[dict[str, Any]], gold: list[str]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, [gold[0], "", gold[2], gold[3], "junk"]))
    for task, metrics in METRICS.items():
        for name, result in evaluation.estimates(task, "greedy").items():
            value, low, high = result["value"], result["ci_low"], result["ci_high"]
            if value is not None and low is not None and high is not None:
                assert low <= value <= high, name
        assert len({metric.name for metric in metrics}) == len(metrics)


def test_evaluation_survives_json(rows: list[dict[str, Any]], gold: list[str]) -> None:
    evaluation = Evaluation(SETTINGS, score(rows, gold, "sampled"), {"sampled": 1.5})
    data = json.loads(json.dumps(evaluation.to_dict()))
    assert Evaluation.from_dict(data) == evaluation
    assert data["metrics"][0]["groups"]["color=black"]["items"] == 1
    with pytest.raises(ValueError, match="no evaluation"):
        Evaluation.from_dict({"items": []})


def test_tables_fit_the_terminal(rows: list[dict[str, Any]], gold: list[str]) -> None:
    rows, gold = rows * 4, gold * 4
    table = evaluation_table(Evaluation(SETTINGS, score(rows, gold) + score(rows, gold, "sampled")))
    assert max(map(len, table.splitlines())) <= 100
    assert "B legal *" in table
    assert "skill *" in table
    assert re.search(
        r"exact, whole string \* +100\.0 +\[75\.8, 100\.0\]", table
    )  # Wilson for 12 of 12, by hand: 12 / (12 + 1.96^2) = 0.7575


# Generation ----------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batch_size(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    runs = [
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=12, batch_size=batch_size, seed=3)
        for batch_size in (1, 2, 64)
    ]
    assert runs[0].items == runs[1].items == runs[2].items
    assert runs[0].tasks_and_modes() == [(t, m) for t in ("policy", "environment") for m in ("greedy", "sampled")]
    assert [item.prompt for item in runs[0].items] == [row["prompt"] for row in rows] * 2


def test_a_log_gets_lines_in_place_of_a_bar(
    tiny_model: Any, tiny_tokenizer: Any, rows: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(tiny_model, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=2, batch_size=1, progress=True)
    lines = capsys.readouterr().err.split()
    assert lines.count("after") == 4  # at the start and the end of each task, none for each batch between
    assert "3 of 3 prompts after" in " ".join(lines)


def test_only_sampling_uses_the_seed(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    runs = [evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=12, seed=seed) for seed in (0, 1)]
    for mode, equal in (("greedy", True), ("sampled", False)):
        texts = [[item.completion for item in run.items if item.mode == mode] for run in runs]
        assert (texts[0] == texts[1]) is equal


def test_each_task_is_sampled_by_its_own_settings(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    own = {"policy": {"temperature": 1e-4}, "environment": {"max_completion_length": 4}}
    plain, by_task = (
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=12, task_sampling=sampling)
        for sampling in (None, own)
    )
    texts = {
        name: {
            (task, mode): [item.completion for item in run.select(task, mode)] for task, mode in run.tasks_and_modes()
        }
        for name, run in (("plain", plain), ("by_task", by_task))
    }
    # Next to no temperature is greedy; lengths are those of both modes; what has no settings stays as it was.
    assert texts["by_task"]["policy", "sampled"] == texts["plain"]["policy", "greedy"]
    assert texts["plain"]["policy", "sampled"] != texts["plain"]["policy", "greedy"]
    assert texts["by_task"]["policy", "greedy"] == texts["plain"]["policy", "greedy"]
    for mode in ("greedy", "sampled"):
        assert max(item.scores["tokens"] for item in by_task.select("environment", mode)) == 4.0
        for short, long in zip(texts["by_task"]["environment", mode], texts["plain"]["environment", mode], strict=True):
            assert long.startswith(short.removesuffix(CUT_OFF))
    assert "sampled, T=0.0001" in evaluation_table(by_task)


def test_greedy_text_equals_generate(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    items = evaluate(tiny_model, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=12).items
    for row, item in zip(rows, items, strict=True):
        prompt = tiny_tokenizer(row["prompt"], return_tensors="pt")
        ids = tiny_model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
        cut_off = "" if ids[-1] == tiny_tokenizer.eos_token_id else CUT_OFF
        assert item.completion == tiny_tokenizer.decode(ids).removesuffix("<eos>") + cut_off
        assert item.scores["tokens"] == len(ids)
        assert item.scores["finished"] == (ids[-1] == tiny_tokenizer.eos_token_id)


def test_the_context_bounds_the_completion(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    longest = max(len(row["prompt"]) for row in rows)  # one token a character
    roomy, full = (GPT2LMHeadModel(replace_context(tiny_model.config, longest + extra)) for extra in (3, 0))
    evaluation = evaluate(roomy, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=12)
    assert evaluation.settings["max_new_tokens"] == 3
    with pytest.raises(ValueError, match="context"):
        evaluate(full, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=12)


def replace_context(config: GPT2Config, n_positions: int) -> GPT2Config:
    return GPT2Config(**{**config.to_dict(), "n_positions": n_positions})


def test_each_item_gets_its_own_completion(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    """Sampling is seeded by prompt, so a prompt evaluated alone gives the text it gives among others."""
    together = evaluate(tiny_model, tiny_tokenizer, rows, modes=["sampled"], max_new_tokens=12).items
    alone = [evaluate(tiny_model, tiny_tokenizer, [row], modes=["sampled"], max_new_tokens=12).items[0] for row in rows]
    assert together == alone
    assert len({item.completion for item in together}) == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "A: nonsense"}, "row 1.*prompt"),
        ({"prompt": None}, "row 1.*prompt"),
        ({"task": "policy"}, "row 1.*'task'"),
        ({"target": "nonsense"}, "row 1"),
    ],
)
def test_malformed_rows_are_named(
    tiny_model: Any, tiny_tokenizer: Any, rows: list[Any], change: dict[str, Any], message: str
) -> None:
    rows[1].update(change)
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=1)


def test_what_cannot_be_evaluated_is_refused(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate(tiny_model, tiny_tokenizer, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="beam"):
        evaluate(tiny_model, tiny_tokenizer, rows, modes=["beam"], max_new_tokens=1)
    del rows[2]["legal_cp"]
    with pytest.raises(ValueError, match=r"row 2.*legal_cp"):
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=1)


# The recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_file(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recipe_prints_writes_and_compares(
    tiny_checkpoint: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import evaluate as recipe

    output = tmp_path / "out" / "before.json"
    common = ["--model", str(tiny_checkpoint), "--dataset", str(data_file), "--max_new_tokens", "5", "--trained_on"]
    recipe.main([*common, "--output", str(output)])
    result = json.loads(output.read_text())
    assert json.loads(output.read_text())["models"][0]["held_out"]["items"]
    assert "| held-out A: | exact, whole string | greedy |" in output.with_suffix(".md").read_text()
    assert result["data"]["rows"] == 5
    assert len(result["data"]["sha256"]) == 64
    assert "torch" in result["versions"]
    again, _ = recipe.run(recipe.parse([*common, "--baseline", str(output)]))
    assert all(row["difference"] in (0.0, None) for row in again["models"][0]["comparison"])
    shown = capsys.readouterr().out
    assert "paired 95 % interval" in shown
    assert "Significant losses: none among" in shown
    assert "none among 0 headline metrics by colour, stake and stratum, and no verdict on" in shown
    few, _ = recipe.run(recipe.parse([*common, "--limit", "1", "--mode", "greedy"]))
    assert len(few["models"][0]["held_out"]["items"]) == 2


BOUNDS = ("ci_low", "ci_high")


@requires_stockfish
def test_recipe_measures_games_by_an_engine(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import evaluate as recipe

    games = tmp_path / "games.pgn"
    games.write_text("1. e4 e5 2. Nf3 *\n\n1. d4 d5 2. c4 *\n\n1. g4 *\n")
    common = ["--model", str(tiny_checkpoint), "--dataset", str(games), "--max_new_tokens", "5", "--mode", "greedy"]
    engine = ["--best_move", "engine", "--engine_nodes", "500", "--engine_cache", ""]
    whole, _ = recipe.run(recipe.parse([*common, *engine, "--limit", "4", "--trained_on"]))
    result = whole["models"][0]["held_out"]
    assert [(found["task"], found["items"]) for found in result["metrics"]] == [("policy", 4), ("environment", 4)]
    moves = [item["game"] for item in result["items"] if item["task"] == "environment"]
    assert set(moves) == {"1", "2", "3"}, "of three games four rows: each is seen"
    shown = capsys.readouterr()
    assert "intervals: none over 3 games." in shown.out
    assert "too few (3)" in shown.out
    assert "[" not in shown.out, "no interval"
    bounds = [found[name] for part in result["metrics"] for found in part["metrics"].values() for name in BOUNDS]
    assert set(bounds) == {None}
    assert "warning: `engine_nodes` is 500" in shown.err
    assert {item["scores"]["random.best_value"] for item in result["items"] if item["task"] == "policy"} != {1.0}


def test_data_hash_sees_every_change(rows: list[dict[str, Any]]) -> None:
    from rookworld_trl.measuring.results import data_hash

    before = data_hash(rows)
    assert before == data_hash([dict(reversed(row.items())) for row in rows])  # the order of columns is no change
    rows[3]["legal_cp"][0] += 1
    assert data_hash(rows) != before
