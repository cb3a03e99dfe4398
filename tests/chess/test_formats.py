"""FENs and rows as text: what is spelled right, what isn't, and where a completion starts."""

import chess
import pytest

from rookworld_trl.chess import ParseError, position_key, split_row, task_of
from rookworld_trl.chess.format import board_from_fen, check_fen_text, squares

START = chess.STARTING_FEN


@pytest.mark.parametrize(
    "fen",
    [
        START,
        "rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR w KQkq e6 0 2",
        "8/8/8/8/8/8/8/8 w - - 0 1",  # spelled right; that nobody stands there is for `board_from_fen`
        "4k3/8/8/8/8/8/8/4K2R b K - 99 150",
        "r3k3/8/8/8/8/8/8/4K2R b Kq - 0 1",
        "4k3/8/8/8/8/8/8/4K3 w - - 1234 12345",
    ],
)
def test_fen_spelling_accepted(fen: str) -> None:
    assert check_fen_text(fen) == fen


@pytest.mark.parametrize(
    "fen",
    [
        "",
        "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR",
        "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -",
        f"{START} ",
        f"{START}\n",
        START.replace(" w", "  w"),
        START.replace(" w ", " W "),
        START.replace("KQkq", "QKkq"),  # order
        START.replace("KQkq", ""),
        START.replace("KQkq -", "KQkq e4"),  # no en-passant rank
        START.replace("0 1", "-1 1"),
        START.replace("0 1", "0 1.0"),
        START.replace("0 1", "٠ ١"),  # digits, but not ASCII ones
        START.replace("/8/8/8/8/", "/8/8/8/"),
        START.replace("/8/8/8/8/", "/8/8/8/8/8/"),
        START.replace("/8/8/8/8/", "/8/8/8/7/"),
        START.replace("/8/8/8/8/", "/8/8/8/44/"),
        START.replace("RNBQKBNR", "RNBQKBNRR"),
    ],
)
def test_fen_spelling_refused(fen: str) -> None:
    with pytest.raises(ParseError, match="field 'fen'"):
        check_fen_text(fen)


@pytest.mark.parametrize(
    ("fen", "problem"),
    [
        ("8/8/8/8/8/8/8/4K3 w - - 0 1", "no_black_king"),
        ("4k3/4R3/8/8/8/8/8/4K3 w - - 0 1", "opposite_check"),
    ],
)
def test_illegal_positions_are_named(fen: str, problem: str) -> None:
    with pytest.raises(ParseError, match=problem) as caught:
        board_from_fen(fen)
    assert caught.value.field == "fen"
    assert fen in str(caught.value)


def test_squares_by_hand() -> None:
    assert squares("8/8/8/8/8/8/8/8") == "." * 64
    assert squares("k7/8/8/8/8/8/8/6NK") == "k" + "." * 61 + "NK"
    assert squares("k7/8/8/8/8/8/8") is None
    assert squares("k7/8/8/8/8/8/8/7") is None
    assert squares("k7/8/8/8/8/8/8/88") is None


def test_task_by_prefix() -> None:
    assert task_of("P: anything") == "policy"
    assert task_of("A: anything") == "environment"
    for text in ("", "P:", "p: ", " P: ", "M: e2e4", "rnbqkbnr/"):
        with pytest.raises(ParseError, match="field 'prefix'"):
            task_of(text)


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        (f"P: {START} M: e2e4 E: 0.3 B: e2e4", " M: e2e4 E: 0.3 B: e2e4"),
        # RookWorld pads the FEN to 90 characters: 34 spaces behind these 56
        (
            f"P: {START}{' ' * 34}M: e2e4{' ' * 26}E: 0.3{' ' * 37}B: e2e4",
            f"{' ' * 34}M: e2e4{' ' * 26}E: 0.3{' ' * 37}B: e2e4",
        ),
        (f"A: {START}+e2e4+e2e4+x", "x"),
        (f"A: {START}+e2e4++x", "x"),  # no history at all
        (f"A: {START}+e7e8q+a2a3 e7e8q+", ""),
    ],
)
def test_completion_start(text: str, completion: str) -> None:
    prompt, rest = split_row(text)
    assert rest == completion
    assert prompt + rest == text


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("P: M: e2e4 E: 0.3 B: e2e4", "fen"),
        ("P:  " + START, "fen"),
        (f"A: {START}+Nf3+Nf3+", "prompt"),
        (f"Q: {START}", "prefix"),
    ],
)
def test_rows_without_a_prompt(text: str, field: str) -> None:
    with pytest.raises(ParseError) as caught:
        split_row(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("before", "square"),
    [
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 1", "-"),  # no pawn stands beside e4
        ("rnbqkbnr/ppp1pppp/8/8/3pP3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 3", "e3"),
        ("4k3/8/8/8/r2pP2K/8/8/8 b - e3 0 1", "e3"),
        ("8/8/8/8/k2pP2R/8/8/4K3 b - e3 0 1", "-"),  # taking would open the fourth rank to the rook
    ],
)
def test_position_key_names_an_en_passant_square_that_can_be_taken_on(before: str, square: str) -> None:
    assert position_key(before).split()[3] == square


def test_position_key_drops_the_clocks_only() -> None:
    assert position_key("4k3/8/8/8/8/8/8/4K2R w K - 3 17") == "4k3/8/8/8/8/8/8/4K2R w K -"
