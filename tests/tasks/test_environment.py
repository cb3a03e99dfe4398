"""`A:` text and ground truth: hand-written transitions, rules of the draw, illegal moves of every kind."""

import chess
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rookworld_trl.tasks import ParseError, environment
from rookworld_trl.tasks.environment import EnvironmentOutput, transition

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
        # en passant, both colours
        (
            "rnbqkbnr/ppp1p1pp/8/3pPp2/8/8/PPPP1PPP/RNBQKBNR w KQkq f6 0 3",
            "e5f6",
            "rnbqkbnr/ppp1p1pp/5P2/3p4/8/8/PPPP1PPP/RNBQKBNR b KQkq - 0 3",
            LEGAL,
        ),
        ("4k3/8/8/8/3pP3/8/8/4K3 b - e3 0 7", "d4e3", "4k3/8/8/8/8/4p3/8/4K3 w - - 0 8", LEGAL),
        # castling both ways, both colours
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 4 9", "e1g1", "r3k2r/8/8/8/8/8/8/R4RK1 b kq - 5 9", LEGAL),
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 4 9", "e1c1", "r3k2r/8/8/8/8/8/8/2KR3R b kq - 5 9", LEGAL),
        ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 4 9", "e8g8", "r4rk1/8/8/8/8/8/8/R3K2R w KQ - 5 10", LEGAL),
        ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 4 9", "e8c8", "2kr3r/8/8/8/8/8/8/R3K2R w KQ - 5 10", LEGAL),
        # rights go with a rook that moves and with one that is captured
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 4 9", "a1a8", "R3k2r/8/8/8/8/8/8/4K2R b Kk - 0 9", LEGAL),
        # promotion to each man
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8q", "4Q3/6k1/8/8/8/8/8/4K3 b - - 0 1", LEGAL),
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8r", "4R3/6k1/8/8/8/8/8/4K3 b - - 0 1", LEGAL),
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8b", "4B3/6k1/8/8/8/8/8/4K3 b - - 0 1", DRAW),  # a lone bishop
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8n", "4N3/6k1/8/8/8/8/8/4K3 b - - 0 1", DRAW),
        # mates, stalemate, dead material
        (
            "rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2",
            "d8h4",
            "rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3",
            MATE,
        ),
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
        ("4k3/8/8/8/8/8/3r4/5K2 w - - 0 1", "f1e2"),  # into check
        ("4k3/8/8/8/8/8/8/r3K3 w - - 0 1", "e1d1"),  # stays in check
        (START, "e7e5"),  # the other side's man
        (START, "e4e5"),  # nobody there
        (START, "a1a5"),  # through a man
        (START, "e2e5"),
        (START, "g1e2"),  # onto an own man
        (START, "e2d3"),  # a capture of nothing
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8"),  # promotion to what?
        ("8/4P1k1/8/8/8/8/8/4K3 w - - 5 1", "e7e8k"),
        (START, "e2e4q"),
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1h1"),  # castling spelled as king takes rook
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1a1"),
        ("r3k2r/8/8/8/8/8/8/R3K2R w - - 0 1", "e1g1"),  # without the right
        ("r3k1r1/8/8/8/8/8/8/R3K2R w KQq - 0 1", "e1g1"),  # onto an attacked square
        ("4kr2/8/8/8/8/8/8/R3K2R w KQ - 0 1", "e1g1"),  # through one
        ("4k3/4r3/8/8/8/8/8/R3K2R w KQ - 0 1", "e1c1"),  # out of check
        ("rnbqkbnr/ppp1p1pp/8/3pPp2/8/8/PPPP1PPP/RNBQKBNR w KQkq f6 0 3", "e5d6"),  # en passant too late
        (START, "0000"),
        (START, ""),
        (START, "e2"),
        (START, "e2e4 "),
        (START, "E2E4"),
        (START, "Nf3"),
        (START, "O-O"),
        (START, "e2-e4"),
        (START, "e2e2"),
        (START, "i9j9"),
        (START, "P@e4"),
        (START, "e2e4\n"),
        ("7k/5Q2/5K2/8/8/8/8/8 b - - 1 1", "h8g8"),  # the game is over: nothing is legal
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


