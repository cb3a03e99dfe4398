"""Every YAML in the repository is read by what reads it for real, and the Makefile's commands exist."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from recipes import grpo, sft
from rookworld_trl.chess.mixing import prompts_of
from rookworld_trl.plugins import settings_of
from rookworld_trl.settings.parser import parse
from tests.support.documents import own_fields
from tests.support.schema import FILES, modeline, schema

ROOT = Path(__file__).parents[2]
GRPO = sorted([*ROOT.glob("recipes/*/grpo/*.yaml"), *ROOT.glob("recipes/*/verify/*.yaml")])
SFT = sorted(ROOT.glob("recipes/*/sft/*.yaml"))
PRESETS = sorted(ROOT.glob("recipes/presets/*.yaml"))
CHECKPOINTING = ROOT / "benchmarks/results/checkpointing.json"
ACCELERATE = sorted(ROOT.glob("accelerate_configs/*.yaml"))


def on_this_machine(path: Path) -> list[str]:
    """What a GPU alone has is refused where there is none; everything else is parsed as it stands."""
    return ["--config", str(path), "--use_cpu", "true"]


def test_grpo_recipes_parse_and_say_what_they_mean():
    assert {path.parts[-3] for path in GRPO} >= {"nano", "rookworld-lm-124m"}
    assert {path.stem for path in PRESETS} == {"conservative", "standard", "emergency", "earlier"}
    assert set(GRPO) | set(SFT) | set(PRESETS) == set(ROOT.glob("recipes/**/*.yaml"))
    # By the seconds that a checkpoint of 124M took; steps of 2.7 s or more are assumed.
    measured = json.loads(CHECKPOINTING.read_text())["sizes"]["124m"]
    seconds = measured["save_seconds"]
    for path in GRPO:
        run, args, *extras = parse(grpo.CLASSES, on_this_machine(path))
        prompts = args.generation_batch_size // args.num_generations
        share = prompts_of(run.mix_env_ratio, prompts, "mix_env_ratio")
        assert share == pytest.approx(run.mix_env_ratio * prompts), path
        # One update a batch: what is sampled together is learned from together, so the optimizer sees the ratio too.
        assert args.steps_per_generation == args.gradient_accumulation_steps, path
        assert args.max_steps > 0, path
        assert args.output_dir.startswith("runs/"), path
        if path.parent == ROOT / "recipes/rookworld-lm-124m/grpo":
            assert run.expected_parameters == 124_439_808, path
            assert seconds / (2.7 * args.save_steps) < 0.01, f"{path}: checkpoints take 1 % of a GPU's time or more"
        if path.stem in ("config_mixed", "config_policy", "config_environment") and "124m" in str(path):
            keys = settings_of(extras)
            controls = (args.kl_control, keys["lr_schedule"], keys["kl_stop_threshold"], args.recovery)
            assert controls == ("multiplicative", "advanced", 50, True), path
    for path in SFT:
        recipe, *_ = parse(sft.CLASSES, on_this_machine(path))
        assert recipe.n_embd % recipe.n_head == 0, path


def test_the_schema_that_a_recipe_names_takes_it_and_is_that_of_the_classes():
    for path in [*GRPO, *SFT, *PRESETS]:
        first, text = path.read_text().split("\n")[0], path.read_text()
        assert first == modeline(path), path
        file = (path.parent / first.partition("$schema=")[2]).resolve()
        jsonschema.validate(yaml.safe_load(text), json.loads(file.read_text()), jsonschema.Draft7Validator)
    for file, classes in FILES.items():
        shipped, now = (json.loads(each)["properties"] for each in (file.read_text(), schema(classes)))
        ours = {field.name for cls in classes for field in own_fields(cls)}
        assert {name: shipped[name] for name in ours} == {name: now[name] for name in ours}, "`make docs` writes it"


def test_a_schema_refuses_what_the_parser_refuses(tmp_path):
    """And takes what it takes: keys of transformers' and TRL's, names of choices, null, lists and mappings."""
    good = "learning_rate: 1.0e-5\nextends: [a.yaml]\nkl_control: multiplicative\nreport_to: [none]\nalert: null\n"
    good += "save_strategy: steps\npolicy_strata: {check: 0.2}\nstages: [{until_step: 3}]\n"
    check = jsonschema.Draft7Validator(json.loads(next(iter(FILES)).read_text()))
    assert check.is_valid(yaml.safe_load(good))
    recipe = tmp_path / "recipe.yaml"
    for bad in ("lr: 1.0e-5", "max_steps: ten", "kl_control: none", "reward: dense", "use_gae: 2", "epsilon: null"):
        assert not check.is_valid(yaml.safe_load(bad)), bad
        recipe.write_text(f"output_dir: {tmp_path}\n{bad}\n")
        with pytest.raises(ValueError, match=bad.split(":")[0]):
            parse(grpo.CLASSES, on_this_machine(recipe))


def test_presets_hold_what_their_names_say(tmp_path):
    """The stricter the preset, the smaller the steps, the clip and the drift at which it stops."""

    def parsed(stem: str) -> Any:
        recipe = tmp_path / f"{stem}.yaml"
        recipe.write_text(
            f"extends: {ROOT / 'recipes/presets' / stem}.yaml\noutput_dir: {tmp_path}\nmax_grad_norm: 0.3\n"
        )
        made = parse(grpo.CLASSES, on_this_machine(recipe))
        return SimpleNamespace(**{name: value for each in made for name, value in vars(each).items()})

    standard, conservative, emergency, earlier = map(parsed, ("standard", "conservative", "emergency", "earlier"))
    assert (earlier.epsilon, earlier.epsilon_high, earlier.beta) == (0.1, 0.1, 1e-4)
    assert (earlier.kl_control, earlier.kl_stop_threshold) == ("fixed", 5)
    for key in ("learning_rate", "epsilon", "epsilon_high", "kl_stop_threshold"):
        assert getattr(standard, key) > getattr(conservative, key) > getattr(emergency, key), key
    assert standard.beta < conservative.beta < emergency.beta
    assert (standard.kl_stop_threshold, conservative.kl_stop_threshold) == (50, 5)
    assert {standard.max_grad_norm, emergency.max_grad_norm} == {0.3}  # the recipe's own key wins


def test_each_file_says_what_it_is_for_and_names_files_that_exist():
    pattern = r"(?:recipes|accelerate_configs|benchmarks|rookworld_trl)/[\w./-]+\.(?:py|yaml|png|md)"
    for path in [*GRPO, *SFT, *ACCELERATE, *PRESETS, ROOT / "Makefile"]:
        text = path.read_text()
        assert text.startswith("# ") or path.name == "Makefile", path
        assert not {each for each in re.findall(pattern, text) if not (ROOT / each).exists()}, path
