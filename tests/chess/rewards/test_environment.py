"""`A:` scores: truth at 1, cheats at the bottom, levels as written down, and nothing a model writes can raise."""

import chess
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rookworld_trl.chess import ParseError
from rookworld_trl.chess.environment import prompt as environment_prompt
from rookworld_trl.chess.rewards import score_environment
from tests.support.positions import TRANSITIONS

E4_PROMPT = f"A: {chess.STARTING_FEN}+e2e4+e2e4+"
E4_TRUTH = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+0"

PINNED_FEN = "4k3/4r3/8/8/8/8/4N3/4K3 w - - 3 20"
PINNED_PROMPT = f"A: {PINNED_FEN}+e2c3+e7e8 e2c3+"
PINNED_TRUTH = f"{PINNED_FEN}+-1.0+0+1"


def expected_truth(fen: str, move: str) -> str:
    """The truth, written without the code under test."""
    board = chess.Board(fen)
    if chess.Move.from_uci(move) not in board.legal_moves:
        return f"{fen}+-1.0+0+1"
    board.push_uci(move)
    reward = 1.0 if board.is_checkmate() else 0.5 if board.is_game_over() else 0.001
    return f"{board.fen()}+{reward}+{int(board.is_game_over())}+0"


@pytest.mark.parametrize(("fen", "move"), TRANSITIONS.values(), ids=TRANSITIONS.keys())
@pytest.mark.parametrize("given_target", [True, False])
def test_truth_scores_one(fen: str, move: str, given_target: bool) -> None:
    truth = expected_truth(fen, move)
    score = score_environment(environment_prompt(fen, move, []), truth, truth if given_target else None)
    assert score.reward == 1.0
    assert score.continuous == 1.0
    assert score.level == 5
    assert score.exact
    assert score.fen_exact
    assert score.placement_exact
    assert score.first_four
    assert score.reward_exact
    assert (score.terminated_pred, score.truncated_pred) == (score.terminated_true, score.truncated_true)
    assert score.similarity == 1.0
    assert score.wrong_squares == 0
    assert not score.copied_input


def flipped(fen: str) -> str:
    return fen.replace(" w ", " b ") if " w " in fen else fen.replace(" b ", " w ")


def without_mover(fen: str, move: str) -> str:
    board = chess.Board(fen)
    board.remove_piece_at(chess.parse_square(move[:2]))
    return board.board_fen()


def with_clocks(fen: str, truth_fen: str) -> str:
    """The input's placement with every other field of the truth."""
    return " ".join([fen.split(" ")[0], *truth_fen.split(" ")[1:]])


