"""Numbers and how far to trust them: metrics, intervals, comparisons, ratings, and their tables. Knows no chess."""

from rookworld_trl.measuring.comparison import Comparison, against, compare, compare_groups
from rookworld_trl.measuring.metrics import Metric, mean, ratio, share
from rookworld_trl.measuring.result import Item, Result, of, read_results, scored, write_results
from rookworld_trl.measuring.tables import comparison_table, overview, result_table

__all__ = [
    "Comparison",
    "Item",
    "Metric",
    "Result",
    "against",
    "compare",
    "compare_groups",
    "comparison_table",
    "mean",
    "of",
    "overview",
    "ratio",
    "read_results",
    "result_table",
    "scored",
    "share",
    "write_results",
]
