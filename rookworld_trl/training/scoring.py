"""Log-probs of completions: on shared prefixes where that is possible, by TRL's forward pass elsewhere.

A group's completions are scored together (`rookworld_trl.modeling.trees`), so its prompt is computed once
instead of `num_generations` times, if its rows are in one micro-batch. TRL shuffles a generation batch before it cuts
it; here each optimizer step still consumes the rows that TRL gave it, with those of a group next to each other.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import nn

from rookworld_trl.modeling.forest import per_token_logps
from rookworld_trl.modeling.gpt2 import EAGER, GPT2, compile_blocks
from rookworld_trl.modeling.hooks import at_temperatures, capture_hidden
from rookworld_trl.training import placement
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.loss import Scored

Batch = dict[str, Any]


class Scorer:
    """Scores completions for the loss, the reference and the gates alike.

    Args:
        args: the configuration.
        accelerator: for the precision.
        policy: the model that is trained.
        reference: None with adapters or without KL.
        device: where a reference stays that does not sit beside the policy.
        stock: TRL's own scoring, `_get_per_token_logps_and_entropies` of `GRPOTrainer`.

    Attributes:
        shared: each distinct prefix of a batch is computed once.
    """

    def __init__(
        self,
        args: RookWorldGRPOConfig,
        accelerator: Accelerator,
        policy: nn.Module,
        reference: nn.Module | None,
        device: torch.device | None,
        stock: Callable[..., Any],
    ):
        self.args, self.accelerator, self.stock = args, accelerator, stock
        self.reference, self.device = reference, device
        self.shared = can_share(policy, args, accelerator)
        self.blocks = compile_blocks(accelerator.state.dynamo_plugin.to_kwargs()) if args.torch_compile else EAGER
        self._weights: dict[nn.Module, GPT2] = {}  # of policy and reference, once they have been asked for

    def __call__(
        self, model: nn.Module, *args: Any, temperatures: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's `_get_per_token_logps_and_entropies`: log-probs, entropies or None, auxiliary loss or None.

        Args:
            temperatures: (B,) of the rows; None: all at `args.temperature`.
        """
        home, device = self.accelerator.device, self.device
        if model is not self.reference or device is None:
            return self._score(model, temperatures, *args, **kwargs)
        across = device.type == "cuda"
        temperatures, args, kwargs = send_to_device((temperatures, args, kwargs), device, non_blocking=across)
        # What accelerate switched on holds for the policy's kind of device alone.
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        other = dtype is not None and device.type != home.type
        # Triton launches on the current device, whichever its arguments are on.
        current: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.autocast(device.type, dtype=dtype, enabled=other), current:
            found = self._score(model, temperatures, *args, **kwargs)
            return send_to_device(found, home, non_blocking=home.type == "cuda")

    def of_batch(self, model: nn.Module, batch: Batch, auxiliary: bool = False) -> Scored:
        """What the loss asks of the policy about a micro-batch.

        Args:
            auxiliary: the router's loss of a mixture of experts, too.
        """
        options: dict[str, Any] = {"compute_entropy": True, "compute_aux_loss": auxiliary}
        logps, entropies, loss = self(model, *sides(batch), temperatures=batch.get("temperatures"), **options)
        assert entropies is not None, "asked for"
        return Scored(logps, entropies, auxiliary=loss)

    def _score(self, model: nn.Module, temperatures: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
        common = self.args.temperature
        if self.shared:
            with self.accelerator.autocast():
                return score(self.weights(model), common if temperatures is None else temperatures, *args, **kwargs)
        scaled: Any = nullcontext()
        if temperatures is not None:
            scaled = at_temperatures(self.accelerator.unwrap_model(model), temperatures, common)
        with scaled:
            return self.stock(model, *args, **kwargs)

    def weights(self, model: nn.Module) -> GPT2:
        """The model's weights alone, with compiled blocks where the run compiles; only where prefixes are shared."""
        if model not in self._weights:
            plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            self._weights[model] = GPT2.sharing(plain, self.blocks)
        return self._weights[model]

    def hidden_states(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Last hidden states (B, C, H) that predict the completion's tokens."""
        ids, mask, keep = sides(batch)
        with torch.no_grad(), capture_hidden(model) as states:
            self.stock(model, ids, mask, keep, batch_size=self.args.per_device_train_batch_size)
        return torch.cat(states)[:, -keep - 1 : -1]


def sides(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and mask (B, P + C) of prompts with their completions, and C."""
    whole = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
    return *whole, batch["completion_ids"].shape[1]


def can_share(model: nn.Module, args: RookWorldGRPOConfig, accelerator: Accelerator) -> bool:
    """Whether log-probs can come from the weights alone, past the model's own `forward`.

    Not if that forward pass does more than compute them: gather shards or synchronise gradients between processes,
    recompute activations, run with adapters or as CUDA graphs (those of single blocks would overwrite each other's
    results).
    """
    alone = accelerator.distributed_type == DistributedType.NO and args.n_gpu <= 1
    special = args.gradient_checkpointing or placement.cuda_graphs(args) or args.cast_lm_head_to_fp32
    if not (args.share_prefixes and alone) or special:
        return False
    try:
        GPT2.sharing(accelerator.unwrap_model(model, keep_torch_compile=False))
    except (AttributeError, ValueError):  # no GPT-2, or one with adapters, untied or of another variant
        return False
    return True


def score(
    gpt2: GPT2,
    temperature: float | torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """What TRL's `_get_per_token_logps_and_entropies` returns for its arguments; those for images do not apply.

    Args:
        temperature: one for all rows, or (B,), one for each.

    Returns:
        Log-probs and entropies (or None), both (B, logits_to_keep), 0 at padding; no auxiliary loss.
    """
    prompt = input_ids.shape[1] - logits_to_keep
    rows, results = batch_size or max(1, len(input_ids)), []
    for start in range(0, max(1, len(input_ids)), rows):
        mine = slice(start, start + rows)
        ids, mask = input_ids[mine], attention_mask[mine]
        halves = (ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:])
        own = temperature[mine] if isinstance(temperature, torch.Tensor) else temperature
        results.append(per_token_logps(gpt2, *halves, own, compute_entropy))
    of_parts, entropies_of_parts = zip(*results, strict=True)
    return torch.cat(of_parts), torch.cat(entropies_of_parts) if compute_entropy else None, None


def regroup(batches: list[Batch], args: RookWorldGRPOConfig) -> list[Batch]:
    """Micro-batches of one generation batch (dicts of per-row tensors or lists, scalars and None), with the rows of
    each optimizer step ordered by prompt.

    Groups keep the order in which they first appear. The loss of an optimizer step is the same sum over the same rows;
    where it is not a sum over rows (a mean over the tokens of each micro-batch, a quantile), nothing is moved.
    """
    if args.loss_type == "bnpo" or args.entropy_coef or args.top_entropy_quantile < 1:
        return batches
    count, accumulated = len(batches), args.gradient_accumulation_steps
    if accumulated % count and count % accumulated:
        return batches  # optimizer steps begin anywhere in a generation batch
    if accumulated < count:
        steps = [batches[start : start + accumulated] for start in range(0, count, accumulated)]
        return [batch for step in steps for batch in regroup(step, args)]
    prompts = [
        tuple(row)
        for batch in batches
        for row in batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1).tolist()
    ]
    first: dict[tuple[int, ...], int] = {}
    order = sorted(range(len(prompts)), key=lambda row: first.setdefault(prompts[row], row))
    size = len(prompts) // len(batches)
    rows = [order[start : start + size] for start in range(0, len(prompts), size)]
    regrouped: list[Batch] = [{} for _ in batches]
    for key, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            whole = torch.cat([batch[key] for batch in batches])
            pieces: list[Any] = [whole[chosen] for chosen in rows]
        elif isinstance(value, list):
            listed = list(chain.from_iterable(batch[key] for batch in batches))
            pieces = [[listed[row] for row in chosen] for chosen in rows]
        else:
            pieces = [batch[key] for batch in batches]
        for batch, piece in zip(regrouped, pieces, strict=True):
            batch[key] = piece
    return regrouped
