"""A new file is all that a new control needs: the example of docs/plugins.md, as it stands there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rookworld_trl import plugins
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOConfig
from tests.support.documents import blocks

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The page's first block, as a file beside the other plug-ins."""
    code, *_ = blocks(PAGE.read_text(encoding="utf-8"), "python")
    (tmp_path / "advantage_limit.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(plugins, "__path__", [*plugins.__path__, str(tmp_path)])
    (found,) = {each for each in plugins.offered() if each.__module__ == "rookworld_trl.plugins.advantage_limit"}
    return found


def test_its_settings_are_keys_and_its_refusals_are_heard(example: type, tmp_path: Path) -> None:
    classes = (RookWorldGRPOConfig, *plugins.offered())
    words = [f"--output_dir={tmp_path}", "--use_cpu=true", "--advantage_limit=0.5"]
    made = next(each for each in parse(classes, words) if isinstance(each, example))
    assert (made.advantage_limit, made.on, example().on) == (0.5, True, False)
    refused = [*words, "--objective=exact", "--scale_rewards=none"]
    with pytest.raises(ValueError, match=r"`advantage_limit` is 0.5: with `objective` .*\(command line\)"):
        parse(classes, refused, check=lambda args, *made: plugins.check(None, args, *made))
    with pytest.raises(ValueError, match=r"`advantage_limit` is -1.0: it must be a finite number of at least 0"):
        example(-1.0)


def test_it_acts_in_a_run(example: type, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(advantage_limit=0.25, max_steps=1)
    seen: list[torch.Tensor] = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, batch: seen.append(batch["advantages"]) or compute(model, batch)
    trainer.train()
    assert torch.cat(seen).abs().max() == 0.25
    assert 0 < trainer.state.log_history[0]["advantages/cut"] <= 1
    assert trainer.identity.fingerprint["advantage_limit"] == 0.25


def test_a_mapping_of_settings_is_parted(example: type) -> None:
    left, made = plugins.split({"beta": 0.1, "advantage_limit": 0.5})
    assert left == {"beta": 0.1}
    assert [each.advantage_limit for each in made if isinstance(each, example)] == [0.5]
    assert len(made) == len(plugins.offered())
