"""Positions as trees of supervised rows: `P:` with every right answer and its share, `A:` with several moves.

One sampled list of five moves says little of a position: which moves are good, and how much better one is, shows only
over many samples. Here each place of a `P:` row has as its target the distribution that the sampling has, so that one
row teaches what many would.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import chess
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.making.moves import environment_rows
from recipes.making.transitions import cornered_king
from rookworld_trl.chess import policy, position_key
from rookworld_trl.chess.dataset import split_of
from rookworld_trl.chess.policy import MATE_CP, format_eval, win_chance
from rookworld_trl.chess.strata import stratum
from rookworld_trl.modeling.tokenizer import SIDES, NanoEncoder
from rookworld_trl.modeling.trees import Tokens, TokenTree

MATE_IN_ONE = 9999  # its value in centipawns
VERSION = 3  # of the trees made of the same positions

# A loss of so much win chance makes a move e times less likely, in every place of the list and at `B:`: the values are
# of few nodes, and in the mean off by more than a point.
TEMPERATURE = 0.04
# Of each place of the list: what all legal moves share, so that legality is learned from thirty moves and not from five
# (the five best share the rest).
LEGAL_SHARE = 0.15
# How much a square counts, at the first place, from which a move could have been listed but is not: its moves.
ASIDE_WEIGHT = 0.5
BEST_WEIGHT = 2.0  # of `B:`, which is played
# Evals are written as an engine of other seeds would give them: off by up to so many centipawns, more the larger they
# are. Then `B:`, which is the best move all the same, is not merely read off them. Their last digits are chance, and
# would drown the rest.
OFF = range(-40, 41, 4)
EVAL_WEIGHT = 0.3
# Of `A:` rows, which have a twentieth of a `P:` row's nats: moves have many right answers, positions one.
POSITION_WEIGHT = 4.0

# Of the positions of `A:` rows, this share offers a scarce kind of move, each kind as often, and shows it.
SCARCE_SHARE = 0.5
# And this share is of no game: a king at the edge, half of the time about to be stalemated, which games hardly offer.
CORNERED_SHARE = 0.12
CORNERED = -1  # in place of a position's number
FEW_MEN = 4  # with so many or fewer, stalemate and dead material are near

# Of squares and moves: the rank as the other side counts it.
OTHER_SIDE = str.maketrans("12345678", "87654321")

# The tasks of the batches of a step, in turn.
TASKS = ("policy", "policy", "environment")
MOST_LISTED = 24  # moves of an `L:` row
MOVES_OF_POSITION = 2  # `A:` rows of one position


class Words:
    """A tokenizer that remembers words; texts of several words are tokenized as a whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos = int(tokenizer.eos_token_id)
        # Of today's chess-aware tokenizer there is a faster form; all texts here are ours, without anything unknown.
        named = SIDES["w"] in tokenizer.get_vocab()
        self.text: Callable[[str], list[int]] = NanoEncoder(tokenizer) if named else partial(_plain_ids, tokenizer)
        self._lead: list[int] = tokenizer("").input_ids  # an end token, where each text begins with one
        self._known: dict[str, Tokens] = {}

    def prompt(self, text: str) -> list[int]:
        return self._lead + self.text(text)

    def __getitem__(self, word: str) -> Tokens:
        """A word with the space before it."""
        if word not in self._known:
            self._known[word] = tuple(self.text(word))
        return self._known[word]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def policy_tree(record: dict[str, Any], words: Words, rng: random.Random) -> TokenTree:
    """A `P:` row of a position: its best moves, better ones rather earlier, their values and the best one."""
    legal = {move.uci(): words[f" {move.uci()}"] for move in chess.Board(record["fen"]).legal_moves}
    ranked = sorted(zip(record["moves"], record["cp"], strict=True), key=lambda pair: -pair[1])[: policy.MAX_CANDIDATES]
    values, best = dict(ranked), win_chance(ranked[0][1])
    shares = {move: math.exp((win_chance(cp) - best) / TEMPERATURE) for move, cp in ranked}
    tree = TokenTree()
    tree.rows = 1
    node = tree.write(words[" M:"], tree.read(words.prompt(policy.prompt(record["fen"]))))
    left, listed = dict(shares), list[str]()
    while left:
        move = rng.choices([*left], [*left.values()])[0]
        good = (1 - LEGAL_SHARE) / sum(left.values())
        options = {tokens: LEGAL_SHARE / len(legal) for tokens in legal.values()}
        for other, share in left.items():
            options[legal[other]] += good * share
        if not listed:
            aside(tree, node, options, legal[move][0])
        node = tree.choose(options, legal.pop(move), node)
        listed.append(move)
        del left[move]
    node = tree.write(words[" E:"], node)
    for move in listed:
        written = eval_options(values[move], words)
        node = tree.choose(written, rng.choices([*written], [*written.values()])[0], node, EVAL_WEIGHT)
    node = tree.write(words[" B:"], node)
    node = tree.choose({words[f" {m}"]: s for m, s in shares.items()}, words[f" {ranked[0][0]}"], node, BEST_WEIGHT)
    tree.want(node, words.eos)
    return tree


