"""Held-out accuracy of both tasks: generate, score each item as training would, keep every item's result."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from operator import itemgetter
from typing import Any

import chess
from transformers import PreTrainedModel

from rookworld_trl.chess import PREFIXES, TaskName, environment, policy, task_of
from rookworld_trl.chess.rewards import score_environment, score_environment_rows, score_policy_rows
from rookworld_trl.chess.rewards.moves import NOTHING_AT_STAKE, move_values
from rookworld_trl.chess.strata import material_won
from rookworld_trl.measuring.intervals import ratios
from rookworld_trl.measuring.metrics import Metric, Scores, mean, share, terms
from rookworld_trl.measuring.result import Item, Result
from rookworld_trl.modeling.completions import complete, fitting_length
from rookworld_trl.settings.terminal import progress_bar

MODES = ("greedy", "sampled")
COLUMNS = ("prompt", "task", "target", "legal_moves", "legal_cp", "stratum")


def _detection(flag: str) -> list[Metric]:
    """Recall, precision and F1 of a rare flag; accuracy would be 98.9 % for a model that never sets it."""
    true, predicted = f"{flag}_true", f"{flag}_pred"

    def hit(scores: Scores) -> float:
        return scores[true] * scores[predicted]

    return [
        Metric(f"{flag}_recall", f"{flag}: recall", hit, itemgetter(true)),
        Metric(f"{flag}_precision", f"{flag}: precision", hit, itemgetter(predicted)),
        Metric(f"{flag}_f1", f"{flag}: F1", lambda s: 2.0 * hit(s), lambda s: s[true] + s[predicted], proportion=False),
    ]


_TEXT = [
    share("finished", "ended by itself"),
    mean("tokens", "tokens a completion", format=".1f", better=0),
]

METRICS: dict[TaskName, list[Metric]] = {
    "policy": [
        share("best_legal", "B legal"),
        # Of the answers whose move is legal: (mean value - r) / (1 - r), r that of a random legal move in their
        # positions; 0 for a random legal mover, 1 for the best moves. The correction is that of Cohen's kappa.
        Metric(
            "skill",
            "skill",
            lambda s: s["best_legal"] * (s["best_value"] - s["random.best_value"]),
            lambda s: s["best_legal"] * (1.0 - s["random.best_value"]),
            proportion=False,
            format=".3f",
            keeps=("best_legal", "random.best_value"),
        ),
        Metric(
            "legal_value",
            "value of the legal moves",
            lambda s: s["best_legal"] * s["best_value"],
            itemgetter("best_legal"),
            proportion=False,
            keeps=("best_legal",),
        ),
        mean("best_value", "value of B, illegal ones 0", format="percent"),
        share("parsed", "parsable"),
        share("candidates_legal_distinct", "all candidates legal and distinct"),
        share("best_in_moves", "B among the candidates"),
        share("best_in_top5", "B in the engine's top five"),
        share("top1", "B is the engine's best"),
        mean("evals_score", "evals, above the best constant", format="percent"),
        # Of the differences in win chance between the listed moves: those that the evals order rightly less those that
        # they turn round. Results measured before it was counted have none.
        Metric(
            "evals_order",
            "evals, order of the moves",
            lambda s: s.get("evals_ordered", 0.0),
            lambda s: s.get("evals_apart", 0.0),
            proportion=False,
            format=".3f",
        ),
        mean("n_candidates", "candidates", format=".2f", better=0),
        mean("reward", "graduated reward"),
        mean("continuous", "continuous reward"),
        *_TEXT,
    ],
    "environment": [
        share("exact", "exact, whole string"),
        share("fen_exact", "FEN exact"),
        share("first_four", "first four FEN fields"),
        share("placement_exact", "placement exact"),
        share("reward_exact", "reward exact"),
        *_detection("terminated"),
        *_detection("truncated"),
        Metric("unparsable", "unparsable", lambda s: 1.0 - s["parsed"], better=-1),
        share("copied_input", "input copied", better=-1),
        mean("reward", "graduated reward"),
        mean("continuous", "continuous reward"),
        *_TEXT,
    ],
}

# Legality, skill and exactness: three numbers, for a gain in one can hide a loss in another. An `A:` answer is exact or
# not; legality is of `P:` alone.
HEADLINES: dict[TaskName, tuple[str, ...]] = {"policy": ("best_legal", "skill"), "environment": ("exact",)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    modes: Sequence[str] = MODES,
    temperature: float = 1.0,
    max_new_tokens: int,
    task_sampling: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> list[Result]:
    """Complete every prompt in each mode and score the completions.

    Args:
        model: a GPT-2 that `rollout` accepts.
        tokenizer: with an end token.
        dataset: rows with the columns `COLUMNS`.
        modes: of "greedy" and "sampled"; sampled means one sample a prompt at `temperature`.
        max_new_tokens: a completion that has not ended by then is scored as it stands. Cut, for all rows alike, to
            what the model's context leaves behind the longest prompt.
        task_sampling: by task, its own `temperature` of the sampled mode and `max_completion_length` of both, as the
            trainer has them.
        batch_size: prompts decoded at a time; changes speed and memory, not the results.
        progress: show a bar.

    Returns:
        Of each task and mode that there is, policy first, greedy first.

    Raises:
        ValueError: no rows, a missing column, a malformed row, an unknown mode, a tokenizer without an end token, or
            a prompt that fills the model's context.
    """
    rows = list(dataset)
    _check(rows, modes)
    max_new_tokens = fitting_length(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens)
    found: list[Result] = []
    for task in METRICS:
        mine, own = [row for row in rows if row["task"] == task], (task_sampling or {}).get(task, {})
        for mode in sorted(modes if mine else (), key=MODES.index):
            settings: dict[str, Any] = {
                "temperature": float(own.get("temperature", temperature)) if mode == "sampled" else 0.0,
                "max_new_tokens": min(max_new_tokens, own.get("max_completion_length", max_new_tokens)),
                "seed": seed,
            }
            title = f"evaluate {PREFIXES[task].strip()} {mode}" if progress else ""
            with progress_bar(title, len(mine), "prompt") as bar:
                how = settings | {"batch_size": batch_size, "told": bar.update}
                written = complete(model, tokenizer, [row["prompt"] for row in mine], **how)
            (result,) = score(mine, [each.text for each in written], mode, settings)
            for item, each in zip(result.items, written, strict=True):
                item.scores.update(tokens=float(each.tokens), finished=float(each.finished))
            found.append(result)
    return found


def score(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    mode: str = "greedy",
    settings: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Score given completions of the rows, with the scorers that training rewards: a result for each task that occurs.

    Each item is filed under `color` (who is to move), `stratum` and, for `P:`, `stake`: whether the choice of a move
    makes a difference of more than one point of win chance. What a report draws is kept of
    items by greedy decoding: of `A:` the right answer, of `P:` the value of each legal move, 1 minus the win chance it
    gives away. `tokens` and `finished`, not known from the text, are 0 and 1; `evaluate` fills them in.

    Raises:
        ValueError: a row is malformed.
    """
    items: dict[TaskName, list[Item]] = {task: [] for task in METRICS}
    for row, completion, found in zip(rows, completions, _scores(rows, completions), strict=True):
        task = task_of(row["prompt"])
        scores = {field.name: float(getattr(found, field.name) or 0.0) for field in fields(found)}
        scores |= {"tokens": 0.0, "finished": 1.0, **baseline_scores(row)}
        turn = row["prompt"].split(" ")[2]  # of the position's FEN
        groups = {"color": "white" if turn == "w" else "black", "stratum": row["stratum"]}
        if task == "policy":
            groups["stake"] = "something" if scores["at_stake"] else "nothing"
        values = zip(row["legal_moves"], move_values(row["legal_cp"]), strict=True) if task == "policy" else ()
        right = ({move: round(value, 3) for move, value in values} or row["target"]) if mode == "greedy" else None
        about = (row["prompt"], completion, dict(sorted(groups.items())), row.get("game") or "", right)
        items[task].append(Item(item_key(row), scores, *about))
    return [
        Result(task, METRICS[task], of_task, mode, dict(settings or {}), HEADLINES[task], PLAYERS[task], prefix)
        for task, of_task in items.items()
        for prefix in [PREFIXES[task].strip()]
        if of_task
    ]


