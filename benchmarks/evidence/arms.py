"""What is compared: each arm starts from the same checkpoint and gets the same time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import ALIKE, ROOT, shipped
from benchmarks.evidence import rivals
from benchmarks.evidence.budget import Budget, BudgetCallback
from benchmarks.evidence.sizes import Size
from recipes import grpo
from rookworld_trl.chess.mixing import mix
from rookworld_trl.chess.rewards import REWARDS
from rookworld_trl.modeling.hooks import install_position_hook
from rookworld_trl.modeling.loading import load
from rookworld_trl.settings.parser import parse

# The budget ends a run, before these do.
NO_END = 1_000_000  # minutes
STEPS_OF_PROMPTS = 2_000  # batches of prompts laid out

SAMPLED, EXACT = "config_cpu", "config_cpu_exact"
# What every arm's prompts have, so that they are alike: the demo's shares. Batches of 48 and 64 are divided by them.
SHARES = {"mix_env_ratio": rivals.ENVIRONMENT, "policy_strata": f"{{check: {rivals.CHECK}}}"}
OF_SAMPLED = {**SHARES, "per_device_train_batch_size": 128}  # 64 prompts of 16
# What stock TRL gets of the sampled recipe.
TAKEN_OVER = ["per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "max_completion_length"]
TAKEN_OVER += ["temperature", "beta", "scale_rewards", "max_grad_norm", "use_cpu", "bf16"]


@dataclass(frozen=True)
class Arm:
    """One way to spend the time.

    Attributes:
        train: (size, folder, budget, seed) -> the trained model.
        about: a line for tables.
        factor: of the size's learning rate, which trials on dev choose.
    """

    train: Callable[[Size, Path, Budget, int], PreTrainedModel]
    about: str
    factor: float = 1.0


def read_recipe(recipe: str, size: Size, keys: Mapping[str, Any]) -> tuple[Any, ...]:
    """A shipped recipe with some keys changed, on a size's device and in its pieces."""
    keys = {"use_cpu": size.device == "cpu", "bf16": size.bf16, "max_completion_length": size.tokens, **keys}

    def parsed() -> Any:
        argv = ["--config", str(ROOT / f"recipes/nano/grpo/{recipe}.yaml")]
        for key, value in keys.items():
            argv += [f"--{key}", str(value)]
        return parse(grpo.CLASSES, argv)

    run, args, *extras = parsed()
    if size.pieces > 1:
        keys["per_device_train_batch_size"] = args.per_device_train_batch_size // size.pieces
        keys["gradient_accumulation_steps"] = args.gradient_accumulation_steps * size.pieces
        run, args, *extras = parsed()
    return run, args, *extras


def of_recipe(
    recipe: str, changed: Mapping[str, Any], size: Size, folder: Path, budget: Budget, seed: int
) -> PreTrainedModel:
    """Ours: a shipped recipe of GRPO, some keys changed."""
    keys = {
        "model": size.folder,
        "output_dir": folder,
        "seed": seed,
        "learning_rate": size.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS_OF_PROMPTS,
        "max_train_minutes": NO_END,
        "logging_steps": 10,
        **changed,
    }
    run, args, *extras = read_recipe(recipe, size, keys)
    set_seed(seed)
    trainer, _ = grpo.build(run, args, *extras)
    trainer.add_callback(BudgetCallback(budget, args.generation_batch_size))
    try:
        trainer.train()
    finally:
        trainer.close()
    if trainer.preemption.signal:  # it has stopped in good order, which is no result
        raise SystemExit(f"{folder.name}: stopped by a signal, nothing of this run is kept; run it again")
    return trainer.model


def stock_trainer(size: Size, folder: Path, seed: int, batches: int, **changed: Any) -> GRPOTrainer:
    """TRL's own trainer with the sampled recipe's settings, some of them changed, and so many batches of its plan."""
    logging.disable_progress_bar()
    run, ours, *_ = read_recipe(SAMPLED, size, OF_SAMPLED)
    settings = {name: getattr(ours, name) for name in TAKEN_OVER}
    args = GRPOConfig(
        output_dir=str(folder),
        learning_rate=size.learning_rate,
        lr_scheduler_type="constant",
        max_steps=batches,
        seed=seed,
        **{**ALIKE, **settings, **changed},
    )
    set_seed(seed)
    prompts = args.generation_batch_size // args.num_generations
    plan = mix(
        shipped("train"),
        run.mix_env_ratio,
        prompts_per_batch=prompts,
        batches=batches,
        seed=seed,
        policy_strata=run.policy_strata,
    )
    return GRPOTrainer(str(size.folder), REWARDS[run.reward], args, plan, processing_class=load(size.folder)[1])


def of_stock(positions: bool, size: Size, folder: Path, budget: Budget, seed: int) -> PreTrainedModel:
    """TRL's own trainer, as it is or with the position ids that padding needs."""
    trainer = stock_trainer(size, folder, seed, STEPS_OF_PROMPTS)
    if positions:
        for model in (trainer.model, trainer.ref_model):
            install_position_hook(model)
    trainer.add_callback(BudgetCallback(budget, trainer.args.generation_batch_size))
    trainer.train()
    return trainer.model


def of_loop(loop: Callable[..., None], size: Size, folder: Path, budget: Budget, seed: int) -> PreTrainedModel:
    """A plain loop of `rivals`."""
    model, tokenizer = load(size.folder)
    set_seed(seed)
    loop(model.to(size.device).eval(), tokenizer, size, budget, seed)
    return model


def ours(about: str, recipe: str = SAMPLED, factor: float = 1.0, **changed: Any) -> Arm:
    keys = SHARES if recipe == EXACT else OF_SAMPLED
    return Arm(partial(of_recipe, recipe, MappingProxyType({**keys, **changed})), about, factor)


ARMS: dict[str, Arm] = {
    "exact": ours("ours, the exact gradient: the demo's recipe", EXACT),
    "mixed": ours("the same; of `A:` what is no whole answer is sampled", EXACT, 2.0, objective="mixed"),
    "sampled": ours("ours, sampled GRPO, advantages divided by their group's deviation"),
    "sampled_unscaled": ours("the same without the group's scale (Dr. GRPO)", factor=2.0, scale_rewards="none"),
    "stock": Arm(partial(of_stock, False), "TRL's GRPOTrainer as it is, the same settings as `sampled`"),
    "stock_positions": Arm(partial(of_stock, True), "TRL's GRPOTrainer with position ids from the mask"),
    "gold": Arm(partial(of_loop, partial(rivals.gold, rows=64)), "supervised training on the right answers (SFT)", 0.5),
    "soft": Arm(
        partial(of_loop, partial(rivals.soft, rows=48, temperature=0.1)),
        "supervised training on soft labels: a softmax of the rewards that `exact` sums",
    ),
    "raft": Arm(
        partial(of_loop, partial(rivals.raft, rows=64, samples=16, temperature=0.7)),
        "best of 16 samples by the same reward, learned from (RAFT)",
        2.0,
    ),
}