@pytest.mark.parametrize(("fen", "move"), TRANSITIONS.values(), ids=TRANSITIONS.keys())
def test_cheats_score_at_the_bottom(fen: str, move: str) -> None:
    prompt, truth = environment_prompt(fen, move, []), expected_truth(fen, move)
    truth_fen, flags = truth.split("+", 1)
    illegal = truth_fen == fen
    cheats = {
        "copied": f"{fen}+0.001+0+0",
        "copied, mate claimed": f"{fen}+1.0+1+0",
        "copied, draw claimed": f"{fen}+0.5+1+0",
        "side flipped": f"{flipped(fen)}+0.001+0+0",
        "empty board": f"8/8/8/8/8/8/8/8 {truth_fen.split(' ', 1)[1]}+{flags}",
        "starting position": f"{chess.Board().fen().replace(' w ', ' b ')}+0.001+0+0",
        "moved man taken off": f"{without_mover(fen, move)} {truth_fen.split(' ', 1)[1]}+{flags}",
        "echo": prompt,
        "echo and truth": prompt + truth,
        "truth twice": f"{truth}+{truth}",
        "text around": f"The answer is {truth}.",
        "space before": f" {truth}",
        "newline behind": f"{truth}\n",
        "no flags": truth_fen,
        "empty": "",
        "only separators": "+++",
        "empty flags": f"{truth_fen}+++",
        "a fifth field": f"{truth}+0",
    }
    if fen != chess.STARTING_FEN:
        cheats.pop("starting position")
    if not illegal:
        # Copying is the truth on an illegal move; elsewhere the best imaginable fields must not help a copy.
        cheats["copied, right flags"] = f"{fen}+{flags}"
        cheats["copied, illegal claimed"] = f"{fen}+-1.0+0+1"
        cheats["copied, all other fields right"] = f"{with_clocks(fen, truth_fen)}+{flags}"
    else:
        del cheats["moved man taken off"]  # with its move judged right, that is one square wrong
        cheats["judged legal, right reward"] = f"{fen}+-1.0+0+0"
    for name, completion in cheats.items():
        score = score_environment(prompt, completion, truth)
        assert score.reward <= 0.2, name
        assert score.continuous <= 0.2, name


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("no FEN at all", -0.3),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0", -0.3),  # a flag missing
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBN b KQkq - 0 1+0.001+0+0", -0.3),  # seven squares in a rank
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+2", -0.3),
        ("rnbqkbnr/pppppppp/44/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+0", -0.3),  # no FEN writes 8 as 44
        # well-formed: three squares wrong
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP4/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.2),
        # a wrong piece on the target square: neither changed square is right
        ("rnbqkbnr/pppppppp/8/8/4N3/8/PPPPPPPP/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.2),
        # one and two squares wrong, the move made
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PP1/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.4),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP2P1/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.4),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPPPPPP/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.2),  # the pawn left standing, too
        # the pawn taken off, but put down nowhere, or on the wrong square
        ("rnbqkbnr/pppppppp/8/8/8/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.2),
        ("rnbqkbnr/pppppppp/8/8/3P4/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+0", 0.2),
        # one square wrong and the wrong side to move
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PP1/RNBQKBNR w KQkq - 0 1+0.001+0+0", 0.2),
        # the placement, with the wrong side or rights
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 1+0.001+0+0", 0.6),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQ - 0 1+0.001+0+0", 0.6),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 1+0.001+0+0", 0.6),
        # four fields, with wrong clocks, reward or flags
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 1 1+0.001+0+0", 0.8),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.5+0+0", 0.8),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+1+0", 0.8),
        ("rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.0010+0+0", 0.8),  # not the entire string
        (E4_TRUTH, 1.0),
    ],
)
def test_levels(completion: str, reward: float) -> None:
    assert score_environment(E4_PROMPT, completion, E4_TRUTH).reward == reward


@pytest.mark.parametrize(
    ("completion", "reward", "copied"),
    [
        (f"{PINNED_FEN}+0.001+0+0", 0.2, False),  # taken for legal: copying alone earns the bottom level
        (f"{PINNED_FEN}+-1.0+0+0", 0.2, False),
        ("4k3/4r3/8/8/8/2N5/8/4K3 b - - 4 20+0.001+0+0", 0.2, False),  # the move made
        ("4k3/4r3/8/8/8/2N5/8/4K3 b - - 4 20+-1.0+0+1", 0.2, False),  # judged illegal, yet made: wrong side to move
        ("4k3/4r3/8/8/8/8/8/4K3 w - - 3 20+-1.0+0+1", 0.4, False),  # judged illegal, one square lost
        ("4k3/4r3/8/8/8/8/4N3/4K3 b - - 3 20+-1.0+0+1", 0.6, False),
        ("4k3/4r3/8/8/8/8/4N3/4K3 w - - 4 20+-1.0+0+1", 0.8, False),
        (f"{PINNED_FEN}+0.001+0+1", 0.8, False),
        (PINNED_TRUTH, 1.0, False),
    ],
)
def test_levels_of_an_illegal_move(completion: str, reward: float, copied: bool) -> None:
    score = score_environment(PINNED_PROMPT, completion, PINNED_TRUTH)
    assert score.reward == reward
    assert score.copied_input is copied
    assert (score.continuous <= 0.2) == (reward <= 0.4)


