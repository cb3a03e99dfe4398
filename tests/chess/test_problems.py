"""Problems of every kind of file, with answers whose worth is known by hand; all suites with the truth and a copy."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rookworld_trl.chess.dataset import MATES_FILE, TACTICS_FILES
from rookworld_trl.chess.problems import Ask, Problem, is_problem_file, read_problems, run_problems
from rookworld_trl.measuring import result_table

# Five lines of the suite: fsmosca/strategic-test-suite, MIT licence.
STS = (Path(__file__).parent / "sts_sample.epd").read_text()

FOOLS_MATE = "rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2"
LICHESS_HEAD = "PuzzleId,FEN,Moves,Rating,RatingDeviation,Popularity,NbPlays,Themes,GameUrl,OpeningTags\n"


def says(move: str, candidates: str | None = None) -> str:
    return f" M: {candidates or move} E: 0.1 B: {move}"


def scripted(script: Callable[[str], str]) -> Ask:
    """A model that is a function of the position."""
    return lambda prompts, title: [script(prompt.removeprefix("P: ")) for prompt in prompts]


def values(problems: Sequence[Problem], script: Callable[[str], str], **group: str) -> dict[str, Any]:
    result = run_problems(scripted(script), problems, "test")
    assert max(map(len, result_table([result]).splitlines())) <= 100
    return {name: found["value"] for name, found in result.estimates(**group).items()}


@pytest.fixture
def two_mates(tmp_path: Path) -> Path:
    """Fool's mate for Black, scholar's mate for White."""
    scholars = "r1bqkb1r/pppp1ppp/2n2n2/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR w KQkq -"
    path = tmp_path / "mates.epd"
    path.write_text(f"{FOOLS_MATE} bm Qh4#;\n{scholars} bm Qxf7#;\n")
    return path


# Mate in one ---------------------------------------------------------------------------------------------------------


def test_mates_are_counted_by_the_board(two_mates: Path) -> None:
    problems = read_problems(two_mates)
    assert [problem.boards[0].fen() for problem in problems][:1] == [FOOLS_MATE]
    assert [problem.group for problem in problems] == ["black", "white"]

    def black_mates(fen: str) -> str:
        return says("d8h4" if " b " in fen else "h5e5", "h5e5 h5f7")

    got = values(problems, black_mates)
    assert [got[name] for name in ("solved", "in_candidates", "legal", "parsed")] == [0.5, 0.5, 1, 1]
    assert values(problems, black_mates, group="black")["solved"] == 1
    got = values(problems, lambda fen: says("a1a1") if " b " in fen else "junk")
    assert [got[name] for name in ("solved", "in_candidates", "legal", "parsed")] == [0, 0, 0, 0.5]


def test_any_mate_counts_and_trivial_players_are_exact(tmp_path: Path) -> None:
    """Two mates, Ra8 and Rb8 on the back rank; the file names one."""
    path = tmp_path / "two.csv"
    path.write_text(LICHESS_HEAD + "x,7k/5ppp/8/8/8/1R6/R6P/7K b - - 0 1,h8g8 a2a8,700,,,,mateIn1,,\n")
    result = run_problems(scripted(lambda fen: says("b3b8")), read_problems(path), "puzzles")
    assert result.estimates()["solved"]["value"] == 1
    # Of 31 legal moves (13 and 14 of the rooks, two each of pawn and king) two mate; nothing can be taken, so that
    # both other trivial players move a2a1.
    expected = {"random legal": pytest.approx(2 / 31), "first legal": 0, "most material": 0}
    assert result.baselines() == {"solved": expected}
    assert "random legal" in result_table([result])


# Puzzles of several moves --------------------------------------------------------------------------------------------

LADDER = "6k1/7p/8/8/8/8/8/RR4K1 b - - 0 1"  # 1... h6 2. Ra7 (to be found) Kf8 3. Rb8#


@pytest.fixture
def puzzles(tmp_path: Path) -> list[Problem]:
    path = tmp_path / "puzzles.csv"
    path.write_text(
        LICHESS_HEAD
        + f"two,{LADDER},h7h6 a1a7 g8f8 b1b8,1234,80,95,1000,mateIn2 endgame,,\n"
        + "one,rnbqkbnr/pppp1ppp/8/4p3/8/5P2/PPPPP1PP/RNBQKBNR w KQkq - 0 2,g2g4 d8h4,600,80,95,9,mateIn1,,\n"
    )
    return read_problems(path)


def test_a_puzzle_is_solved_by_all_its_moves(puzzles: list[Problem]) -> None:
    two, one = puzzles
    assert (two.name, two.group, one.group) == ("two", "rated 1200-1599", "rated  400-799")
    assert [board.fen() for board in two.boards] == [
        "6k1/8/7p/8/8/8/8/RR4K1 w - - 0 2",
        "5k2/R7/7p/8/8/8/8/1R4K1 w - - 2 3",
    ]
    right = {"6k1": "a1a7", "5k2": "b1b8", "rnb": "d8h4"}
    wrong_end = right | {"5k2": "b1b7"}
    wrong_start = right | {"6k1": "a1a6"}
    another_mate = right | {"5k2": "a7a8"}  # not the file's; Ra8 is no mate here: the king goes to e7
    for answers, solved in ((right, 1), (wrong_end, 0.5), (wrong_start, 0.5), (another_mate, 0.5)):
        got = values(puzzles, lambda fen, answers=answers: says(answers[fen[:3]]))
        assert (got["solved"], got["legal"]) == (solved, 1), answers
    result = run_problems(scripted(lambda fen: "junk"), [two], "two")
    legal = [board.legal_moves.count() for board in two.boards]
    assert result.baselines()["solved"]["random legal"] == pytest.approx(1 / legal[0] / legal[1])


def test_an_early_mate_solves_a_puzzle(tmp_path: Path) -> None:
    """The file's line gives away a mate in one, Ra8, and mates a move later: both count, as on Lichess."""
    path = tmp_path / "p.csv"
    path.write_text("FEN,Moves\n7k/5ppp/8/8/8/1R6/R6P/7K b - - 0 1,h8g8 h2h3 h7h6 a2a8\n")
    problem = read_problems(path)[0]
    assert problem.worths[0] == {"h2h3": 1, "a2a8": 1, "b3b8": 1}
    for first, second, solved in (("a2a8", "h3h4", 1), ("h2h3", "h3h4", 0), ("h2h3", "a2a8", 0)):
        answers = iter([first, second])
        # a2a8 is no mate behind 1... h6: the king has h7. The file is wrong there, and its line still counts.
        expected = 1 if (first, second) == ("h2h3", "a2a8") else solved
        assert values([problem], lambda fen, answers=answers: says(next(answers)))["solved"] == expected


