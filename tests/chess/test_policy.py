"""`P:` text: padded and single-spaced, strictly read; writing and reading are inverse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookworld_trl.chess import ParseError, policy
from tests.support.positions import format_row

START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
# A row of RookWorld's generator: FEN padded to 90 characters, moves to 30, evals to 40.
PADDED = (
    "P: rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1                                  "
    "M: e2e4 d2d4 g1f3 c2c4 e2e3      E: 0.33 0.3 0.28 0.24 0.2                  B: e2e4"
)


def test_padded_row_by_hand() -> None:
    moves, evals = ("e2e4", "d2d4", "g1f3", "c2c4", "e2e3"), ("0.33", "0.3", "0.28", "0.24", "0.2")
    start = policy.completion_start(PADDED)
    assert start == 3 + 56
    assert policy.parse(PADDED[start:]) == policy.PolicyOutput(moves, tuple(map(float, evals)), "e2e4")
    assert policy.parse_prompt(PADDED[:start]) == START
    assert policy.parse_prompt(PADDED[:93]) == START  # the prompt with its padding
    assert format_row(START, moves, evals, "e2e4", policy.PADDED) == PADDED


@pytest.mark.parametrize(
    ("completion", "moves", "evals", "best"),
    [
        (" M: e2e4 E: 0.3 B: e2e4", ("e2e4",), (0.3,), "e2e4"),
        ("M: e2e4 E: 0.3 B: e2e4", ("e2e4",), (0.3,), "e2e4"),
        (" M: e7e8q e7e8n E: 9.0 -1000.0 B: e7e8q", ("e7e8q", "e7e8n"), (9.0, -1000.0), "e7e8q"),
        (" M: a1a1 E: +1 B: h8h8", ("a1a1",), (1.0,), "h8h8"),  # well-formed is not legal
        (f"{'':65}M: {'a1a1':30}E: {'1.0':40}B: h8h8", ("a1a1",), (1.0,), "h8h8"),  # a FEN of 25 characters
        (f"M: {'a1a1':20}E: {'1.0':39}B: h8h8", ("a1a1",), (1.0,), "h8h8"),
        (
            f"M: {'a7a8q ' * 6}E: {'-1000.0 ' * 6}B: h8h8",
            ("a7a8q",) * 6,
            (-1000.0,) * 6,
            "h8h8",
        ),  # too long for padding
        (" M: e2e4 E: 0.3 0.2 B: d2d4", ("e2e4",), (0.3, 0.2), "d2d4"),  # nor is it counted
        # As the README of the earlier implementation showed it.
        ("M: e2e4,d2d4,g1f3 E: 0.3,-0.2,0.1 B: e2e4", ("e2e4", "d2d4", "g1f3"), (0.3, -0.2, 0.1), "e2e4"),
        ("M: e2e4,d2d4 E: 0.3 0.2 B: e2e4", ("e2e4", "d2d4"), (0.3, 0.2), "e2e4"),
        ("M: e2e4 E: 0.3 B: e2e4\n", ("e2e4",), (0.3,), "e2e4"),  # a line, as RookWorld's generator wrote them
    ],
)
def test_accepted(completion: str, moves: tuple[str, ...], evals: tuple[float, ...], best: str) -> None:
    assert policy.parse(completion) == policy.PolicyOutput(moves, evals, best)


@pytest.mark.parametrize(
    ("completion", "field"),
    [
        ("", "sections"),
        ("M: e2e4 E: 0.3", "sections"),
        ("M: e2e4 E: 0.3 B: e2e4 B: e2e4", "sections"),
        ("M: E: 0.3 B: e2e4", "moves"),
        ("M:e2e4 E: 0.3 B: e2e4", "moves"),
        ("M: e2e4  d2d4 E: 0.3 B: e2e4", "moves"),  # two spaces between moves
        ("M: e2e4,d2d4 g1f3 E: 0.3 B: e2e4", "moves"),
        ("M: e2e4 E: 0.3,0.2 0.1 B: e2e4", "evals"),
        ("M: e9e4 E: 0.3 B: e2e4", "moves"),
        ("M: e2e4\n E: 0.3 B: e2e4", "moves"),
        ("M: e2e4 E: B: e2e4", "evals"),
        ("M: e2e4 E: nan B: e2e4", "evals"),
        ("M: e2e4 E: ٣ B: e2e4", "evals"),
        ("M: e2e4 E: 0.3 B:e2e4", "best"),
        ("M: e2e4 E: 0.3 B: e2e4 d2d4", "best"),
        ("M: e2e4 E: 0.3 B: e2e4 ", "best"),
        (f"{'':66}M: e2e4 E: 0.3 B: e2e4", "sections"),
        (f"M: {'e2e4':31}E: 0.3 B: e2e4", "moves"),
        (f"M: {'e2e4 ' * 7} E: 0.3 B: e2e4", "moves"),
        (f"M: e2e4 E: {'0.3':41}B: e2e4", "evals"),
    ],
)
def test_refused(completion: str, field: str) -> None:
    with pytest.raises(ParseError) as caught:
        policy.parse(completion)
    assert caught.value.field == field


@pytest.mark.parametrize("text", [f"P: {START} M:", f"P: {START}+", f"A: {START}", f"P: {START[:-1]}", "P: "])
def test_malformed_prompts(text: str) -> None:
    with pytest.raises(ParseError):
        policy.parse_prompt(text)


# By our format, and as RookWorld's generator prints them: `str(score.relative.score(mate_score=100000) / 100)`.
OURS = {0: "0.00", 33: "0.33", -34: "-0.34", -4: "-0.04", 994: "9.94", 999: "9.99", 1000: "10.0", 1249: "12.0"}
OURS |= {-1560: "-16.0", 8000: "30.0", -8000: "-30.0", 9997: "1000.0", -9997: "-1000.0", -10000: "-1000.0"}  # mated
THEIRS = {0: "0.0", 30: "0.3", -34: "-0.34", -200: "-2.0", 1207: "12.07", -4766: "-47.66", 9998: "999.98"}
THEIRS |= {-9979: "-999.79", 9990: "999.9", -10000: "-1000.0"}


def test_evals_by_hand() -> None:
    assert {centipawns: policy.format_eval(centipawns) for centipawns in OURS} == OURS
    assert {centipawns: policy.format_eval(centipawns, None) for centipawns in THEIRS} == THEIRS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{'':34}M: {'e2e4 d2d4':30}E: {'0.33 0.3':40}B: e2e4", policy.PADDED),
        (f"{'':34}M: {'e2e4 d2d4':30}E: {'0.33 0.30':40}B: e2e4", policy.Spelling(True, 2)),
        (f"M: {'e2e4 d2d4':30}E: {'0.0 0.0':40}B: e2e4\n", policy.Spelling(True, None, "\n")),
        (" M: e2e4 d2d4 E: 0.33 0.30 B: e2e4", policy.SINGLE),
        (" M: e2e4 d2d4 E: 0.3 0.2 B: e2e4", policy.Spelling(decimals=1)),
        ("  ", policy.Spelling(True, None)),
        (" M: e2e4", policy.Spelling(decimals=1)),
        ("", None),
        (" ", None),
        ("x  y", None),
        ("e2e4 M:", None),
    ],
)
def test_a_spelling_is_seen_in_what_is_written(text: str, expected: policy.Spelling | None) -> None:
    assert policy.spelling_of(text) == expected


def test_a_list_that_is_too_long_for_its_field_ends_with_one_space() -> None:
    evals = ["-1000.00"] * 5
    text = policy.format_completion(["a7a8q"] * 5, evals, "a7a8q", policy.PADDED, 89)
    assert text == f" M: {' '.join(['a7a8q'] * 5)} E: {' '.join(evals)} B: a7a8q"
    assert policy.parse(text).evals == (-1000.0,) * 5


def test_win_chance_by_hand() -> None:
    assert policy.win_chance(0) == 0.5
    assert policy.win_chance(100) == pytest.approx(0.591026, abs=1e-6)  # 1 / (1 + e^-0.368208)
    assert policy.win_chance(-100) == pytest.approx(1 - 0.591026, abs=1e-6)
    assert policy.win_chance(9995) == 1.0
    assert policy.win_chance(-9995) == 0.0


moves = st.from_regex(r"[a-h][1-8][a-h][1-8][qrbn]?", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(moves, min_size=1, max_size=7),
    st.lists(st.integers(-9999, 9999), min_size=1, max_size=7),
    moves,
    st.booleans(),
)
def test_reading_is_the_inverse_of_writing(listed: list[str], values: list[int], best: str, padded: bool) -> None:
    evals = [policy.format_eval(value) for value in values]
    row = format_row(START, listed, evals, best, policy.PADDED if padded else policy.SINGLE)
    read = policy.parse(row[policy.completion_start(row) :])
    assert read == policy.PolicyOutput(tuple(listed), tuple(float(text) for text in evals), best)
