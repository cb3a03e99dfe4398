"""Real and false engines: `@requires_stockfish` skips a test where there is no Stockfish, unless CI=true."""

import os
import stat
import sys
from pathlib import Path

import pytest

from rookworld_trl.chess.engine import find_engine


def _installed() -> bool:
    try:
        find_engine()
    except FileNotFoundError:
        return False
    return True


requires_stockfish = pytest.mark.skipif(
    not _installed() and os.environ.get("CI") != "true",
    reason="needs Stockfish: apt-get install stockfish, or set STOCKFISH_PATH",
)


def fake_engine(path: Path, on_go: str) -> str:
    """A UCI engine in a few lines of Python that answers `go` as told; `position` is the last line of that kind."""
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time\n"
        "for line in sys.stdin:\n"
        "    word = line.split()[0] if line.split() else ''\n"
        "    if word == 'uci': print('id name Fake\\noption name Hash type spin default 1 min 1 max 99', flush=True)\n"
        "    if word == 'uci': print('option name Threads type spin default 1 min 1 max 9', flush=True)\n"
        "    if word == 'uci': print('option name MultiPV type spin default 1 min 1 max 500\\nuciok', flush=True)\n"
        "    if word == 'isready': print('readyok', flush=True)\n"
        "    if word == 'position': position = line.strip()\n"
        "    if word == 'quit': break\n"
        f"    if word == 'go':\n        {on_go}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
