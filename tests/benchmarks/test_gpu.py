"""`make gpu` without a GPU: every stage's own code at tiny sizes, what runs them, and that their checks can fail."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import checks, program, speed
from benchmarks.gpu.stage import Stage, peak_flops
from rookworld_trl.modeling import rollout as sampling
from rookworld_trl.modeling.gpt2 import GPT2

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = {"paged_adamw", "second_card", "vllm"}
FACTS = {"name": "a card", "count": 1, "driver": "1.2", "code": "abc", "tiny": True}


def tiny(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(tmp_path), *more]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    done = tiny(tmp_path, "--minutes", "600")
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in program.STAGES}
    shown = {name: f"{result['status']}: {result['found']}" for name, result in results.items()}
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in program.STAGES}
    for name, result in results.items():
        expected = "not possible on this device" if name in NEEDS_A_GPU else "ok"
        assert result["status"] == expected, f"{name}: {shown[name]}\n{logs[name]}"
        assert result["figures"] or name in NEEDS_A_GPU
        assert {"torch", "trl", "python"} <= set(result["versions"])
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in program.STAGES)
    # What is done is not done again; what a stage left behind is there for the next one.
    again = tiny(tmp_path, "--minutes", "600")
    run = {line.split(":")[0] for line in again.stdout.splitlines() if line.split(":")[0] in program.STAGES}
    assert (again.returncode, run) == (0, NEEDS_A_GPU)


# Stages that end well and badly, for the test of what runs them


def good(stage: Stage) -> str:
    stage.figures["answer"] = 42
    stage.check("small", 1.0, 2.0)
    return "found it"


def broken(stage: Stage) -> str:
    stage.check("small", 3.0, 2.0)
    return "three"


def raises(stage: Stage) -> str:
    raise ValueError("no such thing")


def dies(stage: Stage) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(stage: Stage) -> None:
    child = os.fork()
    if child:
        Path(stage.root, "child").write_text(str(child))
    time.sleep(3600)


ENDS = {"good": "ok", "broken": "failed", "raises": "failed", "dies": "crashed", "hangs": "timed out"}


def alive(process: int) -> bool:
    """Whether a process runs; one that is dead and waits for its parent does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_a_stage_that_ends_badly_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own. Only good results of this code and device stand."""
    program.CONTEXT.set_forkserver_preload(["benchmarks.gpu.stage"])
    options = program.Options("cpu", True, tmp_path, 1.0, FACTS)
    for name in ENDS:
        monkeypatch.setitem(program.STAGES, name, (__name__, 60))
    ends = {name: program.run(name, options, 20 if name == "hangs" else 120) for name in ENDS}
    assert {name: end["status"] for name, end in ends.items()} == ENDS
    assert ends["good"]["figures"] == {"answer": 42}
    assert ends["broken"]["found"] == "does not hold: small (three)"
    assert ends["raises"]["found"] == "ValueError: no such thing"
    assert "Traceback" in (tmp_path / "raises.log").read_text()
    child = int((tmp_path / "work" / "child").read_text())
    deadline = time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child), "what a hanging stage has started goes with it"
    assert {name for name, end in ends.items() if program.is_done(end, FACTS)} == {"good"}
    for other in ({"code": "def"}, {"driver": "1.3"}, {"name": "another card"}, {"tiny": False}):
        assert not program.is_done(ends["good"], FACTS | other)
    assert not program.is_done(None, FACTS)
    assert "| good | ok (other code or device) |" in program.table(ends, FACTS | {"code": "def"})


def test_a_call_that_would_last_too_long_leaves_stages_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    assert program.main(["--device", "cpu", "--tiny", "--minutes", "1", "--output", str(tmp_path)]) == program.LEFT
    assert "card: might not end within 1 minutes" in capsys.readouterr().out
    assert "| card | not run |" in (tmp_path / "table.md").read_text()


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(["--only", "card,cards"])
    assert end.value.code == 2
    assert "there is no stage cards; there are card, " in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=r"`--device` is cuda: .*Give --device cpu --tiny"):
            program.device_facts("cuda")


@pytest.mark.slow
def test_what_a_second_card_is_asked_runs_without_one(tmp_path: Path) -> None:
    """The stage itself needs two; its models by name are trained here, each on the one device."""
    stage = Stage("second_card", "cpu", True, tmp_path)
    speed.by_name(stage)
    assert {tuple(each["devices"]) for each in stage.figures.values()} == {("cpu", "cpu")}
    assert held(stage) == set(stage.checks)


# The checks can fail


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("stage", "cpu", True, tmp_path)


def held(stage: Stage) -> set[str]:
    return {what for what, check in stage.checks.items() if check["held"]}


def test_nan_and_too_much_do_not_hold(stage: Stage) -> None:
    for what, *values in (("a", 1.0, 1.0), ("b", 1.1, 1.0), ("c", math.nan, 1.0), ("d", True), ("e", False)):
        stage.check(what, *values)
    assert held(stage) == {"a", "d"}


@pytest.mark.slow
def test_a_head_in_bf16_is_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.head(stage)
    assert held(stage) == set(stage.checks)
    monkeypatch.setattr(GPT2, "logits", lambda self, hidden: F.linear(hidden, self.wte))
    checks.head(stage)
    assert not held(stage) & {"logits are float32", "packed and exact, of the largest logit"}
    trl = "TRL's head and exact, of the largest logit"
    assert trl in held(stage)
    monkeypatch.setattr(checks, "trl_built_here", nullcontext)
    checks.head(stage)
    assert trl not in held(stage)


def test_impossible_draws_and_falling_sums_are_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.draws(stage)
    assert held(stage) == set(stage.checks)

    def parallel(log_probs: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """Sums as a scan in blocks might give them: off by an ulp to either side."""
        sums = log_probs.exp().cumsum(-1)
        down = torch.arange(sums.shape[-1]) % 2 == 1  # the last token that is possible among them
        return sums.where(~down, sums.nextafter(torch.zeros(())))

    monkeypatch.setattr(sampling, "cumulative_probs", parallel)
    checks.draws(stage)
    assert held(stage) == set()


def test_a_peak_belongs_to_the_whole_name_of_a_card() -> None:
    assert peak_flops("NVIDIA GeForce RTX 4090", mixed=True) == 165.2e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", mixed=False) == 19.5e12
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 NVL"):
        assert peak_flops(other, mixed=True) is None
