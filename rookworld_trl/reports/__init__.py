"""Reports of training runs, made from their files alone."""

from rookworld_trl.reports.results import write_results
from rookworld_trl.reports.summary import timed

__all__ = ["timed", "write_results"]
