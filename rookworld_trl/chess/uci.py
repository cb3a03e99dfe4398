"""A model as a UCI engine, for any chess program: `rookworld-uci --model FOLDER`.

The model answers each position with one `P:` completion, so there is nothing to search and `go` ignores its limits.
An engine must never make an illegal move. Where the model's `B:` is not legal, its player falls back, in this order:

    retries      sampled completions at temperature 1, as many as the option `Retries` says (0 by default);
    candidates   the first legal move of the model's own list, its highest eval first;
    random       any legal move, drawn from the seed and the position.

Each fallback is told in an `info string` line and counted; `quit` prints the totals. Protocol: Stefan Meyer-Kahlen,
"Description of the universal chess interface (UCI)", April 2006.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chess

from rookworld_trl.chess import policy

if TYPE_CHECKING:  # importing torch takes seconds, and chess programs wait few of them for `uciok`
    from rookworld_trl.chess.play import ModelPlayer

NAME = "rookworld-uci"
MAX_LINES = policy.MAX_CANDIDATES


@dataclass(frozen=True, slots=True)
class _Option:
    """A UCI option: its declaration behind the name, and how its text is read."""

    declared: str
    read: Callable[[str], Any]


def _between(low: float, high: float, kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(f"{text} is not between {low} and {high}")
        return value

    return read


OPTIONS = {
    "Model": _Option("type string default {model}", str),
    # UCI has no fractions: hundredths. 0 is greedy.
    "Temperature": _Option("type spin default 0 min 0 max 200", _between(0, 200, int)),
    "Retries": _Option("type spin default 0 min 0 max 100", _between(0, 100, int)),
    "MultiPV": _Option(f"type spin default 1 min 1 max {MAX_LINES}", _between(1, MAX_LINES, int)),
    "Seed": _Option("type spin default 0 min 0 max 2147483647", _between(0, 2**31 - 1, int)),
}


class UciEngine:
    """Answers UCI lines one by one.

    Args:
        load: a model and its tokenizer from what the option `Model` names; called when they are first needed.
        model: what `Model` is at first.
        write: takes each line of the answer.

    Attributes:
        fallbacks: how often each kind of move was played, by `Choice.origin`.
    """

    def __init__(self, load: Callable[[str], tuple[Any, Any]], model: str, write: Callable[[str], None]) -> None:
        self._load, self._write = load, write
        self._values: dict[str, Any] = {"Model": model, "Temperature": 0, "Retries": 0, "MultiPV": 1, "Seed": 0}
        self._default_model = model
        self._loaded: tuple[str, Any, Any] | None = None
        self._board = chess.Board()
        self._held: str | None = None  # the move that `stop` or `ponderhit` lets go
        self._rng = random.Random(0)
        self.fallbacks: Counter[str] = Counter()

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until `quit` or their end."""
        for line in lines:
            if not self.answer(line):
                break
        if self.fallbacks:
            counted = ", ".join(f"{name} {count}" for name, count in sorted(self.fallbacks.items()))
            self._write(f"info string moves by origin: {counted}")

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
            text = " ".join(str(error).split())
            self._write(f"info string error: {text}")
            if command == "isready":
                self._write("readyok")
            if command == "go":
                self._write("bestmove 0000")
        return True

    def _introduce(self) -> None:
        self._write(f"id name {NAME}")
        self._write("id author the rookworld-trl authors")
        for name, option in OPTIONS.items():
            self._write(f"option name {name} {option.declared.format(model=self._default_model)}")
        self._write("uciok")

    def _set(self, words: Sequence[str]) -> None:
        text = " ".join(words)
        name, _, value = text.removeprefix("name ").partition(" value ")
        key = next((each for each in OPTIONS if each.lower() == name.strip().lower()), None)
        if key is None:
            raise ValueError(f"no option '{name}'; there are {', '.join(OPTIONS)}")
        try:
            self._values[key] = OPTIONS[key].read(value.strip())
        except ValueError as error:
            raise ValueError(f"option {key}: {error}; it stays {self._values[key]}") from error
        if key == "Seed":
            self._rng.seed(self._values[key])

    def _player(self) -> "ModelPlayer":
        from rookworld_trl.chess.play import ModelPlayer

        name = self._values["Model"]
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = (name, *self._load(name))
        temperature, retries = self._values["Temperature"] / 100, self._values["Retries"]
        seed = self._rng.getrandbits(31)  # a new one each time: a position met again is sampled again
        return ModelPlayer(*self._loaded[1:], temperature=temperature, retries=retries, seed=seed)

    def _go(self, words: Sequence[str]) -> None:
        board = self._board
        legal = {move.uci() for move in board.legal_moves}
        if "searchmoves" in words:
            wanted = words[words.index("searchmoves") + 1 :]
            legal = legal & set(wanted) or legal
        if not legal:
            self._write(f"info depth 0 score {'mate 0' if board.is_check() else 'cp 0'}")
            self._write("bestmove (none)")
            return
        move, origin, output = self._player().choose_among([board], [legal])[0]
        assert move is not None
        self.fallbacks[origin] += 1
        for number, (candidate, pawns) in enumerate(self._lines(output, move, legal), start=1):
            self._write(f"info depth 1 seldepth 1 multipv {number}{_score(pawns)} nodes 1 pv {candidate}")
        if origin != "own":
            written = f"B: {output.best}" if output is not None else "no answer of the format"
            self._write(f"info string fallback {origin}: the model wrote {written}")
        best = f"bestmove {move}"
        if "infinite" in words or "ponder" in words:
            self._held = best
        else:
            self._write(best)

    def _lines(self, output: policy.PolicyOutput | None, move: str, legal: set[str]) -> list[tuple[str, float | None]]:
        """The move that is played, then the model's other legal candidates, as many as `MultiPV` asks for, with their
        evals; None where the model gave the move none."""
        from rookworld_trl.chess.play import by_eval

        evals = dict(by_eval(output))
        lines: list[tuple[str, float | None]] = [(move, evals.pop(move, None))]
        lines += ((other, value) for other, value in evals.items() if other in legal)
        return lines[: self._values["MultiPV"]]


def _score(pawns: float | None) -> str:
    """`cp` from the mover's side. The model knows mates as about +-1000 pawns, not their length."""
    return "" if pawns is None else f" score cp {round(100 * pawns)}"


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
    for number, text in enumerate(moves, start=1):
        try:
            board.push_uci(text)
        except ValueError as error:
            raise ValueError(f"position: move {number}, '{text}', is not legal after the moves before it") from error
    return board


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `rookworld-uci`."""

    def load_model(name: str) -> tuple[Any, Any]:
        from rookworld_trl.modeling.loading import load

        return load(name)

    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", default="nano", help="'nano', which comes with the package, a folder, or a name on the Hub."
    )
    args = parser.parse_args(arguments)
    UciEngine(load_model, args.model, lambda line: print(line, flush=True)).run(sys.stdin)


if __name__ == "__main__":
    main()
