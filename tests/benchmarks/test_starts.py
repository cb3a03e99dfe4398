"""Starts of different length: losses against transformers' own, lines by hand, results that stay apart."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import shipped
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import starts, store
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.modeling.loading import NANO_FOLDER, load


def test_losses_are_nats_a_token_of_right_answers() -> None:
    """Against transformers' own loss, one row at a time, weighted by tokens."""
    model, tokenizer = load("nano")
    rows = list(draw_of_each(shipped("dev"), {"policy": 4, "environment": 3}))
    sums: dict[str, list[float]] = {}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            nats = float(model.eval()(input_ids=torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
        for name in (row["task"], "all"):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + nats, total[1] + len(answer)
    expected = {name: nats / tokens for name, (nats, tokens) in sums.items()}
    assert starts.losses(model, tokenizer, rows) == pytest.approx(expected, rel=1e-4)


def test_a_law_by_hand() -> None:
    """On a line of slope -2 every start lies where the others say; one that is 0.3 above breaks it; so does noise."""
    x = np.array([0.0, 1.0, 2.0, 3.0])
    line = np.tile(5 - 2 * x, (1000, 1)) + np.random.default_rng(0).normal(0, 0.01, (1000, 4))
    found = starts.fit(x, line)
    assert found["slope"] == pytest.approx(-2, abs=0.01)
    assert found["holds"]
    assert [error["mean"] for error in found["above_the_others"]] == pytest.approx([0] * 4, abs=0.01)
    bent = starts.fit(x, line + np.array([0, 0.3, 0, 0]))
    # The line through (0, 5), (2, 1), (3, -1) is 5 - 2x, at 1 it is 3, and the start has 3.3.
    assert bent["above_the_others"][1]["mean"] == pytest.approx(0.3, abs=0.01)
    assert not bent["holds"]
    assert not starts.fit(x[:2], line[:, :2])["holds"]  # any two points have a line
    flat = starts.fit(x, np.random.default_rng(1).normal(0, 1, (1000, 4)))
    assert flat["ci_low"] < 0 < flat["ci_high"]
    assert not flat["holds"]


def test_steps_to_an_aim_by_hand() -> None:
    """0.8, 0.9 and 0.95 after 100, 400 and 1,600 steps: what is missing is 2 / sqrt(steps), 0.02 at 10,000."""
    steps = np.array([100.0, 400.0, 1600.0])
    drawn = np.array([[0.8, 0.9, 0.95], [0.8, 0.8, 0.8], [0.9, 0.8, 0.7]])
    assert starts.steps_to(0.98, steps, drawn) == pytest.approx([10_000, np.inf, np.inf])


def made_up(legal: float, seed: int) -> store.Result:
    """A run of 200 `P:` and 200 `A:` items, whose headlines are all `legal`."""
    terms, keys = {}, [str(i) for i in range(200)]
    for task in ("policy", "environment"):
        names = [metric.name for metric in store.metrics_of(task)]
        for mode in ("greedy", "sampled"):
            top = np.repeat((np.arange(200) < 200 * legal)[:, None], len(names), axis=1).astype(float)
            terms[task, mode] = (top, np.ones_like(top))
    facts = {"seed": seed, "steps": 70, "trivial": {}, "start": "w"}
    return store.Result(facts, dict.fromkeys(store.SHOWN, keys), dict.fromkeys(store.SHOWN, [""] * 200), terms)


def test_a_table_of_made_up_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Before .1 .3 .7, after RL .2 .4 .8, at losses 4 3 1, which is on a line: two seeds each, differences by hand."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    (tmp_path / "starts").mkdir()
    known = {}
    for steps, loss, before, after in ((1000, 3.0, 0.3, 0.4), (200, 4.0, 0.1, 0.2), (4000, 1.0, 0.7, 0.8)):
        known[str(steps)] = {"steps": steps, "weights": "w", "policy": loss, "environment": loss, "all": loss}
        store.save("dev", store.name_of("base", 0.0, 0, start=str(steps)), made_up(before, 0))
        for seed in (1, 2):
            store.save("dev", store.name_of("exact", 3.0, seed, start=str(steps)), made_up(after, seed))
    known["9000"] = known["4000"] | {"steps": 9000}  # whose run is still to come
    (tmp_path / "starts" / "losses.json").write_text(json.dumps(known))
    starts.main(["table"])
    report = json.loads((tmp_path / "starts.json").read_text())
    assert [start["steps"] for start in report["starts"]] == [200, 1000, 4000]
    exact = [start["exact, greedy"] for start in report["starts"]]
    assert [each["gain"]["mean"] for each in exact] == pytest.approx([0.1, 0.1, 0.1], abs=0.005)
    assert [each["rl_minus_next"]["mean"] for each in exact[:2]] == pytest.approx([-0.1, -0.3], abs=0.005)
    shown = capsys.readouterr().out.splitlines()
    assert shown[3].startswith("| legality | 1,000 | 3.000 | 0.3")
    assert "| **−0.3" in shown[3]
    assert shown[4].endswith("] | |")
    assert [line.split(" | ")[0] for line in shown[-3:]] == ["| legality", "| skill", "| exactness"]
    starts.main(["reach"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("legality: 0.70")
    assert shown[0].endswith(" after 4,000 steps, 0.98 takes")
    assert shown[1].endswith(" by the starts from 200 steps on")
    monkeypatch.setattr(starts, "losses", lambda *_: {"policy": 2.0, "environment": 9.0, "all": 3.0})
    starts.main(["predict", "--model", "nano"])
    legal, *_, exact = capsys.readouterr().out.splitlines()
    assert legal.startswith("best_legal, greedy: 0.")
    assert legal.endswith("at a loss of 2.0000")
    assert float(legal.split()[2]) == pytest.approx(0.6, abs=0.005)
    assert exact.endswith("at a loss of 9.0000 (outside the losses that were measured)")
    monkeypatch.setattr(starts, "fit", lambda x, drawn: {"holds": False})
    starts.main(["predict", "--model", "nano"])
    assert capsys.readouterr().out.splitlines()[0] == "best_legal, greedy: the loss before does not say it"
    (line,) = (
        each for each in report["fits"] if (each["metric"], each["mode"], each["of"]) == ("exact", "greedy", "after")
    )
    assert line["slope"] == pytest.approx(-0.2, abs=0.005)
    assert line["holds"]


def test_a_start_has_files_and_losses_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base alone: results of another start lie under starts/, are not made again, and not taken for others."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    words = ["run", "--policy-items", "4", "--environment-items", "2", "--seeds", "1"]
    monkeypatch.setattr(starts, "ARM", "base")
    starts.main([*words, "--starts", f"7={NANO_FOLDER}"])
    assert store.names("dev", "7") == ["7/base-0min-seed0"]
    assert store.names("dev") == []
    assert json.loads((tmp_path / "starts" / "losses.json").read_text())["7"]["steps"] == 7
    capsys.readouterr()
    starts.main([*words, "--starts", f"7={NANO_FOLDER}"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(evidence, "weights_of", lambda folder: "others")
    with pytest.raises(SystemExit, match="other weights"):
        starts.main([*words, "--starts", f"7={NANO_FOLDER}"])
    asked = {"arms": [], "minutes": [], "seeds": [], "split": "dev", "start": str(NANO_FOLDER), "start_name": "7"}
    asked |= {"size": "nano", "device": None}
    with pytest.raises(SystemExit, match="other weights"):
        evidence.run(argparse.Namespace(**asked, updates=None, policy_items=4, environment_items=2))


@pytest.mark.parametrize("start", ["7", "x=/", "7=/nowhere"])
def test_a_start_needs_its_steps_and_a_folder(start: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        starts.main(["run", "--starts", start])
    assert "give STEPS=FOLDER" in capsys.readouterr().err
