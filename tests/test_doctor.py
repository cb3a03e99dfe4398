"""The tables in `docs/doctor.md` are what `rookworld-doctor` prints for the commands above them."""

import re
import shlex
from pathlib import Path

import pytest

from rookworld_trl import doctor
from rookworld_trl.modeling.loading import NANO_FOLDER
from tests.support.documents import ROOT, blocks

PAGE = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(code.replace("\\\n", " "))[1:] for code in blocks(PAGE, "bash")]


def without_digits(text: str) -> str:
    """Numbers that rounding moves, and the widths that they take, left out."""
    return re.sub(r"[ -]+", " ", re.sub(r"\d\.?\d*(?:e-\d+)?(?= nats)", "N", text)).strip()


@pytest.mark.parametrize("number", [0, 1], ids=["stock", "with the hook"])
def test_the_pages_tables_are_what_the_command_prints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "checkpoint").symlink_to(NANO_FOLDER)
    monkeypatch.chdir(tmp_path)
    exec(blocks(PAGE, "python")[0], {})
    capsys.readouterr()
    assert doctor.main(COMMANDS[number]) == (1, 0)[number]
    printed, committed = capsys.readouterr().out, blocks(PAGE, "text")[number]
    assert without_digits(printed) == without_digits(committed)
    assert re.search(r"^padding +\d\.?\d* nats +0\.0001 +FAILS$", printed, flags=re.MULTILINE) if number == 0 else True
