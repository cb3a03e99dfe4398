"""Which positions a training source shows, so that nothing is measured on what was trained on.

What is not known is no proof that nothing was seen: it is named, and the results say that it is unknown.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rookworld_trl.chess import ParseError, split_row
from rookworld_trl.chess.dataset import PROBLEM_FILES, Report, positions_of, shipped_positions
from rookworld_trl.chess.pgn import rows_of_games
from rookworld_trl.chess.rookworld import TEXT_COLUMN, with_prefix
from rookworld_trl.chess.sources import PGN, DataOptions, open_rows, reader_of
from rookworld_trl.modeling.loading import NANO

SHIPPED = "shipped"


class Source(NamedTuple):
    """What was trained on: `dataset` and `dataset_split` of recipes/grpo.py, and of a stream how much of it."""

    name: str
    split: str = "train"
    streaming: bool = False
    max_rows: int | None = None


@dataclass
class TrainingData:
    """What models were trained on, as far as it is known; `unknown`: what is not, one phrase each."""

    sources: list[Source]
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = f"Whether these items were seen in training is unknown, for this is: {'; '.join(self.unknown)}. "
        return f"{said}`--trained_on` says what the models were trained on" if self.unknown else ""


@functools.cache
def shown_positions(
    source: str, split: str = "train", streaming: bool = False, max_rows: int | None = None
) -> set[str]:
    """Keys (`position_key`) of all positions that a training source shows, in prompts and in answers.

    Args:
        source: `shipped`, whose train split is taken; a folder that `generate_data.py dataset` wrote; a file as
            recipes/grpo.py reads them, of which only the columns `prompt` and `target`, or `text`, are looked at (rows
            that don't parse were not trained on either); a PGN file; or a data set's name on the Hub.

    Raises:
        ValueError: an unreadable source, or one with none of these columns; `--trained_on` names others, or none.
    """
    if source == SHIPPED:
        return shipped_positions("train")
    if Path(source, f"{split}.parquet").is_file():
        return shipped_positions(split, Path(source))
    if reader_of(Path(source)) == PGN:
        games = rows_of_games(Path(source), Report(), positions=True)
        return set(chain.from_iterable(positions_of(row["prompt"], row["target"]) for row in games))
    rows, columns = open_rows(source, split, DataOptions(streaming=streaming, max_rows=max_rows))
    if "prompt" not in columns and TEXT_COLUMN not in columns:
        raise ValueError(f"{source}: has neither a column 'prompt' nor '{TEXT_COLUMN}' (found: {', '.join(columns)})")
    keys: set[str] = set()
    for row in rows:
        prompt, target = row.get("prompt"), row.get("target")
        try:
            if prompt is None:
                prompt, target = split_row(with_prefix(str(row[TEXT_COLUMN])))
            keys.update(positions_of(str(prompt), target))
        except ParseError:
            continue
    return keys


def unseen(items: Sequence[Sequence[str]], source: str | Path, trained_on: TrainingData) -> list[int]:
    """The numbers of the items of which no training source shows a position; how many do is printed.

    Args:
        items: the keys of the positions that each item shows.
        source: where the items come from. The shipped ones share no position with the shipped training split.
        trained_on: the training sources.

    Raises:
        ValueError: none is left; names the source.
    """
    seen: dict[str, str] = {}
    for other in trained_on.sources:
        if other.name != SHIPPED or source not in (SHIPPED, *PROBLEM_FILES):
            seen |= dict.fromkeys(shown_positions(*other) - seen.keys(), other.name)
    places = [next((seen[key] for key in keys if key in seen), None) for keys in items]
    left = [number for number, place in enumerate(places) if place is None]
    if len(left) < len(items):
        said = f"{source}: {len(items) - len(left)} of {len(items)} items show positions of the training data "
        said += f"{', '.join(sorted({place for place in places if place}))} and are left out"
        if not left:
            raise ValueError(f"{said}: nothing is left to measure. `--trained_on` says what the model was trained on")
        print(said)
    return left


def known_training_data(models: Iterable[str]) -> TrainingData:
    """What can be seen of the models' training: the shipped rows, and what the summaries of their runs name.

    Args:
        models: `nano`; folders that recipes/grpo.py wrote, with `summary.json` above them, which names the data and the
            model that the run started from; or others, of which nothing is known.
    """
    known = TrainingData([Source(SHIPPED)])
    waiting, done = list(models), set()
    for model in waiting:
        if model == NANO or model in done:
            continue
        done.add(model)
        run = Path(model).absolute().parent
        try:
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            dataset, start = summary["dataset"], str(summary["model"])
        except (OSError, ValueError, LookupError, TypeError):
            known.unknown.append(f"all that {model} was trained on (no summary.json of a run stands above it)")
            continue
        waiting.append(start)
        source = _source(str(dataset), summary)
        if source is None:
            known.unknown.append(f"the training data {dataset!r} of {model} (it is not there any more)")
        elif source not in known.sources:
            known.sources.append(source)
    return known


def _source(dataset: str, summary: dict[str, Any]) -> Source | None:
    """A run's data as it can be read from here; None if it cannot. A name on the Hub may be read, or not."""
    if dataset == SHIPPED:
        return Source(SHIPPED)
    split = str(summary.get("dataset_split") or "train")
    for place in (str(summary.get("dataset_path") or ""), dataset):
        if place and Path(place).exists():
            return Source(place, split)
    if reader_of(Path(dataset)) is None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset):
        return Source(dataset, split, bool(summary.get("streaming")), summary.get("max_rows"))
    return None