def test_fifty_moves_count_with_a_claim() -> None:
    fen = "8/8/4k3/8/8/4K3/8/R7 w - - {} 120"
    assert outcome(transition(fen.format(98), "a1a2", claim_draw=True)) == LEGAL
    assert outcome(transition(fen.format(99), "a1a2", claim_draw=True)) == DRAW
    assert outcome(transition("7k/8/5KQ1/8/8/8/8/8 w - - 99 120", "g6g7", claim_draw=True)) == MATE


# Knights out and back from the start: the starting position stands for the third time after eight moves.
DANCE = ["g1f3", "g8f6", "f3g1", "f6g8", "g1f3", "g8f6", "f3g1"]
DANCE_FEN = "rnbqkb1r/pppppppp/5n2/8/8/8/PPPPPPPP/RNBQKBNR b KQkq - 7 4"


@pytest.mark.parametrize("with_move", [False, True])
def test_threefold_repetition_from_the_history(with_move: bool) -> None:
    history = [*DANCE, "f6g8"] if with_move else DANCE
    assert outcome(transition(DANCE_FEN, "f6g8", history, claim_draw=True)) == DRAW
    assert outcome(transition(DANCE_FEN, "f6g8", history)) == LEGAL  # nobody claims
    assert outcome(transition(DANCE_FEN, "f6g8", claim_draw=True)) == LEGAL  # nothing proves it
    assert outcome(transition(DANCE_FEN, "f6g8", DANCE[1:], claim_draw=True)) == LEGAL  # one move short
    assert outcome(transition(DANCE_FEN, "f6d5", history[:7], claim_draw=True)) == LEGAL


def test_a_history_from_elsewhere_proves_nothing() -> None:
    for history in (["a2a4"] * 7, ["g1f3"] * 7, ["zzzz"] * 7, ["e2e2"] * 7, ["a1a8", "h8h1"] * 4, ["f6g8"] * 10):
        assert outcome(transition(DANCE_FEN, "f6g8", history, claim_draw=True)) == LEGAL


def test_castling_rights_lost_on_the_way_are_no_repetition() -> None:
    """King e1-e2-e1 and back again: the first position still had the rights, so it stands only twice after it."""
    moves = ["e1e2", "e8e7", "e2e1", "e7e8", "e1e2", "e8e7", "e2e1"]
    board = chess.Board("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1")
    for move in moves:
        board.push_uci(move)
    assert outcome(transition(board.fen(), "e7e8", moves, claim_draw=True)) == LEGAL
    assert not any(later.is_repetition(3) for later in [board])


def test_an_en_passant_right_on_the_way_is_no_repetition() -> None:
    """After e2e4 Black might capture on e3; eight knight moves later the same squares stand, but not that right."""
    board = chess.Board("rnbqkbnr/ppp1pppp/8/8/3p4/8/PPPPPPPP/RNBQKBNR w KQkq - 0 3")
    moves = ["e2e4", "g8f6", "g1f3", "f6g8", "f3g1", "g8f6", "g1f3", "f6g8"]
    for move in moves:
        board.push_uci(move)
    for history in (moves, moves[1:]):  # whether or not the pawn's step is still among the last ten moves
        assert outcome(transition(board.fen(), "f3g1", history, claim_draw=True)) == LEGAL
    quiet = chess.Board("rnbqkbnr/ppp1pppp/8/8/8/3p4/PPPPPPPP/RNBQKBNR w KQkq - 0 3")  # nothing to capture with
    for move in moves:
        quiet.push_uci(move)
    assert outcome(transition(quiet.fen(), "f3g1", moves, claim_draw=True)) == DRAW


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_random_games_agree_with_python_chess(random: object, claim: bool) -> None:
    """Play on sparse boards, where draws and repetitions happen; the board knows its whole game, we ten moves."""
    board = chess.Board(random.choice(["8/8/4k3/8/8/4K3/8/R6r w - - 90 60", "4k2r/8/8/8/8/8/8/R3K3 w Qk - 0 1", START]))  # type: ignore[attr-defined]
    for _ in range(60):
        moves = list(board.legal_moves)
        if not moves or board.is_game_over():
            return
        # going back and forth makes repetitions likely
        back = [m for m in moves if len(board.move_stack) > 1 and m.to_square == board.move_stack[-2].from_square]
        move = random.choice(back or moves)  # type: ignore[attr-defined]
        fen, history = board.fen(), [played.uci() for played in board.move_stack]
        output = transition(fen, move.uci(), history, claim_draw=claim)
        board.push(move)
        assert output.fen == board.fen()
        assert not output.truncated
        if board.is_checkmate():
            assert outcome(output) == MATE
        elif board.is_game_over() or (claim and board.is_fifty_moves()):
            assert board.is_fivefold_repetition() or outcome(output) == DRAW
        elif outcome(output) == DRAW:
            assert claim or board.is_fivefold_repetition()
            assert board.is_repetition(3)  # what we call proven is true
        elif claim and board.halfmove_clock >= 8 and _repeated_within(board, 8):
            raise AssertionError(f"a repetition within the history was missed: {history} {move}")
        if board.is_fivefold_repetition():
            return


