"""What is measured: rows and problems, drawn the same in every run, none of which the models were trained on."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset

from rookworld_trl.data.mates import MATES_FILE
from rookworld_trl.data.seen import SHIPPED, check_unseen
from rookworld_trl.data.splits import draw_of_each, positions_of
from rookworld_trl.evaluation.problem_files import read_problems
from rookworld_trl.evaluation.problems import Problem
from rookworld_trl.tasks import PREFIXES, position_key


def unseen_rows(
    dataset: Dataset, source: str, trained_on: Iterable[str] = (), drop: bool = False, limit: int | None = None
) -> Dataset:
    """Rows of each task, at most `limit` (see `draw_of_each`).

    Args:
        source: where they come from; `shipped` for a shipped split, which is known to share no position with the
            shipped training split.
        trained_on: training sources, see `shown_positions`.
        drop: leave out rows that were trained on; else they are an error.

    Raises:
        ValueError: rows were trained on, or none is left; names the source.
    """
    if others := _others(trained_on, source == SHIPPED):
        shown = [
            positions_of(prompt, target) for prompt, target in zip(dataset["prompt"], dataset["target"], strict=True)
        ]
        dataset = dataset.select(_unseen(source, shown, others, drop))
    return draw_of_each(dataset, dict.fromkeys(PREFIXES, limit)) if limit else dataset


def unseen_problems(
    path: Path,
    trained_on: Iterable[str] = (),
    drop: bool = False,
    limit: int | None = None,
    max_rows: int | None = None,
) -> list[Problem]:
    """The problems of a file's first `max_rows` entries, at most `limit` of them; otherwise as `unseen_rows`."""
    problems = read_problems(path, max_rows)
    if others := _others(trained_on, path == MATES_FILE):
        shown = [[position_key(board.fen()) for board in problem.boards] for problem in problems]
        problems = [problems[number] for number in _unseen(path, shown, others, drop)]
    drawn = random.Random(0).sample(range(len(problems)), min(limit or len(problems), len(problems)))
    return [problems[number] for number in sorted(drawn)]


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


def _others(trained_on: Iterable[str], disjoint: bool) -> list[str]:
    """The sources to compare with; what comes with the package shares no position with its training split."""
    return [source for source in trained_on if not (disjoint and source == SHIPPED)]


def _unseen(source: str | Path, shown: Sequence[Sequence[str]], trained_on: Sequence[str], drop: bool) -> list[int]:
    try:
        return check_unseen(shown, trained_on, drop)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
