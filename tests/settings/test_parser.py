"""The parser of recipes: what it takes, and that everything else is refused by file, line, key and remedy."""

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from recipes import grpo, sft
from rookworld_trl.checkpointing.resume import ResumeError
from rookworld_trl.settings.parser import SYNONYMS, RecipeError, bad_input, command, parse


class Color(Enum):
    WHITE = "white"
    BLACK = "black"


class Switch(Enum):
    NO = "no"
    STEPS = "steps"


@dataclass
class Run:
    model: str
    rate: float = 0.5
    steps: int = 10
    quiet: bool = False
    limit: int | None = None
    color: Color | str = "white"
    mode: Literal["fast", "exact"] = "exact"
    pace: Literal["slow"] | None = "slow"
    names: list[str] = field(default_factory=list)
    extra: dict[str, Any] | str | None = None
    stages: list[dict[str, Any]] | None = None
    shares: dict[str, float] | None = None
    native: bool | None = None
    report: str | list[str] | None = None
    switch: Switch | str = "no"


@dataclass
class Other:
    batch_size: int = 8
    groups: int = 2

    def __post_init__(self) -> None:
        if self.batch_size % self.groups:
            raise ValueError(f"batch_size ({self.batch_size}) must be divisible by groups ({self.groups}).")


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, *overrides: str) -> tuple[Run, Other]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return parse((Run, Other), ["--config", str(path), *overrides])

    return write


def test_file_and_command_line(recipe):
    run, other = recipe(
        "model: a\nrate: 1e-5\nlimit: null\nnames: [x, y]\nextra: {k: 1}\nbatch_size: 6\n",
        "--rate", "3", "--quiet", "--limit=7", "--batch-size", "4", "--color", "black",
    )  # fmt: skip
    assert run == Run("a", 3.0, quiet=True, limit=7, color="black", names=["x", "y"], extra={"k": 1})
    assert isinstance(run.rate, float)
    assert other == Other(batch_size=4)


def test_null_collections_and_bare_flags(recipe):
    """On the command line as in a file; a list may be written word by word too, as in TRL's programs."""
    text = (
        "model: a\npace: null\nstages: [{until: 0.5}, {until: 1}]\nshares: {check: 0.25}\nreport: [x, y]\nnative: no\n"
    )
    run, _ = recipe(text)
    assert (run.pace, run.stages, run.shares) == (None, [{"until": 0.5}, {"until": 1}], {"check": 0.25})
    assert (run.report, run.native) == (["x", "y"], False)
    words = ["--stages", "null", "--shares", "{check: 1}", "--report", "[z]", "--native", "--names", "a", "b"]
    (run,) = parse((Run,), ["--model", "0123", "--steps", "-1", *words])
    assert (run.model, run.steps) == ("0123", -1), "text stays text, and a negative number is a value"
    assert (run.stages, run.shares, run.report, run.native, run.names) == (None, {"check": 1}, ["z"], True, ["a", "b"])
    assert recipe("model: a\nnames: []\n")[0].names == []


def test_a_choice_called_no_is_no_boolean(recipe):
    for text in ("no", "'no'"):
        assert recipe(f"model: a\nswitch: {text}\n")[0].switch == "no"
    assert recipe("model: a\n", "--switch", "no")[0].switch == "no"


def test_a_file_starts_from_others(tmp_path):
    """Base, then the later base, then the file itself, then the command line; paths are relative to the file."""
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/base.yaml").write_text("model: base\nrate: 1\nsteps: 1\nnames: [base]\n")
    (tmp_path / "presets/calm.yaml").write_text("extends: base.yaml\nrate: 2\nsteps: 2\n")
    (tmp_path / "other.yaml").write_text("steps: 3\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: [presets/calm.yaml, other.yaml]\nlimit: 4\n")
    run, _ = parse((Run, Other), ["--config", str(recipe), "--quiet", "true"])
    assert run == Run("base", 2.0, steps=3, quiet=True, limit=4, names=["base"])


