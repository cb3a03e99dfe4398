"""Speed: every measure at a tiny size writes the file that the pages read, with the numbers that they quote."""

import json
from pathlib import Path

import pytest

from benchmarks import common, speed

SIZES = {
    "scoring": ["--rows", "40", "--repeats", "1"],
    "rollouts": ["--prompts", "2", "--samples", "2", "--repeats", "1"],
    "learning": ["--prompts", "2", "--samples", "2", "--repeats", "1"],
    "step": ["--prompts", "4", "--samples", "2", "--rounds", "1"],
    "exact": ["--prompts", "4", "--rounds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", speed.MEASURES)
def test_a_measure_writes_what_its_file_holds(name: str, tmp_path: Path) -> None:
    """Keys of the shipped file, that of the day when the tables were made."""
    speed.main([name, *SIZES[name], "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]
    made, known = (json.loads((folder / f"{name}.json").read_text()) for folder in (tmp_path, common.RESULTS))
    about_the_machine = {*common.machine("cpu"), "processor"}
    assert known.keys() - made.keys() <= about_the_machine
    seconds = made.get("seconds_per_step", {})
    assert all(0 < value < 60 for value in seconds.values())
    assert seconds.keys() == known.get("seconds_per_step", {}).keys()
    if name == "learning":
        assert all(row["relative_gradient_difference"] < 1e-4 for row in made["results"])
    if name in ("learning", "rollouts"):
        assert all(value > 0 for row in made["results"] for value in row["seconds"].values())
    if name == "scoring":
        assert made["results"].keys() == {key for key in known["results"] if "without" not in key}


def test_an_unknown_measure_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["speeed"])
    assert "nothing measures speeed; there are scoring, rollouts" in capsys.readouterr().err
