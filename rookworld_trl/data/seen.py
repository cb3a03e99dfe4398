"""Which positions a training source shows, so that nothing is measured on what was trained on."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from rookworld_trl.data.dataset import shipped_positions
from rookworld_trl.data.pgn import GamesReport, rows_of_games
from rookworld_trl.data.rookworld import TEXT_COLUMN
from rookworld_trl.data.sources import PGN, DataOptions, _columns, _read, _reader
from rookworld_trl.data.splits import positions_of
from rookworld_trl.tasks import PREFIXES, ParseError, environment, split_row

SHIPPED = "shipped"


def shown_positions(source: str, split: str = "train") -> set[str]:
    """Keys (`position_key`) of all positions that a training source shows, in prompts and in answers.

    Args:
        source: `shipped`, whose train split is taken; a file as recipes/grpo.py reads them, of which only the columns
            `prompt` and `target`, or `text`, are looked at (rows that don't parse were not trained on either); a PGN
            file; or a data set's name on the Hub.

    Raises:
        ValueError: an unreadable source, or one with none of these columns.
    """
    if source == SHIPPED:
        return shipped_positions("train")
    if _reader(Path(source)) == PGN:
        games = rows_of_games(Path(source), GamesReport(), positions=True)
        return set(chain.from_iterable(positions_of(row["prompt"], row["target"]) for row in games))
    stream, columns = _columns(source, _read(source, split, DataOptions()))
    if "prompt" not in columns and TEXT_COLUMN not in columns:
        raise ValueError(f"{source}: has neither a column 'prompt' nor '{TEXT_COLUMN}' (found: {', '.join(columns)})")
    keys: set[str] = set()
    for row in stream:
        prompt, target = row.get("prompt"), row.get("target")
        if prompt is None:
            text = str(row[TEXT_COLUMN])
        try:
            if prompt is None:  # the public rows leave out the prefix of `A:`
                prompt, target = split_row(
                    text if text.startswith(tuple(PREFIXES.values())) else environment.PREFIX + text
                )
            keys.update(positions_of(str(prompt), target))
        except ParseError:
            continue
    return keys


def check_unseen(positions: Sequence[Sequence[str]], trained_on: Iterable[str], drop: bool) -> list[int]:
    """The numbers of the items that no training source shows.

    Args:
        positions: of each item the keys of the positions it shows.
        trained_on: sources, see `shown_positions`.
        drop: leave out items that were seen; else they are an error.

    Raises:
        ValueError: items were seen and `drop` is false, or none is left.
    """
    seen: dict[str, str] = {}
    for source in trained_on:
        for key in shown_positions(source):
            seen.setdefault(key, source)
    found = {
        n: next(key for key in keys if key in seen)
        for n, keys in enumerate(positions)
        if not seen.keys().isdisjoint(keys)
    }
    if found and not drop:
        first = next(iter(found.values()))
        raise ValueError(
            f"{len(found)} of {len(positions)} items show positions that stand in the training data {seen[first]!r} "
            f"(first: {first}); `--seen drop` leaves them out, `--trained_on` says what the model was trained on"
        )
    left = [n for n in range(len(positions)) if n not in found]
    if not left:
        raise ValueError(f"all {len(positions)} items show positions of the training data; nothing is left to measure")
    return left
