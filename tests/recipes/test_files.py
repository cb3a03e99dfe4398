"""Every YAML in the repository is read by what reads it for real, and the Makefile's commands exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from recipes import grpo, sft
from rookworld_trl.chess.mixing import prompts_of
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.supervised import SupervisedConfig

ROOT = Path(__file__).parents[2]
GRPO = sorted([*ROOT.glob("recipes/*/grpo/*.yaml"), *ROOT.glob("recipes/*/verify/*.yaml")])
SFT = sorted(ROOT.glob("recipes/*/sft/*.yaml"))
PRESETS = sorted(ROOT.glob("recipes/presets/*.yaml"))
CHECKPOINTING = ROOT / "benchmarks/results/checkpointing.json"
ACCELERATE = sorted(ROOT.glob("accelerate_configs/*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def on_this_machine(path: Path) -> list[str]:
    """What a GPU alone has is refused where there is none; everything else is parsed as it stands."""
    return ["--config", str(path), "--use_cpu", "true"]


def test_there_are_recipes():
    assert {path.parts[-3] for path in GRPO} >= {"nano", "rookworld-lm-124m"}
    assert {path.stem for path in PRESETS} == {"conservative", "standard", "emergency", "earlier"}
    assert set(GRPO) | set(SFT) | set(PRESETS) == set(ROOT.glob("recipes/**/*.yaml"))


@pytest.mark.parametrize("path", GRPO, ids=name)
def test_grpo_recipes_parse_and_their_ratio_is_possible(path, tmp_path):
    run, args = parse((grpo.RunConfig, RookWorldGRPOConfig), on_this_machine(path))
    prompts = args.generation_batch_size // args.num_generations
    assert prompts_of(run.mix_env_ratio, prompts, "mix_env_ratio") == pytest.approx(run.mix_env_ratio * prompts)
    # One update a batch: what is sampled together is learned from together, so the optimizer sees the ratio too.
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert args.max_steps > 0
    assert args.output_dir.startswith("runs/")


def test_a_recipe_for_a_gpu_runs_with_the_accelerate_config_of_the_cpu_as_it_stands(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = ROOT / "recipes/rookworld-lm-124m/grpo/config_mixed.yaml"
    (_, args) = parse((grpo.RunConfig, RookWorldGRPOConfig), ["--config", str(path)])
    assert (args.use_cpu, args.bf16, args.device.type) == (True, False, "cpu")


def test_presets_hold_what_their_names_say(tmp_path):
    """The stricter the preset, the smaller the steps, the clip and the drift at which it stops."""

    def parsed(stem: str) -> RookWorldGRPOConfig:
        recipe = tmp_path / f"{stem}.yaml"
        recipe.write_text(
            f"extends: {ROOT / 'recipes/presets' / stem}.yaml\noutput_dir: {tmp_path}\nmax_grad_norm: 0.3\n"
        )
        return parse((RookWorldGRPOConfig,), on_this_machine(recipe))[0]

    standard, conservative, emergency, earlier = map(parsed, ("standard", "conservative", "emergency", "earlier"))
    assert (earlier.epsilon, earlier.epsilon_high, earlier.beta) == (0.1, 0.1, 1e-4)
    assert (earlier.kl_control, earlier.kl_stop_threshold) == ("fixed", 5)
    for key in ("learning_rate", "epsilon", "epsilon_high", "kl_stop_threshold"):
        assert getattr(standard, key) > getattr(conservative, key) > getattr(emergency, key), key
    assert standard.beta < conservative.beta < emergency.beta
    assert (standard.kl_stop_threshold, conservative.kl_stop_threshold) == (50, 5)
    assert {standard.max_grad_norm, emergency.max_grad_norm} == {0.3}  # the recipe's own key wins


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/rookworld-lm-124m/grpo/*.yaml")), ids=name)
def test_checkpoints_take_less_than_two_percent_of_a_gpus_time(path):
    """By the seconds that a checkpoint of 124M and its stable copy took; steps of 2.7 s or more are assumed."""
    measured = json.loads(CHECKPOINTING.read_text())["sizes"]["124m"]
    seconds = measured["save_seconds"] + measured["make_stable_seconds"]
    _, args = parse((grpo.RunConfig, RookWorldGRPOConfig), on_this_machine(path))
    assert seconds / (2.7 * args.save_steps) < 0.02


@pytest.mark.parametrize("path", SFT, ids=name)
def test_sft_recipes_parse(path):
    (recipe, _) = parse((sft.SFTRecipe, SupervisedConfig), on_this_machine(path))
    assert recipe.n_embd % recipe.n_head == 0


@pytest.mark.parametrize("path", GRPO + SFT + ACCELERATE + PRESETS, ids=name)
def test_each_file_says_at_its_top_what_it_is_for(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))  # raises on unknown keys
    assert config.num_processes >= 1
    assert config.use_cpu == path.stem.startswith("cpu")
    known = {action.dest for action in launch_command_parser()._actions} | set(vars(config))
    assert set(yaml.safe_load(path.read_text())) <= known


def paths_in(text: str) -> set[str]:
    return set(
        re.findall(r"(?:recipes|accelerate_configs|benchmarks|rookworld_trl)/[\w./-]+\.(?:py|yaml|png|md)", text)
    )


@pytest.mark.parametrize("path", [ROOT / "Makefile", *GRPO, *SFT, *ACCELERATE], ids=name)
def test_files_that_are_named_exist(path):
    missing = {each for each in paths_in(path.read_text()) if not (ROOT / each).exists()}
    assert not missing


def test_make_targets_expand():
    """A dry run of each target that the pages and continuous integration use."""
    for target in (
        "demo",
        "demo-long",
        "test",
        "test-fast",
        "lint",
        "bench",
        "data",
        "sft",
        "docs",
        "parity",
        "gpu",
        "container",
    ):
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
