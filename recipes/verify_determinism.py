"""Does the same seed give the same weights? Trains a recipe of GRPO twice, each time in a process of its own.

    python recipes/verify_determinism.py --config recipes/nano/grpo/config_cpu_exact.yaml --max_steps 3

Takes what `recipes/grpo.py` takes; measures nothing and keeps nothing. Prints a hash of the weights of each run. The
exit code is 0 if they are the same and 1 if not.
"""

if __name__ == "__main__":
    import sys  # run as a file, it does not find `recipes` by itself
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from transformers import set_seed

from recipes import grpo
from rookworld_trl import plugins
from rookworld_trl.checkpointing.resume import weights_digest
from rookworld_trl.settings.parser import bad_input, parse


def weights_of(argv: Sequence[str]) -> str:
    """Train once, and hash what comes out."""
    with tempfile.TemporaryDirectory() as folder:
        with bad_input():
            run, args, *extras = parse(grpo.CLASSES, [*argv, "--output_dir", folder], __doc__, plugins.check)
            args.save_strategy, args.report_to = "no", []
            set_seed(args.seed)
            trainer, _ = grpo.build(run, args, *extras)
        with trainer.at_work():
            trainer.train()
            return weights_digest(trainer.model.state_dict())


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    with bad_input():
        parse(grpo.CLASSES, words, __doc__, plugins.check)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        first, second = pool.map(weights_of, [words, words])
    print(f"first run   {first}\nsecond run  {second}\n{'the same' if first == second else 'NOT THE SAME'}")
    return int(first != second)


if __name__ == "__main__":
    sys.exit(main())