def _scores(rows: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[Any]:
    """What the scorers of both tasks say of each completion."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    prompts = columns.pop("prompt")
    of_policy = score_policy_rows(prompts, list(completions), **columns)
    of_environment = score_environment_rows(prompts, list(completions), **columns)
    return [one or other for one, other in zip(of_policy, of_environment, strict=True)]


def _check(rows: Sequence[Mapping[str, Any]], modes: Sequence[str]) -> None:
    if not rows or not {*modes} <= {*MODES}:
        raise ValueError(f"the data set has no rows, or a mode of {modes} is none of {MODES}")
    for i, row in enumerate(rows):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"row {i} of the data set lacks the columns {missing}; needed are {COLUMNS}")
        if row["task"] != task_of(row["prompt"]):
            raise ValueError(f"row {i} of the data set: column 'task' says {row['task']!r}, and the prompt another one")
    _scores(rows, [""] * len(rows))  # so that what no answer can be scored against is known before any is written


def item_key(row: Mapping[str, Any]) -> str:
    """What tells an item from others: a hash of its prompt and of what it is scored against."""
    reference = [row[name] for name in ("prompt", "target", "legal_moves", "legal_cp")]
    return hashlib.sha256(json.dumps(reference).encode()).hexdigest()[:16]


# Trivial players on the same items: what a number is worth shows beside theirs.

# Names as in an item's scores, and as in tables.
PLAYERS: dict[TaskName, dict[str, str]] = {
    "policy": {"random": "random legal", "first": "first legal", "material": "most material"},
    "environment": {"copy": "input copied"},
}
# What of their scores is kept.
_FIELDS: dict[TaskName, tuple[str, ...]] = {
    "policy": ("best_value", "best_in_top5", "top1"),
    "environment": ("exact", "fen_exact", "first_four", "placement_exact", "reward_exact"),
}


def baseline_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The trivial players' scores on a row, as `player.field`; of a `P:` row also `at_stake`.

    The random mover, the alphabetically first legal move, and the move that wins most material at once (the captured
    man's value and what a promotion adds; the first of equals). Of an `A:` row the copied input, as if nothing had
    happened.
    """
    if row["task"] == "environment":
        copied = environment.parse_prompt(row["prompt"]).fen + "+0.001+0+0"  # what most moves lead to
        score = score_environment(row["prompt"], copied, row["target"])
        return {f"copy.{name}": float(getattr(score, name)) for name in _FIELDS["environment"]}
    moves, cp = row["legal_moves"], row["legal_cp"]
    ranked = sorted(cp, reverse=True)
    fifth = ranked[min(policy.MAX_CANDIDATES, len(cp)) - 1]
    fields = list(
        zip(move_values(cp), (float(value >= fifth) for value in cp), (float(v == ranked[0]) for v in cp), strict=True)
    )
    first = moves.index(min(moves))
    material = moves.index(most_material(policy.parse_prompt(row["prompt"]), moves))
    means = [sum(column) / len(column) for column in zip(*fields, strict=True)]
    found = {"random": means, "first": fields[first], "material": fields[material]}
    scores = {
        f"{player}.{name}": value
        for player, values in found.items()
        for name, value in zip(_FIELDS["policy"], values, strict=True)
    }
    scores |= {f"{player}.best_legal": 1.0 for player in found}
    return scores | {"at_stake": float(policy.win_chance(ranked[0]) - policy.win_chance(ranked[-1]) > NOTHING_AT_STAKE)}


def most_material(fen: str, legal_moves: Sequence[str]) -> str:
    """The legal move that wins most pawns' worth (1, 3, 3, 5, 9) in one ply; the alphabetically first of equals."""
    board = chess.Board(fen)
    return min(legal_moves, key=lambda uci: (-material_won(board, chess.Move.from_uci(uci)), uci))


# While training

REWARD = "reward"  # the mean over both tasks' items
SCORES = {"graduated": "reward", "continuous": "continuous"}  # by the name of the rewards, an item's score
METRIC_NAMES = (REWARD, *(f"{task}/{metric.name}" for task, metrics in METRICS.items() for metric in metrics))


class Watch:
    """An evaluator for the trainer: `(model, rows) -> metrics`, by `task/metric`, and the mean reward as `reward`.

    Args:
        reward: which rewards that is of: `graduated` or `continuous`.
        chosen: the metric that the best checkpoint is kept by, if any.
        settings: `evaluate`'s.

    Raises:
        ValueError: there is no such metric as `chosen`.
    """

    def __init__(self, tokenizer: Any, reward: str, chosen: str | None, settings: Mapping[str, Any]):
        if chosen is not None and chosen.removeprefix("eval_") not in METRIC_NAMES:
            raise ValueError(
                f"`metric_for_best_model` is '{chosen}': no such metric is measured. Choose one of "
                f"{', '.join(METRIC_NAMES)}"
            )
        self.tokenizer, self.score, self.settings = tokenizer, SCORES[reward], dict(settings)

    def __call__(self, model: PreTrainedModel, rows: Any) -> dict[str, float]:
        results = evaluate(model, self.tokenizer, rows, modes=["greedy"], **self.settings)
        rewards = [item.scores[self.score] for result in results for item in result.items]
        found = {REWARD: math.fsum(rewards) / len(rewards)}
        for result in results:
            values = ratios(*terms([item.scores for item in result.items], result.metrics))
            found |= {f"{result.name}/{m.name}": float(v) for m, v in zip(result.metrics, values, strict=True)}
        return found
