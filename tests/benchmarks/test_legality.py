"""Kinds of illegal moves and the probability of legal ones, by hand."""

from types import SimpleNamespace
from typing import Any

import chess
import pytest
import torch

from benchmarks.legality import kind, legal_mass, table
from rookworld_trl.data.trees import Words
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer

PINNED = "4k3/8/8/8/4r3/8/4B3/4K3 w - - 0 1"


@pytest.mark.parametrize(
    ("fen", "move", "name"),
    [
        (PINNED, "e2d3", "pinned"),
        ("4k3/8/8/8/8/8/r7/4K3 w - - 0 1", "e1e2", "into_check"),
        ("4k3/8/8/8/4r3/8/3N4/4K3 w - - 0 1", "d2b3", "leaves_check"),
        ("4k3/8/8/8/8/8/P7/R3K3 w - - 0 1", "a1a3", "jump"),
        ("4k3/8/8/8/8/8/P7/R3K3 w - - 0 1", "a1a2", "own_man"),
        ("4k3/8/8/8/8/8/P7/R3K3 w - - 0 1", "a1b2", "geometry"),
        ("4k3/8/8/8/8/8/P7/R3K3 w - - 0 1", "zz", "other"),
    ],
)
def test_kinds(fen: str, move: str, name: str) -> None:
    assert kind(chess.Board(fen), move) == name


class Fixed:
    """Writes what it was given behind any token, whatever stood before: logits by token, else 0."""

    def __init__(self, size: int, behind: dict[int, dict[int, float]]) -> None:
        self.size, self.behind = size, behind

    def __call__(self, ids: torch.Tensor) -> Any:
        logits = torch.zeros(*ids.shape, self.size)
        for place, token in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])).tolist():
            for wanted, logit in self.behind.get(int(ids[place, token]), {}).items():
                logits[place, token, wanted] = logit
        return SimpleNamespace(logits=logits)


def test_the_probability_of_what_is_legal() -> None:
    """A pinned bishop may not move, the king has two squares on each side of it; half the mass goes to the bishop."""
    tokenizer = build_nano_tokenizer()
    words = Words(tokenizer)
    king, bishop = words[" e1d1"][0], words[" e2d3"][0]
    sure = 100.0
    behind = {words[" M:"][-1]: {king: sure, bishop: sure}, king: {words[f" e1{to}"][1]: sure for to in ("d1", "e2")}}
    found = legal_mass(Fixed(len(tokenizer), behind), tokenizer, [PINNED])["other"]
    assert found == {"K": [0.5, 1], "from": [0.5, 1], "move": [0.25, 1]}


def test_positions_in_check_are_counted_apart() -> None:
    tokenizer = build_nano_tokenizer()
    found = legal_mass(Fixed(len(tokenizer), {}), tokenizer, ["4k3/8/8/8/4r3/8/8/4K3 w - - 0 1", chess.STARTING_FEN])
    size = len(tokenizer)
    assert found["in check"]["K"] == [pytest.approx(4 / size, abs=1e-4), 1]  # off the file: d1, d2, f1, f2
    assert found["other"]["P"] == [pytest.approx(2 / size, abs=1e-4), 8]
    assert found["other"]["from"] == [pytest.approx(10 / size, abs=1e-4), 1]


def test_the_table() -> None:
    masses = {"from": [0.9, 1], "move": [0.8, 1]} | {man: [0.5, 1] for man in "KQRBNP"}
    one = {"positions": {"in check": 10, "other": 90}, "illegal": {"in check": 4, "other": 5}, "kinds": {"jump": 9}}
    shown = table({"checkpoints": {"one": one | {"mass": {"in check": masses, "other": masses}}}})
    assert "| illegal `B:`, in check | 4 of 10 |" in shown
    assert "| `jump` | 9 |" in shown
    assert "| legal mass, other: moves | 0.800 |" in shown
