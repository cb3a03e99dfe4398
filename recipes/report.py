"""Make one HTML page of a run from its files. It opens without a network.

    python recipes/report.py runs/demo

Works while a run is still going on, and on one that was interrupted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rookworld_trl.chess import boards
from rookworld_trl.reports.document import write_report
from rookworld_trl.settings.parser import bad_input
from rookworld_trl.settings.terminal import TerminalOptions, shown


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a run.")
    parser.add_argument("--output", type=Path, help="File to write; default: report.html in the run's folder.")
    for field in fields(TerminalOptions):
        parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with bad_input(), shown(args) as result:
        result["report"] = str(write_report(args.run, args.output, boards))
        print(result["report"])


if __name__ == "__main__":
    main()