def test_what_a_file_starts_from_is_named_in_errors(tmp_path):
    (tmp_path / "base.yaml").write_text("model: a\nsteps: ten\n")
    recipe = tmp_path / "recipe.yaml"

    def message(text, *overrides):
        recipe.write_text(text)
        with pytest.raises(RecipeError) as error:
            parse((Run, Other), ["--config", str(recipe), *overrides])
        return str(error.value)

    assert re.search(r"base.yaml line 2: key 'steps' is 'ten'", message("extends: base.yaml\n"))
    missing = message("model: a\nextends: bse.yaml\n")
    assert re.search(r"bse.yaml: cannot be read .*; correct 'extends' in .*recipe.yaml line 2", missing)
    assert "'extends' leads back to" in message("extends: recipe.yaml\n")
    assert "unknown key 'extends'" in message("model: a\n", "--extends", "base.yaml")


def test_the_environment_stands_between_the_file_and_the_command_line(recipe, monkeypatch):
    variables = {"STEPS": "5", "RATE": "1e-3", "NAMES": "[x]", "MODEL": "007", "SWITCH": "no", "BATCH_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(f"ROOKWORLD_{name}", value)
    run, other = recipe("model: a\nsteps: 1\nrate: 1\nlimit: 2\n", "--rate", "3")
    assert run == Run("007", 3.0, steps=5, limit=2, names=["x"], switch="no")
    assert other.batch_size == 4


def test_bad_variables(monkeypatch):
    for name, value, message in (
        ("STEP", "3", "ROOKWORLD_STEP is called after no key; the nearest valid key is ROOKWORLD_STEPS"),
        ("STEPS", "ten", "environment ROOKWORLD_STEPS: key 'steps' is 'ten'; write a whole number"),
        ("GROUPS", "3", r"divisible .* groups \(environment ROOKWORLD_GROUPS\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"ROOKWORLD_{name}", value)
            with pytest.raises(RecipeError, match=message):
                parse((Run, Other), ["--model", "a"])


BAD = {
    "two recipes": ("model: a\n", ("--config", "other.yaml"), r"command line: --config stands twice; .*'extends"),
    "binary": ("model: \x00\n", (), r"recipe.yaml: is not valid YAML: .*\w"),
    "unknown key": ("model: a\nstep: 3\n", (), r"recipe.yaml line 2: unknown key 'step'; .* 'steps'"),
    "unknown option": ("model: a\n", ("--stepz", "3"), r"command line: unknown key 'stepz'; .* 'steps'"),
    "text for int": ("model: a\nsteps: ten\n", (), r"line 2: key 'steps' is 'ten'; write a whole number"),
    "fraction for int": ("model: a\nsteps: 1.5\n", (), r"'steps' is '1.5'; write a whole number"),
    "bool for int": ("model: a\nsteps: yes\n", (), r"'steps' is 'yes'; write a whole number"),
    "number for bool": ("model: a\nquiet: 2\n", (), r"line 2: key 'quiet' .*'?2'?"),
    "list for float": ("model: a\nrate: [1]\n", (), r"'rate' is '\[1\]'; write a number"),
    "text for a mapping": ("model: a\nshares: x\n", (), r"line 2: key 'shares' is 'x'; write a mapping"),
    "null for int": ("model: a\nsteps:\n", (), r"'steps' is 'null'; write a whole number"),
    "no such choice": ("model: a\nmode: slow\n", (), r"line 2: key 'mode' .*'slow' \(choose from .*fast"),
    "no such enum value": ("model: a\ncolor: red\n", (), r"line 2: key 'color' .*'red' \(choose from .*white"),
    "wrong on command line": ("model: a\n", ("--limit", "x"), r"command line: key 'limit' is 'x'; write a whole"),
    "missing key": ("rate: 1\n", (), r"the following arguments are required: --model"),
    "twice": ("model: a\nsteps: 1\nsteps: 2\n", (), r"line 3: key 'steps' stands twice; .*line 2"),
    "no mapping": ("- model\n", (), r"holds no settings"),
    "empty": ("", (), r"holds no settings"),
    "broken YAML": ("model: [a\n", (), r"recipe.yaml: is not valid YAML"),
    "loose word": ("model: a\n", ("fast",), r"'fast' stands alone; write --key value"),
    "refused together": (
        "model: a\ngroups: 3\n", (),
        r"batch_size \(8\) must be divisible by groups \(3\). Change batch_size \(not set\) or groups \(.*line 2\)",
    ),
}  # fmt: skip


def test_bad_recipes(recipe, tmp_path):
    for text, overrides, message in BAD.values():
        with pytest.raises(RecipeError, match=message):
            recipe(text, *overrides)
    with pytest.raises(RecipeError, match=r"nowhere.yaml: cannot be read .* give --config an existing YAML file"):
        parse((Run,), ["--config", "nowhere.yaml"])
    (tmp_path / "recipe.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: is no text.*$"):  # in one line
        parse((Run, Other), ["--config", str(tmp_path / "recipe.yaml")])


def test_a_word_of_other_trainers_is_refused_with_the_key_that_means_it(monkeypatch):
    """By spelling alone `lr` is nearest to `alert`."""
    types = grpo.CLASSES
    keys = {"lr": "learning_rate", "clip_range": "epsilon", "batch-size": "per_device_train_batch_size"}
    for word, key in keys.items():
        name = word.replace("-", "_")
        with pytest.raises(RecipeError, match=f"command line: unknown key '{name}'; .*'{key}'$"):
            parse(types, [f"--{word}", "1", "--use_cpu", "true"])
        with monkeypatch.context() as patch:
            patch.setenv(f"ROOKWORLD_{name.upper()}", "1")
            with pytest.raises(RecipeError, match=f"ROOKWORLD_{name.upper()} .* ROOKWORLD_{key.upper()}. Or unset it"):
                parse(types, ["--use_cpu", "true"])


def test_bad_input_is_one_line_and_exit_code_2_and_bugs_keep_their_traceback(capsys):
    with pytest.raises(AttributeError), bad_input():
        raise AttributeError("a bug")
    with pytest.raises(SystemExit) as exit_, bad_input():
        raise RecipeError("file: key: remedy")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: file: key: remedy\n"
    with pytest.raises(SystemExit) as exit_, bad_input():
        raise type("Other", (ResumeError,), {"exit_code": 7})("an error knows its code")
    assert exit_.value.code == 7


def test_errors_do_not_show_tokens(recipe, capsys):
    token = "hf_abcdefgh12345678"
    for text, words in (("model: a\n", (token,)), ("model: a\n", ("--steps", token)), (f"model: [{token}\n", ())):
        with pytest.raises(SystemExit), bad_input():
            recipe(text, *words)
        shown = capsys.readouterr().err
        assert "***" in shown
        assert "abcdefgh" not in shown


def test_the_command_line_that_is_published_has_no_secrets(monkeypatch):
    words = ["grpo.py", "--hub_token", "t0p secret", "--alert=curl -d @- https://t0p", "--max_steps", "3"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setenv("ROOKWORLD_ALERT", "https://t0p")
    monkeypatch.setenv("ROOKWORLD_NAMES", "[a, b]")
    expected = "ROOKWORLD_ALERT=*** 'ROOKWORLD_NAMES=[a, b]' grpo.py --hub_token *** --alert=*** --max_steps 3"
    assert command() == expected


def test_help_has_choices_default_and_sentence_of_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for words, classes in ((["-h"], (Run, Other)), (["--help"], grpo.CLASSES)):
        with pytest.raises(SystemExit) as exit_:
            parse(classes, words, "What it is for.")
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert "What it is for." in out
        assert all(f"--{field.name}" in out for cls in classes for field in fields(cls) if field.init)
    assert re.search(r"--reward \{graduated,continuous\}\s+Six levels from .*\(default:\s+graduated\)", out)


def test_every_key_has_a_sentence_and_no_word_of_other_trainers_is_one():
    """Else its hint would never be shown."""
    for keys in (
        [each for cls in classes for each in fields(cls) if each.init] for classes in (grpo.CLASSES, sft.CLASSES)
    ):
        assert not [key.name for key in keys if not key.metadata.get("help", "").strip()]
        assert not SYNONYMS.keys() & {key.name for key in keys}
    assert set(SYNONYMS.values()) <= {key.name for cls in grpo.CLASSES for key in fields(cls)}
