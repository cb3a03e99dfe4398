"""Positions to be solved: mates in one, and tactics for dev and for test.

Mates come by python-chess alone, the same on every machine. Of tactics, one move wins: as in Lichess's puzzles, the
opponent has just blundered and one move punishes it. In a level position of noisy engine self-play, blunders are drawn
among the legal moves; a position after one is kept if, by the engine's values of all of its legal moves,

- the best move leaves a win chance of `WINS` or more (Lichess's formula; +110 centipawns), and
- every other move leaves `BLUNDER` less or worse: 15 points of win chance are what Lichess calls a blunder, and
- the best move neither checkmates at once nor takes back what was just taken.

In a third of the positions of a split the best move is not among those that take the most: it takes less, gives check
or is quiet. In the others no move takes more than the best one, the usual punishment of a noisy player's blunder. Games
of dev and of test are their own. Needs Stockfish; the same bytes for a seed and an engine; run again to resume.
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import chess

from recipes.making.generation import RANDOM_SHARES, TEMPERATURES, GameSettings, choose_move, opening_position
from recipes.making.shipping import write_held_out
from rookworld_trl.chess import position_key
from rookworld_trl.chess.dataset import (
    MATES_FILE,
    SPLITS,
    TACTICS_FILES,
    SplitName,
    positions_to_solve,
    shipped_positions,
    split_of,
)
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.play import read_lines
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.chess.strata import BLUNDER, material_won, mating_moves, winning_move

MATES, MATES_SEED, MATE_PLIES = 1_200, 0, 160  # of the shipped file; the longest game
# Share of moves that take the most material; the others are random. One share a game, from wild games to greedy ones.
GREEDY_SHARES = (0.0, 0.3, 0.6)

TACTICS, TACTICS_SEED = 1_000, 29  # of each shipped file
OTHERS = 1 / 3  # share of the positions whose best move is not to take the most
LABEL_NODES = 50_000  # shared by all legal moves
# To play with, to find blunders with, and to look at what stands behind them before it is valued.
PLAY_NODES, BLUNDER_NODES, FILTER_NODES = 50, 3_000, 2_000
MAX_PLIES = 100
LEVEL, DECIDED = 250, 800  # centipawns: blunders are looked for where a position is level; a decided game ends
LOOK_SHARE = 0.5  # of the level positions
MOST_SHARE = 0.2  # of these, where the best move is to take the most, since such blunders are common
TRIES = 8  # blunders looked at in a position
CHUNK = 20  # games that an engine plays in a row


def write_epd(path: Path, lines: Iterable[str]) -> None:
    """A compressed EPD file, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def clocks(board: chess.Board) -> dict[str, Any]:
    """The move clocks as EPD's operations."""
    return {"hmvc": board.halfmove_clock, "fmvn": board.fullmove_number}


# Mates in one


def mates(count: int = MATES, seed: int = MATES_SEED, taken: Container[str] = ()) -> Iterator[str]:
    """EPD lines of different positions, White and Black to mate in turn; `bm` has every mating move.

    Each is the first position of a noisy game in which that colour can mate.

    Args:
        taken: positions to leave out, by `position_key`.
    """
    seen: set[str] = set()
    game = 0
    while len(seen) < count:
        board = first_mate(random.Random(f"{seed}:{game}"), colour=len(seen) % 2 == 0)
        game += 1
        if board is None or (key := position_key(board.fen())) in seen or key in taken:
            continue
        seen.add(key)
        yield board.epd(bm=mating_moves(board), id=f"mate in one {len(seen)}", **clocks(board))


def first_mate(rng: random.Random, colour: chess.Color) -> chess.Board | None:
    """Play a game up to the first position in which `colour` can mate; None where there is none."""
    board, share = chess.Board(), rng.choice(GREEDY_SHARES)
    for _ in range(MATE_PLIES):
        moves = sorted(board.legal_moves, key=chess.Move.uci)
        if not moves or board.is_insufficient_material():
            return None
        if board.turn == colour and mating_moves(board):
            return board
        if rng.random() < share:
            won = [material_won(board, move) for move in moves]
            moves = [move for move, worth in zip(moves, won, strict=True) if worth == max(won)]
        board.push(rng.choice(moves))
    return None


