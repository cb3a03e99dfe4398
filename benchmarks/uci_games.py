"""Does rookworld-uci play whole games in other programs, without an illegal move or a crash?

    python -m benchmarks.uci_games [--games 100] [--max_plies 60]       python-chess starts it and checks every move
    python -m benchmarks.uci_games --program xboard [--games 10]        XBoard runs a match against Stockfish

python-chess: the engine at temperature 0.5 meets a random mover and a greedy capturer in turn, which lead it to odd
positions, with both colours; an illegal move or a crash is counted, and the next game goes on with a new process.
XBoard (Debian: apt-get install xboard polyglot xvfb stockfish) knows the rules itself and forfeits whoever breaks them;
its games are written as PGN and read again here. Without a screen it runs under xvfb-run.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chess
import chess.engine
import chess.pgn

from rookworld_trl.chess.players import GreedyCapturePlayer, Player, RandomPlayer
from rookworld_trl.reports.summary import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "uci_games.json"
OPTIONS = {"Temperature": 50, "Retries": 1}
# What XBoard writes at the end of a game that an engine lost other than by chess.
FAULTS = ("illegal", "forfeit", "exited", "died", "unresponsive", "time")


def engine_command(model: str) -> list[str]:
    return [sys.executable, "-m", "rookworld_trl.chess.uci", "--model", model]


def play_by_python_chess(command: Sequence[str], games: int, max_plies: int, seed: int = 0) -> dict[str, Any]:
    """Play games and count what went wrong.

    Returns:
        `games`, `moves` of the engine, `illegal_moves`, `crashes`, how games `ended`, the first `faults` in words.
    """
    opponents: list[Player] = [RandomPlayer(seed), GreedyCapturePlayer(seed)]
    counts, ended, faults = Counter[str](), Counter[str](), []
    engine: chess.engine.SimpleEngine | None = None
    for number in range(games):
        if engine is None:
            engine = chess.engine.SimpleEngine.popen_uci(
                list(command), timeout=120, stderr=subprocess.DEVNULL, cwd=ROOT
            )
            engine.configure({**OPTIONS, "Seed": seed + number})
        board, opponent = chess.Board(), opponents[number // 2 % 2]
        try:
            while not board.is_game_over(claim_draw=True) and board.ply() < max_plies:
                if board.turn == (number % 2 == 0):
                    move = engine.play(board, chess.engine.Limit(time=60), game=number).move
                    if move not in board.legal_moves:
                        raise chess.engine.EngineError(f"illegal move {move} in {board.fen()}")
                    counts["moves"] += 1
                else:
                    move = chess.Move.from_uci(opponent.choose([board])[0].move or "")
                board.push(move)
            outcome = board.outcome(claim_draw=True)
            ended[outcome.termination.name.lower() if outcome else "ply limit"] += 1
        except chess.engine.EngineError as error:  # an illegal move; a process that ended is a kind of its own
            crashed = isinstance(error, chess.engine.EngineTerminatedError)
            counts["crashes" if crashed else "illegal_moves"] += 1
            faults.append(f"game {number}: {error}")
            engine.close()
            engine = None
    if engine is not None:
        engine.quit()
    faultless = {name: counts[name] for name in ("moves", "illegal_moves", "crashes")}
    return {"games": games, **faultless, "ended": dict(ended.most_common()), "faults": faults[:10]}


def play_by_xboard(command: Sequence[str], games: int, depth: int = 2) -> dict[str, Any]:
    """Let XBoard run a match against Stockfish, which searches so many plies, and read its games.

    Returns:
        `games`, `moves` of the engine, `results` by PGN, how games `ended` in XBoard's words, `faults`.

    Raises:
        FileNotFoundError: XBoard, polyglot, xvfb-run or Stockfish is missing.
        RuntimeError: the match did not end.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/games"])
    programs = {name: shutil.which(name, path=path) for name in ("xboard", "polyglot", "xvfb-run", "stockfish")}
    if missing := [name for name, found in programs.items() if found is None]:
        raise FileNotFoundError(f"{', '.join(missing)}: not found; apt-get install xboard polyglot xvfb stockfish")
    with tempfile.TemporaryDirectory() as folder:
        pgn, script = Path(folder, "games.pgn"), Path(folder, "engine.sh")
        script.write_text(f"#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}\n")
        script.chmod(0o755)
        match = [str(programs["xvfb-run"]), "-a", str(programs["xboard"]), "-noGUI", "-xexit", "-xponder"]
        match += ["-fcp", str(script), "-fd", folder, "-fUCI", "-scp", str(programs["stockfish"]), "-sUCI"]
        match += ["-mg", str(games), "-tc", "10", "-inc", "1", "-depth", str(depth), "-sgf", str(pgn)]
        done = subprocess.run(match, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=3600)
        if not pgn.exists():
            raise RuntimeError(f"XBoard wrote no games: {(done.stdout + done.stderr)[-500:]}")
        return read_match(pgn)


def read_match(pgn: Path) -> dict[str, Any]:
    """What became of XBoard's games."""
    results, ended = Counter[str](), Counter[str]()
    faults, games, moves = [], 0, 0
    with pgn.open() as file:
        while (game := chess.pgn.read_game(file)) is not None:
            games += 1
            end = game.end()
            board, said = end.board(), re.sub(r"^[-+][\d./ ]+", "", " ".join(end.comment.split()))  # without its eval
            moves += board.ply() // 2 + (board.ply() % 2) * game.headers["White"].startswith("rookworld")
            results[game.headers["Result"]] += 1
            ended[said] += 1
            words = [word for word in FAULTS if word in said.lower()]
            if game.errors or words or not board.is_game_over(claim_draw=True):
                faults.append(f"game {games}: {said or game.errors}")
    return {"games": games, "moves": moves, "results": dict(results), "ended": dict(ended), "faults": faults}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=("python-chess", "xboard"), default="python-chess")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--games", type=int)
    parser.add_argument("--max_plies", type=int, default=60, help="python-chess's games end there.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    command, start = engine_command(args.model), time.perf_counter()
    if args.program == "xboard":
        result = play_by_xboard(command, args.games or 10)
    else:
        result = {"max_plies": args.max_plies, **play_by_python_chess(command, args.games or 100, args.max_plies)}
    result |= {"model": args.model, "seconds": round(time.perf_counter() - start, 1), "versions": versions()}
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.write_text(json.dumps({**known, args.program: result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
