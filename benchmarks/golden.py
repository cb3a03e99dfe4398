"""The golden runs of tests/support/golden_run.py by the code of two commits: checkpoints and logs, tolerance zero.

    python -m benchmarks.golden <commit> [<variant> ...]

The commit is checked out beside this one for the time of the comparison, and takes this one's weights and data: what
is compared is code. A move of code must print `equal` for each variant; a fix of a number must not, and the lines say
where.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.checkpoint_diff import IGNORED, compare, differences  # noqa: E402
from tests.support.golden_run import VARIANTS  # noqa: E402

ASSETS = "rookworld_trl/assets"
WORKER = ROOT / "tests" / "support" / "golden_run.py"


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the tree of a commit, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="golden-") as parent:
        folder = Path(parent, "tree")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            shutil.rmtree(folder / ASSETS)
            shutil.copytree(ROOT / ASSETS, folder / ASSETS)
            yield folder
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def run(tree: Path, variant: str, folder: Path) -> None:
    """A variant from its start, and once more from its first checkpoint, by the package in `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONHASHSEED"] = "0"  # peft keeps the names of its layers in a set
    launcher = [sys.executable]
    if variant == "two processes":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first = folder / "whole" / f"checkpoint-{VARIANTS[variant]['save_steps']}"
    for name, more in (("whole", []), ("resumed", [str(first)])):
        command = [*launcher, str(WORKER), variant, str(folder / name), *more]
        done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{tree}, {variant}, {name}:\n{done.stderr[-3000:]}")


def compared(a: Path, b: Path) -> list[str]:
    """Every difference between what two runs of one variant left behind, but times, ids and names of settings."""
    ignored = (*IGNORED, "run_id", "fingerprint", "time", "debug", "base_model_name_or_path")
    names = {path.relative_to(each) for each in (a, b) for path in each.glob("*/*-*") if path.is_dir()}
    lines = []
    for name in sorted(names):
        found = differences(a / name, b / name, ignored)
        lines += [f"{name}/{line}" for line in found if not line.startswith("README.md")]  # peft's; it has the path
    for name in ("whole", "resumed"):
        logs = [json.loads((each / name / "log.json").read_text(encoding="utf-8")) for each in (a, b)]
        lines += [f"{name}/log.json{line}" for line in compare(*logs, "", ignored)]
    return lines


def main(commit: str, *variants: str) -> int:
    different = 0
    with checked_out(commit) as tree, tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        for variant in variants or VARIANTS:
            folders = [Path(temporary, variant, name) for name in ("then", "now")]
            for folder, code in zip(folders, (tree, ROOT), strict=True):
                folder.mkdir(parents=True)
                run(code, variant, folder)
            lines = compared(*folders)
            different += bool(lines)
            print(f"{variant}: {'equal' if not lines else f'{len(lines)} differences'}", *lines[:20], sep="\n  ")
    return different


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
