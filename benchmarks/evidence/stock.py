"""How far are the log-probs of stock TRL's GRPOTrainer from those its samples were drawn with, by padding?

    python -m benchmarks.evidence.stock

The first batches of the arm `stock`, by its own plan, of 60 prompts, two samples each: TRL pads prompts on the left and
scores them without position ids, from which GPT-2 counts positions from the padding on. Compared, token by token, are
TRL's log-probs as they are and with position ids from the mask (the arm `stock_positions`), those that transformers'
`generate` drew from, and those of each sequence alone, without padding, by a model loaded separately. The gradient of
TRL's loss is taken both ways on the same samples. Nothing is trained.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer

from benchmarks.common import RESULTS, machine, write_report
from benchmarks.evidence.sizes import NANO
from benchmarks.learning import gradient
from rookworld_trl.evaluation.accuracy import score
from rookworld_trl.evaluation.intervals import Array
from rookworld_trl.modeling.loading import NANO_FOLDER, load
from rookworld_trl.modeling.positions import install_position_hook
from rookworld_trl.modeling.tokens import completion_texts
from rookworld_trl.training.recording import record_generate

OUTPUT = RESULTS / "stock_logprobs.json"
PADDING = {"0": (0, 0), "1-10": (1, 10), "11-40": (11, 40), "over 40": (41, 10_000)}  # padded tokens of a prompt


@contextmanager
def position_ids(trainer: GRPOTrainer) -> Iterator[None]:
    """The fix: positions from the mask, for policy and reference."""
    with ExitStack() as stack:
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                stack.callback(install_position_hook(model).remove)
        yield


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """Log-probs of a completion's tokens, from the sequence without any padding."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def loss_gradient(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    """Of TRL's loss on a whole batch."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch).backward()
    return gradient(trainer.model)


