"""Reports of training runs, made from their files alone."""

from rookworld_trl.reports.summary import timed, write_for_people

__all__ = ["timed", "write_for_people"]