def legal_tree(record: dict[str, Any], words: Words, rng: random.Random) -> TokenTree:
    """An `L:` row: legal moves in a random order, each as likely as every other one that is not listed yet."""
    legal = {move.uci(): words[f" {move.uci()}"] for move in chess.Board(record["fen"]).legal_moves}
    tree = TokenTree()
    tree.rows = 1
    node = tree.read(words.prompt("L: " + policy.prompt(record["fen"]).removeprefix(policy.PREFIX)))
    for _ in range(min(MOST_LISTED, len(legal))):
        move = rng.choice([*legal])
        options = {tokens: 1 / len(legal) for tokens in legal.values()}
        node = tree.choose(options, legal.pop(move), node)
    return tree


def aside(tree: TokenTree, node: int, options: dict[Tokens, float], taken: int) -> None:
    """What follows each first token of the options that is not the one taken."""
    by_first: dict[int, dict[Tokens, float]] = {}
    for tokens, share in options.items():
        by_first.setdefault(tokens[0], {})[tokens] = share
    for first, group in by_first.items():
        if first != taken:
            behind, total = tree.read((first,), node), sum(group.values())
            for tokens, share in group.items():
                tree.want(behind, tokens[1], ASIDE_WEIGHT * share / total)


def eval_options(centipawns: int, words: Words) -> dict[Tokens, float]:
    """The evals near a value, with their shares; a mate has one."""
    if abs(centipawns) >= MATE_CP:
        return {words[f" {format_eval(centipawns)}"]: 1.0}
    scale = 1 + abs(centipawns) // 200
    options: dict[Tokens, float] = {}
    for off in OFF:
        tokens = words[f" {format_eval(centipawns + off * scale)}"]
        options[tokens] = options.get(tokens, 0.0) + 1 + OFF[-1] - abs(off)
    return options


def environment_tree(record: dict[str, Any], words: Words, rng: random.Random) -> TokenTree:
    """`A:` rows of several moves in a position, one of a scarce kind if offered; none leads into dev or test."""
    tree = TokenTree()
    while not tree.rows:
        for row in environment_rows(record, MOVES_OF_POSITION, True, rng)[-MOVES_OF_POSITION:]:
            if split_of(row["after"]) == "train":
                tree.add(words.prompt(row["prompt"]), [*words.text(row["completion"]), words.eos], POSITION_WEIGHT)
    return tree


def cornered_record(rng: random.Random) -> dict[str, Any]:
    """A position with a cornered king, of those that belong to train."""
    stalemate = rng.random() < 0.5
    while True:
        board = cornered_king(rng)
        moves = [move.uci() for move in board.legal_moves]
        if stalemate and not any(stratum(board, move) == "stalemate" for move in moves):
            continue
        if split_of(board.fen()) == "train":
            return {"fen": board.fen(), "history": "", "played": rng.choice(moves)}


def scarce_kinds(fen: str, best: int) -> list[str]:
    """Scarce kinds of moves that a position is seen to offer without looking at its moves.

    Args:
        best: value of the best move, in centipawns.
    """
    placement, turn, rights, en_passant, *_ = fen.split()
    ranks, white = placement.split("/"), turn == "w"
    home, seventh, pawn = (ranks[7], ranks[1], "P") if white else (ranks[0], ranks[6], "p")
    kinds = {
        "mate": best == MATE_IN_ONE,
        "en_passant": en_passant != "-",
        "promotion": pawn in seventh,
        "castle_queen": ("Q" if white else "q") in rights and home.lower().startswith("r3k"),
        "few_men": sum(map(str.isalpha, placement)) <= FEW_MEN,
    }
    return [kind for kind, offered in kinds.items() if offered]


