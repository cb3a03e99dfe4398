"""Log-probs of completions: on shared prefixes where that is possible, by TRL's forward pass elsewhere.

A group's completions are scored together (`rookworld_trl.modeling.shared_scoring`), so its prompt is computed once
instead of `num_generations` times, if its rows are in one micro-batch. TRL shuffles a generation batch before it cuts
it; here each optimizer step still consumes the rows that TRL gave it, with those of a group next to each other.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from trl.trainer.utils import use_adapter

from rookworld_trl.modeling.compiling import compile_blocks
from rookworld_trl.modeling.gpt2 import EAGER, GPT2, Blocks
from rookworld_trl.modeling.hooks import capture_hidden, hooked, replaced, without_adapters
from rookworld_trl.modeling.shared_scoring import per_token_logps
from rookworld_trl.training import placement
from rookworld_trl.training.config import RookWorldGRPOConfig

Batch = dict[str, Any]


class Scorer:
    """Scores completions for the loss, the reference and the gates alike.

    Args:
        args: the configuration.
        accelerator: for the precision.
        policy: the model that is trained.
        reference: None with adapters, which are switched off in its place, or without KL.
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
        self.args, self.accelerator, self.policy, self.stock = args, accelerator, policy, stock
        self.reference, self.device = reference, device
        self.shared = can_share(policy, args, accelerator)
        self.blocks = compile_blocks(accelerator.state.dynamo_plugin.to_kwargs()) if args.torch_compile else EAGER
        self._temperatures: torch.Tensor | None = None  # (B,) of the rows being scored; None: all `args.temperature`
        self._only: tuple[torch.Tensor, torch.Tensor | None] | None = None  # of `score_some`; None: all rows
        self._passes: list[torch.Tensor] | None = None  # collects log-probs while somebody watches
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None  # what the next pass would compute

    def at(self, temperatures: torch.Tensor | None) -> AbstractContextManager[None]:
        """Score the rows of each batch at these temperatures (B,); None: all at `args.temperature`."""
        return replaced(self, _temperatures=temperatures)

    def only(self, rows: torch.Tensor | None, others: torch.Tensor | None) -> AbstractContextManager[None]:
        """Compute these rows only (`score_some`); None: all."""
        return replaced(self, _only=None if rows is None else (rows, others))

    def given(self, logps: torch.Tensor, entropies: torch.Tensor) -> AbstractContextManager[None]:
        """Whoever asks inside the block gets these (B, C): another forward pass has computed them already."""
        return replaced(self, _given=(logps, entropies))

    @contextmanager
    def watched(self, hidden: bool) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Collect log-probs and, if asked for, the policy's last hidden states of each pass inside the block."""
        capture: Any = capture_hidden(self.policy) if hidden else nullcontext([])
        passes: list[torch.Tensor] = []
        with replaced(self, _passes=passes), capture as states:
            yield passes, states

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As TRL's `_get_per_token_logps_and_entropies`: log-probs, entropies or None, auxiliary loss or None."""
        if self._given is not None:
            result: Any = (*self._given, None)
        elif model is not self.reference or self.device is None:
            result = self._score(model, *args, **kwargs)
        else:
            result = self._elsewhere(self.device, model, *args, **kwargs)
        if self._passes is not None:
            self._passes.append(result[0])
        return result

    def logps(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor,
        keep: int,
        temperatures: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probs (B, keep) of the last tokens alone, at these temperatures (B,)."""
        with self.at(temperatures):
            return self(model, ids, mask, keep)[0]

    def _elsewhere(self, device: torch.device, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Inputs go to the model's device, results come back."""
        home = self.accelerator.device
        args, kwargs = placement.moved((args, kwargs), device)
        precision = placement.precision_of(home, device, self.accelerator.mixed_precision)
        # Triton launches on the current device, whichever its arguments are on.
        current: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self.at(placement.moved(self._temperatures, device)), precision, current:
            return placement.moved(self._score(model, *args, **kwargs), home)

    def _score(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        temperatures, common = self._temperatures, self.args.temperature
        if self.shared:
            temperature = common if temperatures is None else temperatures
            plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            kwargs["blocks"] = self.blocks
            with self.accelerator.autocast():
                if self._only is None:
                    return score(temperature, plain, *args, **kwargs)
                return score_some(*self._only, temperature, plain, *args, **kwargs)
        scaled: Any = nullcontext()
        if temperatures is not None:
            scaled = at_temperatures(self.accelerator.unwrap_model(model), temperatures, common)
        with scaled:
            return self.stock(model, *args, **kwargs)

    def weights(self, model: nn.Module) -> GPT2:
        """The model's weights alone, with compiled blocks where the run compiles; only where prefixes are shared."""
        return GPT2.sharing(self.accelerator.unwrap_model(model, keep_torch_compile=False), self.blocks)

    def hidden_states(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Last hidden states (B, C, H) that predict the completion's tokens."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        keep = batch["completion_ids"].shape[1]
        with torch.no_grad(), capture_hidden(model) as states:
            self.stock(model, ids, mask, keep, batch_size=self.args.per_device_train_batch_size)
        return torch.cat(states)[:, -keep - 1 : -1]

    @contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The reference; with adapters, the policy while they are switched off."""
        if self.reference is not None:
            yield self.reference
        else:
            policy = self.accelerator.unwrap_model(self.policy)
            # As TRL does: an adapter that came with the model has a frozen copy of its start beside it.
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                yield self.policy


def can_share(model: nn.Module, args: RookWorldGRPOConfig, accelerator: Accelerator) -> bool:
    """Whether log-probs can come from the weights alone, past the model's own `forward`.

    Not if that forward pass does more than compute them: gather shards or synchronise gradients between processes,
    recompute activations, run with adapters or as CUDA graphs (those of single blocks would overwrite each other's
    results), hand its hidden states to the exact KL.
    """
    alone = accelerator.distributed_type == DistributedType.NO and args.n_gpu <= 1
    special = args.gradient_checkpointing or placement.cuda_graphs(args) or args.cast_lm_head_to_fp32
    if not (args.share_prefixes and alone) or special or args.kl_estimator == "exact":
        return False
    try:
        GPT2.sharing(accelerator.unwrap_model(model, keep_torch_compile=False))
    except (AttributeError, ValueError):  # no GPT-2, or one with adapters, untied or of another variant
        return False
    return True


@contextmanager
def at_temperatures(model: nn.Module, temperatures: torch.Tensor, temperature: float) -> Iterator[None]:
    """Let a model whose head divides logits by `temperature` score row r of a batch at `temperatures[r]` instead.

    Logits are linear in the hidden states, so these are multiplied by `temperature / temperatures[r]`. Rows are counted
    over successive forward passes: together they must be the rows that the temperatures (B,) stand for.

    Raises:
        ValueError: the head has a bias or caps its logits, so that they are not linear.
    """
    inner = without_adapters(model)
    bias = getattr(inner.get_output_embeddings(), "bias", None)
    if bias is not None or getattr(inner.config, "final_logit_softcapping", None):
        raise ValueError(
            "`task_sampling` sets temperatures that differ by task, and this model's logits are not linear in its "
            "hidden states (its head has a bias or caps them). Use one temperature for all tasks"
        )
    done = 0

    def scale(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal done
        states = output.last_hidden_state
        rows = temperatures[done : done + len(states)]
        done += len(states)
        output.last_hidden_state = states * (temperature / rows)[:, None, None]
        return output

    with hooked(inner.base_model, scale):
        yield


def score(
    temperature: float | torch.Tensor,
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    blocks: Blocks = EAGER,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """What TRL's `_get_per_token_logps_and_entropies` returns for its arguments; those for images do not apply.

    Args:
        temperature: one for all rows, or (B,), one for each.
        blocks: compute the model's.

    Returns:
        Log-probs and entropies (or None), both (B, logits_to_keep), 0 at padding; no auxiliary loss.
    """
    gpt2 = GPT2.sharing(model, blocks)
    prompt = input_ids.shape[1] - logits_to_keep
    rows = batch_size or max(1, len(input_ids))
    parts = zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
    results = []
    for number, (ids, mask) in enumerate(parts):
        mine = temperature
        if isinstance(temperature, torch.Tensor):
            mine = temperature[number * rows : (number + 1) * rows]
        sides = (ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:])
        results.append(per_token_logps(gpt2, *sides, mine, compute_entropy))
    logps, entropies = zip(*results, strict=True)
    return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


def rows_that_learn(inputs: Batch, args: RookWorldGRPOConfig) -> torch.Tensor | None:
    """The rows (B,) bool of a micro-batch that the loss without a KL term has a gradient for, or None for all.

    Each of the losses here is a sum over rows, its terms multiples of the row's advantage: of a group whose rewards all
    agree nothing is learned, and its rows need no forward pass. Where entropies enter the loss, all rows do.
    """
    entropies = args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1
    if entropies or args.loss_type not in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"):
        return None
    learns = (inputs["advantages"].reshape(len(inputs["advantages"]), -1) != 0).any(1)  # (B,), or (B, C) by GAE
    if learns.all():
        return None
    learns[0] |= ~learns.any()  # a loss needs a graph, if only for a gradient of 0
    return learns


def score_some(
    learns: torch.Tensor,
    others: torch.Tensor | None,
    temperature: float | torch.Tensor,
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """`score`, computed for the rows of `learns` only.

    The other rows get `others` (B, logits_to_keep; None: 0) as log-probs, which their advantage of 0 cancels, and as
    entropy the mean over the tokens of the rows computed, so that what is logged is the entropy of these.
    """
    mine = temperature[learns] if isinstance(temperature, torch.Tensor) else temperature
    logps, entropies, _ = score(mine, model, input_ids[learns], attention_mask[learns], logits_to_keep, **options)
    filled = torch.zeros(len(learns), logits_to_keep, device=logps.device) if others is None else others.clone()
    filled = filled.to(logps.dtype).index_put((learns,), logps)
    if entropies is None:
        return filled, None, None
    mask = attention_mask[:, -logits_to_keep:]
    mean = entropies.sum() / mask[learns].sum().clamp(min=1)
    return filled, (mean * mask.to(entropies.dtype)).index_put((learns,), entropies), None


def regroup(batches: list[Batch], args: RookWorldGRPOConfig) -> list[Batch]:
    """Micro-batches of one generation batch, with the rows of each optimizer step ordered by prompt.

    Groups keep the order in which they first appear. The loss of an optimizer step is the same sum over the same rows;
    where it is not a sum over rows (a mean over the tokens of each micro-batch, a quantile), nothing is moved.
    """
    by_micro_batch = args.loss_type == "bnpo" or args.entropy_coef or args.use_adaptive_entropy
    if by_micro_batch or args.top_entropy_quantile < 1:
        return batches
    count, accumulated = len(batches), args.gradient_accumulation_steps
    if accumulated % count and count % accumulated:
        return batches  # optimizer steps begin anywhere in a generation batch
    window = min(count, accumulated)
    parts = [batches[start : start + window] for start in range(0, count, window)]
    return list(chain.from_iterable(map(_by_prompt, parts)))


def _by_prompt(batches: list[Batch]) -> list[Batch]:
    """The rows of micro-batches (dicts of per-row tensors or lists, scalars and None) ordered by prompt."""
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
