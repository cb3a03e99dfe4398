"""What a program shows: bars with the time left, nothing at all, or JSON."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rookworld_trl.settings.parser import option

LOG_SECONDS = 30.0
BAR_AFTER = 2.0  # seconds; what is done before needs no bar
_quiet = False  # of the program that is running

Item = TypeVar("Item")


@dataclass
class TerminalOptions:
    """What a recipe shows."""

    quiet: bool = option(False, "Show no bars, lines or tables; warnings and errors still come.")
    json: bool = option(False, "Print the result as one line of JSON on stdout, and what is for people on stderr.")


def progress_bar(title: str, total: int | None, unit: str, initial: int = 0, delay: float = 0.0) -> tqdm:
    """A bar with the time left on stderr; without a terminal a line every half a minute. No title: nothing.

    Args:
        delay: seconds after which it appears, of what may be done before.
    """
    options: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "initial": initial, "dynamic_ncols": True}
    options["delay"] = delay
    if not sys.stderr.isatty():
        options |= {"mininterval": LOG_SECONDS, "maxinterval": 2 * LOG_SECONDS, "miniters": 1}
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left\n"
    return tqdm(**options, disable=_quiet or not title)


def with_bar(items: Iterable[Item], title: str, total: int | None, unit: str) -> Iterator[Item]:
    """The items, with a `progress_bar` once they have taken `BAR_AFTER` seconds."""
    with progress_bar(title, total, unit, delay=BAR_AFTER) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def shown(
    options: TerminalOptions | argparse.Namespace, folder: str | Path | None = None, main: bool = True
) -> Iterator[dict[str, Any]]:
    """Show what the block prints as the options say; bars made by `progress_bar` and those of libraries follow.

    Args:
        folder: of a run, which the result names.
        main: this process is the one that people look at; the others print no result.

    Yields:
        The program's result, to be filled; with `options.json` it is printed on stdout where the block ends well.
    """
    stdout, result = sys.stdout, dict[str, Any]() if folder is None else {"output_dir": str(folder)}
    with ExitStack() as stack:
        people: Any = sys.stderr if options.json else stdout
        if options.quiet:
            people = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.callback(_set_quiet, _quiet)
            _set_quiet(True)
        stack.enter_context(redirect_stdout(people))
        yield result
        if options.json and main:
            print(json.dumps(result, default=str), file=stdout, flush=True)


def _set_quiet(quiet: bool) -> None:
    """The bars of this package, of datasets and of the Hub's client, where these have been imported."""
    global _quiet
    _quiet = quiet
    for name in ("datasets.utils.logging", "huggingface_hub.utils"):
        module: Any = sys.modules.get(name)
        switch = {True: "disable_progress_bar", False: "enable_progress_bar"}[quiet]
        for function in (getattr(module, switch, None), getattr(module, f"{switch}s", None)):
            if function is not None:
                function()
                break
