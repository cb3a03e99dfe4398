"""A model as a UCI engine, for any chess program: `rookworld-uci --model FOLDER`.

The model answers each position with one `P:` completion, so there is nothing to search and `go` ignores its limits.
An engine must never make an illegal move. Where the model's `B:` is not legal, its player falls back, in this order:

    candidates   the first legal move of the model's own list, its highest eval first;
    random       any legal move, drawn from the seed and the position.

Each fallback is told in an `info string` line. Protocol: Stefan Meyer-Kahlen,
"Description of the universal chess interface (UCI)", April 2006.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import chess

if TYPE_CHECKING:  # importing torch takes seconds, and chess programs wait few of them for `uciok`
    from rookworld_trl.chess.play import ModelPlayer

NAME = "rookworld-uci"


HOTTEST = 200  # UCI has no fractions: temperature in hundredths, 0 is greedy


class UciEngine:
    """Answers UCI lines one by one.

    Args:
        load: a model and its tokenizer; called when they are first needed.
        write: takes each line of the answer.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], write: Callable[[str], None]) -> None:
        self._load, self._write = load, write
        self._temperature = 0  # in hundredths
        self._loaded: tuple[Any, Any] | None = None
        self._board = chess.Board()
        self._held: str | None = None  # the move that `stop` or `ponderhit` lets go
        self._rng = random.Random(0)

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until `quit` or their end."""
        all(map(self.answer, lines))

    def answer(self, line: str) -> bool:
        """Answer one line; False if it ends the engine. An impossible one is told in an `info string`."""
        words = line.split()
        # "Any unknown command or token should just be ignored", up to the first word that is one.
        known = {"uci", "isready", "ucinewgame", "position", "go", "stop", "ponderhit", "setoption", "quit"}
        while words and words[0] not in known:
            words = words[1:]
        if not words:
            return True
        command, rest = words[0], words[1:]
        try:
            if command == "quit":
                return False
            if command == "uci":
                self._introduce()
            elif command == "isready":
                self._player()
                self._write("readyok")
            elif command == "ucinewgame":
                self._board = chess.Board()
            elif command == "position":
                self._board = read_position(rest)
            elif command == "setoption":
                self._set(rest)
            elif command == "go":
                self._go(rest)
            elif self._held is not None:  # stop, ponderhit
                self._write(self._held)
                self._held = None
        except (ValueError, OSError) as error:
            self._write(f"info string error: {' '.join(str(error).split())}")
            if command == "isready":
                self._write("readyok")
            if command == "go":
                self._write("bestmove 0000")
        return True

    def _introduce(self) -> None:
        self._write(f"id name {NAME}")
        self._write("id author the rookworld-trl authors")
        self._write(f"option name Temperature type spin default 0 min 0 max {HOTTEST}")
        self._write("uciok")

    def _set(self, words: Sequence[str]) -> None:
        name, _, value = " ".join(words).removeprefix("name ").partition(" value ")
        if name.strip().lower() != "temperature":
            raise ValueError(f"no option '{name}'; there is Temperature")
        if not (value.strip().isdecimal() and int(value) <= HOTTEST):
            raise ValueError(f"Temperature: {value} is not between 0 and {HOTTEST}; it stays {self._temperature}")
        self._temperature = int(value)

    def _player(self) -> "ModelPlayer":
        from rookworld_trl.chess.play import ModelPlayer

        self._loaded = self._loaded or self._load()
        seed = self._rng.getrandbits(31)  # a new one each time: a position met again is sampled again
        return ModelPlayer(*self._loaded, temperature=self._temperature / 100, seed=seed)

    def _go(self, words: Sequence[str]) -> None:
        board = self._board
        if not any(board.legal_moves):
            self._write(f"info depth 0 score {'mate 0' if board.is_check() else 'cp 0'}")
            self._write("bestmove (none)")
            return
        move, origin, output = self._player().choose([board])[0]
        assert move is not None
        evals = dict(zip(output.moves, output.evals, strict=False)) if output is not None else {}
        # The model knows mates as about +-1000 pawns, not their length.
        score = f" score cp {round(100 * evals[move])}" if move in evals else ""
        self._write(f"info depth 1 seldepth 1{score} nodes 1 pv {move}")
        if origin != "own":
            written = f"B: {output.best}" if output is not None else "no answer of the format"
            self._write(f"info string fallback {origin}: the model wrote {written}")
        if "infinite" in words or "ponder" in words:
            self._held = f"bestmove {move}"
        else:
            self._write(f"bestmove {move}")


def read_position(words: Sequence[str]) -> chess.Board:
    """The board of `startpos` or `fen <six fields>`, then `moves ...`.

    Raises:
        ValueError: a malformed or illegal position, or a move that is illegal in it; the text says which.
    """
    cut = words.index("moves") if "moves" in words else len(words)
    setup, moves = words[:cut], words[cut + 1 :]
    if setup[:1] == ["startpos"]:
        board = chess.Board()
    elif setup[:1] == ["fen"]:
        board = chess.Board(" ".join(setup[1:]))
        if not board.is_valid():
            raise ValueError(f"position {' '.join(setup[1:])!r} is not legal: {board.status()!r}")
    else:
        raise ValueError("position: write 'startpos' or 'fen' and a FEN")
    for text in moves:
        board.push_uci(text)
    return board


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `rookworld-uci`."""

    def load_model() -> tuple[Any, Any]:
        from rookworld_trl.modeling.loading import load

        return load(args.model)

    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", default="nano", help="'nano', which comes with the package, a folder, or a name on the Hub."
    )
    args = parser.parse_args(arguments)
    UciEngine(load_model, lambda line: print(line, flush=True)).run(sys.stdin)


if __name__ == "__main__":
    main()
