"""README and docs: short, linked, and every command, code block, recipe fragment and table in them is true."""

import importlib.util
import io
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from recipes import evaluate, generate_data, generate_problems, grpo, play, report, sft
from rookworld_trl import doctor, uci
from rookworld_trl.checkpointing import exits
from rookworld_trl.config import parse_recipe
from rookworld_trl.modeling.loading import NANO_FOLDER
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.supervised import SupervisedConfig
from tests.support.documents import (
    GENERATED,
    PAGES,
    README,
    ROOT,
    blocks,
    commands,
    languages,
    prose,
    with_fields,
)

DOCS = sorted(ROOT.glob("docs/*.md"))
DEMO = "recipes/nano/grpo/config_cpu_exact.yaml"
# Programs that others wrote and that these tests need not have; the files that they are given must exist.
FOREIGN = {"vllm", "sbatch", "docker", "apt-get", "export", ".", "cd", "git", "fastchess", "lm_eval", "xvfb-run"}
GRPO_TYPES, SFT_TYPES = (grpo.RunConfig, RookWorldGRPOConfig), (sft.SFTRecipe, SupervisedConfig)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_readme_takes_ten_minutes():
    assert len(README.read_text().splitlines()) <= 130


def test_the_index_links_to_every_page_and_the_readme_to_the_index():
    index = ROOT / "docs" / "index.md"
    assert "](docs/index.md)" in README.read_text()
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index.read_text()))
    assert linked == {page.name for page in DOCS} - {index.name}, "a new page needs a row in the index"


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_files_that_are_named_exist(page):
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = re.findall(r"(?:recipes|accelerate_configs|benchmarks|rookworld_trl|tests|docs)/[\w./*-]*\w/?", text)
    missing = {name for name in named if not any(ROOT.glob(name.rstrip("/")))}
    assert not missing


@pages
def test_code_is_of_a_kind_that_is_tested(page):
    assert languages(page.read_text()) <= {"bash", "python", "yaml", "text"}


# Shell commands


def make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            assert name in targets
        elif name == "ARGS" and words[0].startswith("demo"):
            parse_recipe(GRPO_TYPES, ["--config", DEMO, *value.split()])
        else:
            assert f"{name} ?=" in (ROOT / "Makefile").read_text() or f"$({name})" in (ROOT / "Makefile").read_text()


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|rookworld-trl)\[([\w,]+)\]", word)
        assert set(own[1].split(",") if own else ()) <= set(extras), word


def on_this_machine(words: list[str]) -> list[str]:
    return [*words, "--use_cpu", "true"]  # what a GPU alone has is refused where there is none


