"""Reports of training runs, made from their files alone."""

from rookworld_trl.reports.summary import timed
from rookworld_trl.reports.writing import write_results

__all__ = ["timed", "write_results"]
