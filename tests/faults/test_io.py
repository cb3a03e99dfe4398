"""Full disks and folders that cannot be written: a clear outcome each, and whole files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rookworld_trl.checkpointing.stopping import UNRECOVERABLE
from rookworld_trl.checkpointing.store import newest_valid
from rookworld_trl.files import DiskError, append_line, write_atomically
from rookworld_trl.plugins.live import LiveReport, live_line
from rookworld_trl.reports.run import read_run
from tests.support.disk import files_end_at, full_disk
from tests.support.toy import make_trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("room", [0, 3, 9])
def test_a_line_is_whole_or_not_there(tmp_path: Path, room: int) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, '{"a": 1}')
    with files_end_at(path.stat().st_size + room), pytest.raises(OSError, match=r"large|part"):
        append_line(path, '{"b": 2, "c": 3}')
    assert path.read_text() == '{"a": 1}\n'
    append_line(path, '{"d": 4}')
    assert path.read_text() == '{"a": 1}\n{"d": 4}\n'


def test_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"b"')  # killed in the middle
    append_line(path, '{"c": 3}')
    append_line(path, '{"d": 4}')
    assert path.read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n{"d": 4}\n'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    write_atomically(path, "first")
    with files_end_at(3), pytest.raises(OSError, match="large"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
    write_atomically(path, "third")
    assert path.read_text() == "third"
    assert [each.name for each in path.parent.iterdir()] == ["state.json"]


def test_a_full_disk_costs_lines_of_the_log_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=3)
    report = LiveReport(tmp_path)
    report.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        state.global_step = step
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr("rookworld_trl.plugins.live.append_line", full_disk)
            report.on_log(None, state, None, logs={"kl": 0.1})  # type: ignore[arg-type]
    report.on_train_end(None, state, None)  # type: ignore[arg-type]
    assert [row["step"] for row in read_run(tmp_path).steps] == [1, 3]
    assert "No space left on device" in capsys.readouterr().out


def test_a_step_that_measured_nothing_still_prints() -> None:
    """TRL logs None for a metric whose values were all NaN."""
    assert live_line(3, 9, {"kl": None, "entropy": 0.5}) == "step 3/9  entropy 0.500"


def test_an_output_folder_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    """Below a file, which stops the superuser too; and on a disk that is full."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` is '.*file/run': .*Choose"):
        make_trainer(tmp_path / "file" / "run")
    with files_end_at(0), pytest.raises(ValueError, match=r"`output_dir` is .*Choose"):
        make_trainer(tmp_path / "run")


def test_a_full_temporary_folder_is_named_at_once(tmp_path: Path) -> None:
    """Room for the output folder's probe and the weights' config, but not for the weights."""
    found = r"the starting weights could not be written: .*set TMPDIR to one that has some"
    with files_end_at(9_000), pytest.raises(DiskError, match=found) as error:
        make_trainer(tmp_path / "run")
    assert error.value.exit_code == UNRECOVERABLE


PROGRAM = """
import sys
from pathlib import Path
from tests.support.toy import make_trainer
make_trainer(Path(sys.argv[1]), max_steps=1).train()
"""


@pytest.mark.slow
def test_caches_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "cache")
    caches = ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR")
    environment = {**os.environ, **dict.fromkeys(caches, nowhere), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