def test_fields_by_hand() -> None:
    """Castling king-side with the rook forgotten: f1 and h1 are wrong, of the four squares that change."""
    prompt = "A: r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1+e1g1+e1g1+"
    truth = "r3k2r/8/8/8/8/8/8/R4RK1 b kq - 1 1+0.001+0+0"
    score = score_environment(prompt, "r3k2r/8/8/8/8/8/8/R5KR b kq - 1 1+0.001+0+1", truth)
    assert score.wrong_squares == 2
    assert score.similarity == pytest.approx(0.5)
    assert (score.placement_exact, score.first_four, score.fen_exact, score.exact) == (False, False, False, False)
    assert (score.turn_exact, score.castling_exact, score.en_passant_exact) == (True, True, True)
    assert (score.halfmove_exact, score.fullmove_exact) == (True, True)
    assert score.reward_exact
    assert (score.truncated_true, score.truncated_pred) == (False, True)
    assert score.reward == 0.4
    # (e^1.5 - 1) / (e^3 - 1) = 3.4817 / 19.0855 = 0.18243; half of it, and 5 * 0.05 for the fields, no outcome
    assert score.continuous == pytest.approx(0.18243 * 0.75, abs=1e-5)


def test_continuous_form_by_hand() -> None:
    fen = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR"
    wrong_side = score_environment(E4_PROMPT, f"{fen} w KQkq - 0 1+0.001+0+0", E4_TRUTH)
    assert wrong_side.continuous == pytest.approx(0.95)
    wrong_flags = score_environment(E4_PROMPT, f"{fen} b KQkq - 0 1+0.001+1+0", E4_TRUTH)
    assert wrong_flags.continuous == pytest.approx(0.75)
    copy = score_environment(E4_PROMPT, f"{chess.STARTING_FEN}+0.001+0+0", E4_TRUTH)
    assert copy.continuous == 0.0
    assert copy.copied_input
    garbage = score_environment(E4_PROMPT, "8/8/8/8/8/8/8/8 w - - 0 1+0.001+0+0", E4_TRUTH)
    assert -0.053 < garbage.continuous < 0.0  # worse than a copy, better than unparsable


def test_data_errors_are_raised() -> None:
    with pytest.raises(ParseError, match="prompt"):
        score_environment("A: nonsense", E4_TRUTH, E4_TRUTH)
    with pytest.raises(ParseError, match="fields"):
        score_environment(E4_PROMPT, E4_TRUTH, "nonsense")
    with pytest.raises(ParseError, match="illegal"):  # two white kings: no truth can be computed
        score_environment("A: 4k3/8/8/8/8/8/8/K3K3 w - - 0 1+e1e2+e1e2+", E4_TRUTH)


numbers = st.sampled_from(["nan", "inf", "-inf", "1e999", "9" * 5000, "٣", "²", "1_0", "0x1", "-", ".", "1.", "-0"])
junk = st.one_of(st.text(max_size=200), st.text("+/ 012345678pnbrqkPNBRQKwba-hKQ.\n", max_size=200), numbers)


@st.composite
def mutated_truth(draw: st.DrawFn) -> str:
    """The truth with a slice of it, or one of its fields, replaced by junk."""
    if draw(st.booleans()):
        fields = E4_TRUTH.replace("+", " + ").split(" ")
        fields[draw(st.integers(0, len(fields) - 1))] = draw(junk)
        return " ".join(fields).replace(" + ", "+")
    start, length = draw(st.integers(0, len(E4_TRUTH))), draw(st.integers(0, 6))
    return E4_TRUTH[:start] + draw(junk) + E4_TRUTH[start + length :]


@settings(max_examples=400, deadline=None)
@given(st.one_of(junk, mutated_truth()), st.booleans())
@example("\ud800+0+0+0", True)
@example("+" * 10000, True)
@example("1" * 10000, False)
def test_no_text_raises_or_leaves_the_range(completion: str, legal: bool) -> None:
    prompt, truth = (E4_PROMPT, E4_TRUTH) if legal else (PINNED_PROMPT, PINNED_TRUTH)
    score = score_environment(prompt, completion, truth)
    assert -0.3 <= score.reward <= 1.0
    assert -0.3 <= score.continuous <= 1.0
    assert 0.0 <= score.similarity <= 1.0
    assert score.exact == (completion == truth) == (score.reward == 1.0) == (score.continuous == 1.0)
