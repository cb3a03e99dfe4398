"""Stages that end badly, for the test of what runs them."""

import os
import signal
import time
from pathlib import Path

from benchmarks.gpu.stage import Stage


def good(stage: Stage) -> str:
    stage.figures["answer"] = 42
    stage.check("small", 1.0, 2.0)
    return "found it"


def broken(stage: Stage) -> str:
    stage.check("small", 3.0, 2.0)
    return "three"


def raises(stage: Stage) -> str:
    raise ValueError("no such thing")


def impossible(stage: Stage) -> str:
    stage.needs(False, "nothing to do it with")
    return ""


def dies(stage: Stage) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def hangs(stage: Stage) -> str:
    child = os.fork()
    if child:
        Path(stage.root, "child").write_text(str(child))
    time.sleep(3600)
    return ""
