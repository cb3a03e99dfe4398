"""Metrics on rows whose results are counted by hand, and generation on a tiny random model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from rookworld_trl.chess import rewards
from rookworld_trl.chess.accuracy import evaluate, score
from rookworld_trl.measuring import against, of, read_results, result_table, write_results
from rookworld_trl.modeling.completions import CUT_OFF

SETTINGS = {"temperature": 1.0, "max_new_tokens": 99, "seed": 0}
RIGHT = {"exact", "fen_exact", "first_four", "placement_exact", "reward_exact", "terminated_f1", "truncated_f1"}
RIGHT |= {"best_value", "parsed", "best_legal", "candidates_legal_distinct", "best_in_top5", "top1"}


def test_the_truth_is_right_and_nonsense_wrong_in_every_metric(rows: list[dict[str, Any]], gold: list[str]) -> None:
    for texts, value in ((gold, 1.0), (["nonsense"] * 5, 0.0)):
        results = score(rows, texts, settings=SETTINGS)
        found = {name: each["value"] for result in results for name, each in result.estimates().items()}
        assert {found[name] for name in RIGHT} == {value}
        assert found["unparsable"] == 1 - value
        assert found["reward"] == (1.0 if value else pytest.approx(-0.3))
    assert (found["terminated_recall"], found["terminated_precision"]) == (0.0, None)


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
        results = score(rows, faulty)
        found = [item.scores[name] for task in ("environment", "policy") for item in of(results, task).items]
        paid = environment(prompts, faulty, **columns)[:3] + policy(prompts, faulty, **columns)[3:]
        assert found == paid
        assert len(set(found)) >= 3, "so that they could differ"


def test_metrics_counted_by_hand(rows: list[dict[str, Any]], faulty: list[str]) -> None:
    evaluation = score(rows, faulty, settings=SETTINGS)
    got = of(evaluation, "environment").estimates()
    assert [got[name]["value"] for name in ("exact", "fen_exact", "first_four", "reward_exact")] == pytest.approx(
        [0, 2 / 3, 1, 2 / 3]
    )
    # Terminated: one true (missed), one predicted (wrong). Truncated: one true, found.
    assert [got[f"terminated_{name}"]["value"] for name in ("recall", "precision", "f1")] == [0, 0, 0]
    assert [got[f"truncated_{name}"]["value"] for name in ("recall", "precision", "f1")] == [1, 1, 1]
    assert (got["exact"]["numerator"], got["exact"]["denominator"]) == (0, 3)

    got = of(evaluation, "policy").estimates()
    loss = 1 / (1 + math.exp(-0.00368208 * 40)) - 1 / (1 + math.exp(0.00368208 * 60))
    assert got["best_value"]["value"] == pytest.approx((1 - loss) / 2)
    assert got["best_legal"]["value"] == 0.5
    assert got["candidates_legal_distinct"]["value"] == 0.5
    assert got["n_candidates"]["value"] == 3.5


def test_groups_split_by_mover_and_stratum(rows: list[dict[str, Any]], gold: list[str]) -> None:
    evaluation = score(rows, [*gold[:1], "wrong", *gold[2:]], settings=SETTINGS)
    assert of(evaluation, "environment").groups() == {
        ("color", "black"): 1,
        ("color", "white"): 2,
        ("stratum", "illegal"): 1,
        ("stratum", "mate"): 1,
        ("stratum", "quiet"): 1,
    }
    assert of(evaluation, "environment").estimates(color="black")["exact"]["value"] == 0.0
    assert of(evaluation, "environment").estimates(color="white")["exact"]["denominator"] == 2
    assert of(evaluation, "environment").estimates(stratum="illegal")["exact"]["value"] == 1.0
    with pytest.raises(ValueError, match="opening"):
        of(evaluation, "policy").estimates(stratum="opening")


def test_results_survive_their_file(rows: list[dict[str, Any]], gold: list[str], tmp_path: Path) -> None:
    results = score(rows, gold, "sampled", SETTINGS)
    write_results(tmp_path / "results.parquet", results)
    written = read_results(tmp_path / "results.parquet")
    assert written == {(each.name, each.mode): each.to_dict() for each in results}
    assert [each.earlier(written[each.name, each.mode]) for each in results] == results
    assert written["policy", "sampled"]["groups"]["color=black"]["items"] == 1
    with pytest.raises(ValueError, match="none that this version wrote"):
        against(results[:1], {("policy", "sampled"): {"items": []}})
    (tmp_path / "older.json").write_text(json.dumps({"settings": {}, "items": [], "metrics": []}))
    with pytest.raises(ValueError, match=r"older\.json: no evaluation that this version wrote.*measure again"):
        read_results(tmp_path / "older.json")


# Generation ----------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batch_size(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    runs = [
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=12, batch_size=batch_size, seed=3)
        for batch_size in (1, 2, 64)
    ]
    assert runs[0] == runs[1] == runs[2]
    pairs = [(task, mode) for task in ("policy", "environment") for mode in ("greedy", "sampled")]
    assert [(each.name, each.mode) for each in runs[0]] == pairs
    for each in runs[0]:
        assert [item.prompt for item in each.items] == [row["prompt"] for row in rows if row["task"] == each.name]


def test_each_task_is_sampled_by_its_own_settings(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    own = {"policy": {"temperature": 1e-4}, "environment": {"max_completion_length": 4}}
    plain, by_task = (
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=12, task_sampling=sampling)
        for sampling in (None, own)
    )
    texts = {
        name: {(each.name, each.mode): [item.completion for item in each.items] for each in run}
        for name, run in (("plain", plain), ("by_task", by_task))
    }
    # Next to no temperature is greedy; lengths are those of both modes; what has no settings stays as it was.
    assert texts["by_task"]["policy", "sampled"] == texts["plain"]["policy", "greedy"]
    assert texts["plain"]["policy", "sampled"] != texts["plain"]["policy", "greedy"]
    assert texts["by_task"]["policy", "greedy"] == texts["plain"]["policy", "greedy"]
    for mode in ("greedy", "sampled"):
        assert max(item.scores["tokens"] for item in of(by_task, "environment", mode).items) == 4.0
        for short, long in zip(texts["by_task"]["environment", mode], texts["plain"]["environment", mode], strict=True):
            assert long.startswith(short.removesuffix(CUT_OFF))
    assert "sampled, T=0.0001" in result_table(by_task)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rows": (lambda rows: rows.clear(), {}, "no rows"),
    "an unknown mode": (lambda rows: None, {"modes": ["beam"]}, "beam"),
    "a bad prompt": (lambda rows: rows[1].update(prompt="A: nonsense"), {}, "row 1.*prompt"),
    "another task": (lambda rows: rows[1].update(task="policy"), {}, "row 1.*'task'"),
    "a bad target": (lambda rows: rows[1].update(target="nonsense"), {}, "row 1"),
    "a value for five moves": (lambda rows: rows[4].update(legal_cp=[1]), {}, "row 4"),  # of all rows
    "no values": (lambda rows: rows[2].pop("legal_cp"), {}, r"row 2.*legal_cp"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_evaluated_is_refused(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any], case: str) -> None:
    spoil, settings, message = BAD[case]
    spoil(rows)
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, tiny_tokenizer, rows, max_new_tokens=1, **settings)


def test_the_context_bounds_the_completion(tiny_model: Any, tiny_tokenizer: Any, rows: list[Any]) -> None:
    longest = max(len(row["prompt"]) for row in rows)  # one token a character
    config = tiny_model.config.to_dict()
    roomy, full = (GPT2LMHeadModel(GPT2Config(**config | {"n_positions": longest + more})) for more in (3, 0))
    evaluation = evaluate(roomy, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=12)
    assert {each.settings["max_new_tokens"] for each in evaluation} == {3}
    with pytest.raises(ValueError, match="context"):
        evaluate(full, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=12)
