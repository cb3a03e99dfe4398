"""README and docs: short, linked, and every command, code block, recipe fragment and table in them is true."""

import importlib.util
import io
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from recipes import evaluate, generate_data, grpo, report, sft
from rookworld_trl import doctor
from rookworld_trl.checkpointing import stopping
from rookworld_trl.chess import uci
from rookworld_trl.modeling.loading import NANO_FOLDER
from rookworld_trl.settings.parser import parse
from tests.support.documents import (
    GENERATED,
    PAGES,
    README,
    ROOT,
    blocks,
    dry_run,
    languages,
    prose,
    with_fields,
    with_tables,
)
from tests.support.tables import cells

DOCS = sorted(ROOT.glob("docs/*.md"))
# Programs that others wrote and that these tests need not have; the files that they are given must exist.
FOREIGN = {"vllm", "sbatch", "docker", "apt-get", "export", ".", "cd", "git", "fastchess", "lm_eval", "xvfb-run"}
GRPO_TYPES, SFT_TYPES = grpo.CLASSES, sft.CLASSES
DOCTOR_TYPES = (doctor.DoctorArguments, GRPOConfig)


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_short_linked_and_name_what_exists():
    assert len(README.read_text().splitlines()) <= 110, "it takes ten minutes"
    index = ROOT / "docs" / "index.md"
    assert "](docs/index.md)" in README.read_text()
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index.read_text()))
    assert linked == {page.name for page in DOCS} - {index.name}, "a new page needs a row in the index"
    astray, missing = [], []
    for page in PAGES:
        assert languages(page.read_text()) <= {"bash", "python", "yaml", "text"}, f"{page}: code of a kind not tested"
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
                astray.append((page.name, target))
        text = re.sub(r"https?://\S+", "", page.read_text())
        named = re.findall(r"(?:recipes|accelerate_configs|benchmarks|rookworld_trl|tests|docs)/[\w./*-]*\w/?", text)
        missing += [(page.name, name) for name in set(named) if not any(ROOT.glob(name.rstrip("/")))]
    assert (astray, missing) == ([], [])


# Shell commands


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|rookworld-trl)\[([\w,]+)\]", word)
        assert set(own[1].split(",") if own else ()) <= set(extras), word


def on_this_machine(words: list[str]) -> list[str]:
    return [*words, "--use_cpu", "true"]  # what a GPU alone has is refused where there is none


def recipe(script: str, words: list[str]) -> None:
    """The program's own parser takes the arguments."""
    words = [word for word in words if word != "--help"]
    if "--from" in words:  # a run; tests/plugins/test_origin.py has one
        words = [word for number, word in enumerate(words) if "--from" not in (word, words[number - 1])]
    parsers: dict[str, Callable[[list[str]], Any]] = {
        "recipes/grpo.py": lambda words: parse(GRPO_TYPES, on_this_machine(words)),
        "recipes/sft.py": lambda words: parse(SFT_TYPES, on_this_machine(words)),
        "recipes/evaluate.py": lambda words: parse((evaluate.EvaluationOptions,), words),
        "recipes/generate_data.py": generate_data.parse,
        "recipes/report.py": report.parse,
    }
    parsers[script](words)


def accelerate(words: list[str]) -> None:
    assert words[0] == "launch"
    known = launch_command_parser().parse_args(words[1:])
    if known.config_file:
        load_config_from_file(known.config_file)
    recipe(known.training_script, known.training_script_args)


def python(words: list[str]) -> None:
    if words[0] == "-m":
        module = importlib.util.find_spec(words[1])
        assert module
        assert module.origin
        file = Path(module.origin)
        files = file.parent.glob("*.py") if module.submodule_search_locations else [file]
        text = "".join(each.read_text() for each in files)
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))
    else:
        recipe(words[0], words[1:])


def rookworld_uci(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("uci\nquit\n"))
    uci.main(words)


def run_or_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the command could not be typed as it stands."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    checks: dict[str, Callable[[], Any]] = {
        "make": lambda: dry_run("make", *rest) if rest else None,
        "pip": lambda: pip(rest),
        "accelerate": lambda: accelerate(rest),
        "python": lambda: python(rest),
        "rookworld-uci": lambda: rookworld_uci(rest, monkeypatch),
        "rookworld-doctor": lambda: parse(DOCTOR_TYPES, ["--output_dir", "x", *on_this_machine(rest)]),
    }
    if program in FOREIGN:
        assert all((ROOT / word).exists() for word in rest if word.startswith(("recipes/", "accelerate_configs/")))
    else:
        checks[program]()


def test_options_in_the_text_exist():
    text = "".join(prose(page.read_text()) for page in [README, *DOCS])
    options = set(re.findall(r"`--([\w-]+)", text)) - {"key"}  # `--key value` stands for all of them
    kinds = (*GRPO_TYPES, *SFT_TYPES, *DOCTOR_TYPES, evaluate.EvaluationOptions)
    kinds += tuple(cls for _, classes in generate_data.COMMANDS.values() for cls in classes)
    known = {field.name for cls in kinds for field in fields(cls)} | {"config", "from", "help"}
    known |= {action.dest for action in launch_command_parser()._actions}
    assert {option.replace("-", "_") for option in options} <= {option.replace("-", "_") for option in known}


# Code


