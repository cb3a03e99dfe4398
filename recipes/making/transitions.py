"""Chooses the `A:` rows of the shipped data: so many of each stratum, one a position, histories of several lengths."""

import itertools
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import chess

from recipes.making.moves import ILLEGAL_KINDS
from rookworld_trl.chess import environment, position_key
from rookworld_trl.chess.dataset import SplitName, position_number, split_by_hash, split_of
from rookworld_trl.chess.format import HISTORY_LENGTH
from rookworld_trl.chess.strata import ENVIRONMENT_STRATA, stratum

# Rows of each stratum in test; dev has half of it, train three times as many where there are so many.
ROWS = 210
MANY = {"quiet": 300, "capture": 240, "illegal": 300}
FACTOR: dict[SplitName, float] = {"test": 1.0, "dev": 0.5, "train": 3.0}

# Rows of these are made of a position and a quiet move: other clocks, a history that repeats it, first moves of games.
MADE = ("seventyfive_moves", "fifty_moves", "repetition")
STRATA = (*(name for name in ENVIRONMENT_STRATA if name not in MADE), *MADE, "first_moves")
COMMON = ("quiet", "capture", "check")  # of these the answer's position is held out by its hash, too
HISTORIES = (1, 2, 5, HISTORY_LENGTH)  # moves shown, this one included, if so many are known
EXTRA = 8_000  # positions of random games, and as many of a cornered king, looked at for what games rarely offer
FIRST_PLIES, FIRST_GAMES = 7, 15_000
_CASTLING_HOMES = chess.BB_CORNERS | chess.BB_E1 | chess.BB_E8


