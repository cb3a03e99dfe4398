"""What all arms of a comparison share: the model they start from, and what follows from its size."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT
from benchmarks.gpu.program import OUTPUT
from rookworld_trl.modeling.loading import NANO_FOLDER


@dataclass(frozen=True)
class Size:
    """One comparison's model and settings.

    Attributes:
        results: what stands before the names of its results; None: rookworld-nano's, which have none.
        folder: the checkpoint that every arm starts from.
        learning_rate: every arm's; what else was tried on dev is in `results/evidence/trials-3min.json`.
        tokens: of a completion, at most.
        pieces: that each forward and backward pass of the recipes and the loops is cut into, for lack of memory.
        device: cpu, whose seconds of work a budget counts, or cuda, where it counts the clock's.
    """

    results: str | None
    folder: Path
    learning_rate: float
    tokens: int
    pieces: int
    device: str

    @property
    def bf16(self) -> bool:
        """On a GPU that has it, as the recipes choose by themselves."""
        return self.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def autocast(self) -> torch.autocast:
        """The precision that an arm samples and scores in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


NANO = Size(None, NANO_FOLDER, 2e-4, 80, 1, "cpu")
SIZES = {
    "nano": NANO,
    # What the second half of `make gpu`'s supervised training leaves. A quarter of nano's rows a pass: with 50,257
    # tokens and twelve layers, 64 of them are too many for 24 GB.
    "124m": Size("124m", ROOT / OUTPUT / "work" / "sft_2", 1e-5, 144, 4, "cuda"),
}