# Test suites ---------------------------------------------------------------------------------------------------------


def test_points_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "sts.epd"
    path.write_text(STS)
    positions = read_problems(path)
    assert [position.group for position in positions][:2] == ["Undermine", "Undermine"]
    assert len({position.group for position in positions}) == 4
    # Full points, 24 points, a legal move of no points, castling for 55, an illegal move.
    fens = [position.boards[0].fen() for position in positions]
    choices = dict(zip(fens, ["f4f5", "e7d8", "", "", "a1a1"], strict=True))
    castling = next(fen for fen, position in zip(fens, positions, strict=True) if "e1g1" in position.worths[0])
    choices[castling] = "e1g1"
    silent = next(fen for fen, move in choices.items() if not move)
    worths = positions[fens.index(silent)].worths[0]
    choices[silent] = next(move.uci() for move in chess.Board(silent).legal_moves if move.uci() not in worths)
    got = values(positions, lambda fen: says(choices[fen]))
    assert got["solved"] == pytest.approx((1 + 0.24 + 0 + 0.55 + 0) / 5)
    assert (got["best"], got["legal"]) == (pytest.approx(1 / 5), pytest.approx(4 / 5))
    assert values(positions, lambda fen: says(choices[fen]), group="Undermine")["solved"] == pytest.approx(1.24 / 2)
    result = run_problems(scripted(lambda fen: "junk"), positions, "STS")
    expected = [sum(p.worths[0].values()) / p.boards[0].legal_moves.count() for p in positions]
    assert result.baselines()["solved"]["random legal"] == pytest.approx(sum(expected) / 5)
    assert "best" not in result.baselines()


START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -"
ALL_MOVES = [move.uci() for move in chess.Board().legal_moves]


@pytest.mark.parametrize(
    ("line", "worths"),
    [
        ('bm e4 Nf3; id "x 1";', {"e2e4": 1, "g1f3": 1}),
        ("bm e2e4 g1f3;", {"e2e4": 1, "g1f3": 1}),
        ("5 9 bm e4;", {"e2e4": 1}),  # a FEN's clocks
        ("hmvc 5; fmvn 9; bm e4;", {"e2e4": 1}),
        ('bm e4; c0 "a comment, no points";', {"e2e4": 1}),
        ('c8 "4 1"; c9 "Nf3 e4"; bm a3;', {"g1f3": 1, "e2e4": 0.25}),
        ("bm e4; am e2e4 d4;", {"e2e4": 1}),
        ("am f3 g4;", {move: 1 for move in ALL_MOVES if move not in ("f2f3", "g2g4")}),
    ],
)
def test_epd_of_any_origin(tmp_path: Path, line: str, worths: dict[str, float]) -> None:
    path = tmp_path / "any.epd"
    path.write_text(f"# a comment\n\n{START} {line}\n")
    (problem,) = read_problems(path)
    assert problem.worths == (worths,)
    clocks = "5 9" if "5" in line.split("bm")[0] else "0 1"
    assert problem.boards[0].fen() == f"{START} {clocks}"


