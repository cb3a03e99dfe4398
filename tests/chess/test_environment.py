"""`A:` text and ground truth: hand-written transitions, rules of the draw, illegal moves of every kind."""

import chess
import pytest

from rookworld_trl.chess import ParseError, environment
from rookworld_trl.chess.environment import EnvironmentOutput, transition

START = chess.STARTING_FEN
LEGAL = (0.001, False, False)
DRAW = (0.5, True, False)
MATE = (1.0, True, False)
ILLEGAL = (-1.0, False, True)


def outcome(output: EnvironmentOutput) -> tuple[float, bool, bool]:
    return output.reward, output.terminated, output.truncated


@pytest.mark.parametrize(
    ("fen", "move", "after", "expected"),
    [
        # an en-passant square stands only where a capture is legal
        (START, "e2e4", "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1", LEGAL),
        (
            "rnbqkbnr/ppp1pppp/8/8/3p4/8/PPPPPPPP/RNBQKBNR w KQkq - 0 3",
            "e2e4",
            "rnbqkbnr/ppp1pppp/8/8/3pP3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 3",
            LEGAL,
        ),
        # the capturing pawn would uncover its king on the rank: no square either
        ("8/8/8/8/k2p3R/8/4P3/4K3 w - - 0 1", "e2e4", "8/8/8/8/k2pP2R/8/8/4K3 b - - 0 1", LEGAL),
        # en passant
        ("4k3/8/8/8/3pP3/8/8/4K3 b - e3 0 7", "d4e3", "4k3/8/8/8/8/4p3/8/4K3 w - - 0 8", LEGAL),
        # castling
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 4 9", "e1g1", "r3k2r/8/8/8/8/8/8/R4RK1 b kq - 5 9", LEGAL),
        ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 4 9", "e8c8", "2kr3r/8/8/8/8/8/8/R3K2R w KQ - 5 10", LEGAL),
        # rights go with a rook that moves and with one that is captured
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 4 9", "a1a8", "R3k2r/8/8/8/8/8/8/4K2R b Kk - 0 9", LEGAL),
        # promotion
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8r", "4R3/6k1/8/8/8/8/8/4K3 b - - 0 1", LEGAL),
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8b", "4B3/6k1/8/8/8/8/8/4K3 b - - 0 1", DRAW),  # a lone bishop
        # mates, stalemate, dead material
        ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", "g6g7", "7k/6Q1/5K2/8/8/8/8/8 b - - 1 1", MATE),
        ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", "g6f7", "7k/5Q2/5K2/8/8/8/8/8 b - - 1 1", DRAW),
        ("8/8/8/3k4/8/8/3p4/3K4 w - - 0 1", "d1d2", "8/8/8/3k4/8/8/3K4/8 b - - 0 1", DRAW),
        # the 75-move rule ends the game by itself; mate on the same move goes first
        ("8/8/4k3/8/8/4K3/8/R7 w - - 148 120", "a1a2", "8/8/4k3/8/8/4K3/R7/8 b - - 149 120", LEGAL),
        ("8/8/4k3/8/8/4K3/8/R7 w - - 149 120", "a1a2", "8/8/4k3/8/8/4K3/R7/8 b - - 150 120", DRAW),
        ("7k/8/5KQ1/8/8/8/8/8 w - - 149 120", "g6g7", "7k/6Q1/5K2/8/8/8/8/8 b - - 150 120", MATE),
        # the 50-move rule needs a claim, and nobody claims here
        ("8/8/4k3/8/8/4K3/8/R7 w - - 99 120", "a1a2", "8/8/4k3/8/8/4K3/R7/8 b - - 100 120", LEGAL),
        # Black's move counts the move number up
        ("4k3/8/8/8/8/8/8/R3K3 b - - 3 9", "e8d8", "3k4/8/8/8/8/8/8/R3K3 w - - 4 10", LEGAL),
    ],
)
def test_transitions_by_hand(fen: str, move: str, after: str, expected: tuple[float, bool, bool]) -> None:
    output = transition(fen, move)
    assert output.fen == after
    assert outcome(output) == expected


