"""A user's games: one `A:` row a move, `P:` rows by an engine, and games that cannot be used counted.

No word of a file may become another move than it says: random games in many spellings against a reader of clean SAN.
"""

import gzip
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import chess
import pytest

from rookworld_trl.chess.pgn import GamesReport, rows_of_games
from rookworld_trl.chess.sources import FEATURES, load_prompts

GAMES = """[Event "Fool's mate"]

1. f3 {careless} e5 2. g4 (2. e4 Nf6) Qh4# 0-1

[Event "The same start, then an illegal move"]

1. f3 e5 2. Ke3 Nc6 *

[Variant "Crazyhouse"]

1. e4 e5 *

[Event "Nothing played"]

*
"""
MATED = "rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3"


@pytest.fixture
def pgn(tmp_path: Path) -> Path:
    path = tmp_path / "games.pgn"
    path.write_text(GAMES)
    return path


def test_each_move_is_a_row(pgn: Path) -> None:
    report = GamesReport()
    rows = list(rows_of_games(pgn, report))
    assert [row["prompt"].split("+")[1] for row in rows] == ["f2f3", "e7e5", "g2g4", "d8h4"]
    assert rows[-1]["prompt"].endswith("+d8h4+f2f3 e7e5 g2g4 d8h4+")
    assert {row["game"] for row in rows} == {"1"}
    assert (rows[-1]["target"], rows[-1]["stratum"]) == (f"{MATED}+1.0+1+0", "mate")
    assert (report.games, report.cut, report.repeated, report.kept["environment"]) == (4, 1, 2, 4)
    assert report.skipped == {"a chess variant": 1, "no moves": 1}


def test_each_position_is_a_row_too_for_an_engine_to_value(pgn: Path) -> None:
    report = GamesReport()
    rows = [row for row in rows_of_games(pgn, report, positions=True) if row["task"] == "policy"]
    assert rows[0]["prompt"] == f"P: {chess.STARTING_FEN}"
    assert len({row["prompt"] for row in rows}) == len(rows) == report.kept["policy"] == 4
    assert all((row["target"], row["legal_moves"]) == ("", []) for row in rows)


def test_a_pgn_is_a_data_set(pgn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_prompts(str(pgn))
    assert dataset.features == FEATURES
    assert len(dataset) == 4
    shown = capsys.readouterr().out
    assert f"{pgn}: {dataset.info.description}\n" in shown
    assert "skipped 1 games: a chess variant" in dataset.select([0]).info.description
    assert "4 games: 0 P: and 4 A: rows" in shown
    assert "`best_move: engine` makes them" in shown
    with pytest.raises(ValueError, match=r"gone\.pgn: no such file"):
        load_prompts(str(pgn.with_name("gone.pgn")))
    pgn.write_text("\n")
    with pytest.raises(ValueError, match="has no rows that can be used"):
        load_prompts(str(pgn))


# As chess.com's export has them: no empty line between a game and the next one's tags.
RUN_TOGETHER = """[Event "Live Chess"]
[Site "Chess.com (rapid :)"]

1. e4 {[%clk 0:09:58.1]} e5 {[%clk
0:09:57]} 2. Nf3 1-0
[Event "Live Chess"]
[Variant "Chess960"]
[FEN "bbqnnrkr/pppppppp/8/8/8/8/PPPPPPPP/BBQNNRKR w HFhf - 0 1"]

1. e4 e5 0-1
[Event "From a position"]
[SetUp "1"]
[FEN "8/8/8/8/8/2k5/P7/K7 w - - 0 1"]

1. a4 Kc4 *
[Event "Two empty lines behind the tags"]
[FEN "8/8/8/8/8/2k5/P7/K7 w - - 0 1"]


1. a3

1... Kd3 *
"""


def read(path: Path, text: str) -> tuple[list[str], GamesReport]:
    """Moves and report of a file with this text; a move from any position but those by hand is a phantom."""
    path.write_text(text)
    report = GamesReport()
    return [row["prompt"].split("+")[1] for row in rows_of_games(path, report)], report


def test_games_without_an_empty_line_between_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moves, report = read(tmp_path / "chess_com.pgn", RUN_TOGETHER)
    assert moves == ["e2e4", "e7e5", "g1f3", "a2a4", "c3c4", "a2a3", "c3d3"]
    assert (report.games, report.cut, report.skipped) == (4, 0, {"a chess variant": 1})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("1. e4 e5 *\n\n1. d4 d5 *\n", ["e2e4", "e7e5", "d2d4", "d7d5"]),
        ("1. e4 e5 1-0\n1. d4 d5\n\n1. c4 *\n", ["e2e4", "e7e5", "d2d4", "d7d5", "c2c4"]),
        # Wrapped before the number of a variation's first move, as python-chess's own exporter may.
        ("1. e4 (\n1. d4 d5) e5 *\n", ["e2e4", "e7e5"]),
        # In a comment, a tag is text.
        ('1. e4 {so:\n[Site "x"]\n} e5 ; and {\n2. Nf3 *\n', ["e2e4", "e7e5", "g1f3"]),
        # A comment that nobody closed ends with its game.
        ('[Event "a"]\n\n1. e4 {open\n[Event "b"]\n\n1. d4 *\n', ["e2e4", "d2d4"]),
        ('[Event "a"]\n[Result "*"]\n\n[Event "b"]\n\n1. d4 *\n', ["d2d4"]),
        # Escaped lines, and Windows' line ends.
        ('[Event "a"]\r\n\r\n1. e4\r\n% nothing\r\ne5 *\r\n', ["e2e4", "e7e5"]),
    ],
)
def test_where_a_game_ends(tmp_path: Path, text: str, moves: list[str]) -> None:
    assert read(tmp_path / "games.pgn", text)[0] == moves


