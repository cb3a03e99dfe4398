"""Strict loading of GPT-2 checkpoints and their tokenizers, from a local folder or the Hugging Face Hub.

Nothing is guessed and nothing is initialised at random: every weight of the config is found in the files with its
shape, or loading stops with one error that says what to do.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rookworld_trl.modeling.gpt2 import check_config

logger = logging.get_logger(__name__)

NANO = "nano"  # the model that comes with the package
NANO_FOLDER = Path(str(files("rookworld_trl"))) / "assets" / NANO

WEIGHTS = "model.safetensors"

# Named from the top of the repository: a pattern such as `*.safetensors` would fetch training checkpoints too.
_CONFIG_FILES = ["config.json", "generation_config.json"]
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
_TOKENIZER_FILES += ["vocab.json", "merges.txt", "chat_template.jinja"]


class LoadingError(ValueError):
    """A checkpoint cannot be used as it is; the message names the file and the remedy."""


def load(
    name: str | Path,
    leading_eos: bool = False,
    *,
    expected_parameters: int | None = None,
    **hub: Any,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Load a model for training and its tokenizer, from a folder or the Hub; they are checked against each other.

    Embedding rows beyond the tokenizer's vocabulary are cut when they are padding (see `load_model`). The model's end
    and pad tokens become the tokenizer's. The commit of a model from the Hub is in `config._commit_hash`.

    Args:
        name: a local folder, a repository on the Hub such as `jrahn/RookWorld-LM-124M`, or `nano`: the model that comes
            with the package.
        leading_eos: see `load_tokenizer`.
        expected_parameters: refuse a model with another number of parameters.
        hub: `revision`, `token` and the others of `checkpoint_folder`.

    Raises:
        LoadingError: see `checkpoint_folder`, `load_model` and `load_tokenizer`; or model and tokenizer do not fit.
    """
    folder = checkpoint_folder(name, **hub)
    tokenizer = load_tokenizer(folder, leading_eos=leading_eos)
    model = load_model(folder, vocab_size=len(tokenizer))
    if len(tokenizer) > model.config.vocab_size:
        raise LoadingError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "take the tokenizer that the model was trained with"
        )
    count = model.num_parameters()
    if expected_parameters is not None and count != expected_parameters:
        raise LoadingError(
            f"{name} has {count:,} parameters, and `expected_parameters` is {expected_parameters}: check name and "
            "revision, or change it"
        )
    # A folder of the Hub's cache is called after the commit that it holds.
    cached = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    model.config._commit_hash = folder.name if cached else None
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model, tokenizer


def checkpoint_folder(name: str | Path, **hub: Any) -> Path:
    """The local folder of a checkpoint; a repository on the Hub is downloaded first, or found in the cache.

    Only the config, the tokenizer and the final weights are fetched. With HF_HUB_OFFLINE=1 nothing is.

    Args:
        hub: arguments of `huggingface_hub.snapshot_download`, such as `revision`: a branch, a tag, or a commit, which
            pins the exact files.

    Raises:
        LoadingError: it is neither a folder nor a repository that can be had.
    """
    if name == NANO:
        return NANO_FOLDER
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*_CONFIG_FILES, *_TOKENIZER_FILES, WEIGHTS], **hub))
    except (HFValidationError, HTTPError, OSError) as error:
        raise LoadingError(
            f"{name} is no folder, and the Hub's repository of that name is not to be had ({error}): check name, "
            "revision, network and HF_HUB_OFFLINE; if it is private or gated, run `hf auth login`"
        ) from error


def load_model(path: str | Path, *, vocab_size: int | None = None) -> GPT2LMHeadModel:
    """Load a GPT-2 for training from a folder: every weight accounted for, float32, dropout 0, in eval mode.

    Dropout is 0 because policy and reference must score alike: with the config's usual 0.1, two passes over the same
    weights disagree by hundreds of nats a sequence. AdamW's small steps vanish in bf16.

    Exports of llm.c pad the embedding to a multiple of 128 rows (50257 to 50304). No token has those rows and llm.c
    leaves them out of its softmax: kept, their untrained logits would draw samples. They are cut. Names may lack the
    prefix `transformer.`, and the causal masks that old exports carry are left out.

    Args:
        vocab_size: the tokenizer's number of tokens, where the config gives the padded one; None: the config's.

    Raises:
        LoadingError: a file is missing, unreadable or truncated, or is not a GPT-2 of a supported variant.
    """
    folder = Path(path)
    config = _read_config(folder)
    if vocab_size is not None and config.vocab_size == _padded(vocab_size):
        config.vocab_size = vocab_size
    try:
        stored = load_file(folder / WEIGHTS)  # no pickles: that format can carry code
    except FileNotFoundError:
        raise LoadingError(f"{folder} has no {WEIGHTS}: save the model with save_pretrained()") from None
    except (SafetensorError, OSError) as error:
        raise LoadingError(f"{folder / WEIGHTS} is damaged or truncated ({error}): download it again") from error
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(("wte.weight", "lm_head.weight")) and tensor.shape[0] == _padded(config.vocab_size):
            tensor = tensor[: config.vocab_size]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    words = state.get("transformer.wte.weight")
    if words is not None and not torch.equal(state.setdefault("lm_head.weight", words), words):
        raise LoadingError(f"{folder}: lm_head.weight differs from wte.weight: untied heads are not supported")
    with torch.device("meta"):  # no time for a random start that is overwritten
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").float()
    model.tie_weights()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise LoadingError(
            f"{folder}: the weights are not those of config.json ({' '.join(str(error).split())}): take both from one "
            "checkpoint, without adapters"
        ) from error
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def load_tokenizer(path: str | Path, *, leading_eos: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, ready to pad.

    A tokenizer without a pad token, as GPT-2's is, pads with its end token, and that is logged. Nothing is lost by it:
    padding is masked, and the model still learns its own end tokens, which are told from padding by the mask.

    Args:
        leading_eos: put the end token in front of every text, as llm.c has it in front of every document that
            RookWorld-LM was trained on. It stays with the tokenizer when that is saved. `add_special_tokens=False`
            leaves it out, which is what a completion that is tokenised by itself needs.

    Raises:
        LoadingError: the folder holds no tokenizer, or one without an end token.
    """
    folder = Path(path)
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise LoadingError(f"{folder} has neither tokenizer.json nor vocab.json: save the model's tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadingError(f"the tokenizer in {folder} cannot be read ({error}): download it again") from error
    if tokenizer.eos_token_id is None:
        raise LoadingError(f"the tokenizer in {folder} has no end token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(
            f"the tokenizer in {folder} has no pad token: padding is written with its end token "
            f"{tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), and masked"
        )
    if leading_eos:
        eos, special = tokenizer.eos_token, [(tokenizer.eos_token, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{eos}:0 $A:0", pair=f"{eos}:0 $A:0 $B:1", special_tokens=special
        )
        # The slow classes' way of saying the same, for those that rebuild their backend from what was saved.
        tokenizer.bos_token = eos
        tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // 128) * 128


def _read_config(folder: Path) -> GPT2Config:
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise LoadingError(f"{file} does not exist: give the folder of a saved model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadingError(f"{file} is not valid JSON ({error}): download it again") from error
    if fields.get("model_type") != "gpt2":
        raise LoadingError(f"{file}: model_type is {fields.get('model_type')!r}, only 'gpt2' can be loaded")
    fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    try:
        config = GPT2Config.from_dict(fields)
        check_config(config)
    except (TypeError, ValueError) as error:
        raise LoadingError(f"{file}: {error}") from error
    config.name_or_path = str(folder)  # TRL reads the reference model from here
    return config
