"""Which rules a rookworld-nano knows: what its illegal moves are, and how much of what it would write is legal, on dev.

    python -m benchmarks.legality "shipped=rookworld_trl/assets/nano" [NAME=FOLDER ...]
    python -m benchmarks.legality --table

Two views. Of greedy answers, the kinds of illegal `B:` moves. And without any sampling, behind ` M:`, the probability
of the squares from which a move goes, and behind each of them that of the squares to which its man may go: this shows
what is known of moves that the model would rarely choose. The report is written after each checkpoint; a name that it
holds is not measured again. Never on test.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import chess
import torch

from benchmarks.common import RESULTS, machine, shipped, write_report
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.data.strata import ILLEGAL_KINDS
from rookworld_trl.data.trees import Words
from rookworld_trl.evaluation import evaluate
from rookworld_trl.modeling.loading import load
from rookworld_trl.tasks import ParseError, policy

OUTPUT = RESULTS / "legality.json"
ITEMS = {"policy": 1_500, "environment": 1}
MASS_ITEMS = 500  # of the positions, for the probabilities
MEN = {"K": "king", "Q": "queen", "R": "rook", "B": "bishop", "N": "knight", "P": "pawn"}


def kind(board: chess.Board, uci: str) -> str:
    """The kind of an illegal move (`ILLEGAL_KINDS`), or `other`."""
    return next((name for name, moves in ILLEGAL_KINDS.items() if uci in moves(board)), "other")


def answered(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Greedy answers: of how many positions, in check or not, `B:` is illegal, and of which kind."""
    evaluation = evaluate(model, tokenizer, list(rows), max_new_tokens=80, batch_size=128, seed=1)
    kinds: Counter[str] = Counter()
    illegal, positions = Counter[bool](), Counter[bool]()
    for item in evaluation.select("policy", "greedy"):
        board = chess.Board(policy.parse_prompt(item.prompt))
        positions[board.is_check()] += 1
        try:
            best = policy.parse(item.completion).best
        except ParseError:
            kinds["unreadable"] += 1
            illegal[board.is_check()] += 1
            continue
        if best not in {move.uci() for move in board.legal_moves}:
            kinds[kind(board, best)] += 1
            illegal[board.is_check()] += 1
    return {
        "positions": {"in check": positions[True], "other": positions[False]},
        "illegal": {"in check": illegal[True], "other": illegal[False]},
        "kinds": dict(kinds.most_common()),
    }


@torch.no_grad()
def legal_mass(model: Any, tokenizer: Any, fens: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Mean probability of what is legal, of a tokenizer that writes a move's two squares as a token each.

    Returns:
        for positions in check and others: `from`, behind ` M:`, the squares from which a move goes; of each man's
        letter, behind its square, those to which it may go; `move`, both. Each with the number of cases.
    """
    words = Words(tokenizer)
    found: dict[str, dict[str, list[float]]] = {"in check": defaultdict(list), "other": defaultdict(list)}
    for fen in fens:
        board = chess.Board(fen)
        of = found["in check" if board.is_check() else "other"]
        targets: dict[int, set[int]] = defaultdict(set)
        men: dict[int, str] = {}
        for move in board.legal_moves:
            origin, target = words[f" {move.uci()}"][:2]
            targets[origin].add(target)
            men[origin] = chess.piece_symbol(board.piece_type_at(move.from_square) or chess.PAWN).upper()
        prompt = [*words.prompt(policy.prompt(fen)), *words[" M:"]]
        logits = model(torch.tensor([[*prompt, origin] for origin in targets])).logits[:, -2:].softmax(-1)
        origins = logits[0, 0, list(targets)]
        legal = torch.stack([row[list(to)].sum() for row, to in zip(logits[:, 1], targets.values(), strict=True)])
        of["from"].append(float(origins.sum()))
        of["move"].append(float((origins * legal).sum()))
        for man, mass in zip(men.values(), legal.tolist(), strict=True):
            of[man].append(mass)
    return {
        state: {name: [round(fmean(each), 4), len(each)] for name, each in sorted(of.items())}
        for state, of in found.items()
    }


def measure(folder: str) -> dict[str, Any]:
    model, tokenizer = load(folder)
    rows = [row for row in draw_of_each(shipped("dev"), ITEMS) if row["task"] == "policy"]
    fens = [policy.parse_prompt(row["prompt"]) for row in rows[:MASS_ITEMS]]
    return answered(model, tokenizer, rows) | {"mass": legal_mass(model.eval(), tokenizer, fens)}


def table(report: dict[str, Any]) -> str:
    names = list(report["checkpoints"])
    of = list(report["checkpoints"].values())
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for state in ("other", "in check"):
        shares = [f"{each['illegal'][state]} of {each['positions'][state]}" for each in of]
        lines.append(f"| illegal `B:`, {state} | " + " | ".join(shares) + " |")
    kinds: Counter[str] = sum((Counter(each["kinds"]) for each in of), Counter())
    for name, _ in kinds.most_common():
        lines.append(f"| `{name}` | " + " | ".join(str(each["kinds"].get(name, 0)) for each in of) + " |")
    for state in ("other", "in check"):
        for man, title in {"from": "squares to move from", **MEN, "move": "moves"}.items():
            masses = [f"{each['mass'][state][man][0]:.3f}" for each in of]
            lines.append(f"| legal mass, {state}: {title} | " + " | ".join(masses) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report = {"split": "dev", **machine("cpu"), "checkpoints": {}, **report}
    for pair in arguments.checkpoints:
        name, _, folder = pair.partition("=")
        if name not in report["checkpoints"]:
            report["checkpoints"][name] = measure(folder)
            write_report(arguments.output, report)
    print(table(report))


if __name__ == "__main__":
    main()
