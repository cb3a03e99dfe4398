"""Memory over a run: what is in use, what is reserved, the peak of each phase of a step, and what glibc keeps of it."""

import ctypes
import resource
import sys

import psutil
import torch


def on_cuda() -> bool:
    """Whether this process has anything on a GPU; a run on the CPU of a machine with one has not."""
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


class Memory:
    """Peaks of a step's phases (rollout, scoring, learn) on a GPU, and the resident set of a process without one.

    A phase is all that happened since the one before it ended. The driver's own peak starts again with each phase, so
    the most of the whole run is kept here.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self.phases: dict[str, float] = {}

    def begin(self) -> None:
        """A step begins; what came before it (an evaluation, a checkpoint) belongs to none of its phases."""
        self.ended("before")
        self.phases = {}

    def ended(self, phase: str) -> None:
        """A phase is over; of one that comes several times in a step, the largest peak stands."""
        if on_cuda():
            peak = torch.cuda.max_memory_allocated() / 1e9
            self.most = max(self.most, peak)
            self.phases[phase] = max(self.phases.get(phase, 0.0), peak)
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> dict[str, float]:
        """Figures of the step that ends here, GB by name; `gb` is the most of the run."""
        if not on_cuda():
            return {"gb": most_resident_gb(), "rss_gb": psutil.Process().memory_info().rss / 1e9}
        self.ended("learn")
        peaks = {f"{phase}_gb": peak for phase, peak in self.phases.items()}
        allocated, reserved = torch.cuda.memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        return {"gb": self.most, "allocated_gb": allocated, "reserved_gb": reserved, **peaks}


def most_resident_gb() -> float:
    """Largest resident set of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_gb() -> float:
    """Most memory used so far, GB: of the GPU by tensors, or of this process where none are on a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if on_cuda() else most_resident_gb()


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving large blocks back to the system, on Linux; whether it does.

    A pass takes and frees hundreds of megabytes again and again. Fresh pages cost a CPU a fifth of a step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system or another C library
        return False
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all(mallopt(name, value) for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)))