def test_nothing_is_read_behind_an_unreadable_move(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bracket behind it once led back to the main line, and what followed was played from the wrong position."""
    moves, report = read(tmp_path / "cut.pgn", "1. e4 Ke5 2. d4 (x) d5 2... a6 *\n\n1. c4 Qxh8 *\n")
    assert moves == ["e2e4", "c2c4"]
    assert report.cut == 2
    assert "2 games are used up to their first null, illegal or unreadable move (first: game 1, illegal san: 'Ke5'" in (
        str(report)
    )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("variant", ["Crazyhouse", "Antichess", "Chess960", "No such chess"])
def test_a_variant_is_never_played_by_the_rules_of_chess(tmp_path: Path, variant: str) -> None:
    moves, report = read(tmp_path / "variant.pgn", f'[Variant "{variant}"]\n\n1. e4 e5 *\n')
    assert (moves, report.skipped) == ([], {"a chess variant": 1})


def test_random_bytes_are_no_games(tmp_path: Path) -> None:
    path = tmp_path / "binary.pgn"
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(5000))
        with pytest.raises(ValueError, match=r"binary\.pgn line \d+: is no text"):
            load_prompts(str(path))
    for seed in range(50):  # and no text whatever ends in a traceback
        text = "".join(random.Random(seed).choices('[]{}();"$%*.?! \n01-/=+#OKQRBNPabcdefgh12345678xEvent²', k=2000))
        read(path, text)


@pytest.mark.parametrize("name", ["GAMES.PGN", "games.pgn.gz"])
def test_names_a_user_may_give(tmp_path: Path, name: str) -> None:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as file:
        file.write(GAMES)
    assert len(load_prompts(str(tmp_path / name))) == 4


START = ["e2e4", "e7e5"]
MISREAD = {
    "1. e4 e5 2. Sf3 Sc6 3. Lb5 a6 4. 0-0 *": [],  # German
    "1. e4 e5 2. Re2 Cc6 *": [],  # French, whose R is a king
    "1. e4 e5 2. Кf3 Кc6 3. Сb5 *": [],  # Russian
    "1. e4 e5 2. ♘f3 ♞c6 3. ♗b5 *": [*START, "g1f3", "b8c6", "f1b5"],
    "1. e4 e5 2. nf3 nc6 *": START,  # no notation that is known
    "1. e4 e5 2. Xf3 Xc6 *": [],  # piece letters of no language
    "(1. d4 d5) 1. e4 e5 *": START,
    "1. e4 e5) 2. Nf3 *": [],  # which bracket is missing, nobody knows: the moves may be a variation's
    "1. e4 e5 1-0 1. d4 d5 0-1": START,  # two games in a line: the second is lost, and that is reported
    "1. e4 e5 1. d4 d5 *": START,
    "1. e4 e5 2. -- Nc6 3. Nf3 *": START,
    "1. e4 e5 2. Z0 Nc6 3. Nf3 *": START,
    "1. e4 (1. d4 d5 e5 2. Nf3 *": START[:1],  # a variation that never ends hides no move in silence
    "1. e4 e5 and then 2. Nf3 *": START,
}


@pytest.mark.parametrize("text", MISREAD)
def test_no_word_becomes_another_move_than_it_says(tmp_path: Path, text: str) -> None:
    moves, report = read(tmp_path / "games.pgn", text + "\n")
    assert moves == MISREAD[text]
    assert report.cut + report.skipped.total() == (text[0] == "1" and len(moves) <= 2)


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff[Event "x"]\r\n\r\n1.e4 e5\r\n2.Nf3 1-0\r\n',
        "1. e4! $14 {[%clk 0:01:02] [%eval 0.3]} 1... e5?? $2 ({no} 1... c5 (1... d5 2. exd5) 2. a3) 2. Nf3 ; d6\n*\n",
        "% Nf6\n1 e4 e5\n% d5\n2 Nf3\n",
        "1. e2-e4 e7-e5 2. Ng1-f3 1/2-1/2\n",
        "1. e2e4 e7e5 2. g1f3 ½-½\n",
        "1.\u00a0e4 … e5 ± 2. Nf3+- N = *\n",
        "1. … *\n\n1. e4 1...e5 2.Nf3\n\n\n",
        "1. e4 {open ( and ; and 1. d4} e5 {1-0\n\n1. c4} 2. Nf3 0-1\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_spellings_of_the_same_moves(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "games.pgn"
    path.write_bytes(text.encode(encoding, errors="replace").replace(b"?[Event", b"[Event"))
    report = GamesReport()
    assert [row["prompt"].split("+")[1] for row in rows_of_games(path, report)] == ["e2e4", "e7e5", "g1f3"]
    assert report.cut == 0


def read_san(board: chess.Board, san: str) -> str:
    """A second reader, of clean SAN alone: the one legal move whose man, squares and promotion are those written."""
    san = san.rstrip("+#")
    if san.startswith("O-O"):
        rank, file = "1" if board.turn else "8", "g" if san == "O-O" else "c"
        return f"e{rank}{file}{rank}"
    san, _, promotion = san.partition("=")
    man = san[0] if san[0] in "KQRBN" else "P"
    target, hint = san[-2:], san.removeprefix(man)[:-2].replace("x", "")
    found = []
    for move in map(chess.Move.uci, board.legal_moves):
        piece = board.piece_at(chess.parse_square(move[:2]))
        if piece and piece.symbol().upper() == man and move[2:4] == target and move[4:] == promotion.lower():
            found += [move] * all(each in move[:2] for each in hint)
    (move,) = found
    return move


def random_game(rng: random.Random) -> list[str]:
    """In clean SAN, as python-chess writes it; pieces move more often than pawns, so that letters occur."""
    board, written = chess.Board(), []
    for _ in range(rng.randint(8, 60)):
        moves = sorted(board.legal_moves, key=chess.Move.uci)
        if not moves:
            break
        pieces = [move for move in moves if board.piece_type_at(move.from_square) != chess.PAWN]
        move = rng.choice(pieces if pieces and rng.random() < 0.5 else moves)
        written.append(board.san(move))
        board.push(move)
    return written


def spelled(san: str, letters: str, rng: random.Random) -> str:
    """With a language's letters, perhaps a remark, a variation, a glyph or a comment behind it."""
    own = dict(zip("KQRBN", letters.split(), strict=True))
    word = "".join(own.get(each, each) for each in san) if not san.startswith("O") else san
    word = word.replace("O", rng.choice("O0")) if san.startswith("O") else word.replace("x", rng.choice("xx:×"))
    word += rng.choice(["", "", "", "!", "??", "!?", " $13", " ±", " N"])
    notes = ["", "", "", " {a comment (with\n1. e4) and ; and Sf3}", " (1. a3 {b} (2. Kxa9 Dh5) -- Zz)", " ; Nf3 {\n"]
    return word + rng.choice(notes)


def written_game(game: list[str], letters: str, rng: random.Random) -> str:
    end, dot = rng.choice("\n "), rng.choice([".", ". ", " . "])
    words = []
    for ply, san in enumerate(game):
        number = f"{ply // 2 + 1}{dot}" if ply % 2 == 0 else rng.choice(["", f"{ply // 2 + 1}... "])
        words.append(number + spelled(san, letters, rng))
    tags = rng.choice(["", '[Event "a"]\n[White "M\u00fcller"]\n\n', '[Event "b"]\n'])
    before = rng.choice(["", "(1. d4 d5) ", "{so} "]) if tags else ""
    return f"{tags}{before}{end.join(words)}{rng.choice([' 1-0', ' *', ' 1/2-1/2'])}\n{'' if tags else chr(10)}"


def moves_by_game(path: Path, text: bytes) -> tuple[dict[str, list[tuple[str, str]]], GamesReport]:
    path.write_bytes(text)
    report, found = GamesReport(), defaultdict(list)
    for row in rows_of_games(path, report):
        fen, move, *_ = row["prompt"].removeprefix("A: ").split("+")
        found[row["game"]].append((" ".join(fen.split()[:4]), move))
    return dict(found), report


def expected(games: list[list[str]]) -> dict[str, list[tuple[str, str]]]:
    """By the second reader; a pair of position and move counts once."""
    seen, found = set(), defaultdict(list)
    for number, game in enumerate(games, 1):
        board = chess.Board()
        for san in game:
            pair = (" ".join(board.fen().split()[:4]), read_san(board, san))
            board.push_uci(pair[1])
            if pair not in seen:
                seen.add(pair)
                found[str(number)].append(pair)
    return dict(found)


ENCODINGS: list[Callable[[str], bytes]] = [
    lambda text: text.encode(),
    lambda text: ("\ufeff" + text).encode(),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.encode("latin-1", errors="replace"),
]


@pytest.mark.parametrize("seed", range(12))
def test_random_games_are_read_as_they_were_played(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    games = [random_game(rng) for _ in range(8)]
    letters = "K Q R B N" if seed % 2 else "♔ ♕ ♖ ♗ ♘"
    text = "".join(written_game(game, letters, rng) for game in games)
    encode = ENCODINGS[seed // 2 % 4 if seed % 2 else seed // 2 % 3]
    found, report = moves_by_game(tmp_path / "games.pgn", encode(text))
    assert found == expected(games)
    assert (report.games, report.cut, report.skipped.total()) == (8, 0, 0)


@pytest.mark.parametrize("letters", ["K D T L S", "R D T F C", "Ц Д Т О К"])
def test_games_in_other_languages_are_left_out(tmp_path: Path, letters: str) -> None:
    """And never read as anything else."""
    rng = random.Random(letters)
    games = [random_game(rng) for _ in range(6)]
    text = "".join(written_game(game, letters, rng) for game in games)
    found, report = moves_by_game(tmp_path / "games.pgn", text.encode())
    right = {pair for each in expected(games).values() for pair in each}
    assert not {pair for each in found.values() for pair in each} - right
    assert report.skipped["other piece letters than K Q R B N"] >= 5
