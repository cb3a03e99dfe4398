"""The three verifications of RookWorld-LM 124M, and the exact gradient, at real size on a CPU, by their own recipes and
few prompts.

    python -m benchmarks.verify [--only random_weights components epochs exact] [--output FILE]

`random_weights`: 124,439,808 random parameters at the recipe's learning rate and thresholds run into the KL stop and
end in good order. `components`: three steps of them with everything in the log. `epochs`: sixty passes of the real
weights of rookworld-nano over the same 32 rows (the real 124M weights are on the Hub). `exact`: two steps with the
exact gradient by `accelerate_configs/rtx4090.yaml` as it stands, in bf16 and compiled by Inductor. What holds in the
report is not done again; the program fails if a check does not hold.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.common import RESULTS, ROOT, busy, machine, shipped, write_report
from benchmarks.fresh import write_fresh
from rookworld_trl.checkpointing.stopping import DIVERGED, DONE
from rookworld_trl.training.gates import Bounds

OUTPUT = RESULTS / "verify.json"
PARAMETERS = 124_439_808
FEW = {"use_cpu": "true", "bf16": "false", "dataloader_num_workers": 0, "eval_policy_items": 2}
FEW |= {"eval_environment_items": 2, "gradient_accumulation_steps": 1}
CHANGE = ("before", "after", "ci_low", "ci_high")
ROWS, EPOCHS = 32, 60  # half of the rows are A:, and a step takes 8 prompts: 4 steps are a pass

Steps = list[dict[str, Any]]


def random_weights(folder: Path) -> dict[str, Any]:
    """2 prompts of 2 samples instead of 8 of 4; lengths, rates and thresholds are the recipe's."""
    start = fresh(folder)
    small = {"model": start, "num_generations": 2, "per_device_train_batch_size": 4, "mix_env_ratio": 0.5}
    code, steps, summary = run("random_weights", folder / "random", small)
    model = AutoModelForCausalLM.from_pretrained(folder / "random" / "checkpoint")
    checks = {
        "it ends with 3, diverged": code == DIVERGED,
        "the reason is the KL stop": "kl_stop_threshold" in summary["stop_reason"],
        "it stops at its first step above 50 nats a completion": [row["kl/sequence_p95"] > 50 for row in steps]
        == [False] * (len(steps) - 1) + [True],
        "KL starts at 0": abs(steps[0]["kl"]) < 1e-6,
        "losses and gradients are finite": finite(steps),
        "the end was measured": bool(summary["headline"]),
        "checkpoint and parameters": model.num_parameters() == PARAMETERS,
    }
    return {
        "parameters": model.num_parameters(),
        "steps": len(steps),
        "stop_reason": summary["stop_reason"],
        "kl_p95": [round(row["kl/sequence_p95"], 3) for row in steps],
        "checks": checks,
    }


