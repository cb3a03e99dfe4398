"""What the reward pays players whose values are known: strong and weak ones, and those who write what nobody would.

    python -m benchmarks.players          measures on dev, writes benchmarks/results/players.json and the figure

A player of `P:` believes the true values plus noise, chooses a list by what it believes, and writes evals. The file's
`before` column is kept: the reward of commit c2d7452 on the same texts.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import chess
import numpy as np

from benchmarks.common import RESULTS, ROOT, shipped, write_report
from rookworld_trl.chess.format import squares
from rookworld_trl.chess.policy import MATE_CP, format_completion, format_eval
from rookworld_trl.chess.rewards import score_environment, score_policy

FILE = RESULTS / "players.json"
FIGURE = ROOT / "docs" / "images" / "levels.svg"
FORMS = ("continuous", "reward")
Values = np.ndarray[Any, Any]
Chooses = Callable[[Values, int, np.random.Generator], list[int]]  # of moves in the order of belief; `B:` comes first
Writes = Callable[[Values, Values], list[str]]  # from what it believes of them and the true values, the evals


@cache
def rows(task: str) -> list[dict[str, Any]]:
    return [row for row in shipped("dev") if row["task"] == task]


def best(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[:count])


def spread(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[np.linspace(0, len(order) - 1, count).round().astype(int)])


def best_and_worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return [order[0], *order[::-1][: count - 1]]


def three_and_two_worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    good = max(1, count - 2)
    return [*order[:good], *order[::-1][: count - good]]


def best_and_random(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return [order[0], *rng.permutation(order[1:])[: count - 1]]


def any_legal(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(rng.permutation(order)[:count])


def worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[::-1][:count])


def own(believed: Values, true: Values) -> list[str]:
    return [format_eval(int(cp)) for cp in believed]


def wrong(believed: Values, true: Values) -> list[str]:
    """One number that no value is: what the moves earn without evals."""
    return ["-55.55"] * len(believed)


def constant(believed: Values, true: Values) -> list[str]:
    """The best one there is, which takes the true values to find."""
    return [format_eval(int(np.sort(true)[len(true) // 2]))] * len(true)


def near_constant(believed: Values, true: Values) -> list[str]:
    return [f"{float(constant(believed, true)[0]) + i / 1000:.3f}" for i in range(len(true))]


def zeros(believed: Values, true: Values) -> list[str]:
    return ["0.0"] * len(true)


def by_place(believed: Values, true: Values) -> list[str]:
    return ["0.5", "0.4", "0.3", "0.2", "0.1"][: len(true)]


def texts(chooses: Chooses, noise: float = 0.0, of_position: float = 0.0, writes: Writes = own) -> Iterator[str]:
    """The answers to every row of a player whose values are off by so many centipawns a move and, all of a position
    alike, a position. Mates are seen."""
    for number, row in enumerate(rows("policy")):
        rng = np.random.default_rng(number)
        true = np.array(row["legal_cp"])
        off = noise * rng.standard_normal(len(true)) + of_position * rng.standard_normal()
        believed = np.where(abs(true) >= MATE_CP, true, np.clip(true + off.round(), 1 - MATE_CP, MATE_CP - 1))
        listed = chooses(np.argsort(-believed, kind="stable"), min(5, len(true)), rng)
        moves = [row["legal_moves"][i] for i in listed]
        yield format_completion(moves, writes(believed[listed], true[listed]), moves[0])


@cache
def earned(chooses: Chooses, noise: float = 0.0, of_position: float = 0.0, writes: Writes = own) -> dict[str, Values]:
    """Both forms of the reward (rows,) of such a player."""
    pairs = zip(texts(chooses, noise, of_position, writes), rows("policy"), strict=True)
    scores = [score_policy(text, row["legal_moves"], row["legal_cp"]) for text, row in pairs]
    return {form: np.array([getattr(score, form) for score in scores]) for form in FORMS}


def unlike(count: int = 300) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Boards of `A:` that are no transition: what is wrong, the row, the answer. The man on both of its squares, or on
    neither; ranks of the input and of the truth; of the truth and of another row's, three squares off or more.

    Without castling, where the rook has moved, too, en passant, where one of two men may be forgotten, and illegal
    moves, whose board is the input.
    """
    kinds = ("illegal", "en_passant")
    legal = [row for row in rows("environment") if row["stratum"] not in kinds]
    rng = random.Random(0)
    for row in rng.sample(legal, count):
        before, uci = row["prompt"].removeprefix("A: ").split("+")[:2]
        truth, rest = row["target"].split(" ", 1)
        move, board = chess.Move.from_uci(uci), chess.Board(row["target"].split("+")[0])
        if chess.Board(before).is_castling(move):
            continue
        yield "the input copied", row, f"{before.split(' ')[0]} {rest}"
        board.set_piece_at(move.from_square, board.piece_at(move.to_square))
        yield "the man on both of its squares", row, f"{board.board_fen()} {rest}"
        board.remove_piece_at(move.from_square)
        board.remove_piece_at(move.to_square)
        yield "the man on neither", row, f"{board.board_fen()} {rest}"
        for name, other in (("the input", before), ("another board", rng.choice(legal)["target"])):
            ranks = truth.split("/"), other.split(" ", 1)[0].split("/")
            mixed = ["/".join(a[:cut] + b[cut:]) for cut in range(1, 8) for a, b in (ranks, ranks[::-1])]
            for placement in mixed:
                wrong_squares = sum(map(str.__ne__, squares(placement) or "", squares(truth) or ""))
                if wrong_squares > (2 if name == "another board" else 0):
                    yield f"ranks of the truth and of {name}", row, f"{placement} {rest}"