def build_mates(output: Path, count: int = MATES, seed: int = MATES_SEED) -> None:
    """Write the file, none of whose positions a shipped row to train on shows, and the list of held-out answers with
    them."""
    file = output / MATES_FILE.name
    write_epd(file, mates(count, seed, shipped_positions("train")))
    write_held_out(output, {"test": positions_to_solve(file)})


# Tactics


def kind_of(board: chess.Board, move: chess.Move) -> str:
    """`material` if the move takes something and no move takes more; else `capture`, `check` or `quiet`."""
    won = material_won(board, move)
    if won and won == max(material_won(board, each) for each in board.legal_moves):
        return "material"
    return "capture" if won else "check" if board.gives_check(move) else "quiet"


def shipped_keys() -> set[str]:
    """All positions that the shipped splits and mates show, by `position_key`."""
    return positions_to_solve(MATES_FILE).union(*map(shipped_positions, SPLITS))


def tactics_of_game(
    game: int, seed: int, nodes: int, engines: Mapping[int, Engine], openings: Sequence[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """Play a noisy game and look for positions after blunders at some plies: one at most at a ply.

    Args:
        engines: by the nodes that they search.

    Returns:
        `fen`, `kind` and `cp`, the values of all legal moves in UCI order.
    """
    rng = random.Random(f"{seed}:{game}")
    board = opening_position(rng, openings)
    noise = {side: (rng.choice(TEMPERATURES), rng.choice(RANDOM_SHARES[:-1])) for side in chess.COLORS}
    found = []
    while len(board.move_stack) < MAX_PLIES and not board.is_game_over():
        values = engines[PLAY_NODES].analyse(board, multipv=5, game=game)
        if not values or abs(values[0].centipawns) > DECIDED:
            break
        if rng.random() < LOOK_SHARE and abs(values[0].centipawns) <= LEVEL:
            takes_most = rng.random() < MOST_SHARE
            for after, taken in blunders(board, takes_most, engines[BLUNDER_NODES], rng):
                wanted = partial(is_wanted, after, taken, takes_most)
                if wanted(values_of(engines[FILTER_NODES], after, 2)) and wanted(
                    every := values_of(engines[nodes], after)
                ):
                    cp = [every[move] for move in sorted(every)]
                    found.append({"fen": after.fen(), "cp": cp, "takes_most": takes_most})
                    break
        board.push_uci(choose_move(board, values, *noise[board.turn], GameSettings(), rng))
    return found


def blunders(
    board: chess.Board, takes_most: bool, engine: Engine, rng: random.Random
) -> Iterator[tuple[chess.Board, chess.Square | None]]:
    """Positions after moves that lose `BLUNDER` or more and that a move of the wanted kind seems to punish, none with a
    mate in one; where something was taken, its square."""
    values = engine.analyse(board, multipv=500, game=board.fen()) or []
    most = max((win_chance(value.centipawns) for value in values), default=0.0)
    found = sorted(
        (value.move, value.reply) for value in values if most - win_chance(value.centipawns) >= BLUNDER and value.reply
    )
    tries = TRIES
    for blunder, reply in rng.sample(found, len(found)):
        after, move = board.copy(stack=False), chess.Move.from_uci(blunder)
        after.push(move)
        if (kind_of(after, chess.Move.from_uci(reply)) == "material") != takes_most or mating_moves(after):
            continue
        yield after, move.to_square if board.is_capture(move) else None
        tries -= 1
        if not tries:
            return


def is_wanted(board: chess.Board, taken: chess.Square | None, takes_most: bool, values: Mapping[str, int]) -> bool:
    """Whether, by these values, one move wins, takes the most or not, and takes nothing back from `taken`."""
    best = winning_move(values)
    if best is None or (move := chess.Move.from_uci(best)).to_square == taken:
        return False
    return (kind_of(board, move) == "material") == takes_most


def values_of(engine: Engine, board: chess.Board, multipv: int = 500) -> dict[str, int]:
    """Centipawns of the best moves by UCI; none where the engine failed or the game is over."""
    found = engine.analyse(board, multipv=multipv, game=board.fen()) or []
    return {value.move: value.centipawns for value in found}


def tactics_of_games(
    games: Sequence[int], seed: int, nodes: int, openings: str | None, engine_path: str | None
) -> list[list[dict[str, Any]]]:
    """What `tactics_of_game` finds in each game."""
    lines = read_lines(openings) if openings else []
    with ExitStack() as stack:
        engines = {
            number: stack.enter_context(
                Engine(engine_path, nodes=number, hash_mb=16 if number == nodes else 1, timeout=60.0)
            )
            for number in {PLAY_NODES, BLUNDER_NODES, FILTER_NODES, nodes}
        }
        return [tactics_of_game(game, seed, nodes, engines, lines) for game in games]


def choose(
    found: Mapping[int, Sequence[dict[str, Any]]], count: int, taken: Container[str]
) -> dict[SplitName, list[dict[str, Any]]]:
    """The first `count` positions of each split, of both kinds; none that is taken or held out by the other split."""
    seen: set[str] = set()
    splits = list(TACTICS_FILES)  # games of dev and of test take turns
    chosen: dict[SplitName, list[dict[str, Any]]] = {split: [] for split in splits}
    others = round(OTHERS * count)
    left = Counter({(split, most): count - others if most else others for split in chosen for most in (True, False)})
    for game in sorted(found):
        for entry in found[game]:
            split, key = splits[game % 2], position_key(entry["fen"])
            free = key not in seen and key not in taken and split_of(entry["fen"]) in ("train", split)
            if free and left[split, entry["takes_most"]]:
                seen.add(key)
                left[split, entry["takes_most"]] -= 1
                chosen[split].append({**entry, "game": game})
    return chosen


def epd_line(entry: Mapping[str, Any], number: int) -> str:
    """EPD of a position: `bm`, its value `ce`, the second best value and the game in `c0`, clocks, its kind as `id`."""
    board = chess.Board(entry["fen"])
    values = dict(zip(sorted(move.uci() for move in board.legal_moves), entry["cp"], strict=True))
    best = chess.Move.from_uci(winning_move(values) or "")
    second = sorted(values.values())[-2]
    operations: dict[str, Any] = {"ce": max(values.values()), "c0": f"second best {second}, game {entry['game']}"}
    return board.epd(bm=[best], **operations, **clocks(board), id=f"{kind_of(board, best)} {number}")


def build_tactics(
    output: Path,
    taken: Container[str],
    *,
    count: int = TACTICS,
    seed: int = TACTICS_SEED,
    nodes: int = LABEL_NODES,
    workers: int = 1,
    openings: str | None = None,
    engine_path: str | None = None,
) -> Iterator[int]:
    """Write both files, and the list of `dataset.held_out_answers` with their positions, so that none is trained on.

    Run again, it goes on where it was interrupted: `tactics.jsonl` remembers the games. Yields how many positions there
    are after each round of games.

    Args:
        taken: positions to leave out, by `position_key`: those of the shipped splits and of the mates.
    """
    output.mkdir(parents=True, exist_ok=True)
    memory = output / "tactics.jsonl"
    found: dict[int, list[dict[str, Any]]] = {}
    for line in memory.read_text().splitlines() if memory.exists() else ():
        played = json.loads(line)
        if (played["seed"], played["nodes"]) == (seed, nodes):
            found[played["game"]] = played["found"]
    with ProcessPoolExecutor(max_workers=workers) as executor, memory.open("a") as file:
        while sum(map(len, (chosen := choose(found, count, taken)).values())) < len(TACTICS_FILES) * count:
            yield sum(map(len, chosen.values()))
            rounds = [range(len(found) + i * CHUNK, len(found) + (i + 1) * CHUNK) for i in range(workers)]
            play = partial(tactics_of_games, seed=seed, nodes=nodes, openings=openings, engine_path=engine_path)
            for games, results in zip(rounds, executor.map(play, rounds), strict=True):
                found |= zip(games, results, strict=True)
                memories = ({"seed": seed, "nodes": nodes, "game": game, "found": found[game]} for game in games)
                file.write("".join(f"{json.dumps(each)}\n" for each in memories))
            file.flush()
    for split, entries in chosen.items():
        lines = (epd_line(entry, number) for number, entry in enumerate(entries, start=1))
        write_epd(output / TACTICS_FILES[split].name, lines)
    write_held_out(output, {split: positions_to_solve(output / file.name) for split, file in TACTICS_FILES.items()})