def _repeated_within(board: chess.Board, plies: int) -> bool:
    """Whether the position stood at least twice within the last `plies`, by moves that keep castling rights."""
    probe, key, count, rights = board.copy(), board._transposition_key(), 0, board.castling_rights
    for _ in range(plies):
        if not probe.move_stack or probe.castling_rights != rights:
            return False
        last = probe.pop()
        man, home = probe.piece_type_at(last.from_square), chess.square_name(last.from_square)
        if man in (chess.KING, chess.ROOK) and home in ("a1", "e1", "h1", "a8", "e8", "h8"):
            return False  # the rewind stops there on purpose
        count += probe._transposition_key() == key
    return count >= 2


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=8), st.lists(st.text(max_size=6), max_size=12), st.booleans())
@example("a1a1", ["a1a1"], True)
def test_any_move_text_is_judged(move: str, history: list[str], claim: bool) -> None:
    output = transition(START, move, history, claim_draw=claim)
    legal = {legal.uci() for legal in chess.Board().legal_moves}
    assert output.truncated == (move not in legal)


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
        f"A: {START}+e2e4",
        f"A:{START}+e2e4+e2e4+",
        f"A: {START}+e2e4+e2e4,e7e5+",
        f"A: {START}+e2e4+e2e4  e7e5+",
        f"A: {START}+e9e4+e9e4+",
        f"P: {START}",
        "",
    ],
)
def test_malformed_prompts(text: str) -> None:
    with pytest.raises(ParseError, match="field 'prompt'"):
        environment.parse_prompt(text)


def test_a_reward_may_be_a_whole_number() -> None:
    assert environment.parse(f"{START}+1+0+0") == EnvironmentOutput(START, 1.0, False, False)


@pytest.mark.parametrize(
    ("completion", "field"),
    [
        ("", "fields"),
        (START, "fields"),
        (f"{START}+0.001+0", "fields"),
        (f"{START}+0.001+0+0+0", "fields"),
        (f" {START}+0.001+0+0", "fen"),
        (f"{START} +0.001+0+0", "fen"),
        (f"{START[:-1]}+0.001+0+0", "fen"),
        ("+0.001+0+0", "fen"),
        (f"{START}++0+0", "reward"),
        (f"{START}+nan+0+0", "reward"),
        (f"{START}+1e3+0+0", "reward"),
        (f"{START}+٣+0+0", "reward"),
        (f"{START}+.5+0+0", "reward"),
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
        (EnvironmentOutput(START, 0.5, True, False), f"{START}+0.5+1+0"),
        (EnvironmentOutput(START, -1.0, False, True), f"{START}+-1.0+0+1"),
    ],
)
def test_writing_by_hand_and_back(output: EnvironmentOutput, text: str) -> None:
    assert environment.format_completion(output) == text
    assert environment.parse(text) == output
