"""Make a run's plot and report from its files.

    python recipes/report.py runs/demo

Reads metrics.jsonl and summary.json; writes plot.png, report.md and report.html beside them, or into --output.
Works while a run is still going, and on one that was interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rookworld_trl.config import bad_input
from rookworld_trl.reports import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="Folder of a run.")
    parser.add_argument("--output", type=Path, help="Folder to write to; with several runs, one folder in it for each.")
    args = parser.parse_args(arguments)
    with bad_input():
        for run in args.runs:
            output = args.output / run.resolve().name if args.output and len(args.runs) > 1 else args.output
            for path in write_report(run, output):
                print(path)


if __name__ == "__main__":
    main()