def test_recipe_fragments_parse(tmp_path):
    """As if they stood in `recipes/MODEL/TASK/`, where `extends` reaches the presets."""
    (tmp_path / "recipes" / "mine" / "grpo").mkdir(parents=True)
    (tmp_path / "recipes" / "presets").symlink_to(ROOT / "recipes" / "presets")
    for number, code in enumerate(code for page in PAGES for code in blocks(page.read_text(), "yaml")):
        path = tmp_path / "recipes" / "mine" / "grpo" / f"{number}.yaml"
        path.write_text(code)
        parse(GRPO_TYPES, ["--config", str(path), "--use_cpu", "true"])


@pytest.fixture
def workplace(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the names that the pages use stand for something small: no Hub, and no GPU."""
    for name, target in {"openai-community/gpt2": tiny_checkpoint, "runs/demo/checkpoint": NANO_FOLDER}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def run(page: Path, **given: Any) -> dict[str, Any]:
    """Run the blocks of a page one after the other, as a reader would type them, but small; return their names.

    Args:
        given: names that a page takes for granted.
    """
    names: dict[str, Any] = {"__name__": "__main__", **given}
    for code in blocks(page.read_text(), "python"):
        small = re.sub(r"max_steps=\d+", "max_steps=2", re.sub(r"train_batch_size=\d+", "train_batch_size=8", code))
        small = small.replace('load_shipped("train")', 'load_shipped("dev")')
        exec(compile(small, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python") and p != README], ids=str)
def test_python_runs(page, workplace, tiny_model, tiny_tokenizer):
    run(page, model=tiny_model, tokenizer=tiny_tokenizer, options={"max_steps": 2, "max_completion_length": 6})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_trainer_takes_a_users_own_task(kind, workplace, tiny_tokenizer, capsys):
    """The README's example and its table, with GPT-2 and with another decoder-only model in its place."""
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder = workplace / "openai-community" / "gpt2"
        folder.unlink()
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    names = run(README)
    trainer = names["trainer"]
    assert (trainer.state.global_step, trainer.model.config.model_type) == (2, kind)
    assert {row["answer"] for row in names["dataset"]} > {"2", "18"}
    table = capsys.readouterr().out[-500:].splitlines()
    assert [line for line in table if re.fullmatch(r"sums, 20 items +before +after +change   95 % interval", line)]
    (row,) = [line.split() for line in table if line.startswith("  right *")]
    assert row[2:5] == ["0.0", "0.0", "+0.0"], "two steps teach nothing"
    assert "Significant losses: none among 1 metrics." in table
    assert not {each["prompt"] for each in names["held_out"]} & {each["prompt"] for each in names["dataset"]}
    assert names["right_sum"](completions=[" 12, 1", " 1"], answer=["12", "12"]) == [1.0, 0.0]


# Tables


def test_generated_tables_are_those_of_the_classes_and_of_the_measurements():
    for page, rewrite in GENERATED.items():
        text = page.read_text()
        assert text == rewrite(text), f"{page.name}: `make docs` writes the tables"
    with pytest.raises(ValueError, match=r"no table takes .*RunConfig\.model"):
        with_fields("<!-- fields of RunConfig: dataset* -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"blocks of tables \['a'\], functions for \['b'\]"):
        with_tables("<!-- table: a -->\n<!-- end -->", {"b": str})
    assert with_tables("<!-- table: a -->\nold\n<!-- end -->", {"a": lambda: "new"}) == (
        "<!-- table: a -->\n\nnew\n\n<!-- end -->"
    )


def test_the_exit_codes_are_those_of_the_programs():
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "resume.md").read_text(), flags=re.MULTILINE)
    codes = {value for name, value in vars(stopping).items() if name.isupper() and type(value) is int}
    assert {int(code) for code in table} == codes


# Intervals in the text that no result file has, by page.
OF_NO_FILE = {
    ("first-evening", "+0.6 [−0.6, +1.9]"): "how to read a line, no result",
    ("evidence-tables", "0.913 [0.897, 0.927]"): "code that is not in the repository, as the page says",
    ("evidence-tables", "0.284 [0.230, 0.339]"): "the same",
    ("evidence-tables", "0.870 [0.841, 0.895]"): "the same",
}


def intervals_of(found: Any) -> Iterator[str]:
    """Each number with its interval that a result file holds, and its negative, as the pages write them."""
    if isinstance(found, list):
        for each in found:
            yield from intervals_of(each)
    elif isinstance(found, dict):
        for each in found.values():
            yield from intervals_of(each)
        for name in ("mean", "difference", "value", "slope", "median") if found.get("ci_low") is not None else ():
            if isinstance(found.get(name), (int, float)):
                three = (found[name], found["ci_low"], found["ci_high"])
                for value, low, high in (three, (-three[0], -three[2], -three[1])):
                    for scale, digits in ((1, 3), (1, 0), (100, 1)):
                        for sign, bounds in itertools.product(("", "+"), repeat=2):
                            ends = cells.interval(scale * low, scale * high, f"{bounds}.{digits}f")
                            yield f"{cells.number(scale * value, f'{sign}.{digits}f')} {ends}"


def test_intervals_in_the_text_are_those_of_the_results():
    """A result that is computed anew changes the tables by `make docs`, and the sentences around them by hand."""
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    known = {text for file in files for text in intervals_of(json.loads(file.read_text()))}
    written = set()
    for page in [README, *DOCS]:
        text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        for match in re.finditer(r"[+−]?\d+(?:\.\d+)?\s\[[+−]?[\d.]+,\s[+−]?[\d.]+\]", text):
            written.add((page.stem, " ".join(match[0].split())))
    assert len(written) > 8
    assert {each for each in written if each[1] not in known} == set(OF_NO_FILE)
