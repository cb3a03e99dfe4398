"""Self-play as training prompts: which positions come in, in whose places, and that a resumed run meets the same."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import chess
import pytest
from datasets import Dataset

from rookworld_trl.chess import dataset as splits
from rookworld_trl.chess import environment
from rookworld_trl.chess.own_games import Found, SelfPlay, read_options

BATCH = 8
STARTS = {
    "opening": "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1",
    "middlegame": "r4rk1/pp3ppp/2n1b3/3p4/3P4/2N1B3/PP3PPP/R4RK1 w - - 0 16",
    "endgame": "8/5k2/8/3R4/8/4K3/5P2/8 w - - 0 40",
    "check": "8/8/8/8/4k3/8/4r3/4K3 w - - 0 50",
}
QUIET = environment.prompt("8/5k2/8/3R4/8/4K3/5P2/8 w - - 0 40", "e3e4", ["f8f7"])
ILLEGAL = environment.prompt(STARTS["endgame"], "e3e8", [])
GIVEN = {"games": 12, "plies": 12, "batches": 2, "per_opening": 99, "temperatures": [1.2, 0.8]}

Make = Callable[..., SelfPlay]


def policy_row(fen: str) -> dict[str, Any]:
    moves = sorted(move.uci() for move in chess.Board(fen).legal_moves)
    values = {"legal_moves": moves, "legal_cp": [7 * number for number in range(len(moves))]}
    return {"prompt": f"P: {fen}", "task": "policy", "target": "stored", **values}


def environment_row(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "task": "environment", "target": "right", "legal_moves": [], "legal_cp": []}


@pytest.fixture
def dataset() -> Dataset:
    """Ten batches: `P:` an opening (twice), a middlegame, an endgame, a check; `A:` two quiet moves, an illegal one."""
    batch = [policy_row(STARTS[name]) for name in ("opening", "opening", "middlegame", "endgame", "check")]
    batch += [environment_row(prompt) for prompt in (QUIET, QUIET, ILLEGAL)]
    return Dataset.from_list(
        [{**row, "stratum": "", "game": "", "place": place} for place, row in enumerate(batch * 10)]
    )


@pytest.fixture
def make(dataset: Dataset, tiny_model: Any, tiny_tokenizer: Any) -> Make:
    def valued(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row if row["task"] == "environment" else row | {"legal_moves": ["all"]} for row in rows]

    def made(values: Any = valued, held_out: Any = (), **changes: Any) -> SelfPlay:
        options = read_options(GIVEN | changes)
        given = {"max_new_tokens": 12, "seed": 3, "values": values, "held_out": held_out}
        return SelfPlay(options, dataset, BATCH, tiny_model, tiny_tokenizer, **given)

    return made


def batches(source: SelfPlay, numbers: list[int]) -> list[list[dict[str, Any]]]:
    """The batches of these numbers, each prompt dealt twice."""
    chosen = []
    for number in numbers:
        places = range(number * BATCH, (number + 1) * BATCH)
        rows = [source.dataset[place] for place in places for _ in range(2)]
        source.choose(rows)
        assert rows[::2] == rows[1::2]
        chosen.append(rows[::2])
    return chosen


def of_games(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for batch in rows for row in batch if row["game"].startswith("self-play")]


def fen_of(row: dict[str, Any]) -> str:
    return row["prompt"][3:].split("+")[0]


def key(fen: str) -> str:
    return " ".join(fen.split()[:4])


def by_hand(fen: str) -> str:
    men, board = sum(each in "nbrqNBRQ" for each in fen.split()[0]), chess.Board(fen)
    phase = "endgame" if men <= 6 else "opening" if men >= 12 and int(fen.split()[5]) <= 12 else "middlegame"
    return f"{phase}, check" if board.is_check() else phase


def test_every_batch_keeps_its_quotas(make: Make) -> None:
    """And most prompts come from games; no game holds an illegal move, so that prompt stays."""
    rows = batches(make(games=60), [0, 1, 2])
    wanted = {"opening": 2, "middlegame": 1, "endgame": 1, "endgame, check": 1}
    for batch in rows:
        assert Counter(by_hand(fen_of(row)) for row in batch if row["task"] == "policy") == wanted
        moves = [(chess.Board(fen_of(row)), row["prompt"].split("+")[1]) for row in batch[5:]]
        assert [chess.Move.from_uci(move) in board.legal_moves for board, move in moves] == [True, True, False]
        assert not any(board.gives_check(board.parse_uci(move)) for board, move in moves[:2])
        assert batch[7]["prompt"] == ILLEGAL
    assert len(of_games(rows)) >= 16
    assert {"P", "A"} == {row["prompt"][0] for row in of_games(rows)}


def test_openings_have_quotas_and_no_position_comes_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four openings by hand: three positions of the first game, of which two are used; the others' are the same one,
    but for the clocks, in both generations."""
    source, board, game = make(per_opening=2, values=list), chess.Board(), []
    for move in ("g1h3", "g8h6", "h3g5", "h6g4", "g5e4"):
        board.push_uci(move)
        reply = next(iter(sorted(each.uci() for each in board.legal_moves)))
        game.append(Found(board.fen(), reply, (), "first", "self-play first"))
    game = [each for each in game if split_by_hand(each.fen) == "train"][:4]
    *three, other = game
    clock = other.fen.rsplit(" ", 2)[0] + " 1 7"
    same = [Found(clock, other.move, (), name, f"self-play {name}") for name in ("second", "third")]
    monkeypatch.setattr(source, "play", lambda generation, rng: three + same)
    first, second = batches(source, [0, 1]), batches(source, [2, 3])
    assert Counter(row["game"][10:] in ("second", "third") for row in of_games(first)) == {False: 2, True: 1}
    assert len(of_games(second)) == 1, "the one that the first generation had no room for"
    shown = [key(fen_of(row)) for row in of_games(first + second)]
    assert len(set(shown)) == len(shown) == 4