def test_careless_castling_rights_and_en_passant_squares_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "c.epd"
    path.write_text("4k3/8/8/8/4P3/8/8/4K3 b KQkq e3 bm Kd7;\n")
    assert read_problems(path)[0].boards[0].fen() == "4k3/8/8/8/4P3/8/8/4K3 b - - 0 1"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "csv.gz", "csv.zst"])
def test_tables_of_every_kind(tmp_path: Path, kind: str) -> None:
    rows = [{"PuzzleId": f"p{n}", "FEN": LADDER, "Moves": "h7h6 a1a7 g8f8 b1b8", "Rating": 1000 + n} for n in range(3)]
    path = tmp_path / f"rows.{kind}"
    text = "PuzzleId,FEN,Moves,Rating\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text(text)
    else:
        packed = gzip.compress(text.encode()) if kind == "csv.gz" else pa.compress(text.encode(), "zstd", asbytes=True)
        path.write_bytes(packed)
    assert is_problem_file(path)
    assert [problem.name for problem in read_problems(path)] == ["p0", "p1", "p2"]
    assert len(read_problems(path, max_rows=2)) == 2


FIRST = STS.splitlines()[0]
HEAD = "PuzzleId,FEN,Moves\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a,b\n1,2\n", "row 1: field 'fen' is missing"),
        ("p.csv", HEAD + "x,nonsense,a2a3 a3a4\n", "row 1"),
        ("p.jsonl", '{"fen": "8/8/8/8/8/2k5/P7/K7 w - - 0 1", "bm": "a4"}\n', "row 1: field 'moves' is missing"),
        ("p.csv", HEAD + f"x,{chess.STARTING_FEN},e2e4\n", "row 1: field 'Moves'"),
        ("p.csv", HEAD + f"x,{chess.STARTING_FEN},e2e4 e2e4\n", "row 1: .*legal"),
        ("p.txt", "", "give problems as"),
        ("s.epd", "\n", "holds no problems"),
        ("s.epd", FIRST.replace("f4f5 ", ""), "line 1: operations 'c9' and 'c8' have 9 moves and 10 points"),
        ("s.epd", FIRST.replace("f4f5", "f4f6"), "line 1: .*legal"),
        ("s.epd", FIRST.replace("1kr5", "2r5"), "line 1: the position .* is illegal"),
        ("s.epd", FIRST.replace("1kr5/", ""), "line 1"),
        ("s.epd", f'{START} id "nothing";', "line 1: neither points"),
        ("s.epd", f"{START} c8 '0'; c9 'e4';".replace("'", '"'), "line 1: points"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_problems(tmp_path / name)
    assert name in str(error.value)


# Games ---------------------------------------------------------------------------------------------------------------


def test_problems_name_their_games(tmp_path: Path) -> None:
    path = tmp_path / "games.epd"
    path.write_text(
        f'{START} bm e4; c0 "of a game 3 years ago";\n' + f'{START} bm e4; c0 "second best 3, game 7"; id "7";\n' * 2
    )
    problems = read_problems(path)
    assert [problem.game for problem in problems] == ["", "7", "7"]
    result = run_problems(lambda prompts, _: [says("e2e4")] * 3, problems, "games")
    assert "intervals: none over 2 games" in result_table([result])


# The truth and a copy, in every suite --------------------------------------------------------------------------------


@pytest.fixture
def kinds(tmp_path: Path, two_mates: Path, puzzles: list[Problem]) -> dict[str, list[Problem]]:
    (tmp_path / "sts.epd").write_text(STS)
    (tmp_path / "am.epd").write_text(f"{START} am f3;\n")
    files = {name: read_problems(tmp_path / name) for name in ("sts.epd", "am.epd")}
    mates_in_one = read_problems(MATES_FILE, max_rows=20)
    kinds = {**files, "two_mates": read_problems(two_mates), "puzzles": puzzles, "mates": mates_in_one}
    return kinds | {split: read_problems(path) for split, path in TACTICS_FILES.items()}


@pytest.mark.parametrize("kind", ["sts.epd", "am.epd", "two_mates", "puzzles", "mates", *TACTICS_FILES])
def test_the_truth_scores_all_and_a_copy_nothing(kinds: dict[str, list[Problem]], kind: str) -> None:
    pairs = [(b, w) for p in kinds[kind] for b, w in zip(p.boards, p.worths, strict=True)]
    right = {board.fen(): max(worths, key=worths.__getitem__) for board, worths in pairs}
    got = values(kinds[kind], lambda fen: says(right[fen]))
    assert {got[name] for name in ("solved", "in_candidates", "legal", "parsed")} == {1.0}
    got = values(kinds[kind], lambda fen: f" {fen}")
    assert set(got.values()) == {0.0}
