"""What must be true of model, reference and tokenizer before TRL builds a trainer around them."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.pytorch_utils import Conv1D
from trl.import_utils import is_vllm_available
from trl.trainer import grpo_trainer

from rookworld_trl.files import check_output_dir, needs_disk
from rookworld_trl.modeling.hooks import install_position_hook, replaced
from rookworld_trl.modeling.hub import hide_token
from rookworld_trl.training.config import RookWorldGRPOConfig


def prepare(args: Any, model: Any, tokenizer: Any, options: dict[str, Any]) -> RookWorldGRPOConfig:
    """Check what the trainer was given, widen the model's weights, choose adapters.

    Args:
        options: further arguments of TRL's trainer; `peft_config` is filled in.

    Raises:
        TypeError: `args` of another class.
        ValueError: an output folder that cannot be written, a tokenizer without pad or eos token, tools, no vLLM, a
            model on several devices.
    """
    if not isinstance(args, RookWorldGRPOConfig):
        raise TypeError(f"`args` must be a RookWorldGRPOConfig, got {type(args).__name__}")
    if args.should_save:
        check_output_dir(args.output_dir)
    hide_token(args)
    check_tokenizer(tokenizer)
    for name in ("tools", "rollout_func", "environment_factory"):  # sampling, gates and scoring know nothing of them
        if options.get(name):
            raise ValueError(f"`{name}` is given: completions here are sampled in one turn. Leave it out")
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError("`processing_class` is a processor: prompts here are text. Give a tokenizer")
    if args.use_vllm and not is_vllm_available():
        raise ValueError(
            "`use_vllm` is True: vLLM is not installed. Install it with `pip install 'rookworld-trl[vllm]'`, or leave "
            "`use_vllm` and `rollout_backend` out"
        )
    if isinstance(model, nn.Module):
        check_device(model)
        for parameter in model.parameters():  # casting up is exact; quantised and frozen weights stay as they are
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    if args.use_peft and options.get("peft_config") is None:
        options["peft_config"] = lora_config(args, model)
    return args


def check_built(policy: nn.Module, reference: nn.Module | None, tokenizer: Any) -> None:
    """What TRL has made of it: the position hook goes into both models. Of dropout and precision the gates judge."""
    check_tokenizer(tokenizer)
    for model in (policy, reference):
        if model is not None:
            check_device(model)
            install_position_hook(model)


@contextmanager
def weights_on_disk(model: str | nn.Module, args: RookWorldGRPOConfig, adapter: Any, tokenizer: Any) -> Iterator[None]:
    """Give the starting weights of a model object a name for as long as TRL needs one.

    TRL loads the reference from `config._name_or_path`, and a vLLM engine in this process from `name_or_path`. For an
    object that name may not exist, or may hold other weights than the object does (a fine-tuned model keeps its base's
    name, a padded vocabulary is cut when it is loaded); so the weights are saved to a temporary folder and the names
    point there until both are built. Adapters need no reference: TRL switches them off.

    Raises:
        DiskError: the temporary folder has no room for them.
    """
    engine = args.use_vllm and args.vllm_mode == "colocate"
    if not isinstance(model, PreTrainedModel) or not (engine or (args.beta and not adapter)):
        yield
        return
    with ExitStack() as stack:
        with needs_disk(
            "the starting weights", "Make room in the temporary folder, or set TMPDIR to one that has some"
        ):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="weights-"))
            _write_whole(model, Path(folder))
            if engine:
                tokenizer.save_pretrained(folder)
        with replaced(model.config, _name_or_path=folder), replaced(model, name_or_path=folder):
            yield


def _write_whole(model: PreTrainedModel, folder: Path) -> None:
    # Not `save_pretrained`: in a distributed run it writes on the first process only, and each has its own folder.
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.to_json_file(folder / "config.json", use_diff=False)
    # Tied weights under the first of their names: a folder with `lm_head.weight` alone is untied to vLLM, and its
    # head would then keep the starting weights, since TRL sends tied weights once.
    twice = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name not in twice}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def trl_built_here() -> Iterator[None]:
    """Change two functions of TRL's for as long as it builds a trainer; it has no seam for either.

    Its scoring heads are built in float32, outside autocast, as `GPT2.logits` is; see there for the reason. TRL's own
    `cast_lm_head_to_fp32` is for untied heads alone. Where weights are float32 already nothing needs casting, and what
    is left of that option is an argument of `add_fused_lm_head`.

    What it loads by name, the policy or the reference, is loaded whole and for one device. By itself it asks for
    `device_map="auto"` wherever one process trains on a GPU. Where that process sees two, layers are spread over both,
    and hooks send inputs after them. Here the policy has one device, and the reference goes as a whole to where
    `rookworld_trl.training.placement` puts it.
    """
    add_head, create_model = grpo_trainer.add_fused_lm_head, grpo_trainer.create_model_from_path

    def add(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        add_head(model, *args, **{**kwargs, "cast_lm_head_to_fp32": True})

    def create(name: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return create_model(name, *args, **{"device_map": None, **kwargs})

    with replaced(grpo_trainer, add_fused_lm_head=add, create_model_from_path=create):
        yield


def check_device(model: Any) -> None:
    """Raises:
    ValueError: accelerate has spread the model over several devices, or parts of it are kept off its device.
    """
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(devices)}: policy and reference have one device each. Load it "
            "without `device_map` (of `model_init_kwargs` too); a model too large for one GPU trains in shards, by "
            "accelerate_configs/fsdp2.yaml"
        )


def lora_config(args: RookWorldGRPOConfig, model: Any) -> Any:
    """peft's configuration of the adapters that `args` ask for."""
    from peft import LoraConfig  # needed for adapters alone

    layers = args.lora_target_modules or "all-linear"
    transposed = isinstance(model, nn.Module) and any(isinstance(module, Conv1D) for module in model.modules())
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0,
        target_modules=layers,
        fan_in_fan_out=transposed,  # GPT-2 keeps its weights the other way round
        task_type="CAUSAL_LM",
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Raises:
    ValueError: no pad or no eos token. TRL would pad with eos in silence, or fail on the first batch.
    """
    for name in ("eos_token", "pad_token"):
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        if inner is not None and getattr(inner, name, None) is None:
            raise ValueError(
                f"the tokenizer {inner.name_or_path!r} has no `{name}`: completions could not be ended or padded. "
                f"Set `tokenizer.{name}` before building the trainer (GPT-2 uses its eos token for both)"
            )
