"""The notebook runs from top to bottom, small, in a kernel of its own; what it shows comes out of it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.documents import ROOT

NOTEBOOK = ROOT / "notebooks" / "rookworld_grpo_cpu.ipynb"
SMALL = {"MAX_STEPS": 1, "MAX_MINUTES": 2.0, "PROMPTS": 10, "HELD_OUT": 12, "OWN_STEPS": 1}


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert set(SMALL) < set(re.findall(r"^(\w+) =", given.source, flags=re.MULTILINE))
    for name, value in SMALL.items():
        given.source = re.sub(rf"^{name} = \S+", f"{name} = {value}", given.source, flags=re.MULTILINE)
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    pages = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "12 held-out positions" in text
    assert "P: policy, greedy, 12 items" in text
    assert re.search(r"^(raise|lower) [+-]\d\.\d\d   ", text, flags=re.MULTILINE)
    assert re.search(r"step 1/1  captures [+-]\d\.\d{3}", text)
    assert pages.count("<svg") == 7
    assert sum("application/vnd.bokehjs_exec.v0+json" in output.get("data", {}) for output in outputs) == 2
