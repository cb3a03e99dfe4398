"""Every command of the README, the pages and the heads of the YAML files runs as it is written: with the recipe and
the launch file as they are, and only sizes and steps reduced.

A new command is found by itself. What cannot run here stands in `NOT_HERE` by name with its reason; of these, the words
are checked as their programs take them, and the recipe is parsed whole.
"""

import importlib
import io
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import chess
import pyarrow as pa
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from datasets import Dataset

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO_FOLDER
from tests.support.builders import character_tokenizer, random_gpt2
from tests.support.documents import ROOT, documented
from tests.test_docs import run_or_parse

DOCUMENTED = documented()
PLACEHOLDERS = {"RANK": "0", "FIRST_MACHINE": "127.0.0.1"}  # of multi_node.yaml

# By the beginning of a command, the longest counts; each must name one that is documented.
NOT_HERE = {
    "make": "what it starts of the programs is listed by itself and runs; the rest runs tests, builds or measures",
    "pip install": "needs the network",
    "git clone": "needs the network",
    "apt-get install": "needs the network and root",
    ". .venv/bin/activate": "changes the shell",
    ". .venv-vllm/bin/activate": "changes the shell",
    "export": "changes the shell",
    "CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve": "needs vLLM and a GPU; make test-vllm runs a server",
    "CUDA_VISIBLE_DEVICES=0 accelerate launch": "needs that server",
    "accelerate launch --config_file accelerate_configs/rtx4090.yaml recipes/grpo.py "
    "--config recipes/rookworld-lm-124m/grpo/config_vllm_colocate.yaml": "needs vLLM; make test-vllm runs it",
    "accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml": "needs DeepSpeed, which needs CUDA",
    "lm_eval": "another program; tests/benchmarks/test_lm_eval.py runs its task",
    "xvfb-run": "another program",
    "fastchess": "another program",
    "docker": "another program",
    "sbatch": "a cluster's",
    "python recipes/grpo.py --from": "tests/plugins/test_origin.py runs it, with a run to begin from",
    "python -m": "measures for minutes to hours; what it measures is tested in small",
    "rookworld-doctor": "tests/test_doctor.py runs it at full size, and compares what it prints",
    "python recipes/generate_data.py dataset": "needs thousands of positions; test_shipping.py builds from few",
    "python recipes/grpo.py --help": "prints what tests/test_docs.py compares",
    "accelerate launch --config_file accelerate_configs/cpu.yaml recipes/grpo.py --config "
    "recipes/nano/grpo/config_cpu_selfplay.yaml": "20,000 nodes a move; tests/recipes/test_recipes_run.py plays few",
}
USERS_WAY = "tests/recipes/test_users_way.py runs it by its launch file, with a model that writes decisions"
OWN = "takes the rows of the commands above it; tests/training/test_settings.py reads such a folder"
MIXED = "recipes/rookworld-lm-124m/grpo/config_mixed.yaml"
HUB = "the rows are on the Hub; tests/recipes/test_rookworld.py runs it on rows of their kind"


def reason(command: str) -> str | None:
    """Why it does not run here."""
    if "config_rookworld_7m" in command or "verify/epochs" in command:
        return HUB
    if "124m/grpo/config_exact" in command or command.endswith("rtx4090.yaml recipes/grpo.py --config " + MIXED):
        return USERS_WAY
    if command.endswith("config_cpu_own_data.yaml"):
        return OWN
    known = [name for name in NOT_HERE if command == name or command.startswith(f"{name} ")]
    return NOT_HERE[max(known, key=len)] if known else None


RUN = [command for command in DOCUMENTED if reason(command) is None]

# Sizes and steps, and names of models in place of RookWorld-LM; no other setting.
GRPO = {"max_steps": 2, "gradient_accumulation_steps": 1, "eval_policy_items": 4, "eval_environment_items": 2}
LARGE = {"expected_parameters": "null", "max_completion_length": 12, "eval_steps": 1, "save_steps": 1}
SMALL: dict[str, list[str]] = {
    "recipes/evaluate.py": ["--limit", "2", "--games", "2", "--max_new_tokens", "40"],
    "recipes/generate_data.py": ["--shards", "1", "--games_per_shard", "1", "--nodes", "20", "--workers", "1"],
    "recipes/report.py": [],
}


def rows(recipe: str) -> int:
    """Two completions of as few prompts as the shares of tasks and strata make whole numbers of."""
    few = {"overfit": 8, "exact": 16, "long": 16, "verify": 16, "curriculum": 20, "mining": 20}
    return next((count for name, count in few.items() if name in recipe), 10)


