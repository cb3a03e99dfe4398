"""Supervised training: its arguments, a trainer over trees of rows, and its optimizer."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn, optim
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from rookworld_trl.checkpointing.durable import DurableTrainer
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.trees import collate, weighted_nats
from rookworld_trl.settings.parser import option, require
from rookworld_trl.training.placement import agree_on_tf32, follow_launcher, insist_on_no_compile, on_gpu
from rookworld_trl.training.recovery import Diverged

NATS_SCALE = 32  # the loss is nats a completion divided by this, about the tokens of rookworld-nano's `A:` completion


@dataclass
class SupervisedConfig(SFTConfig):
    """TRL's arguments, for a run that goes on by itself where it was interrupted.

    Raises:
        ValueError: settings of TRL's pass over rows, in whose place stands another; `push_to_hub`; see
            `rookworld_trl.training.placement.follow_launcher`.
    """

    auto_resume: ClassVar[bool] = True  # what `rookworld_trl.checkpointing` asks for

    recovery_mode: bool = option(
        False,
        "Go on from the newest checkpoint but one, at half the learning rates; give it once, after a run has diverged.",
    )
    # TRL's default is True under this old name, of which transformers warns.
    gradient_checkpointing: bool | None = option(
        None, "Old name of `activation_checkpointing`, which is off by default."
    )

    # transformers' False would contradict accelerate's own setting, which acts without being asked.
    torch_compile: bool | None = option(
        None, "Compile the model; default: as `accelerate launch` says (`dynamo_config`)."
    )

    def __post_init__(self) -> None:
        follow_launcher(self)
        # Trees are made by the data set as they are asked for, of columns that the model does not know.
        self.remove_unused_columns = False
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        # transformers and torch would refuse these once all rows are there, without a remedy.
        for name, least in (
            ("per_device_train_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("learning_rate", 0),
        ):
            value = getattr(self, name)
            require(value >= least, name, value, f"it must be {least} or more", f"set it to {least} or more")
        super().__post_init__()
        insist_on_no_compile(self)
        if on_gpu(self):
            agree_on_tf32(self)
        for name in ("packing", "padding_free", "activation_checkpointing", "activation_offloading"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is True: rows go through a pass of their own without it. Set it to False")
        if self.push_to_hub:
            raise ValueError(
                "`push_to_hub` is True: checkpoints and logs would go along. Leave it out, and upload the model when "
                "training is done: hf upload OWNER/NAME OUTPUT_DIR --exclude '*/*'"
            )


class SupervisedTrainer(DurableTrainer, SFTTrainer):
    """`SFTTrainer` over trees of rows, whose loss is the mean over a step's completions: nats a completion / 32.

    An `A:` completion has three times the tokens of a `P:` completion and most are copied, so that a loss per token
    has gradients a quarter the size, which a momentum over batches of both tasks drowns in `P:`'s noise.

    Args:
        train_dataset: of trees, as `rookworld_trl.modeling.trees.TokenTree.arrays` writes them.
        facts: of the recipe, what decides the result beside the arguments; see `DurableTrainer.facts`.
    """

    def __init__(self, *args: Any, facts: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, data_collator=collate, **kwargs)
        self._facts = facts or {}
        model: Any = self.model

        def forward(**batch: torch.Tensor) -> torch.Tensor:
            return weighted_nats(GPT2.sharing(model), batch)

        model.forward = forward  # in place of TRL's, so that whatever wraps the model sees its weights being used

    def facts(self) -> dict[str, Any]:
        return self._facts

    @property
    def tokens(self) -> int:
        """Tokens seen so far, in all processes, each of a tree once."""
        return self._total_train_tokens

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "tokens": self._total_train_tokens}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._total_train_tokens = self._restored["tokens"]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """What the sum of a step's nats is divided by: its completions, of all micro-batches and processes, times 32.

        transformers counts tokens here, in which accumulated batches of few tokens would weigh little.
        """
        rows = torch.stack([batch["rows"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices:
            rows = self.accelerator.gather(rows).sum()
        return rows * NATS_SCALE

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs) / num_items_in_batch
        self._total_train_tokens += int(self.accelerator.gather(inputs["size"]).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, before it is applied.

        Raises:
            Diverged: it is not finite; in every process, as the gradient is all processes' together.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16's loss scaling a gradient that overflows is routine, and the scaler leaves the step out.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            remedy = "Resume, in case it was a fault of the moment; if it comes again, with `--recovery_mode`"
            raise Diverged(self.state.global_step + 1, f"the gradient's norm is {float(norm)}", remedy)
        return norm


class MuonFactory:
    """Optimizer factory for `Trainer(optimizer_cls_and_kwargs=(MuonFactory, {...}))`.

    The matrices inside the transformer's blocks go to Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), an
    orthogonal update times the square root of max(1, outputs / inputs); embeddings, the tied head, norms and biases go
    to AdamW. transformers recognises a factory by its being called with the model.
    """

    def __call__(
        self,
        model: nn.Module,
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> optim.Optimizer:
        from pytorch_optimizer import Muon  # only supervised training from scratch needs the package

        stored_in_out = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
        matrices: dict[float, list[nn.Parameter]] = {1.0: []}  # by what the package's factor is to be multiplied by
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".h." in name:
                first, second = parameter.shape  # the package takes the first for the outputs; GPT-2 stores (in, out)
                growth = second / first if id(parameter) in stored_in_out else first / second
                factor = math.sqrt(max(1.0, growth) / max(1.0, first / second))
                matrices.setdefault(factor, []).append(parameter)
            else:
                others.append(parameter)
        # The decay is by the rate alone, without the factor. The first group's rate is the one in the log.
        groups: list[dict[str, Any]] = [
            {"params": group, "use_muon": True, "lr": muon_lr * factor, "weight_decay": weight_decay / factor}
            for factor, group in matrices.items()
        ]
        groups.append({"params": others, "use_muon": False, "lr": adamw_lr, "betas": betas, "weight_decay": 0.0})
        return Muon(groups)
