"""TRL's own tests of its GRPO trainer, with this package's trainer in its place and every model and data set made here.

    python tests/trl_own.py /path/to/trl [--stock] [pytest's options]

The checkout's `tests/test_grpo_trainer.py` is run as it is. `trl.GRPOTrainer` and `trl.GRPOConfig` are this package's
(`--stock`: TRL's, to see what fails by itself), and names on the Hub are folders of the working directory, which
`from_pretrained` and `load_dataset` prefer. Prints a table. A test is *refused* if this package's own checks raised;
the exit code is 1 if one fails in another way. `docs/trl.md` has the table and the reasons.
"""

import inspect
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")

import pytest
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import rookworld_trl
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

HUB = Path("trl-internal-testing")
PACKAGE = str(Path(rookworld_trl.__file__).parent)
# Tests that name Qwen's tokens by number or a whole batch get a vocabulary and rows as large as the real ones; the
# others are a hundred times faster with small ones.
EXACT = ("151645", "mask_truncated_completions", "expected_first_generation_batch")
QWEN_SPECIAL = 151_643  # where its special tokens begin
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>"]
SPECIAL += [f"<|special_{number}|>" for number in range(4, 22)]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What one test expects word for word: beginnings of the lines of the Zen of Python.
ZEN = [
    *("Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Flat is better than"),
    *("Sparse is better", "Readability", "Special cases aren't special", "Although practicality beats"),
    *("Errors should never", "Unless explicitly", "In the face of ambiguity, refuse"),
]
SIZES = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 2, "initializer_range": 0.3, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", {"num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", EXPERTS),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {"num_labels": 1}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", {}),
}


def make_tokenizer(first_special: int) -> Any:
    """Bytes, then names that nothing is encoded to, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<unused {number}>" for number in range(len(alphabet), first_special))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


def make_hub(first_special: int, count: int) -> None:
    """The tests' models and data sets, of `count` rows, as folders below the working directory."""
    tokenizer = make_tokenizer(first_special)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tokens["eos_token_id"] = tokenizer.eos_token_id
    for name, (architecture, own) in MODELS.items():
        cls = getattr(transformers, architecture)
        torch.manual_seed(0)
        cls(cls.config_class(**SIZES, **tokens, **own)).save_pretrained(HUB / name)
        tokenizer.save_pretrained(HUB / name)
    zen, configs = HUB / "zen", []
    for config in ("standard_prompt_only", "conversational_prompt_only"):
        (zen / config).mkdir(parents=True)
        for split, lines in (("train", ZEN[:count]), ("test", ZEN[:3])):
            chat = config.startswith("conversational")
            rows = [{"prompt": [{"role": "user", "content": line}] if chat else line} for line in lines]
            (zen / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in ("train", "test")]
        configs.append({"config_name": config, "data_files": files})
    (zen / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


class Table:
    """Runs each test in its folder, and prints what becomes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        source = inspect.getsource(item.function)  # type: ignore[attr-defined]
        os.chdir(self.folder / ("exact" if any(each in source for each in EXACT) else "small"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
        report = yield
        outcome, why = report.outcome, ""
        if call.excinfo is not None and report.failed:
            why = re.split(r"\n|\. (?=[A-Z])", str(call.excinfo.value).strip())[0]  # the first sentence
            ours = str(call.excinfo.traceback[-1].path).startswith(PACKAGE)
            outcome = (
                "refused" if ours and call.excinfo.errisinstance((ValueError, TypeError, RuntimeError)) else "FAILS"
            )
            why = why if ours else f"{call.excinfo.typename}: {why}"
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
        if call.when == "call" or outcome != "passed":
            self.outcomes[item.name] = outcome
            print(f"| `{item.name}` | {outcome} | {why.removeprefix('Skipped: ')} |", flush=True)
        return report


def main(words: list[str]) -> int:
    file, options = Path(words[0]).resolve() / "tests" / "test_grpo_trainer.py", words[1:]
    if not file.is_file():
        raise SystemExit(f"{file}: there is no such file. Give a checkout of https://github.com/huggingface/trl")
    if "--stock" in options:
        options.remove("--stock")
    else:
        trl.GRPOTrainer = RookWorldGRPOTrainer
        trl.GRPOConfig = partial(RookWorldGRPOConfig, logging_steps=10)  # TRL's, which one test relies on
    with tempfile.TemporaryDirectory() as folder:
        for name, first_special, count in (("small", 256, 3), ("exact", QWEN_SPECIAL, len(ZEN))):
            Path(folder, name).mkdir()
            os.chdir(Path(folder, name))
            make_hub(first_special, count)
        print("| test | outcome | reason |\n|---|---|---|")
        quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--rootdir", str(file.parents[1]), "-c", os.devnull]
        table = Table(Path(folder))
        pytest.main([*quiet, str(file), *options], plugins=[table])
    counts = Counter(table.outcomes.values())
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(not counts or counts["FAILS"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
