"""What a step with the exact gradient costs beside a sampled one, and how its cost grows with the number of actions.

    python -m benchmarks.exact [--prompts 48] [--rounds 3]

`step`: whole GRPO steps at equal prompts, sampled (16 completions a prompt) and exact (2), in turn: sampling, rewards,
forward, backward, optimizer. `growth`: forward and backward of one `P:` completion's decision points, at positions with
few and with many legal moves; the exponent of seconds over legal moves is that of a straight line in logarithms.
With OMP_NUM_THREADS=1 seconds are the process's own, in which others on the machine hardly count.
"""

import argparse
import json
import math
import statistics

import numpy as np

from benchmarks.common import RESULTS, busy, machine, own_clock, padded, timed_training, write_report
from rookworld_trl.data import load_shipped
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import load
from rookworld_trl.rewards.decisions import ChessPoints
from rookworld_trl.training.exact import score_tree
from rookworld_trl.training.points import Points

OUTPUT = RESULTS / "exact.json"
BATCH = 16
# Legal moves: lower bound of each bucket of positions.
BUCKETS = (5, 12, 20, 28, 36, 44)


def steps(prompts: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of both sides, a median for each round."""
    seconds: dict[str, list[float]] = {"sampled": [], "exact": []}
    for _ in range(rounds):
        for side, samples in (("sampled", 16), ("exact", 2)):
            model, tokenizer = load("nano")
            points = ChessPoints(tokenizer) if side == "exact" else None
            measured = timed_training(
                model,
                tokenizer,
                prompts=prompts,
                samples=samples,
                tokens=80,
                steps=4,
                device="cpu",
                micro_batch=32 if side == "exact" else 128,
                find_points=points,
                clock=own_clock("cpu"),
                objective=side,
                scale_rewards="group",
                beta=0.0,
            )
            seconds[side].append(measured["seconds_per_step"])
            print(f"{side}: {seconds[side][-1]:.2f} s a step", flush=True)
    return seconds


def growth(rounds: int) -> list[dict[str, float]]:
    """Seconds of forward and backward of a batch of gold completions, by their positions' legal moves."""
    clock = own_clock("cpu")
    model, tokenizer = load("nano")
    find, rows = ChessPoints(tokenizer), [row for row in load_shipped("train") if row["task"] == "policy"]
    results = []
    for low, high in zip(BUCKETS, [*BUCKETS[1:], BUCKETS[-1] + 8], strict=True):
        chosen = [row for row in rows if low <= len(row["legal_moves"]) < high][:BATCH]
        prompts, answers = ([tokenizer(row[key])["input_ids"] for row in chosen] for key in ("prompt", "target"))
        answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        batch = padded(prompts, answers)
        points = []
        for row, ids in zip(chosen, answers, strict=True):
            plain = find(row, ids)
            points.append(Points.read({key: plain[key] for key in ("decisions", "determined")}))
        seconds = []
        for _ in range(rounds * 4 + 1):
            start = clock()
            gpt2, head = GPT2.sharing(model), model.get_output_embeddings()
            score_tree(gpt2, head, batch, points).objective.sum().backward()
            seconds.append(clock() - start)
        moves = statistics.mean(len(row["legal_moves"]) for row in chosen)
        results.append({"legal_moves": moves, "seconds_a_row": statistics.median(seconds[1:]) / len(chosen)})
        print(f"{moves:.1f} legal moves: {1000 * results[-1]['seconds_a_row']:.1f} ms a row", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds, curve = steps(arguments.prompts, arguments.rounds), growth(arguments.rounds)
    logs = [[math.log(row[key]) for row in curve] for key in ("legal_moves", "seconds_a_row")]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    report = {
        "prompts": arguments.prompts,
        "rounds": arguments.rounds,
        "seconds_per_step": medians,
        "sampled_over_exact": medians["sampled"] / medians["exact"],
        "growth": curve,
        "exponent": float(np.polyfit(*logs, 1)[0]),
        **machine("cpu"),
        "busy_processes": busy(),
        "clock": own_clock("cpu").__name__,
    }
    print(json.dumps(report))
    write_report(OUTPUT, report)


if __name__ == "__main__":
    main()