def components(folder: Path) -> dict[str, Any]:
    """2 prompts of 4 samples of 24 tokens in two micro-batches, random weights."""
    small = {"model": fresh(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    small |= {"num_generations": 4, "max_completion_length": 24, "mix_env_ratio": 0.5}
    code, steps, _ = run("components", folder / "components", small)
    gates, hold = gates_of(steps, mixed=False)
    wanted = {"kl", "kl/coefficient", "kl/sequence_p95", "entropy", "grad_norm", "learning_rate", "perf/memory_gb"}
    wanted |= {"perf/memory_rss_gb", "perf/seconds_learning", "rollout/seconds_per_sample"}
    wanted |= {"rewards/policy_reward_continuous/mean", "rewards/environment_reward_continuous/mean"}
    checks = {
        "it ends with 0": code == DONE,
        "the gates hold": hold,
        "KL starts at 0": abs(steps[0]["kl"]) < 1e-6,
        "everything is in every line": len(steps) == 3 and all(wanted <= row.keys() for row in steps),
        "losses and gradients are finite": finite(steps),
        "a checkpoint at every step": len(list((folder / "components").glob("checkpoint-*"))) == 3,
        "completions of every step": len(list((folder / "components" / "completions").glob("*.parquet"))) == 3,
    }
    return {"gates": gates, "memory_gb": round(steps[-1]["perf/memory_gb"], 2), "checks": checks}


def epochs(folder: Path) -> dict[str, Any]:
    """rookworld-nano, 8 prompts of 8 samples a step; rate and thresholds are the recipe's.

    The rate matters: at twenty times this one (1e-4) the KL stop ended such a run at step 155.
    """
    rows, counts = [], {"policy": ROWS // 2, "environment": ROWS // 2}
    for row in shipped("train"):
        if counts[row["task"]]:
            counts[row["task"]] -= 1
            rows.append({name: row[name] for name in ("prompt", "legal_moves", "legal_cp")})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a_pass = ROWS // 8
    small = {
        "model": "nano",
        "dataset": file,
        "streaming": "false",
        "best_move": "null",
        "max_rows": ROWS,
        "max_steps": EPOCHS * a_pass,
    }
    small |= {"num_generations": 8, "per_device_train_batch_size": 64, "max_completion_length": 80}
    small |= {"save_strategy": "no", "eval_policy_items": 64, "eval_environment_items": 64}
    code, steps, summary = run("epochs", folder / "epochs", small)
    first, last = (fmean(row["reward"] for row in part) for part in (steps[: 10 * a_pass], steps[-10 * a_pass :]))
    checks = {
        "it ends with 0, not stopped": code == DONE and not summary["stop_reason"],
        "all sixty passes": len(steps) == EPOCHS * a_pass,
        "losses and gradients are finite": finite(steps),
        "KL stays below 0.5 nats a token, and moves": 1e-5 < max(row["kl"] for row in steps) < 0.5,
        "gradients stay below 10": max(row["grad_norm"] for row in steps) < 10,
        "the last ten passes earn no less than the first ten": last >= first,
    }
    return {
        "steps": len(steps),
        "reward_first_passes": round(first, 4),
        "reward_last_passes": round(last, 4),
        "kl_most": round(max(row["kl"] for row in steps), 4),
        "grad_norm_most": round(max(row["grad_norm"] for row in steps), 3),
        "held_out": list(map(change, summary["headline"])),
        "significant_losses": list(map(change, summary["losses"])),
        "checks": checks,
    }


def exact(folder: Path) -> dict[str, Any]:
    """4 `A:` prompts of 2 samples of 24 tokens in two micro-batches; the launch file's precision and compiler.

    Each of these completions has a decision, where random `P:` text has none and is refused.
    """
    small = {"model": fresh(folder), "mix_env_ratio": 1.0, "policy_strata": "null", "max_completion_length": 24}
    small |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "use_cpu": "true"}
    small |= {"eval_steps": 1, "save_steps": 1, "eval_items": 2, "eval_policy_items": 2, "eval_environment_items": 2}
    recipe = "recipes/rookworld-lm-124m/grpo/config_exact.yaml"
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/rtx4090.yaml"]
    code, steps, summary = program([*launch, "recipes/grpo.py", "--config", recipe], folder / "exact", small)
    gates, hold = gates_of(steps, mixed=True)
    checks = {
        "it ends with 0": code == DONE,
        "two steps": len(steps) == 2,
        "the gates of bf16 hold": hold,
        "every completion has a decision": all(row["exact/decided/environment"] == 1 for row in steps),
        "blocks are compiled": steps[-1]["perf/compiled_graphs"] > 0,
        "losses and gradients are finite": finite(steps),
        "something was learned": max(row["kl"] for row in steps) > 0 < min(row["grad_norm"] for row in steps),
        "the end was measured": bool(summary["headline"]),
    }
    return {
        "parameters": PARAMETERS,
        "gates": gates,
        "loss": [row["loss"] for row in steps],
        "kl": [row["kl"] for row in steps],
        "seconds": [round(row["step_time"], 1) for row in steps],
        "memory_gb": round(steps[-1]["perf/memory_gb"], 2),
        "checks": checks,
    }


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each for each in (random_weights, components, epochs, exact)
}


def fresh(folder: Path) -> Path:
    """Random GPT-2 small, written once."""
    model = folder / "random-124m"
    if not model.exists():
        write_fresh(model)
    return model


def change(row: dict[str, Any]) -> str:
    """A metric's change on held-out prompts, with its paired interval."""
    before, after, low, high = ("n/a" if row[key] is None else f"{row[key]:.3f}" for key in CHANGE)
    return f"{row['task']}, {row['mode']}: {row['label']} {before} -> {after}, change within [{low}, {high}]"


def gates_of(steps: Steps, mixed: bool) -> tuple[dict[str, float], bool]:
    """What the gates of the first batch measured, and whether all of it is within their bounds."""
    bounds = Bounds.for_precision(mixed=mixed)
    limits = {"padding": bounds.logp, "reference": bounds.kl, "sampled_ids": 0.0, "sampler": bounds.logp}
    gates = {name: steps[0][f"gates/{name}"] for name in limits}
    return gates, all(gates[name] <= limit for name, limit in limits.items())


def finite(steps: Steps) -> bool:
    return all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)


def run(recipe: str, folder: Path, settings: dict[str, Any]) -> tuple[int, Steps, dict[str, Any]]:
    """Exit code, lines of the metrics, and summary of a recipe with these settings."""
    config = f"recipes/rookworld-lm-124m/verify/{recipe}.yaml"
    return program(["recipes/grpo.py", "--config", config], folder, {**FEW, **settings})


def program(words: list[str], folder: Path, settings: dict[str, Any]) -> tuple[int, Steps, dict[str, Any]]:
    """The same of a command of Python's that ends in a recipe."""
    words += [f"--{key}={value}" for key, value in {**settings, "output_dir": folder}.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment).returncode
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return code, [row for row in lines if "kl" in row], json.loads((folder / "summary.json").read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            if all(report.get(name, {}).get("checks", {"none": False}).values()):
                continue
            started = time.perf_counter()
            report[name] = RUNS[name](Path(folder))
            report[name] |= {"minutes": round((time.perf_counter() - started) / 60, 1), "busy_processes": busy()}
            report |= machine("cpu")
            write_report(arguments.output, report)
            print(f"{name}: {json.dumps(report[name], indent=1)}", flush=True)
    failed = [f"{name}: {what}" for name in arguments.only for what, held in report[name]["checks"].items() if not held]
    print("\n".join(f"does not hold: {each}" for each in failed) or "every check holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