def split_by_hand(fen: str) -> str:
    digest = hashlib.blake2b(key(fen).encode(), digest_size=8, person=b"rookworld-split").digest()
    permille = int.from_bytes(digest, "big") % 1000
    return "test" if permille < 40 else "dev" if permille < 80 else "train"


def positions_shown(rows: list[dict[str, Any]]) -> set[str]:
    """By the prompt and, for `A:`, after the move."""
    shown = set()
    for row in rows:
        board = chess.Board(fen_of(row))
        shown.add(key(board.fen()))
        if row["task"] == "environment":
            board.push_uci(row["prompt"].split("+")[1])
            assert row["target"].split("+")[0] == board.fen()
            shown.add(key(board.fen()))
    return shown


def test_held_out_positions_never_enter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their hash, by the list of held-out answers, and those of the user's own held-out rows."""
    source = make(plies=40)
    met = {split_by_hand(each.fen) for each in source.play(0, random.Random(0))}
    assert met == {"train", "dev", "test"}, "the games do not avoid them"
    shown = positions_shown(of_games(batches(source, [0, 1])))
    assert {split_by_hand(fen) for fen in shown} == {"train"}
    listed, own = sorted(shown)[0], sorted(shown)[1]
    held_out = {splits.position_number(f"{listed} 0 1"): "dev"}
    monkeypatch.setattr(splits, "held_out_answers", lambda: held_out)
    again = positions_shown(of_games(batches(make(plies=40, held_out={own}), [0, 1])))
    assert again
    assert not again & {listed, own}


def test_prompts_of_a_game_have_its_moves_and_right_answers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source, met = make(), []
    play = source.play
    monkeypatch.setattr(source, "play", lambda *of: met.extend(play(*of)) or list(met))
    rows = [row for row in of_games(batches(source, [0, 1])) if row["task"] == "environment"]
    for found in met:
        board = chess.Board(found.opening)
        moves = found.history[1:] if found.history[:1] == ("f8f7",) else found.history  # before its start, of QUIET
        for move in moves:
            board.push_uci(move)
        assert board.fen() == found.fen
        assert chess.Move.from_uci(found.move) in board.legal_moves
    assert rows
    for row in rows:
        (found,) = [each for each in met if row["prompt"] == environment.prompt(each.fen, each.move, each.history)][:1]
        assert row["prompt"][:-1].split("+")[2].split() == [*found.history, found.move][-10:]
    assert positions_shown(rows)
