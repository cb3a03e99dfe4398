"""Decision points of chess rows: the gold answer passes through all of them, and what each move earns, by hand."""

import itertools
import random
from typing import Any

import chess
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.evidence.rivals import padded
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import format_eval, win_chance
from rookworld_trl.chess.rewards import score_policy
from rookworld_trl.chess.rewards.decisions import (
    ANSWER_TOKENS_WEIGHT,
    ANSWER_WEIGHT,
    DECISION_WEIGHT,
    EVAL_WEIGHT,
    FORMAT_WEIGHT,
    ChessPoints,
)
from rookworld_trl.chess.rewards.moves import stakes_of
from rookworld_trl.modeling.loading import NANO, NANO_FOLDER, load
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer, build_nano_tokenizer
from rookworld_trl.training.exact import Points, score_tree

# A rook's move, a queen's, a pawn's that promotes and a king's; 0.5 of win chance apart where a value is a mate.
ROW = {
    "prompt": "P: 8/P7/8/8/8/8/k7/2K5 w - - 0 1",
    "legal_moves": ["a7a8n", "a7a8q", "c1c2", "c1d1"],
    "legal_cp": [0, 9990, -9990, 0],
}
GOLD = " M: a7a8q a7a8n c1d1 c1c2 E: 1000.0 0.0 0.0 -1000.0 B: a7a8q"


