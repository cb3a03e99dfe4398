"""Held-out evaluation: accuracy of both tasks, with intervals and paired comparisons; position suites; self-play."""

from rookworld_trl.evaluation.accuracy import MODES, Evaluation, Item, evaluate, score
from rookworld_trl.evaluation.comparison import Comparison, compare, compare_groups
from rookworld_trl.evaluation.ladder import ladder_table, run_ladder, run_llm_chess, standard_anchors
from rookworld_trl.evaluation.mate_in_one import read_puzzles, run_mate_in_one
from rookworld_trl.evaluation.metrics import HEADLINES, METRICS
from rookworld_trl.evaluation.selfplay import run_selfplay
from rookworld_trl.evaluation.sts import read_sts, run_sts
from rookworld_trl.evaluation.suite import SuiteItem, SuiteResult, suite_table
from rookworld_trl.evaluation.tables import comparison_table, evaluation_table

__all__ = [
    "HEADLINES",
    "METRICS",
    "MODES",
    "Comparison",
    "Evaluation",
    "Item",
    "SuiteItem",
    "SuiteResult",
    "compare",
    "compare_groups",
    "comparison_table",
    "evaluate",
    "evaluation_table",
    "ladder_table",
    "read_puzzles",
    "read_sts",
    "run_ladder",
    "run_llm_chess",
    "run_mate_in_one",
    "run_selfplay",
    "run_sts",
    "score",
    "standard_anchors",
    "suite_table",
]
