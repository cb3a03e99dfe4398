"""The nano tokenizer: exact round trips, exact completion starts, squares at fixed offsets."""

import random

import chess
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rookworld_trl.chess import ParseError, environment, policy, split_row
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO_FOLDER
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from tests.support.positions import format_row

KIWIPETE = "r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq - 0 1"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_nano_tokenizer()


def test_tokens_of_a_policy_row(tokenizer):
    tokens = tokenizer.tokenize(format_row(KIWIPETE, ["e2a6", "b7b8q"], ["0.3", "-12.0", "-0.34"], "e2a6"))
    assert tokens[:2] == ["P: ", "⟨w⟩"]
    board = chess.Board(KIWIPETE)
    by_hand = []
    for square in [chess.square(file, rank) for rank in range(7, -1, -1) for file in range(8)]:
        slash = "/" if square in chess.SquareSet(chess.BB_FILE_A) and square != chess.A8 else ""
        man = board.piece_at(square)
        by_hand.append(f"{slash}⟨{chess.square_name(square)}⟩{man.symbol() if man else '·'}")
    assert tokens[2:66] == by_hand
    assert tokens[66:71] == [" w", " KQkq", " -", " 0", " 1"]
    assert "|".join(tokens[71:]) == " M:| e2|a6| b7|b8|q| E:| 0.3| -12.0| -0.3|4| B:| e2|a6"


@pytest.mark.parametrize("side", ["w", "b"])
def test_the_side_to_move_stands_before_the_squares(tokenizer, side):
    """Of the prompt and of the answer, whose side to move is the other one."""
    board = chess.Board(KIWIPETE)
    board.turn = side == "w"
    move = next(iter(board.legal_moves)).uci()
    row = environment.prompt(board.fen(), move, []) + environment.format_completion(
        environment.transition(board.fen(), move)
    )
    tokens = tokenizer.tokenize(row)
    first, second = [i for i, token in enumerate(tokens) if token in ("⟨w⟩", "⟨b⟩")]
    assert (first, tokens[first]) == (1, f"⟨{side}⟩")
    assert tokens[second] == ("⟨b⟩" if side == "w" else "⟨w⟩")
    assert tokens[first + 1].startswith("⟨a8⟩")
    assert tokens[second + 1].startswith("⟨a8⟩")


def random_rows(games: int):
    rng = random.Random(5)
    for _ in range(games):
        board, history = chess.Board(), []
        while not board.is_game_over() and board.ply() < 200:
            move = rng.choice(list(board.legal_moves)).uci()
            output = environment.format_completion(environment.transition(board.fen(), move))
            yield environment.prompt(board.fen(), move, history) + output
            evals = rng.choice((["0.35", "-1.2", "9999.99"], ["3", "-0.0", "+1.5"]))
            yield format_row(board.fen(), [move] * 3, evals, move, rng.choice([policy.SINGLE, policy.PADDED]))
            board.push_uci(move)
            history.append(move)


def test_round_trip_and_boundaries_on_random_games(tokenizer):
    for row in random_rows(games=6):
        prompt, completion = split_row(row)
        ids = tokenizer(row).input_ids
        assert tokenizer.decode(ids) == row
        assert tokenizer.unk_token_id not in ids
        # The completion starts at a token boundary, and both halves tokenise alone as they do together.
        assert tokenizer(prompt).input_ids + tokenizer(completion).input_ids == ids


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_shipped_row_round_trips_and_splits_exactly(tokenizer, split):
    rows = load_shipped(split)
    texts = [prompt + target for prompt, target in zip(rows["prompt"], rows["target"], strict=True)]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    prompts = tokenizer(list(rows["prompt"]))["input_ids"]
    for text, prompt, ids, prompt_ids in zip(texts, rows["prompt"], encoded, prompts, strict=True):
        assert split_row(text)[0] == prompt
        start = len(prompt_ids)  # the completion's first token
        assert ids[:start] == prompt_ids
        assert tokenizer.decode(ids[start:]) == text[len(prompt) :]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["/⟨a4⟩·"], ["/⟨a5⟩·"]),  # another square's name
        (["⟨e4⟩P"], ["⟨e5⟩P"]),
        (["⟨e4⟩P", "⟨f4⟩·"], ["⟨f4⟩P", "⟨e4⟩·"]),  # two names exchanged
        (["⟨e4⟩P"], [*"⟨e4⟩", "⟨e4⟩P"]),  # one more name
        ([" 1"], [" ", "·"]),  # an empty square for a digit
        ([" 1"], [" 1", *"⟨e4⟩"]),  # a name outside of the FEN's placement
        (["+0.001"], [*"⟨e4⟩", "+0.001"]),
        ([" e2", "e4"], [" e2", "e", "····"]),
        ([" M:"], [*"⟨e4⟩", " M:"]),
        ([" 0.3"], [" ", "0", ".", "···"]),
    ],
)
def test_wrong_tokens_do_not_read_as_right_text(tokenizer, old, new):
    """What stands for a square is left out of the text, or counted, only where it is true: else it is visible."""
    truth = environment.transition("4k3/8/8/8/8/8/4P3/4K3 w - - 0 1", "e2e4")
    answers = [
        (environment, environment.format_completion(truth)),
        (policy, policy.format_completion(["e2e4", "e1d1"], ["0.3", "0.1"], "e1d1")),
    ]
    changed = 0
    for task, answer in answers:
        tokens = tokenizer.tokenize(answer)
        for start in [i for i in range(len(tokens)) if tokens[i : i + len(old)] == old]:
            spoiled = [*tokens[:start], *new, *tokens[start + len(old) :]]
            ids = [i for token in spoiled for i in tokenizer.convert_tokens_to_ids(split_up(token))]
            assert tokenizer.unk_token_id not in ids
            changed += 1
            with pytest.raises(ParseError):
                task.parse(tokenizer.decode(ids))
    assert changed


@pytest.mark.parametrize("put", ["nothing", "other", "twice", "later", "before the reward"])
def test_a_wrong_mark_of_the_side_does_not_read_as_right_text(tokenizer, put):
    truth = environment.transition("4k3/8/8/8/8/8/4P3/4K3 w - - 0 1", "e2e4")
    tokens = tokenizer.tokenize(environment.format_completion(truth))
    assert tokens[:2] == ["⟨b⟩", "⟨a8⟩·"]
    reward = tokens.index("+0.001")
    spoiled = {
        "nothing": tokens[1:],
        "other": ["⟨w⟩", *tokens[1:]],
        "twice": ["⟨b⟩", *tokens],
        "later": [tokens[1], "⟨b⟩", *tokens[2:]],
        "before the reward": [*tokens[:reward], "⟨b⟩", *tokens[reward:]],
    }[put]
    with pytest.raises(ParseError):
        environment.parse(tokenizer.decode(tokenizer.convert_tokens_to_ids(spoiled)))


def split_up(token: str) -> list[str]:
    return list(token) if set(token) == {"·"} else [token]


def test_the_shipped_tokenizer_is_the_one_of_the_code(tokenizer):
    shipped = AutoTokenizer.from_pretrained(NANO_FOLDER)
    assert shipped.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_vocabulary_is_the_same_in_every_build_and_after_saving(tokenizer, tmp_path):
    again = build_nano_tokenizer()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = policy.prompt(KIWIPETE)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.pad_token, loaded.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)


def test_other_text_survives(tokenizer):
    for text in ("Hello, world 42!", "P: 8/8 w", "/8/1/ b2 b ", "A: ++e2e4"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