@pytest.fixture(scope="module", params=["nano", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpt2":
        return build_gpt2_tokenizer()
    return AutoTokenizer.from_pretrained(NANO_FOLDER)


def find(tokenizer: Any, text: str, row: dict[str, Any] = ROW) -> tuple[dict[str, Any], list[int]]:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ChessPoints(tokenizer)(row, ids), ids


def rewards(tokenizer: Any, decision: dict[str, Any]) -> dict[str, float]:
    texts = (tokenizer.decode(action).strip() for action in decision["actions"])
    return dict(zip(texts, decision["rewards"], strict=True))


def taken(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The decisions that are moves, without evals and those that only hold the format together."""
    evals = {each["position"] for each in found["determined"] if each["weight"] == EVAL_WEIGHT}
    return [each for each in found["decisions"] if "otherwise" not in each and each["position"] not in evals]


def held(tokenizer: Any, text: str, row: dict[str, Any] = ROW) -> dict[str, tuple[set[str], float, float]]:
    """What holds the format together, by the text before it: the next texts, what they earn, and what all else does."""
    found, ids = find(tokenizer, text, row)
    points = {}
    for each in (each for each in found["decisions"] if "otherwise" in each):
        (earned,) = set(each["rewards"])
        next_texts = {tokenizer.decode(action) for action in each["actions"]}
        assert each["weight"] == FORMAT_WEIGHT
        points[tokenizer.decode(ids[: each["position"]])] = (next_texts, earned, each["otherwise"])
    return points


def test_an_empty_square_is_followed_by_a_square(tokenizer: Any) -> None:
    """All of a7's moves are listed, and none goes from e4; so the second square has no other point that knows of it."""
    squares = set(chess.SQUARE_NAMES) if tokenizer.vocab_size < 2000 else set("abcdefgh")
    for text in (
        " M: a7a8q a7a8n a7 c1d1 E: 1",
        " M: a7a8q a7a8n a7c1",
        " M: a7a8q a7a8n a7b8 E: 0.0 0.0 0.0 B: a7a8q",
    ):
        assert held(tokenizer, text)[" M: a7a8q a7a8n a7"] == (squares, 1.0, 0.0)
    assert next(iter(held(tokenizer, " M: a7a8q c1d1 e4e5"))) == " M: a7a8q c1d1 e4"
    assert held(tokenizer, " M: a7a8q a7a8n c1d1 c1c2") == {}
    best = " M: a7a8q a7a8n c1d1 c1c2 E: 1000.0 0.0 0.0 -1000.0 B:"
    assert held(tokenizer, f"{best} e4")[f"{best} e4"] == (squares, 1.0, 0.0)
    assert f"{best} a7" not in held(tokenizer, f"{best} a7a8q")  # which is listed, and may be the best all the same


def test_nothing_of_a_number_follows_an_eval(tokenizer: Any) -> None:
    moves, further = " M: a7a8q a7a8n c1d1 c1c2 E:", set(".0123456789")
    assert held(tokenizer, f"{moves} 10.0 0.1 -0.2 0.3 B: a7a8q") == {
        f"{moves} {evals}": (further, 0.0, 1.0) for evals in ("10.0", "10.0 0.1", "10.0 0.1 -0.2", "10.0 0.1 -0.2 0.3")
    }
    # Of two decimals the second is still due after 0.1; and what follows a stray point is no eval any more.
    found = held(tokenizer, f"{moves} 10.0 0.25 0.31 0.1 B: a7a8q")
    assert found[f"{moves} 10.0"] == found[f"{moves} 10.0 0.25"] == (further, 0.0, 1.0)
    assert found[f"{moves} 10.0 0.25 0.31 0.1"] == ({"."}, 0.0, 1.0)
    found = held(tokenizer, f"{moves} 10.0 0.25 0.00.04 0.31 B: a7a8q")
    assert list(found) == [f"{moves} {evals}" for evals in ("10.0", "10.0 0.25", "10.0 0.25 0.00")]


def known(weight: float, stake: float) -> float:
    """A term's weight where so much win chance is at stake in it."""
    return weight / (1 + (0.006 / stake) ** 2)


def added(tokenizer: Any, decision: dict[str, Any]) -> dict[str, float]:
    """What each move adds to the reward."""
    most = decision["weight"] / DECISION_WEIGHT
    return {move: share * most for move, share in rewards(tokenizer, decision).items()}


def test_what_each_move_earns(tokenizer: Any) -> None:
    """Values 0.5, 1, 0, 0.5, mean 0.5: the best gains 0.5, the others nothing, a random one 0.125. All four are listed,
    so that a list is as good as any other; the median of the chances is 0.5, and they deviate by 0.25 from it."""
    found, ids = find(tokenizer, GOLD)
    of_best, of_evals = known(0.5, 0.5 - 0.125), known(0.18, 0.25)
    gained = of_best / (of_best + of_evals + 0.02) * 0.5 / 0.375
    for slot, listed in enumerate([[], ["a7a8q"], ["a7a8q", "a7a8n"], ["a7a8q", "a7a8n", "c1d1"]]):
        expected = {move: 0.3 / 4 for move in ROW["legal_moves"] if move not in listed}
        assert added(tokenizer, found["decisions"][slot]) == pytest.approx(expected)
    best = found["decisions"][-1]
    assert added(tokenizer, best) == pytest.approx({"a7a8n": 0.5, "a7a8q": 0.5 + gained, "c1c2": 0.5, "c1d1": 0.5})
    assert max(best["rewards"]) == 1.0
    assert taken(found) == [*found["decisions"][:4], best]
    assert not found["rest_is_sampled"]
    texts = [tokenizer.decode(each["tokens"]) for each in found["determined"]]
    assert texts == [" M:", " E:", " 1000.0", " 0.0", " 0.0", " -1000.0", " B:", tokenizer.eos_token]
    for each in found["determined"]:  # all of it stands there, in a right answer
        assert ids[each["position"] : each["position"] + len(each["tokens"])] == each["tokens"]


def test_evals_are_right_with_the_decimals_that_the_policy_writes(tokenizer: Any) -> None:
    row = {**ROW, "legal_cp": [-127, 9990, 38, 1240]}  # a7a8n a7a8q c1c2 c1d1
    for evals, right in (
        ("1000.0 -0.1 0.2 12.0", ["1000.0", "-1.3", "0.4", "12.0"]),
        ("1000.0 -0.11 0.20 12.0", ["1000.0", "-1.27", "0.38", "12.0"]),
        ("1000.0 -0.11 0.2 0.35", ["1000.0", "-1.27", "0.38", "12.0"]),  # a digit is missing
        ("9.0 12.0 0.2 x", ["1000.0", "-1.3", "0.4", "12.0"]),
    ):
        found, _ = find(tokenizer, f" M: a7a8q a7a8n c1c2 c1d1 E: {evals} B: a7a8q", row)
        texts = [tokenizer.decode(each["tokens"]) for each in found["determined"]]
        assert texts[2:6] == [f" {each}" for each in right]


def test_a_stray_digit_is_no_part_of_an_eval(tokenizer: Any) -> None:
    """Behind the tenth of a policy that writes tenths must stand what follows the eval."""
    row = {**ROW, "legal_cp": [-127, 9990, 38, 240]}
    found, ids = find(tokenizer, " M: a7a8q a7a8n c1c2 c1d1 E: 1000.0 -1.35 0.4 2.4 B: a7a8q", row)
    last = found["determined"][-1]
    assert tokenizer.decode(last["tokens"]) in (" 0.4", " -1.3")  # by whether the digit is a token of its own
    assert ids[last["position"] : last["position"] + len(last["tokens"])] != last["tokens"]
    assert not [each for each in found["decisions"] if each["position"] > last["position"]]


def test_what_is_determined_is_near_what_the_shipped_model_writes() -> None:
    """Each token that a model never writes costs it ten nats and more, and drives it out of its format.

    4.3 nats a sequence; 16.8 where a model of tenths was asked for hundredths.
    """
    model, tokenizer = load(NANO)
    rows = [row for row in load_shipped("train").select(range(120)) if row["task"] == "policy"][:32]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    end = tokenizer.eos_token_id
    drawn = rollout(model, prompts, max_new_tokens=80, eos_token_id=end, temperature=0.7).completion_ids
    found = ChessPoints(tokenizer)
    points = []
    for row, ids in zip(rows, drawn, strict=True):
        plain = found(row, ids)
        points.append(Points.read({key: plain[key] for key in ("decisions", "determined")}))
    with torch.no_grad():
        scored = score_tree(model, model.get_output_embeddings(), padded(prompts, drawn), points, 0.7)
    total, count = scored.metrics["exact/determined_nll"]
    assert total / count < 6.0


def test_what_an_eval_adds_is_what_the_scorer_says() -> None:
    """In lists of the best five moves: one true eval after the other is replaced by each that is as near as the best
    list's spread, and what changes in the reward is what changes in what the eval earns."""
    tokenizer, seen = build_nano_tokenizer(), 0
    for row in load_shipped("dev").filter(lambda row: row["task"] == "policy").select(range(40)):
        values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
        listed = sorted(values, key=lambda move: -values[move])[:5]
        stakes = stakes_of(tuple(row["legal_cp"]))
        evals = [format_eval(values[move], 1) for move in listed]

        def text(evals: list[str], listed: list[str] = listed) -> str:
            return f" M: {' '.join(listed)} E: {' '.join(evals)} B: {listed[0]}"

        found, _ = find(tokenizer, text(evals), row)
        places = [each["position"] for each in found["determined"] if each["weight"] == EVAL_WEIGHT]
        decided = {each["position"]: each for each in found["decisions"] if "otherwise" not in each}
        for slot, place in enumerate(places):
            if place not in decided:
                continue
            assert len(decided[place]["actions"]) == 32
            changes, truth = {}, None
            for eval, earned in added(tokenizer, decided[place]).items():
                score = score_policy(
                    text([*evals[:slot], eval, *evals[slot + 1 :]]), row["legal_moves"], row["legal_cp"]
                )
                off = abs(win_chance(100 * float(eval)) - win_chance(values[listed[slot]]))
                if eval == evals[slot]:
                    truth = score.continuous - earned
                elif off < stakes.deviation:
                    changes[eval] = score.continuous - earned
            assert truth is None or list(changes.values()) == pytest.approx([truth] * len(changes), abs=1e-6)
            seen += len(changes)
    assert seen > 300


def test_evals_of_many_tokens_and_of_wrong_lists_are_no_decisions() -> None:
    for tokenizer, text in (
        (build_gpt2_tokenizer(), GOLD),
        (build_nano_tokenizer(), GOLD.replace("c1d1 c1c2", "c1d1 c1d1")),
    ):
        found, _ = find(tokenizer, text)
        evals = {each["position"] for each in found["determined"] if each["weight"] == EVAL_WEIGHT}
        assert evals
        assert not evals & {each["position"] for each in found["decisions"] if "otherwise" not in each}


def test_what_decisions_add_is_the_reward(tokenizer: Any) -> None:
    """Every answer of a position with three legal moves and an illegal one, and every list of five of one with many,
    with B: in it and outside: the sum of what is added at each point, the evals and a constant are its reward."""
    three = {
        "prompt": "P: 7k/8/8/8/8/8/8/K7 w - - 0 1",
        "legal_moves": ["a1a2", "a1b1", "a1b2"],
        "legal_cp": [40, 0, -90],
    }
    many = next(row for row in load_shipped("dev") if row["task"] == "policy" and len(row["legal_moves"]) > 20)
    rng = random.Random(0)
    answers = [
        (three, listed, best)
        for listed in itertools.product([*three["legal_moves"], "h1h2"], repeat=3)
        for best in [*three["legal_moves"], "h1h2"]
    ]
    answers += [
        (many, rng.choices([*many["legal_moves"][:12], "a1a1"], k=5), rng.choice(many["legal_moves"][:12]))
        for _ in range(60)
    ]
    constants: dict[str, set[float]] = {}
    for row, listed, best in answers:
        text = f" M: {' '.join(listed)} E: {' '.join(['-55.5'] * len(listed))} B: {best}"
        score = score_policy(text, row["legal_moves"], row["legal_cp"])
        whole = score.continuous if score.continuous >= 0 else score.continuous / (1 + score.continuous / 0.25)
        points = taken(find(tokenizer, text, row)[0])
        assert len(points) == len(listed) + 1
        whole -= sum(added(tokenizer, each).get(move, 0.0) for each, move in zip(points, [*listed, best], strict=True))
        assert score.evals_score == 0.0
        constants.setdefault(row["prompt"], set()).add(round(whole, 6))
    assert [len(found) for found in constants.values()] == [1, 1]


def test_the_exact_gradient_is_that_of_the_expected_reward_but_for_what_a_choice_does_to_later_ones() -> None:
    """Three legal moves and an illegal one, three candidates and `B:`, one distribution a place: enumerated.

    The gradient of the expected reward is the sum of the decisions' gradients and of the effect of each choice on what
    later ones earn: a listed move cannot be listed again, and may be `B:` without a fine.
    """
    moves, cp = ["a1a2", "a1b1", "a1b2"], [40, 0, -90]
    row = {"prompt": "P: 7k/8/8/8/8/8/8/K7 w - - 0 1", "legal_moves": moves, "legal_cp": cp}
    tokenizer = build_nano_tokenizer()
    choices = [*moves, "h1h2"]
    logits = torch.tensor([[0.3, -0.2, 0.1, -1.0], [0.0, 0.5, 0.2, -0.5], [0.1, 0.0, 0.4, 0.2], [0.7, 0.1, -0.3, -2.0]])
    logits = logits.double().requires_grad_()
    log_probs = logits.log_softmax(dim=-1)
    expected = decided = later = torch.zeros((), dtype=torch.float64)
    for picked in itertools.product(range(4), repeat=4):
        listed, best = [choices[i] for i in picked[:3]], choices[picked[3]]
        text = f" M: {' '.join(listed)} E: -55.5 -55.5 -55.5 B: {best}"
        points = [added(tokenizer, each) for each in taken(find(tokenizer, text, row)[0])]
        gained = [point.get(choices[i], 0.0) for point, i in zip(points, picked, strict=True)]
        logps = [log_probs[place, i] for place, i in enumerate(picked)]
        prob = torch.stack(logps).sum().exp().detach()
        continuous = score_policy(text, moves, cp).continuous
        whole = continuous if continuous >= 0 else continuous / (1 + continuous / 0.25)
        expected = expected + torch.stack(logps).sum().exp() * whole
        later = later + prob * sum(logps[i] * sum(gained[i + 1 :]) for i in range(4))
        for place, point in enumerate(points):
            # each point's own sum over its actions, on the prefix that was sampled
            value = sum(log_probs[place, i].exp() * point.get(choices[i], 0.0) for i in range(4))
            decided = decided + prob * value
    wanted = torch.autograd.grad(expected, logits, retain_graph=True)[0]
    exact = torch.autograd.grad(decided, logits, retain_graph=True)[0]
    left_out = torch.autograd.grad(later, logits)[0]
    torch.testing.assert_close(wanted, exact + left_out, atol=1e-7, rtol=1e-6)
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), exact.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(
    ("text", "decisions", "determined"),
    [
        # An illegal candidate and a repeated one: the walk goes on, and asks no eval of the illegal one.
        (
            " M: h1h8 a7a8q a7a8q c1c2 E: 0.1 1000.0 1.0 -1000.0 B: a7a8q",
            5,
            [" M:", " E:", " 1000.0", " 1000.0", " -1000.0", " B:", "end"],
        ),
        (" M: a7a8q E: 1000.0 B: a7a8q", 2, [" M:"]),  # a candidate too few: a move, not E:, must stand there
        (" M: a7a8q a7a8n c1d1 c1c2 a7a8q E: 1.0", 4, [" M:", " E:"]),  # one too many: E: must stand there
        (" M: a7a8q a7a8n c1d1 c1c2 E: 1000.0 B: a7a8q", 4, [" M:", " E:", " 1000.0", " 0.0"]),  # an eval missing
        (" M: a7a8q a7a8n c1d1 c1c2 E: 1000.0 0.0 0.0 -1000.0 B: x", 5, None),  # no move at B:
        ("k", 0, [" M:"]),
    ],
)
def test_the_walk_ends_where_the_format_ends(
    tokenizer: Any, text: str, decisions: int, determined: list[str] | None
) -> None:
    found, ids = find(tokenizer, text)
    assert len(taken(found)) == decisions
    if determined is not None:
        texts = [tokenizer.decode(each["tokens"]).replace(tokenizer.eos_token, "end") for each in found["determined"]]
        assert texts == determined
    assert all(each["position"] < len(ids) for each in found["decisions"] + found["determined"])


def rookworld_answer(fen: str, moves: list[str], evals: list[str], best: str) -> str:
    """As RookWorld's generator formats it, behind a prompt that ends with the FEN."""
    return f"{fen:90}M: {' '.join(moves):30}E: {' '.join(evals):40}B: {best}"[len(fen) :]


PROMOTIONS = "4k2r/PPPP4/8/8/8/8/6p1/4K3 w - - 12 107"  # four pawns before the last rank
FEW = "7k/8/8/8/8/8/8/r6K w - - 149 5899"  # in check, two legal moves


def padded_rows() -> list[tuple[dict[str, Any], list[str], list[str]]]:
    """Rows with what RookWorld's generator prints for them: the five best moves and `str(centipawns / 100)`.

    A start, pawns that promote, two legal moves, and shipped rows of every phase; mates in 2 and -21 moves are
    999.98 and -999.79 there.
    """
    found = [({"prompt": f"P: {chess.STARTING_FEN}"}, [36, 31, -7, 0, 120, 1207])]
    found += [({"prompt": f"P: {PROMOTIONS}"}, [9998, 9900, 2521, -9979, -5])]
    found += [({"prompt": f"P: {FEW}"}, [-9979, -9998])]
    rows = []
    for row, values in found:
        moves = sorted((move.uci() for move in chess.Board(row["prompt"][3:]).legal_moves), key=lambda move: -len(move))
        known = dict(itertools.zip_longest(moves, values[: len(moves)], fillvalue=-350))
        rows.append({**row, "legal_moves": sorted(known), "legal_cp": [known[move] for move in sorted(known)]})
    rows += [row for row in load_shipped("dev").select(range(120)) if row["task"] == "policy"][:12]
    answers = []
    for row in rows:
        ranked = sorted(zip(row["legal_moves"], row["legal_cp"], strict=True), key=lambda pair: -pair[1])[:5]
        answers.append((row, [move for move, _ in ranked], [format_eval(cp, None) for _, cp in ranked]))
    return answers


def test_a_padded_answer_has_the_decisions_of_the_single_spaced_one(tokenizer: Any) -> None:
    """And every action's tokens are those that the tokenizer gives to a whole row with that move in its place."""
    lengths = set()
    for row, moves, evals in padded_rows():
        fen = row["prompt"][3:]
        plain = f" M: {' '.join(moves)} E: {' '.join(['0.25'] * len(moves))} B: {moves[0]}"
        single, _ = find(tokenizer, plain, row)
        gold = rookworld_answer(fen, moves, evals, moves[0])
        found, ids = find(tokenizer, gold, row)
        lead = len(tokenizer(row["prompt"])["input_ids"])
        assert tokenizer(row["prompt"] + gold)["input_ids"] == [*tokenizer(row["prompt"])["input_ids"], *ids[:-1]]
        slots = taken(found)
        assert [each["rewards"] for each in slots] == [each["rewards"] for each in taken(single)]
        assert len(slots) == len(moves) + 1
        for number, slot in enumerate(slots):
            for action in slot["actions"]:
                move = tokenizer.decode(action)[1:]
                listed = [*moves[:number], move, *moves[number + 1 :]] if number < len(moves) else moves
                text = rookworld_answer(fen, listed, evals, move if number == len(moves) else moves[0])
                whole = tokenizer(row["prompt"] + text)["input_ids"][lead:]
                at = slot["position"]
                assert whole[: at + len(action)] == ids[:at] + list(action), (move, text)
        assert len(found["determined"]) == len(moves) + 4
        for each in found["determined"]:  # all of it stands there, spaces included
            assert ids[each["position"] : each["position"] + len(each["tokens"])] == each["tokens"]
        assert found["determined"][-1]["position"] == len(ids) - 1
        Points.read({"decisions": found["decisions"]})
        lengths.add(len(" ".join(moves)))
    assert lengths >= {9, 24, 29}, "two moves, five, and five promotions"


LEAD = " " * (90 - len(ROW["prompt"][3:]))
PADDED_GOLD = rookworld_answer(
    ROW["prompt"][3:], ["a7a8q", "a7a8n", "c1d1", "c1c2"], ["999.9", "0.0", "0.0", "-999.9"], "a7a8q"
)


@pytest.mark.parametrize(
    ("text", "target", "determined"),
    [
        ("k", PADDED_GOLD, [f"{LEAD}M:"]),  # nothing to be seen: as the data has it
        ("k", None, [" M:"]),
        (" ", PADDED_GOLD, [f"{LEAD}M:"]),
        ("  k", GOLD, [f"{LEAD}M:"]),  # what the policy writes rules, whatever the data has
        (" M: c1c2 x", PADDED_GOLD, [" M:"]),
        # One space too few, or one field not filled up, is seen and does not end the walk.
        (f"{LEAD[1:]}M: c1c2 c1d1 a7a8n", None, [f"{LEAD}M:"]),
        (f"{LEAD}M: c1c2 c1d1 a7a8n a7a8q E: 0.0", None, [f"{LEAD}M:", f"{' ' * 9}E:", " -999.9", " 0.0"]),
        # A policy that pads and fills evals up to hundredths, or ends its line, goes on doing so.
        (
            f"{LEAD}M: {'c1c2 c1d1 a7a8n a7a8q':30}E: {'-1000.0 0.10 0.00 1000.0':40}B: a7a8q\n",
            None,
            [f"{LEAD}M:", f"{' ' * 9}E:", " -1000.0", " 0.00", " 0.00", " 1000.0", f"{' ' * 16}B:", "\nend"],
        ),
    ],
)
def test_what_is_determined_is_in_the_spelling_of_the_policy(
    tokenizer: Any, text: str, target: str | None, determined: list[str]
) -> None:
    found, ids = find(tokenizer, text, {**ROW, "target": target})
    end = tokenizer.eos_token
    assert [tokenizer.decode(each["tokens"]).replace(end, "end") for each in found["determined"]] == determined
    assert all(each["position"] < len(ids) for each in found["decisions"] + found["determined"])


@pytest.mark.parametrize("gold", [GOLD, PADDED_GOLD], ids=["single", "padded"])
def test_a_completion_that_was_cut_off_has_the_points_up_to_its_end(tokenizer: Any, gold: str) -> None:
    row = {**ROW, "target": gold}
    whole, ids = find(tokenizer, gold, row)
    for length in range(1, len(ids)):
        found = ChessPoints(tokenizer)(row, ids[:length])
        for kind in ("decisions", "determined"):
            assert found[kind] == [each for each in whole[kind] if each["position"] < length][: len(found[kind])]
            assert all(each["position"] < length for each in found[kind])


def test_the_right_answer_of_an_environment_row_is_its_one_action(tokenizer: Any) -> None:
    row = {"prompt": "A: 8/8/8/8/8/8/k7/2K5 w - - 0 1+c1d1+c1d1+", "target": "8/8/8/8/8/8/k7/3K4 b - - 1 1+0.001+0+0"}
    found, _ = find(tokenizer, "anything", row)
    answer = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = {"position": 0, "actions": [answer], "rewards": [1.0], "weight": ANSWER_WEIGHT}
    tokens = {"position": 0, "tokens": answer, "weight": ANSWER_TOKENS_WEIGHT}
    assert found == {"decisions": [expected], "determined": [tokens], "rest_is_sampled": True}


def test_every_shipped_answer_passes_through_all_of_its_points(tokenizer: Any) -> None:
    """Encoded in pieces, an answer has the tokens it has as a whole; rewards are monotonous in the stored values."""
    points = ChessPoints(tokenizer)
    for row in itertools.islice((row for row in load_shipped("dev") if row["task"] == "policy"), 300):
        ids = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found = points(row, ids)
        count = min(5, len(row["legal_moves"]))
        assert len(taken(found)) == count + 1
        assert len(found["determined"]) == count + 4
        assert found["determined"][-1]["position"] == len(ids) - 1
        for each in found["determined"]:
            assert ids[each["position"] : each["position"] + len(each["tokens"])] == each["tokens"]
        Points.read({"decisions": found["decisions"]})
        first = found["decisions"][0]["rewards"]
        ranked = sorted(zip(row["legal_cp"], first, strict=True))
        assert all(low[1] <= high[1] + 1e-12 for low, high in itertools.pairwise(ranked))
        assert max(first) < 1.0 + 1e-12