PLAYERS: dict[str, dict[str, Any]] = {
    "the truth": {"chooses": best},
    **{
        f"off by {noise} centipawns a move: {label}": {"chooses": chooses, "noise": noise}
        for noise in (20.0, 40.0, 60.0)
        for label, chooses in {
            "its best five": best,
            "a spread over all ranks": spread,
            "its best three and worst two": three_and_two_worst,
            "its best and worst four": best_and_worst,
        }.items()
    },
    "the best five, the best constant as evals": {"chooses": best, "writes": constant},
    "the best five, evals by place": {"chooses": best, "writes": by_place},
    "the best move and four others, zeros as evals": {"chooses": best_and_random, "writes": zeros},
    "random legal moves, evals by place": {"chooses": any_legal, "writes": by_place},
    "the worst moves, true evals": {"chooses": worst},
}


def measured() -> dict[str, dict[str, float]]:
    """The mean of both forms by player, of `P:` and of `A:`."""
    found = {name: {form: float(earned(**each)[form].mean()) for form in FORMS} for name, each in PLAYERS.items()}
    of_boards: dict[str, list[Any]] = {}
    for name, row, answer in unlike():
        of_boards.setdefault(f"A: {name}", []).append(score_environment(row["prompt"], answer, row["target"]))
    means = {
        name: {form: float(np.mean([getattr(score, form) for score in scores])) for form in FORMS}
        for name, scores in of_boards.items()
    }
    return found | means


def draw(row: Mapping[str, Any]) -> None:
    """What each legal move earns as `B:` of the best list and alone, and the levels."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "levels"  # the same bytes from the same numbers
    from matplotlib import pyplot

    order = np.argsort(-np.array(row["legal_cp"]), kind="stable")
    moves, cp = [row["legal_moves"][i] for i in order], [row["legal_cp"][i] for i in order]

    def reward(listed: Sequence[int]) -> float:
        text = format_completion([moves[i] for i in listed], [format_eval(cp[i]) for i in listed], moves[listed[0]])
        return score_policy(text, moves, cp).continuous

    others = [[j for j in range(5) if j != i][:4] for i in range(len(moves))]
    among_best = [reward([i, *other]) for i, other in enumerate(others)]
    around = [reward([i, *[j % len(moves) for j in range(i + 1, i + 5)]]) for i in range(len(moves))]
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    for cut, level in zip((0.4, 0.6, 0.8, 0.95), ("0.4", "0.6", "0.8", "1"), strict=True):
        axes.axhline(cut, color="0.8", linewidth=0.8, zorder=0)
        axes.text(len(moves) - 0.4, cut + 0.01, f"pays {level}", fontsize=7, color="0.4", ha="right")
    places = np.arange(len(moves))
    axes.bar(places - 0.2, among_best, 0.4, label="with the best others in the list", color="#0072B2")
    axes.bar(places + 0.2, around, 0.4, label="with the next four of the ranking", color="#E69F00")
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [f"{move} {value / 100:+.2f}" for move, value in zip(moves, cp, strict=True)]
    axes.set_xticks(places, labels, rotation=90, fontsize=6)
    axes.set_ylabel("reward")
    axes.set_title("What a move earns as B:, all evals true", fontsize=9)
    axes.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    before = json.loads(FILE.read_text(encoding="utf-8"))["before"] if FILE.exists() else {}
    counts = {task: len(rows(task)) for task in ("policy", "environment")}
    write_report(FILE, {"split": "dev", "rows": counts, "before": before, "now": measured()})
    fitting = (row for row in rows("policy") if 24 <= len(row["legal_cp"]) <= 28)
    draw(next(row for row in fitting if -60 < max(row["legal_cp"]) < 60 and min(row["legal_cp"]) < -400))


if __name__ == "__main__":
    main()
