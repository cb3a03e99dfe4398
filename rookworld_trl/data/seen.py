"""Which positions a training source shows, so that nothing is measured on what was trained on."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from rookworld_trl.data.dataset import MATES_FILE, TACTICS_FILES, shipped_positions
from rookworld_trl.data.pgn import GamesReport, rows_of_games
from rookworld_trl.data.rookworld import TEXT_COLUMN
from rookworld_trl.data.sources import PGN, DataOptions, _columns, _read, _reader
from rookworld_trl.data.splits import positions_of
from rookworld_trl.tasks import PREFIXES, ParseError, environment, split_row

SHIPPED = "shipped"
T = TypeVar("T")


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


def unseen(
    items: Iterable[T],
    positions: Callable[[T], Sequence[str]],
    source: str | Path,
    trained_on: Iterable[str] = (),
    drop: bool = False,
) -> list[int]:
    """The numbers of the items of which no training source shows a position.

    Args:
        positions: the keys of the positions that an item shows.
        source: where the items come from. The shipped ones share no position with the shipped training split.
        trained_on: training sources, see `shown_positions`.
        drop: leave out items that were seen; else they are an error.

    Raises:
        ValueError: items were seen and `drop` is false, or none is left; names the source.
    """
    items = list(items)
    shipped = (SHIPPED, MATES_FILE, *TACTICS_FILES.values())
    others = [other for other in trained_on if other != SHIPPED or source not in shipped]
    if not others:
        return list(range(len(items)))
    seen: dict[str, str] = {}
    for other in others:
        for key in shown_positions(other):
            seen.setdefault(key, other)
    found = {n: key for n, item in enumerate(items) for key in positions(item) if key in seen}
    if found and not drop:
        first = next(iter(found.values()))
        raise ValueError(
            f"{source}: {len(found)} of {len(items)} items show positions that stand in the training data "
            f"{seen[first]!r} (first: {first}); `--seen drop` leaves them out, `--trained_on` says what the model was "
            "trained on"
        )
    left = [n for n in range(len(items)) if n not in found]
    if not left:
        raise ValueError(
            f"{source}: all {len(items)} items show positions of the training data; nothing is left to measure"
        )
    return left


def known_training_data(models: Iterable[str]) -> list[str]:
    """What can be seen of the models' training: the shipped rows, and the files that their runs' summaries name.

    Args:
        models: folders as recipes/grpo.py writes them, with `summary.json` above them, or others, of which nothing is
            known.
    """
    found = [SHIPPED]
    for model in models:
        try:
            source = json.loads((Path(model).parent / "summary.json").read_text(encoding="utf-8"))["dataset"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(source, str) and source not in found and Path(source).is_file():
            found.append(source)
    return found