@pytest.mark.parametrize(
    ("fen", "move"),
    [
        ("4k3/4r3/8/8/8/8/4N3/4K3 w - - 3 20", "e2c3"),  # pinned
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8"),  # promotion to what?
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1h1"),  # castling spelled as king takes rook
        (START, "0000"),
        (START, ""),
        (START, "e2e4 "),
        (START, "Nf3"),
        (START, "e2e4\n"),
        ("7k/5Q2/5K2/8/8/8/8/8 b - - 1 1", "h8g8"),  # the game is over: nothing is legal
        # as it is written, also what python-chess would write otherwise: a square that no pawn can take on, old zeros
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 1", "e7e4"),
        ("4k3/8/8/8/8/8/8/4K2R w K - 07 00", "e1e3"),
    ],
)
def test_illegal_moves_leave_the_position(fen: str, move: str) -> None:
    output = transition(fen, move)
    assert output.fen == fen
    assert outcome(output) == ILLEGAL


def test_malformed_and_illegal_positions_are_refused() -> None:
    """By `board_from_fen`, whose test has every kind."""
    for fen in ("", "8/8/8/8/8/8/8/4K3 w - - 0 1"):
        with pytest.raises(ParseError, match="field 'fen'"):
            transition(fen, "e1e2")


def test_prompt_by_hand() -> None:
    assert environment.prompt(START, "e2e4", []) == f"A: {START}+e2e4+e2e4+"
    past = ["a2a3", "a7a6"] * 6
    prompt = environment.prompt(START, "e2e4", past)
    assert prompt == f"A: {START}+e2e4+{' '.join(past[-9:])} e2e4+"  # ten in all
    parsed = environment.parse_prompt(prompt)
    assert (parsed.fen, parsed.move, parsed.history) == (START, "e2e4", (*past[-9:], "e2e4"))
    assert environment.parse_prompt(f"A: {START}+e2e4++").history == ()


@pytest.mark.parametrize(
    "text",
    [
        f"A: {START}+e2e4+e2e4",
        f"A: {START}+e2e4+e2e4+x",
        f"A: {START}+e2e4+e2e4,e7e5+",
        f"A: {START}+e9e4+e9e4+",
        "",
    ],
)
def test_malformed_prompts(text: str) -> None:
    with pytest.raises(ParseError, match="field 'prompt'"):
        environment.parse_prompt(text)


@pytest.mark.parametrize(
    ("completion", "field"),
    [
        ("", "fields"),
        (START, "fields"),
        (f"{START}+0.001+0", "fields"),
        (f"{START}+0.001+0+0+0", "fields"),
        (f" {START}+0.001+0+0", "fen"),
        ("+0.001+0+0", "fen"),
        (f"{START}++0+0", "reward"),
        (f"{START}+nan+0+0", "reward"),
        (f"{START}+1e3+0+0", "reward"),
        (f"{START}+٣+0+0", "reward"),
        (f"{START}+0.001 +0+0", "reward"),
        (f"{START}+0.001++0", "terminated"),
        (f"{START}+0.001+2+0", "terminated"),
        (f"{START}+0.001+True+0", "terminated"),
        (f"{START}+0.001+0+", "truncated"),
        (f"{START}+0.001+0+0\n", "truncated"),
        (f"{START}+0.001+0+0 ", "truncated"),
    ],
)
def test_refused(completion: str, field: str) -> None:
    with pytest.raises(ParseError) as caught:
        environment.parse(completion)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (EnvironmentOutput(START, 0.001, False, False), f"{START}+0.001+0+0"),
        (EnvironmentOutput(START, 1.0, True, False), f"{START}+1.0+1+0"),
        (EnvironmentOutput(START, -1.0, False, True), f"{START}+-1.0+0+1"),
    ],
)
def test_writing_by_hand_and_back(output: EnvironmentOutput, text: str) -> None:
    assert environment.format_completion(output) == text
    assert environment.parse(text) == output