class EnvironmentRows:
    """Rows of one split.

    Args:
        split: whose rows.
        rng: draws moves and histories.
        taken: positions, by `position_key`, that no row may show.
        trained: positions, by `position_number`, that no answer may lead to.
    """

    def __init__(self, split: SplitName, rng: random.Random, taken: Collection[str], trained: Collection[int]) -> None:
        self.split, self.rng, self.trained = split, rng, trained
        self.taken = set(taken)
        self.left = {name: round(FACTOR[split] * MANY.get(name, ROWS)) for name in STRATA}
        self.rows: list[dict[str, Any]] = []

    def choose(self, records: list[dict[str, Any]], openings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, of positions with `fen`, `history` and `game`; the scarce strata are filled first."""
        offers = self._offers([*records, *self._random_games(), *self._cornered()])
        offers["first_moves"] = [(record, self._any_move(record)) for record in self._first_moves(openings)]
        quiet = iter(list(offers["quiet"][len(offers["quiet"]) // 2 :]))
        offers["quiet"] = offers["quiet"][: len(offers["quiet"]) // 2]
        for name in sorted(STRATA, key=lambda name: (name in COMMON, len(offers[name]))):
            if name in MADE:
                make = repeated if name == "repetition" else late
                while self.left[name] and (offer := next(quiet, None)):
                    if made := make(*offer, name, self.rng):
                        self._take(made[0], made[1], name, cut=False)
            for record, move in offers[name]:
                if self.left[name]:
                    self._take(record, move, name)
        return self.rows

    def _take(self, record: dict[str, Any], move: str, name: str, cut: bool = True) -> None:
        """Make a row of it unless one of its positions may not be shown."""
        after = environment.transition(record["fen"], move).fen
        key, answer = position_key(record["fen"]), position_key(after)
        if key in self.taken or (name != "illegal" and answer in self.taken):
            return
        if self.split == "train" and split_of(after) != "train":
            return
        if self.split != "train" and name in COMMON and split_by_hash(after) != self.split:
            return
        if name != "illegal" and position_number(after) in self.trained:
            return
        history = record["history"].split()
        if cut and name != "first_moves":
            shown = self.rng.choice(HISTORIES) - 1
            history = history[-shown:] if shown else []
        self.taken |= {key, answer}
        self.left[name] -= 1
        row = {"task": "environment", "fen": record["fen"], "move": move, "history": " ".join(history)}
        self.rows.append(row | {"stratum": name, "game": record["game"]})

    def _offers(self, records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[dict[str, Any], str]]]:
        """For each stratum the positions that offer it with a move; illegal moves of every kind alike."""
        offers: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        illegal: dict[str, list[tuple[dict[str, Any], str]]] = {kind: [] for kind in ILLEGAL_KINDS}
        for record in records:
            board = chess.Board(record["fen"])
            moves = [move.uci() for move in board.legal_moves]
            kinds: dict[str, str] = {}
            for uci in self.rng.sample(moves, len(moves)):
                kinds.setdefault(stratum(board, uci), uci)
            for kind, uci in kinds.items():
                offers[kind].append((record, uci))
            fewest = min(illegal, key=lambda kind: len(illegal[kind]))
            for kind in (fewest, self.rng.choice(list(illegal))):
                if wrong := ILLEGAL_KINDS[kind](board):
                    illegal[kind].append((record, self.rng.choice(wrong)))
                    break
        offers["illegal"] = [offer for turn in itertools.zip_longest(*illegal.values()) for offer in turn if offer]
        offers.pop("seventyfive_moves", None)
        return offers

    def _random_games(self) -> Iterator[dict[str, Any]]:
        """Positions of the split from random games: captures en passant, rooks taken at home."""
        left = self._extra()
        for number in itertools.count():
            for board in random_game(self.rng):
                if self._is_ours(board.fen()):
                    history = " ".join(move.uci() for move in board.move_stack[-(HISTORY_LENGTH - 1) :])
                    yield {"fen": board.fen(), "history": history, "game": f"random:{self.split}:{number}"}
                    if not (left := left - 1):
                        return

    def _cornered(self) -> Iterator[dict[str, Any]]:
        """Positions of the split with a king at the edge, of no game: mates, stalemates, dead material."""
        left = self._extra()
        while left:
            fen = cornered_king(self.rng).fen()
            if self._is_ours(fen):
                left -= 1
                yield {"fen": fen, "history": "", "game": ""}

    def _is_ours(self, fen: str) -> bool:
        return (split_of(fen) if self.split == "train" else split_by_hash(fen)) == self.split

    def _extra(self) -> int:
        return round(EXTRA * min(1.0, FACTOR[self.split]))

    def _first_moves(self, openings: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Positions of the split from the first moves of games: human ones and random ones, with all moves before."""
        yield from (record for record in openings if chess.Board(record["fen"]).ply() <= FIRST_PLIES)
        found = 0
        for _ in range(FIRST_GAMES):
            board = chess.Board()
            for _ in range(self.rng.randint(1, FIRST_PLIES)):
                board.push(self.rng.choice(list(board.legal_moves)))
                if not any(board.legal_moves):
                    break
            else:
                if found < 2 * self.left["first_moves"] and self._is_ours(board.fen()):
                    found += 1
                    history = " ".join(move.uci() for move in board.move_stack)
                    yield {"fen": board.fen(), "history": history, "game": ""}

    def _any_move(self, record: dict[str, Any]) -> str:
        return self.rng.choice([move.uci() for move in chess.Board(record["fen"]).legal_moves])


def random_game(rng: random.Random) -> Iterator[chess.Board]:
    """The positions of a random game that likes what is rare: double steps that may be taken en passant, and attacks
    on rooks that could castle."""
    board = chess.Board()
    while not board.is_game_over() and board.ply() < 60:
        yield board
        moves = list(board.legal_moves)
        rng.shuffle(moves)
        if rng.random() < 0.5:
            moves.sort(key=lambda move: board.piece_type_at(move.from_square) != chess.PAWN)
        board.push(next((move for move in moves if _offers_much(board, move)), moves[0]))


def _offers_much(board: chess.Board, move: chess.Move) -> bool:
    board.push(move)
    much = board.has_legal_en_passant() or bool(
        board.attacks_mask(move.to_square) & board.castling_rights & board.occupied_co[board.turn]
    )
    board.pop()
    return much


def cornered_king(rng: random.Random) -> chess.Board:
    """A legal position, not over, of a king at the edge, another one, and one to three other men, mostly against it."""
    while True:
        board = chess.Board(None)
        edge = rng.choice(list(chess.SquareSet(chess.BB_RANK_1 | chess.BB_RANK_8 | chess.BB_FILE_A | chess.BB_FILE_H)))
        corner = rng.choice((chess.A1, chess.A8, chess.H1, chess.H8))
        squares = [rng.choice((edge, corner)), *rng.sample(chess.SQUARES, rng.randint(2, 4))]
        kinds = ["k", "K", *(rng.choice("QQRBNPP") for _ in squares[2:])]
        for square, kind in zip(squares, kinds, strict=True):
            symbol = kind.lower() if kind != "K" and rng.random() < 0.3 else kind
            board.set_piece_at(square, chess.Piece.from_symbol(symbol))
        board.turn = rng.random() < 0.5
        board.fullmove_number = rng.randint(40, 90)
        board = board.mirror() if rng.random() < 0.5 else board
        if len(set(squares)) == len(squares) and board.is_valid() and not board.is_game_over():
            return board


def late(record: dict[str, Any], move: str, name: str, rng: random.Random) -> tuple[dict[str, Any], str] | None:
    """The position so late after the last capture or pawn move that the quiet move completes 75 moves of each side, or
    50 or more; of no game, for its moves would tell otherwise."""
    *fields, en_passant, _, number = record["fen"].split()
    if en_passant != "-" or not _is_plain(chess.Board(record["fen"]), move):
        return None
    clock = 149 if name == "seventyfive_moves" else rng.choice((99, rng.randint(99, 148)))
    fen = " ".join((*fields, "-", str(clock), str(max(int(number), clock // 2 + rng.randint(1, 40)))))
    return {"fen": fen, "history": "", "game": record["game"]}, move


def repeated(record: dict[str, Any], move: str, name: str, rng: random.Random) -> tuple[dict[str, Any], str] | None:
    """The position after both sides moved there and back twice: the move repeats one for the third time.

    The text proves it, for no king or rook leaves a square that it may have castled from.
    """
    board = chess.Board(record["fen"])
    if board.halfmove_clock > 80 or not _is_plain(board, move):  # or it would end by another rule
        return None
    there = chess.Move.from_uci(move)
    board.push(there)
    answers = [answer for answer in board.legal_moves if _is_plain(board, answer.uci())]
    if not answers:
        return None
    answer = rng.choice(answers)
    board.pop()
    back = [chess.Move(each.to_square, each.from_square) for each in (there, answer)]
    for each in [there, answer, *back] * 2:
        homes = _CASTLING_HOMES & (board.kings | board.rooks)
        if chess.BB_SQUARES[each.from_square] & homes or not board.is_legal(each):
            return None
        board.push(each)
    history = " ".join(each.uci() for each in board.move_stack)
    return {"fen": board.fen(), "history": history, "game": record["game"]}, move


def _is_plain(board: chess.Board, uci: str) -> bool:
    """Whether it is a move of a piece that changes no rights, takes nothing, and does not end the game."""
    move = chess.Move.from_uci(uci)
    if board.piece_type_at(move.from_square) == chess.PAWN or stratum(board, uci) not in ("quiet", "seventyfive_moves"):
        return False
    board.push(move)
    rights = board.castling_rights
    board.pop()
    return rights == board.castling_rights
