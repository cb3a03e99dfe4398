"""The table of switches: which combinations there are, two of them really measured, and that it goes on."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import switches

TINY = ["--prompts", "4", "--samples", "2", "--tokens", "4", "--steps", "1", "--micro_batch", "8"]
ROW = {"seconds_per_step": 1.5, "memory_gb": 2.0, "first_step": {"step_time": 9.0}}


def test_each_switch_is_turned_where_it_can_be() -> None:
    found = switches.combinations()
    assert len(found) == 12
    for name in switches.SWITCHES:
        assert {settings[name] for settings in found.values()} == {True, False}
    assert found["none"] == dict.fromkeys(switches.SWITCHES, False)
    assert "share_prefixes + torch_compile + bf16" in found


@pytest.mark.slow
def test_a_compiled_combination_is_compiled_as_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switches.as_launched()["ACCELERATE_DYNAMO_USE_DYNAMIC"] == "True"
    for name, value in (switches.as_launched() | {"ACCELERATE_DYNAMO_BACKEND": "eager"}).items():
        monkeypatch.setenv(name, value)
    larger = [*TINY, "--samples", "4", "--tokens", "60"]  # so that some are whole, and rewards differ
    switches.main([*larger, "--one", "share_prefixes + torch_compile"])
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < row["graphs"] <= 4
    assert row["seconds_per_step"] > 0
    assert row["memory_gb"] > 0.1
    switches.main([*larger, "--one", "share_prefixes"])  # not compiled, whatever the launcher says
    eager = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert "graphs" not in eager
    assert eager["first_step"]["grad_norm"] > 0.01
    for name in ("loss", "grad_norm"):
        assert row["first_step"][name] == pytest.approx(eager["first_step"][name], rel=1e-3, abs=1e-6)


def test_speeds_are_multiples_of_the_plain_one() -> None:
    others = {"none": ROW, "share_prefixes + bf16": ROW | {"seconds_per_step": 0.5, "graphs": 3}}
    rows = switches.table(others).splitlines()[2:]
    assert rows == ["| on |  |  | on | 0.5 | 3.00 | 9 | 2.00 | 3 |", "|  |  |  |  | 1.5 | 1.00 | 9 | 2.00 |  |"]
    assert switches.table({"bf16": ROW}).splitlines()[2] == "|  |  |  | on | 1.5 |  | 9 | 2.00 |  |"


def test_it_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        if len(measured) == 5:
            raise subprocess.CalledProcessError(1, command)
        measured.append(command[-1])
        return SimpleNamespace(stdout=f"a line\n{json.dumps(ROW)}\n")

    monkeypatch.setattr(switches, "subprocess", SimpleNamespace(run=run, PIPE=-1))  # `platform` runs programs too
    command = [*TINY, "--output", str(tmp_path / "switches.json")]
    with pytest.raises(subprocess.CalledProcessError):
        switches.main(command)
    first, measured[:] = list(measured), []
    with pytest.raises(subprocess.CalledProcessError):
        switches.main(command)
    second, measured[:] = list(measured), []
    switches.main(command)
    assert [*first, *second, *measured] == list(switches.combinations())
    assert len(capsys.readouterr().out.split("| s a step |")[1].splitlines()) == 14
    measured[:] = []
    with pytest.raises(subprocess.CalledProcessError):
        switches.main([*command, "--steps", "2"])
    assert measured == first, "figures of other sizes do not stand beside these"
    measured[:] = []
    switches.main([*command, "--steps", "2", "--only", "bf16", "none"])
    assert measured == ["bf16"], "the others are there already"
