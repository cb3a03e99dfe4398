"""Mate in one, the Strategic Test Suite and self-play, with models that are scripted to err in known ways."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chess
import pytest

from rookworld_trl.evaluation import read_puzzles, read_sts, run_mate_in_one, run_selfplay, run_sts, suite_table
from rookworld_trl.evaluation.completions import Completion
from rookworld_trl.tasks import environment

# Five lines of the suite: fsmosca/strategic-test-suite, MIT licence.
STS = (Path(__file__).parent / "sts_sample.epd").read_text()

FOOLS_MATE = "rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2"
Script = Callable[[str], str]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], None]:
    """Replace generation: a function from prompt to completion plays the model."""

    def install(script: Script) -> None:
        def complete(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[Completion]:
            return [Completion(script(prompt), 1, True) for prompt in prompts]

        for module in ("suite", "selfplay"):
            monkeypatch.setattr(f"rookworld_trl.evaluation.{module}.complete", complete)
            monkeypatch.setattr(f"rookworld_trl.evaluation.{module}.fitting_length", lambda *a: 99)

    return install


def says(move: str, candidates: str | None = None) -> str:
    return f" M: {candidates or move} E: 0.1 B: {move}"


# Mate in one ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def big_bench(tmp_path: Path) -> Path:
    """Fool's mate for Black, scholar's mate for White."""
    games = ["1. f3 e5 2. g4 ", "\n1. e4 e5 2. Bc4 Nc6 3. Qh5 Nf6 4. "]
    examples = [{"input": game, "target": target} for game, target in zip(games, ["Qh4#", "Qxf7#"], strict=True)]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "checkmate_in_one", "examples": examples}))
    return path


@pytest.fixture
def lichess(tmp_path: Path) -> Path:
    """The same fool's mate, before White's blunder, and a puzzle of another theme."""
    before = "rnbqkbnr/pppp1ppp/8/4p3/8/5P2/PPPPP1PP/RNBQKBNR w KQkq - 0 2"
    path = tmp_path / "puzzles.csv"
    path.write_text(
        "PuzzleId,FEN,Moves,Rating,RatingDeviation,Popularity,NbPlays,Themes,GameUrl,OpeningTags\n"
        f"abcde,{before},g2g4 d8h4,600,80,95,1000,mate mateIn1 oneMove opening,https://lichess.org/x,\n"
        "fghij,not read,a b,600,80,95,1000,mateIn2,https://lichess.org/y,\n"
    )
    return path


def test_readers_agree_on_the_position(big_bench: Path, lichess: Path) -> None:
    puzzles = read_puzzles(big_bench)
    assert [puzzle.board.fen() for puzzle in puzzles][:1] == [FOOLS_MATE]
    assert puzzles[1].board.turn == chess.WHITE
    assert [(p.name, p.board.fen()) for p in read_puzzles(lichess)] == [("abcde", FOOLS_MATE)]


def test_mates_are_counted_by_the_board(big_bench: Path, scripted: Any) -> None:
    scripted(lambda prompt: says("d8h4" if " b " in prompt else "h5e5", "h5e5 h5f7"))
    result = run_mate_in_one(None, None, read_puzzles(big_bench), max_new_tokens=99)  # type: ignore[arg-type]
    got = result.estimates()
    assert [got[name]["value"] for name in ("mate", "mate_in_candidates", "legal", "parsed")] == [0.5, 0.5, 1, 1]
    assert result.estimates("black")["mate"]["value"] == 1
    scripted(lambda prompt: says("a1a1") if " b " in prompt else "junk")
    got = run_mate_in_one(None, None, read_puzzles(big_bench), max_new_tokens=99).estimates()  # type: ignore[arg-type]
    assert [got[name]["value"] for name in ("mate", "mate_in_candidates", "legal", "parsed")] == [0, 0, 0, 0.5]


def test_any_mate_counts(tmp_path: Path, scripted: Any) -> None:
    """Two mates, Ra8 and Rb8 on the back rank; the file names one."""
    path = tmp_path / "two.csv"
    path.write_text(
        "PuzzleId,FEN,Moves,Themes\nx,7k/5ppp/8/8/8/1R6/R6P/7K b - - 0 1,h8g8 a2a8,mateIn1\n",
    )
    scripted(lambda prompt: says("b3b8"))
    result = run_mate_in_one(None, None, read_puzzles(path), max_new_tokens=99)  # type: ignore[arg-type]
    got = result.estimates()
    assert got["mate"]["value"] == 1
    # Of 31 legal moves (13 and 14 of the rooks, two each of pawn and king) two mate; nothing can be taken, so that
    # both other trivial players move a2a1.
    assert [got[player]["value"] for player in ("random", "first", "material")] == [pytest.approx(2 / 31), 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task.json", "{", "no BIG-bench task"),
        ("task.json", '{"examples": [{"target": "x"}]}', "no BIG-bench task"),
        ("task.json", '{"examples": []}', "no mate in one"),
        ("task.json", '{"examples": [{"input": "1. e4 e4"}]}', "example 0.*input"),
        ("task.json", '{"examples": [{"input": "1. e4"}]}', "example 0: no mate in one"),
        ("p.csv", "a,b\n1,2\n", "lacks the columns"),
        ("p.csv", "PuzzleId,FEN,Moves,Themes\nx,nonsense,a2a3 a3a4,mateIn1\n", "line 2"),
        ("p.csv", f"PuzzleId,FEN,Moves,Themes\nx,{chess.STARTING_FEN},,mateIn1\n", "line 2"),
        ("p.csv.zst", "", "decompressed"),
    ],
)
def test_malformed_puzzle_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_puzzles(tmp_path / name)
    assert name in str(error.value)


# Strategic Test Suite ------------------------------------------------------------------------------------------------


@pytest.fixture
def epd(tmp_path: Path) -> Path:
    path = tmp_path / "sts.epd"
    path.write_text(STS)
    return path


def test_points_by_hand(epd: Path, scripted: Any) -> None:
    positions = read_sts(epd)
    assert [position.theme for position in positions][:2] == ["Undermine", "Undermine"]
    assert len({position.theme for position in positions}) == 4
    # Full points, 24 points, a legal move of no points, castling for 55, an illegal move.
    moves = iter(["f4f5", "e7d8", None, None, "a1a1"])
    choices = {position.board.fen(): move for position, move in zip(positions, moves, strict=True)}
    castling = next(position for position in positions if "e1g1" in position.points)
    choices[castling.board.fen()] = "e1g1"
    silent = next(fen for fen, move in choices.items() if move is None)
    board = chess.Board(silent)
    worthless = next(p for p in positions if p.board.fen() == silent).points
    choices[silent] = next(move.uci() for move in board.legal_moves if move.uci() not in worthless)
    scripted(lambda prompt: says(choices[prompt.removeprefix("P: ")]))
    result = run_sts(None, None, positions, max_new_tokens=99)  # type: ignore[arg-type]
    got = result.estimates()
    assert got["points"]["value"] == pytest.approx((100 + 24 + 0 + 55 + 0) / 500)
    assert got["best"]["value"] == pytest.approx(1 / 5)
    assert got["legal"]["value"] == pytest.approx(4 / 5)
    assert result.estimates("Undermine")["points"]["value"] == pytest.approx(124 / 200)
    assert result.groups()["Undermine"] == 2
    expected = [sum(p.points.values()) / p.board.legal_moves.count() for p in positions]
    assert got["random"]["value"] == pytest.approx(sum(expected) / 500)
    firsts = [p.points.get(min(move.uci() for move in p.board.legal_moves), 0) for p in positions]
    assert got["first"]["value"] == pytest.approx(sum(firsts) / 500)
    table = suite_table(result)
    assert "points, of all" in table
    assert "Undermine" in table
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("c9", "c5"), "operation 'c9' is missing"),
        (("f4f5 ", ""), "9 moves and 10 points"),
        (("f4f5", "f4f6"), "illegal|legal"),
        (('c8 "100 ', 'c8 "99 '), "earns 100"),
        (("STS(v1.0) Undermine.001", "WAC 1"), "'id'"),
        (("1kr5", "2r5"), "illegal|king"),
        (("1kr5/", ""), "line 1"),
    ],
)
def test_malformed_suite_lines_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "broken.epd"
    path.write_text(STS.splitlines()[0].replace(*change) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_sts(path)
    assert "broken.epd, line 1" in str(error.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no positions"):
        read_sts(path)


# Self-play -----------------------------------------------------------------------------------------------------------


def oracle(choose: Callable[[chess.Board], str] = lambda board: next(iter(board.legal_moves)).uci()) -> Script:
    """A model that knows the rules, and plays `choose`."""

    def script(prompt: str) -> str:
        if prompt.startswith("P: "):
            return says(choose(chess.Board(prompt.removeprefix("P: "))))
        given = environment.parse_prompt(prompt)
        return environment.format_completion(environment.transition(given.fen, given.move, given.history))

    return script


def play(**options: Any) -> Any:
    return run_selfplay(None, None, max_new_tokens=99, **{"games": 4, **options})  # type: ignore[arg-type]


def test_a_faultless_model_reaches_the_limit(scripted: Any) -> None:
    scripted(oracle())
    result = play(max_plies=12)
    assert result.groups() == {"ply limit": 4}
    assert [item.scores["faultless_plies"] for item in result.items] == [12] * 4
    assert result.estimates()["faultless"]["value"] == 1


def test_games_end_with_the_game(scripted: Any) -> None:
    mate = ["f2f3", "e7e5", "g2g4", "d8h4"]
    scripted(oracle(lambda board: mate[len(board.move_stack) + 2 * board.fullmove_number - 2 + (not board.turn)]))
    result = play(games=1, opening_plies=0, max_plies=50)
    assert result.groups() == {"game over": 1}
    assert result.items[0].scores == {"legal_plies": 4, "faultless_plies": 4, "faultless": 1}


@pytest.mark.parametrize(
    ("fault", "reason", "legal"),
    [
        (lambda text: text.replace("+0.001+", "+0.002+"), "wrong reward or flag", 1),
        (lambda text: text.replace("+0+0", "+1+0"), "wrong reward or flag", 1),
        (
            lambda text: re.sub(r" \d+ (\d+\+)", r" 9 \1", text),
            "wrong position",
            1,
        ),
        (lambda text: text + "+", "unparsable A:", 1),
    ],
)
def test_environment_faults_end_the_game(scripted: Any, fault: Callable[[str], str], reason: str, legal: int) -> None:
    script = oracle()
    scripted(lambda prompt: script(prompt) if prompt.startswith("P: ") else fault(script(prompt)))
    result = play(opening_plies=0, games=1)
    assert result.groups() == {reason: 1}
    assert result.items[0].scores == {"legal_plies": legal, "faultless_plies": 0, "faultless": 0}


@pytest.mark.parametrize(("text", "reason"), [(says("a1a1"), "illegal move"), ("junk", "unparsable P:")])
def test_policy_faults_end_the_game(scripted: Any, text: str, reason: str) -> None:
    script = oracle()
    # White plays on, Black fails at its first move: one legal ply.
    scripted(lambda prompt: text if prompt.startswith("P: ") and " b " in prompt else script(prompt))
    result = play(opening_plies=0, games=2)
    assert result.groups() == {reason: 2}
    assert [item.scores["legal_plies"] for item in result.items] == [1, 1]


def test_history_reaches_the_prompt(scripted: Any) -> None:
    prompts: list[str] = []
    script = oracle()
    scripted(lambda prompt: prompts.append(prompt) or script(prompt))  # type: ignore[func-returns-value]
    play(games=1, opening_plies=2, max_plies=12)
    last = environment.parse_prompt([prompt for prompt in prompts if prompt.startswith("A: ")][-1])
    assert len(last.history) == 10
    assert last.history[-1] == last.move


def test_openings_differ_and_are_seeded(scripted: Any) -> None:
    scripted(oracle())
    first, again, other = ([item.prompt for item in play(games=8, max_plies=1, seed=seed).items] for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) > 4
    with pytest.raises(ValueError, match="games"):
        play(games=0)


def test_selfplay_with_a_real_model(tiny_model: Any, tiny_tokenizer: Any) -> None:
    result = run_selfplay(tiny_model, tiny_tokenizer, games=3, max_new_tokens=8)
    assert result.groups() == {"unparsable P:": 3}
    assert len({item.completion for item in result.items}) == 3


def test_recipe_runs_the_suites(
    tiny_checkpoint: Path, epd: Path, big_bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import evaluate as recipe

    common = ["--model", str(tiny_checkpoint), "--max_new_tokens", "4", "--limit", "2"]
    for name, file, items in (("mate_in_one", big_bench, 2), ("sts", epd, 2), ("selfplay", None, 2)):
        output = tmp_path / f"{name}.json"
        arguments = ["--suite", name, "--output", str(output), *(["--dataset", str(file)] if file else [])]
        recipe.main([*common, *arguments])
        suites = json.loads(output.read_text())["suites"]
        assert [len(suite["items"]) for suite in suites] == [items, items]  # greedy and sampled
    assert "strategic test suite, 2 items" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipe.main([*common, "--suite", "sts"])
    assert "--dataset" in capsys.readouterr().err