def reduced(script: str, words: list[str]) -> list[str]:
    """The program's words with small sizes behind them, which count."""
    if script == "recipes/sft.py":
        few = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "n_layer": 2, "n_embd": 32, "n_head": 2}
        few |= {"per_device_train_batch_size": 4}
    elif script == "recipes/grpo.py":
        text = " ".join(words)
        few = {**GRPO, "num_generations": 2, "per_device_train_batch_size": rows(text)}
        if "recipes/rookworld-lm-124m" in text:
            few |= LARGE
    else:
        return [*words, *SMALL[script]]
    return [*words, *(word for name, value in few.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the names that the pages use stand for something small."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "accelerate_configs", "benchmarks", "tests", "rookworld_trl"):
        (folder / name).symlink_to(ROOT / name)
    tiny = folder / "tiny"
    random_gpt2(n_positions=320).save_pretrained(tiny)
    character_tokenizer().save_pretrained(tiny)
    models = dict.fromkeys(("runs/demo/checkpoint", "runs/mine/checkpoint", "runs/nano-sft"), NANO_FOLDER)
    for name in ("jrahn/RookWorld-LM-124M", "runs/rookworld-lm-124m-sft", "runs/random-124m"):
        models[name] = tiny
    for name, target in models.items():
        shutil.copytree(target, folder / name)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        files(folder)
        program(
            "recipes/generate_data.py", "positions --output data/positions --shards 4 --games_per_shard 2 --nodes 20"
        )
        suites = "--suite held_out tactics mate_in_one ladder --dataset STS1-STS15_LAN_v8.epd"
        program("recipes/evaluate.py", f"{suites} --limit 2 --games 2 --max_new_tokens 40 --output runs/before.json")
        shutil.copy("runs/before.json", "before.json")
        short = "--max_steps 1 --eval_policy_items 4 --eval_environment_items 2 --output_dir runs/demo"
        program("recipes/grpo.py", f"--config recipes/nano/grpo/config_cpu.yaml {short} {GROUPS}")
        shutil.copytree("runs/demo", "runs/mine", dirs_exist_ok=True)
    return folder


GROUPS = "--num_generations 2 --per_device_train_batch_size 10 --gradient_accumulation_steps 1"


def files(folder: Path) -> None:
    """Games, openings, problems and rows of the names that the pages use."""
    dice = random.Random(1)
    games = []
    for _ in range(6):
        board, moves = chess.Board(), []
        while len(moves) < 40 and not board.is_game_over():
            move = dice.choice(sorted(board.legal_moves, key=str))
            moves.append(board.san(move))
            board.push(move)
        games.append(f'[Event "Random"]\n\n{" ".join(moves)} *\n')
    (folder / "games.pgn").write_text("\n".join(games))
    (folder / "openings.tsv").write_text("eco\tname\tpgn\nA00\tGrob\t1. g4\nB00\tKing's pawn\t1. e4\n")
    sample = (ROOT / "tests" / "chess" / "sts_sample.epd").read_text()
    for name in ("STS1-STS15_LAN_v8.epd", "sts_v8.epd"):
        (folder / name).write_text(sample)
    puzzles = "PuzzleId,FEN,Moves,Rating\np1,6k1/5ppp/8/8/8/8/5PPP/RR4K1 b - - 0 1,h7h6 a1a8,1000\n"
    (folder / "lichess_db_puzzle.csv.zst").write_bytes(pa.compress(puzzles.encode(), "zstd", asbytes=True))
    rows = load_shipped("dev")
    some: Dataset = rows.filter(lambda row: row["task"] == "policy").select(range(4))
    some.select_columns(["prompt", "legal_moves", "legal_cp"]).to_json(folder / "mine.jsonl")
    board = chess.Board()
    Dataset.from_list([{"prompt": f"P: {board.fen()}"}]).to_parquet(folder / "train.parquet")


def program(script: str, words: str | list[str]) -> None:
    """Run one of the programs in this process."""
    words = shlex.split(words) if isinstance(words, str) else words
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    torch._dynamo.reset()
    try:
        module.main(words)
    except SystemExit as end:
        if end.code not in (0, None):
            raise AssertionError(f"{script} {shlex.join(words)} ended with {end.code}") from end


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workplace as the current folder, and the environment as it was afterwards."""
    monkeypatch.chdir(workplace)
    with patch.dict(os.environ):
        yield workplace


def test_what_is_not_run_is_documented_and_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    unused = {name for name in NOT_HERE if not any(each == name or each.startswith(f"{name} ") for each in DOCUMENTED)}
    assert unused <= {"export", "docker", "fastchess", "sbatch"}, "no command of the pages begins so"
    for command, places in DOCUMENTED.items():
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
        if file_of(command) == "multi_node":
            words += ["--num_generations", "8"]  # the batch is whole groups of 16 over its sixteen processes alone
        try:
            run_or_parse(words, monkeypatch)
        except (SystemExit, KeyError, ValueError, AssertionError) as error:
            raise AssertionError(f"{places[0]}: {command}: {error!r}") from error


def test_every_launch_file_is_shown_in_use() -> None:
    for file in sorted(ROOT.glob("accelerate_configs/*.yaml")):
        assert [each for each, places in DOCUMENTED.items() if f"accelerate_configs/{file.name}" in places], file


# What a run of all tests has no time for: `make test-long`. A word of the command names it. The last ones are, with
# their sizes reduced, what other commands or tests run: test_verify.py has the components.
LONG = ("multi_gpu", "multi_node", "fsdp2", "rtx4090_x2", "lm-124m-sft", "config_environment", "ladder")
LONG += ("config_lora", "config_mining", "random_weights", "overfit", "--max_train_minutes", "--alert", "runs/mine")
LONG += ("--shards 1300", "--shards 160", "--shards 460", "config_cpu_long.yaml --auto_resume", "verify/components")
LONG += (
    "accelerate_configs/cpu.yaml recipes/grpo.py --config recipes/nano/grpo/config_cpu.yaml",
    "checkpoint nano --games",
)


def marked(commands: list[str]) -> list[Any]:
    """The commands as a test's cases; `slow` by the test, those above `long`."""
    return [
        pytest.param(each, marks=pytest.mark.long if any(word in each for word in LONG) else ()) for each in commands
    ]


LAUNCHED = [command for command in RUN if command.startswith("accelerate launch")]
SEVERAL = ("cpu_x2", "multi_gpu", "fsdp2", "multi_node")


def file_of(command: str) -> str:
    words = shlex.split(command)
    return Path(words[words.index("--config_file") + 1]).stem if "--config_file" in words else ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", marked([each for each in RUN if each not in LAUNCHED]))
def test_a_program_runs(command: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    monkeypatch.setattr(sys, "stdin", io.StringIO("uci\nquit\n"))
    if words[0] == "rookworld-uci":
        run_or_parse(words, monkeypatch)
        return
    assert words[0] == "python"
    elsewhere = {"recipes/grpo.py": "--output_dir", "recipes/generate_data.py": "--output"}
    more = [elsewhere[words[1]], str(tmp_path / "out")] if words[1] in elsewhere else []
    program(words[1], [*reduced(words[1], words[2:]), *more])


def launch(command: str, output: Path) -> tuple[list[str], list[str], str]:
    """What stands before the program, the program's words with small sizes, and the program."""
    words = shlex.split(command)
    place = next(number for number, word in enumerate(words) if word.startswith("recipes/"))
    script = words[place]
    own = [*reduced(script, words[place + 1 :]), "--output_dir", str(output)]
    if file_of(command) not in ("cpu", "fsdp2"):
        own += ["--use_cpu", "true"]  # the one setting that this machine adds
    return words[2:place], own, script


def check(output: Path, command: str) -> None:
    """Two steps were made, and in the way that the launch file says; a dry run leaves nothing behind."""
    if "--dry_run" in command:
        assert not output.exists()
        return
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    if not file_of(command).startswith("cpu") and file_of(command):
        assert "use_peft" in command or steps[0]["perf/compiled_graphs"] > 0, "the file says that it is compiled"
    if "config_mixed" in command and file_of(command) != "fsdp2":
        assert [row["step"] for row in rows if "eval_reward" in row] == [1, 2], "measured on the way"
        assert summary["best_step"] in (1, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", marked([each for each in LAUNCHED if file_of(each) not in SEVERAL]))
def test_a_launched_recipe_runs(command: str, here: Path, tmp_path: Path) -> None:
    """In this process, in the environment that accelerate's launcher makes of the file: its settings are real ones."""
    before, own, script = launch(command, tmp_path / "run")
    args = _validate_launch_command(launch_command_parser().parse_args([*before, script]))[0]
    os.environ |= prepare_simple_launcher_cmd_env(args)[1]
    program(script, own)
    if script == "recipes/grpo.py":
        check(tmp_path / "run", command)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", marked([each for each in LAUNCHED if file_of(each) in SEVERAL]))
def test_several_processes_run(command: str, here: Path, tmp_path: Path) -> None:
    """By `accelerate launch` itself, with two processes; two machines are two launches on this one."""
    before, own, script = launch(command, tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    before += ["--num_cpu_threads_per_process", "1", "--main_process_port", port]
    each = [before]
    if file_of(command) == "multi_node":
        places = [{**PLACEHOLDERS, "RANK": rank} for rank in "01"]
        each = [[*(known.get(word, word) for word in before), "--num_processes", "2"] for known in places]
    start = ["-m", "tests.support.sharded_on_cpu"] if file_of(command) == "fsdp2" else [script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    head = [sys.executable, "-m", "accelerate.commands.launch"]
    running = [
        subprocess.Popen([*head, *words, *start, *own], env=environment, stderr=subprocess.PIPE, text=True)
        for words in each
    ]
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[-3000:]
    check(tmp_path / "run", command)
