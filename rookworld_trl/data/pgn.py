"""Prompts from a user's own games: each move of a PGN file gives an `A:` row and, with an engine, a `P:` row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chess
import chess.pgn

from rookworld_trl.data.strata import phase, stratum
from rookworld_trl.tasks import environment, policy, position_key


@dataclass
class GamesReport:
    """What became of the games: how many were read and how many rows they gave; `skipped` and `cut` by reason."""

    games: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    repeated: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.games} games: {self.kept['policy']} P: and {self.kept['environment']} A: rows; "
            f"{self.repeated} moves from positions seen before",
            *(f"skipped {count} games: {reason}" for reason, count in self.skipped.most_common()),
        ]
        if self.cut:
            lines.append(f"{self.cut} games are used up to their first null, illegal or unreadable move")
        return "\n".join(lines)


def rows_of_games(path: Path, report: GamesReport, positions: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, main lines only; a pair of position and move comes once.

    Args:
        path: a PGN file, any number of games.
        report: filled on the way.
        positions: also a `P:` row for each position, without values: `rookworld_trl.data.values` fills them in.
    """
    seen: set[str] = set()
    moves: set[tuple[str, str]] = set()
    with path.open(encoding="utf-8", errors="replace") as file:
        while (game := chess.pgn.read_game(file)) is not None:
            report.games += 1
            board = _start(game, report)
            if board is None:
                continue
            report.cut += bool(game.errors)
            history: list[str] = []
            for move in game.mainline_moves():
                if not move:  # a null move, as annotators write it, is none of chess
                    report.cut += not game.errors
                    break
                fen, key, uci = board.fen(), position_key(board.fen()), move.uci()
                if positions and key not in seen:
                    report.kept["policy"] += 1
                    yield _policy_row(board)
                seen.add(key)
                if (key, uci) in moves:
                    report.repeated += 1
                else:
                    moves.add((key, uci))
                    report.kept["environment"] += 1
                    yield {
                        "prompt": environment.prompt(fen, uci, history),
                        "task": "environment",
                        "target": environment.format_completion(environment.transition(fen, uci)),
                        "legal_moves": [],
                        "legal_cp": [],
                        "stratum": stratum(board, uci),
                    }
                history.append(uci)
                board.push(move)


def _start(game: chess.pgn.Game, report: GamesReport) -> chess.Board | None:
    """The board that a game starts from; None, counted, for a game that is not of standard chess or has no moves."""
    try:
        board = game.board()
    except ValueError:
        report.skipped["unreadable start position"] += 1
        return None
    if type(board) is not chess.Board or board.chess960:
        report.skipped["a chess variant"] += 1
        return None
    if not board.is_valid():
        report.skipped["illegal start position"] += 1
        return None
    if next(iter(game.mainline_moves()), None) is None:
        report.skipped["no moves"] += 1
        return None
    return board


def _policy_row(board: chess.Board) -> dict[str, Any]:
    return {
        "prompt": policy.prompt(board.fen()),
        "task": "policy",
        "target": "",
        "legal_moves": [],
        "legal_cp": [],
        "stratum": phase(board),
    }
