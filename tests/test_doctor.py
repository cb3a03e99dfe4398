"""The tables in `docs/doctor.md` are what `rookworld-doctor` prints for the commands above them."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from rookworld_trl import doctor
from rookworld_trl.modeling.loading import NANO_FOLDER
from tests.support.documents import ROOT, blocks

PAGE = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(code.replace("\\\n", " "))[1:] for code in blocks(PAGE, "bash")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the prompts that the page speaks of."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "runs" / "demo").mkdir(parents=True)
    (folder / "runs" / "demo" / "checkpoint").symlink_to(NANO_FOLDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(blocks(PAGE, "python")[0], {})
    return folder


def masked(text: str) -> str:
    """The table without the numbers that rounding moves and the widths that they take."""
    return re.sub(r"[ -]+", " ", re.sub(r"\d\.?\d*(?:e-\d+)?(?= nats)", "N", text)).strip()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(0, 1), (1, 0)], ids=["stock", "with the hook"])
def test_the_pages_tables_are_what_the_command_prints(
    number: int, code: int, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert doctor.main(COMMANDS[number]) == code
    printed, committed = capsys.readouterr().out, blocks(PAGE, "text")[number]
    assert masked(printed) == masked(committed)
    found = [float(text.split()[1]) for text in (printed, committed) for text in re.findall(r"^padding .*", text, re.M)]
    assert min(found) > 1 if code else max(found) < 1e-4


@pytest.mark.slow
def test_a_model_without_a_cache_is_named(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    model = shutil.copytree(NANO_FOLDER, tmp_path / "model")
    settings = ["--model", str(model), "--dataset", "prompts.jsonl", "--max_completion_length", "4"]
    settings += ["--num_generations", "2", "--per_device_train_batch_size", "2", "--use_cpu", "true", "--bf16", "false"]
    said = []
    for cached in ("true", "false"):
        for file in ("config.json", "generation_config.json"):
            text = (model / file).read_text()
            (model / file).write_text(re.sub('"use_cache": [a-z]+', f'"use_cache": {cached}', text))
        doctor.main(settings)
        said.append("`use_cache: false`" in capsys.readouterr().out)
    assert said == [False, True]