def read_positions(shards: Sequence[Path]) -> tuple[pa.Table, str]:
    """The positions of the shards that belong to train, each once, and a hash of the shards."""
    digest = hashlib.sha256()
    tables = []
    for shard in shards:
        digest.update(hashlib.sha256(shard.read_bytes()).digest())
        tables.append(pq.read_table(shard, columns=["fen", "history", "moves", "cp", "played"]))
    table = pa.concat_tables(tables).combine_chunks()
    first: dict[str, int] = {}
    for number, fen in enumerate(table["fen"].to_pylist()):
        if split_of(fen) == "train":
            first.setdefault(position_key(fen), number)
    return table.take(pa.array(first.values(), pa.int64())), digest.hexdigest()


def mirrored(record: dict[str, Any]) -> dict[str, Any]:
    """The same position with the colours exchanged, as `chess.Board.mirror` has it, and its moves with their values.

    Values are the mover's view, so they stay.
    """
    placement, turn, rights, en_passant, *clocks = record["fen"].split()
    flipped = "/".join(reversed(placement.swapcase().split("/")))
    rights = "".join(sorted(rights.swapcase(), key="-KQkq".index))
    fen = [flipped, "b" if turn == "w" else "w", rights, en_passant.translate(OTHER_SIDE), *clocks]
    moves = [move.translate(OTHER_SIDE) for move in record["moves"]]
    history, played = record["history"].translate(OTHER_SIDE), record["played"].translate(OTHER_SIDE)
    return record | {"fen": " ".join(fen), "moves": moves, "history": history, "played": played}


def with_twins(positions: pa.Table) -> pa.Table:
    """The positions, and behind them the mirrored ones that are new and belong to train."""
    known = {position_key(fen) for fen in positions["fen"].to_pylist()}
    tables = [positions]
    for batch in positions.to_batches(max_chunksize=10_000):  # as Python objects a position takes a kilobyte
        twins = [mirrored(record) for record in batch.to_pylist()]
        new = [twin for twin in twins if position_key(twin["fen"]) not in known and split_of(twin["fen"]) == "train"]
        tables.append(pa.Table.from_pylist(new, schema=positions.schema))
    return pa.concat_tables(tables).combine_chunks()


def position_trees(positions: pa.Table, words: Words, batch_size: int, seed: int, legal_lists: float = 0.0) -> Dataset:
    """Trees in the order of training: batches of one task each, as TASKS says, until each position gave its `P:` row.

    They are made when they are asked for. What a tree shows follows from the seed and its place, so a resumed run sees
    the same. Of the positions' `P:` rows the share `legal_lists` are `L:` rows instead.
    """
    rng = np.random.default_rng(seed)
    count = len(positions)
    rounds = count // (batch_size * max(map(TASKS.count, TASKS)))
    scarce: dict[str, list[int]] = {}
    for number, (fen, values) in enumerate(zip(positions["fen"].to_pylist(), positions["cp"].to_pylist(), strict=True)):
        for kind in scarce_kinds(fen, max(values)):
            scarce.setdefault(kind, []).append(number)
    every = {task: itertools.cycle(rng.permutation(count).tolist()) for task in dict.fromkeys(TASKS)}
    rare = [itertools.cycle(rng.permutation(numbers).tolist()) for numbers in scarce.values()]

    def turn(task: str) -> int:
        if task == "environment" and rng.random() < CORNERED_SHARE:
            return CORNERED
        if task == "environment" and rare and rng.random() < SCARCE_SHARE:
            return next(rare[rng.integers(len(rare))])
        return next(every[task])

    order = [(task, turn(task)) for _ in range(rounds) for task in TASKS for _ in range(batch_size)]

    def make(place: int, task: str, number: int) -> dict[str, Any]:
        rng = random.Random(f"{seed}:{place}")
        (record,) = [cornered_record(rng)] if number == CORNERED else positions.slice(number, 1).to_pylist()
        if task == "policy" and legal_lists and rng.random() < legal_lists:
            return legal_tree(record, words, rng).arrays()
        return (policy_tree if task == "policy" else environment_tree)(record, words, rng).arrays()

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        trees = [make(*row) for row in zip(rows["place"], rows["task"], rows["number"], strict=True)]
        return {name: [tree[name] for tree in trees] for name in trees[0]}

    tasks, numbers = zip(*order, strict=True) if order else ((), ())
    return Dataset.from_dict({"place": range(len(order)), "task": tasks, "number": numbers}).with_transform(transform)
