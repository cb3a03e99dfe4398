"""Stages that teach a 124M model from nothing, on generated rows: supervised training in two parts, then GRPO."""

import json
import os
import random
import time
from importlib.util import find_spec
from typing import Any

import chess
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging

from benchmarks.common import shipped
from benchmarks.gpu.stage import TINY, Stage, peak_flops
from recipes import grpo as grpo_recipe
from recipes import sft as sft_recipe
from recipes.making.moves import choose_move, environment_row
from rookworld_trl.chess.dataset import split_of
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer
from rookworld_trl.modeling.trees import TokenTree
from rookworld_trl.reports.run import read_summary
from rookworld_trl.training.supervised import MuonFactory, SupervisedConfig, SupervisedTrainer

PLIES, KEPT = 80, 0.3  # of a random game, at most; and the share of its positions that become rows


def encoded(row: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """The row as a tree of its own."""
    tree = TokenTree()
    completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
    tree.add(tokenizer(row["prompt"]).input_ids, [*completion, tokenizer.eos_token_id])
    return tree.arrays()


def game_rows(game: int) -> list[dict[str, str]]:
    """`A:` rows of one random game; no held-out position among them, not even as an answer."""
    rng, board, rows = random.Random(f"gpu:{game}"), chess.Board(), []
    history: list[str] = []
    for _ in range(rng.randint(10, PLIES)):
        if board.is_game_over():
            break
        played = rng.choice([move.uci() for move in board.legal_moves])
        if rng.random() < KEPT and split_of(board.fen()) == "train":
            record = {"fen": board.fen(), "history": " ".join(history), "played": played}
            row = environment_row(record, choose_move(record, rng))
            rows += [row] if split_of(row["after"]) == "train" else []
        board.push_uci(played)
        history.append(played)
    return rows


def encoded_games(batch: dict[str, list[int]], tokenizer: Any) -> dict[str, list[Any]]:
    rows = [encoded(row, tokenizer) for game in batch["game"] for row in game_rows(game)]
    return {key: [row[key] for row in rows] for key in TokenTree().arrays()}


def rows(stage: Stage) -> str:
    """`A:` rows of random games, and the `P:` rows of the shipped training split as often as makes a quarter of all."""
    tokenizer, started = build_gpt2_tokenizer(), time.perf_counter()
    games = Dataset.from_dict({"game": list(range(stage.pick(40_000, 8)))})
    workers = stage.pick(os.cpu_count() or 1, None)
    options = {"batched": True, "batch_size": 100, "remove_columns": ["game"], "num_proc": workers}
    environment = games.map(encoded_games, fn_kwargs={"tokenizer": tokenizer}, **options)
    answered = shipped("train")
    answered = answered.select(np.flatnonzero(np.array(answered["task"]) == "policy")[: stage.pick(None, 16)])
    answers = [
        encoded({"task": "policy", "prompt": prompt, "completion": target}, tokenizer)
        for prompt, target in zip(answered["prompt"], answered["target"], strict=True)
    ]
    policy = Dataset.from_list(answers)
    repeats = max(1, len(environment) // (3 * len(policy)))
    concatenate_datasets([environment, *[policy] * repeats]).save_to_disk(stage.folder)
    seconds = time.perf_counter() - started
    stage.figures |= {"environment": len(environment), "policy": len(policy), "policy_repeats": repeats}
    stage.figures["rows_per_second"] = round((len(environment) + len(policy)) / seconds)
    return f"{len(environment):,} A: rows, {len(policy):,} P: rows {repeats} times"


class Deadline(TrainerCallback):
    """Ends training with the step in which its time is over."""

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= time.perf_counter() - self.started > self.seconds


def train(stage: Stage, model: Any, tokenizer: Any, seed: int, **schedule: Any) -> str:
    """Supervised training for the stage's minutes; the model is saved in its folder."""
    logging.disable_progress_bar()
    set_seed(seed)
    folder = stage.root / "rows"
    if not folder.exists():
        raise RuntimeError("there are no rows: run the stage `rows` first")
    batch = stage.pick(128, 4)
    args = SupervisedConfig(
        output_dir=str(stage.folder),
        use_cpu=not stage.cuda,
        bf16=stage.cuda,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        dataloader_num_workers=stage.pick(4, 0),
        logging_steps=stage.pick(50, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **schedule,
    )
    muon = find_spec("pytorch_optimizer") is not None
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=load_from_disk(str(folder)),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonFactory, {"muon_lr": 0.02, "adamw_lr": 1e-3}) if muon else None,
    )
    trainer.add_callback(Deadline(stage.pick(60 * stage.minutes, 60.0)))
    stage.count_memory()
    started = time.perf_counter()
    trainer.train()
    seconds, steps = time.perf_counter() - started, trainer.state.global_step
    trainer.save_final()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    speed = trainer.tokens / seconds
    flops = 6 * model.num_parameters() * speed
    peak = peak_flops(torch.cuda.get_device_name(), True) if stage.cuda else None
    stage.figures |= {
        "optimizer": "muon" if muon else "adamw",
        "steps": steps,
        "seconds_per_step": seconds / steps,
        "tokens_per_second": round(speed),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if stage.cuda else None,
        "mfu": round(flops / peak, 4) if peak else None,
    }
    stage.check("loss falls", stage.tiny or losses[-1] < losses[0])
    return f"{steps} steps, {speed:,.0f} tokens a second, loss {losses[0]:.2f} to {losses[-1]:.2f}"


def sft(stage: Stage) -> str:
    """The first half of supervised training, from random weights, at a constant rate."""
    size = stage.pick({"n_layer": 12, "n_embd": 768, "n_head": 12}, TINY)
    tokenizer = build_gpt2_tokenizer()
    set_seed(1)
    model = sft_recipe.new_model(sft_recipe.SFTRecipe(tokenizer="gpt2", n_positions=1024, **size), tokenizer)
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": stage.pick(200, 1)}
    return train(stage, model, tokenizer, 1, max_steps=stage.pick(100_000, 2), **schedule)


def sft_2(stage: Stage) -> str:
    """The second half: from where the first ended, the rate falling to 0 over as many steps as fit the time."""
    report = stage.root.parent / "sft.json"
    if not report.exists():
        raise RuntimeError("there is no model to go on with: run the stage `sft` first")
    figures = json.loads(report.read_text())["figures"]
    steps = stage.pick(max(1, round(57 * stage.minutes / figures["seconds_per_step"])), 2)
    model, tokenizer = stage.load(stage.root / "sft")
    return train(stage, model, tokenizer, 2, max_steps=steps, lr_scheduler_type="linear")


def grpo(stage: Stage) -> str:
    """GRPO by the recipe on what supervised training left, measured before and after on dev."""
    start = stage.root / "sft_2"
    if not (start / "config.json").exists():
        raise RuntimeError("there is no trained model: run the stages `sft` and `sft_2` first")
    prompts, samples = stage.pick((16, 16), (4, 2))
    items = stage.pick(400, 2)
    settings = {
        "model": start,
        "output_dir": stage.folder,
        "reward": "continuous",
        "mix_env_ratio": 0.25,
        "num_generations": samples,
        "per_device_train_batch_size": stage.pick(64, 8),
        "gradient_accumulation_steps": stage.pick(4, 1),
        "max_completion_length": stage.pick(128, 8),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": stage.pick(2000, 1),
        "max_train_minutes": stage.minutes * 0.6,
        "eval_split": "dev",
        "eval_policy_items": items,
        "eval_environment_items": items,
        "eval_batch_size": 256,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 1,
        "use_cpu": str(not stage.cuda).lower(),
        "bf16": str(stage.cuda).lower(),
    }
    assert prompts * samples == settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    grpo_recipe.main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    summary = read_summary(stage.folder)
    names = ("task", "mode", "metric", "before", "after", "ci_low", "ci_high", "significant")
    headline = [{name: row[name] for name in names} for row in summary["headline"]]
    stage.figures |= {"steps": summary["steps"], "seconds": summary["seconds"], "headline": headline}
    stage.check("no stop", not summary["stop_reason"])
    cells = [f"{row['metric']} ({row['mode']}) {_number(row['before'])} to {_number(row['after'])}" for row in headline]
    return f"{summary['steps']} steps; " + ", ".join(cells)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
