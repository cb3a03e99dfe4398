"""What the server imports that stages are forked from: what each would else do first, and nothing on a GPU."""

from benchmarks.common import shipped
from benchmarks.gpu import checks, learn, speed

__all__ = ["checks", "learn", "speed"]

for split in ("train", "test"):
    shipped(split)
