"""What a program shows: bars with the time left, nothing at all, or JSON; and the same lines in a log file."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from rookworld_trl.settings.parser import command, option, without_secrets

LOG_FILE = "log.txt"
LOG_SECONDS = 30.0
BAR_AFTER = 2.0  # seconds; what is done before needs no bar
_quiet = False  # of the program that is running

Item = TypeVar("Item")


@dataclass
class TerminalOptions:
    """What a recipe shows, and what it keeps of that."""

    quiet: bool = option(False, "Show no bars, lines or tables; warnings and errors still come.")
    json: bool = option(False, "Print the result as one line of JSON on stdout, and what is for people on stderr.")
    log_file: bool = option(False, "Keep every line of the terminal, with its time, in `log.txt` in `output_dir`.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program without a recipe: `--quiet` and `--json`, as `shown` takes them."""
    for field in fields(TerminalOptions):
        if field.name != "log_file":
            parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])


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
        folder: of a run, where the log file goes. A resumed run appends to it.
        main: this process is the one that people look at; of the others, nothing changes but the bars.

    Yields:
        The program's result, to be filled; with `options.json` it is printed on stdout where the block ends well.

    Raises:
        OSError: the log file cannot be written.
    """
    stdout, result = sys.stdout, dict[str, Any]() if folder is None else {"output_dir": str(folder)}
    with ExitStack() as stack:
        people: Any = sys.stderr if options.json else stdout
        if options.quiet:
            people = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.callback(_set_quiet, _quiet)
            _set_quiet(True)
        if folder is not None and options.log_file and main:
            people, errors = stack.enter_context(_copied(people, sys.stderr, Path(folder) / LOG_FILE))
            stack.enter_context(redirect_stderr(errors))
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


@contextmanager
def _copied(out: TextIO, errors: TextIO, file: Path) -> Iterator[tuple[Any, Any]]:
    """The two streams, whose lines go into a file too, and with them transformers' warnings and a crash's traceback."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", buffering=1) as log:
        both = _Copied(out, log), _Copied(errors, log)
        handler = logging.StreamHandler(_Copied(None, log))  # transformers' own holds on to the stderr of its import
        logging.getLogger("transformers").addHandler(handler)
        both[0].note(f"$ {command()}")
        try:
            yield both
        except Exception:
            both[0].note(traceback.format_exc())
            raise
        finally:
            logging.getLogger("transformers").removeHandler(handler)


class _Copied:
    """A stream whose whole lines go into a file too, each with its time; of a bar, how it ended."""

    def __init__(self, stream: TextIO | None, log: TextIO):
        self.stream, self.log, self.rest = stream, log, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        self.rest = self.rest[self.rest.rfind("\r") + 1 :]
        for line in lines:
            self.note(line.rsplit("\r", 1)[-1])
        return len(text) if self.stream is None else self.stream.write(text)

    def note(self, text: str) -> None:
        """Write lines into the file alone."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk must not cost the run
            self.log.writelines(f"{now} {without_secrets(line)}\n" for line in text.splitlines() if line.strip())

    def flush(self) -> None:
        if self.stream is not None:
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