def recipe(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own parser takes the arguments."""
    if "--help" in words:
        words = [word for word in words if word != "--help"]
    name = Path(script).stem
    if not (ROOT / script).is_file():
        raise AssertionError(f"there is no {script}")
    if script == "recipes/grpo.py":
        parse_recipe(GRPO_TYPES, on_this_machine(words))
    elif script == "recipes/sft.py":
        parse_recipe(SFT_TYPES, on_this_machine(words))
    elif script == "recipes/evaluate.py":
        evaluate.parse(words)
    elif script == "recipes/play.py":
        play.parse(words)
    elif name in ("generate_data", "generate_problems", "report"):
        called = []
        programs: dict[str, Any] = {"generate_data": generate_data, "generate_problems": generate_problems}
        programs["report"] = report
        for function in ("positions", "dataset", "write_mates", "write_tactics", "write_report"):
            if hasattr(programs[name], function):
                monkeypatch.setattr(programs[name], function, lambda *_: called.append(True) or [])
        programs[name].main(words)
        assert called
    else:
        raise AssertionError(f"{script} is started as a module")


def accelerate(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "launch"
    known = launch_command_parser().parse_args(words[1:])
    load_config_from_file(known.config_file)
    recipe(known.training_script, known.training_script_args, monkeypatch)


def python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-m":
        module = importlib.util.find_spec(words[1])
        assert module
        assert module.origin
        file = Path(module.origin)
        files = file.parent.glob("*.py") if module.submodule_search_locations else [file]
        text = "".join(each.read_text() for each in files)
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))
    else:
        recipe(words[0], words[1:], monkeypatch)


def rookworld_uci(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("uci\nquit\n"))
    uci.main(words)


def run_or_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the command could not be typed as it stands."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    checks: dict[str, Callable[[], None]] = {
        "make": lambda: make(rest),
        "pip": lambda: pip(rest),
        "accelerate": lambda: accelerate(rest, monkeypatch),
        "python": lambda: python(rest, monkeypatch),
        "rookworld-uci": lambda: rookworld_uci(rest, monkeypatch),
        "rookworld-doctor": lambda: doctor.parse(rest),
    }
    if program in FOREIGN:
        assert all((ROOT / word).exists() for word in rest if word.startswith(("recipes/", "accelerate_configs/")))
    else:
        checks[program]()


@pages
def test_shell_commands_are_what_the_programs_take(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    inline = re.findall(r"`((?:make|pip|python|rookworld-uci) [^`]+)`", prose(page.read_text()))
    typed = [words for code in [*blocks(page.read_text(), "bash"), *inline] for words in commands(code)]
    for words in typed:
        try:
            run_or_parse(words, monkeypatch)
        except (SystemExit, KeyError, ValueError, AssertionError) as error:
            raise AssertionError(f"{' '.join(words)}: {error!r}") from error


def test_options_in_the_text_exist(capsys):
    text = "".join(prose(page.read_text()) for page in [README, *DOCS])
    options = set(re.findall(r"`--([\w-]+)", text)) - {"key"}  # `--key value` stands for all of them
    kinds = (*GRPO_TYPES, *SFT_TYPES, doctor.DoctorArguments)
    known = {field.name for cls in kinds for field in fields(cls)} | {"config", "help"}
    known |= {action.dest for action in launch_command_parser()._actions}
    for main, words in (
        (evaluate.parse, []),
        (play.parse, []),
        (generate_data.main, ["positions"]),
        (generate_data.main, ["dataset"]),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        known |= set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
    assert {option.replace("-", "_") for option in options} <= {option.replace("-", "_") for option in known}


# Code


def with_code(language: str, but: tuple[Path, ...] = ()) -> pytest.MarkDecorator:
    chosen = [page for page in PAGES if blocks(page.read_text(), language) and page not in but]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: page.stem)


@with_code("yaml")
def test_recipe_fragments_parse(page, tmp_path):
    """As if they stood in `recipes/MODEL/TASK/`, where `extends` reaches the presets."""
    (tmp_path / "recipes" / "mine" / "grpo").mkdir(parents=True)
    (tmp_path / "recipes" / "presets").symlink_to(ROOT / "recipes" / "presets")
    for number, code in enumerate(blocks(page.read_text(), "yaml")):
        path = tmp_path / "recipes" / "mine" / "grpo" / f"{number}.yaml"
        path.write_text(code)
        parse_recipe(GRPO_TYPES, ["--config", str(path), "--use_cpu", "true"])


def test_every_field_of_ours_is_set_by_a_recipe_or_an_example() -> None:
    """What nobody shows a use of should be a constant."""
    yaml = [path.read_text() for path in ROOT.glob("recipes/**/*.yaml")]
    yaml += [code for page in PAGES for code in blocks(page.read_text(), "yaml")]
    keys = set(re.findall(r"^(\w+):", "\n".join(yaml), flags=re.MULTILINE))
    options = {word for page in PAGES for word in re.findall(r"--(\w+)", page.read_text())}
    ours = {each.name for each in fields(RookWorldGRPOConfig)} - {each.name for each in fields(GRPOConfig)}
    assert ours - keys - options == set()


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


@with_code("python", but=(README,))
def test_python_runs(page, workplace, tiny_model, tiny_tokenizer):
    run(page, model=tiny_model, tokenizer=tiny_tokenizer, options={"max_steps": 2, "max_completion_length": 6})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_trainer_takes_a_users_own_task(kind, workplace, tiny_tokenizer):
    """The README's example, with GPT-2 and with another decoder-only model in its place."""
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
    assert names["right_sum"](completions=[" 12, 1", " 1"], answer=["12", "12"]) == [1.0, 0.0]


# Tables


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.stem)
def test_generated_tables_are_those_of_the_classes_and_of_the_measurements(page):
    text = page.read_text()
    assert text == GENERATED[page](text), "`make docs` writes the tables"


def test_a_field_that_no_table_takes_is_named():
    with pytest.raises(ValueError, match=r"no table takes .*RunConfig\.model"):
        with_fields("<!-- fields of RunConfig: dataset* -->\n<!-- end -->")


def test_the_exit_codes_are_those_of_the_programs():
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "resume.md").read_text(), flags=re.MULTILINE)
    codes = {value for name, value in vars(exits).items() if name.isupper() and type(value) is int}
    assert {int(code) for code in table} == codes
