"""A dozen steps of rookworld-nano with every control on and two faults: interrupted in the middle, it ends the same."""

from pathlib import Path

import pytest

from tests.support.checkpoint_diff import differences
from tests.support.golden_run import VARIANTS, main


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    variant = "controls"
    first, last = (f"checkpoint-{VARIANTS[variant][name]}" for name in ("save_steps", "max_steps"))
    main(variant, str(tmp_path / "whole"))
    main(variant, str(tmp_path / "resumed"), str(tmp_path / "whole" / first))
    assert differences(tmp_path / "whole" / last, tmp_path / "resumed" / last) == []
    assert (tmp_path / "whole" / "recovery.jsonl").read_text(encoding="utf-8").count("\n") == len(
        VARIANTS[variant]["faults"]
    )