def measure(trainer: GRPOTrainer, plain: PreTrainedModel, batches: int) -> dict[str, Any]:
    """Sample and score the trainer's next batches.

    Args:
        trainer: stock TRL's, without hooks.
        plain: the same weights, loaded separately.

    Returns:
        Errors in nats a token by padding, for each pair of sides; ratios of TRL's probabilities to the sampler's;
        cosines of the gradients, one a batch; the share of completions that parse, by task.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    logps: dict[str, list[Tensor]] = {name: [] for name in ("stock", "with position ids", "sampler", "unpadded")}
    padding: list[int] = []
    cosines: list[float] = []
    parsed: dict[str, list[float]] = {}
    ended, old_logps_kept = [], False
    trainer.model.train()  # as in training; dropout is off
    repeated = args.steps_per_generation * trainer.num_iterations  # TRL's loader gives a batch as often as it is used
    for rows in islice(trainer.get_train_dataloader(), 0, batches * repeated, repeated):
        with record_generate(trainer.model, rows=len(rows)) as drawn_of:
            batch = trainer._generate_and_score_completions(rows)
        mask, width = batch["completion_mask"].bool(), batch["completion_ids"].shape[1]
        old_logps_kept |= "old_per_token_logps" in batch
        whole = [torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], dim=1) for what in ("ids", "mask")]

        def scored(whole: list[Tensor] = whole, width: int = width, mask: Tensor = mask) -> list[Tensor]:
            with torch.no_grad():
                values = trainer._get_per_token_logps_and_entropies(trainer.model, *whole, width)[0]
            return [row[kept] for row, kept in zip(values, mask, strict=True)]

        logps["stock"] += scored()
        wrong = loss_gradient(trainer, batch)
        with position_ids(trainer):
            logps["with position ids"] += scored()
            if "ref_per_token_logps" in batch:  # of the same weights, so that this is the reference's with the fix
                values = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *whole, width)[0]
                batch["ref_per_token_logps"] = values.detach()
            right = loss_gradient(trainer, batch)
        cosines.append(float(torch.cosine_similarity(wrong, right, dim=0)))
        completions = [row[kept].tolist() for row, kept in zip(batch["completion_ids"], mask, strict=True)]
        prompts = [
            row[kept.bool()].tolist() for row, kept in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        logps["sampler"] += [torch.tensor(each.logps) for each in drawn_of(completions)]
        for prompt, completion in zip(prompts, completions, strict=True):
            logps["unpadded"].append(alone(plain, prompt, completion, args.temperature))
            padding.append(batch["prompt_ids"].shape[1] - len(prompt))
            ended.append(completion[-1] == tokenizer.eos_token_id)
        for item in score(rows, completion_texts(tokenizer, completions), mode="sampled"):
            parsed.setdefault(item.task, []).append(item.scores["parsed"])
    values = {name: [row.double().numpy() for row in found] for name, found in logps.items()}
    by_padding = {}
    for name, (low, high) in PADDING.items():
        chosen = [i for i, number in enumerate(padding) if low <= number <= high]
        if chosen:
            sides = {side: np.concatenate([rows_[i] for i in chosen]) for side, rows_ in values.items()}
            by_padding[name] = {
                "rows": len(chosen),
                "tokens": len(sides["stock"]),
                **compared(sides, trainer.epsilon_low),
            }
    everything = {side: np.concatenate(found) for side, found in values.items()}
    return {
        "batches": batches,
        "rows": len(padding),
        "tokens": len(everything["stock"]),
        "padded_tokens": {
            "mean": float(np.mean(padding)),
            "max": max(padding),
            "rows_padded": float(np.mean(np.array(padding) > 0)),
        },
        "by_padding": by_padding,
        "all": compared(everything, trainer.epsilon_low),
        "old_per_token_logps kept": old_logps_kept,
        "gradient_cosines": cosines,
        "parsed": {task: float(np.mean(found)) for task, found in parsed.items()},
        "ended": float(np.mean(ended)),
    }


def compared(sides: dict[str, Array], epsilon: float) -> dict[str, Any]:
    """Errors of one side's log-probs against another's (nats a token), and TRL's ratios to the sampler."""
    found: dict[str, Any] = {}
    for side in ("stock", "with position ids", "sampler"):
        for target in ("sampler", "unpadded"):
            if side != target:
                error = np.abs(sides[side] - sides[target])
                summary = {"mean": error.mean(), "p95": np.quantile(error, 0.95), "max": error.max()}
                found[f"{side} against {target}"] = {name: float(f"{value:.3g}") for name, value in summary.items()}
    for side in ("stock", "with position ids"):
        ratio = np.exp(sides[side] - sides["sampler"])
        low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
        outside = np.mean(np.abs(ratio - 1) > epsilon)
        summary = {"p5": low, "median": middle, "p95": high, f"outside 1 +- {epsilon:g}": outside}
        found[f"ratio of {side} to sampler"] = {name: float(f"{value:.3g}") for name, value in summary.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default=str(NANO_FOLDER))
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the plan and of the samples")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.evidence.arms import stock_trainer  # which loads the recipes

    # Two samples of each prompt instead of 16: the padding is the same, that of 60 prompts sampled together.
    smaller = {"num_generations": 2, "per_device_train_batch_size": 120, "gradient_accumulation_steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        size = replace(NANO, folder=Path(arguments.start))
        trainer = stock_trainer(size, Path(folder), arguments.seed, arguments.batches, **smaller)
        found = measure(trainer, load(arguments.start)[0].eval(), arguments.batches)
    settings = {"model": Path(arguments.start).name, "seed": arguments.seed, "temperature": trainer.args.temperature}
    write_report(OUTPUT, {**settings, **machine("cpu"), **found})
    print(as_markdown(found))


def as_markdown(found: dict[str, Any]) -> str:
    lines = ["| padded tokens | rows | tokens | mean error | p95 | worst | fixed, worst | ratio outside 1 ± 0.2 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in found["by_padding"].items():
        error, fixed = row["stock against sampler"], row["with position ids against sampler"]["max"]
        outside = next(value for key, value in row["ratio of stock to sampler"].items() if key.startswith("outside"))
        cells = [name, row["rows"], row["tokens"], *(f"{error[each]:.2g}" for each in ("mean", "p95", "max"))]
        lines.append("| " + " | ".join(map(str, [*cells, f"{fixed:.2g}", f"{100 * outside:.1f} %"])) + " |")
    lines.append("")
    lines.append(f"sampler against unpadded: {found['all']['sampler against unpadded']}; parsed {found['parsed']}")
    lines.append(f"gradient cosines {[round(each, 3) for each in found['gradient_cosines']]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
