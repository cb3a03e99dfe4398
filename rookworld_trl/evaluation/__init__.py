"""Held-out evaluation: accuracy of both tasks, with intervals and paired comparisons; problems; self-play; matches."""

from rookworld_trl.evaluation.accuracy import MODES, Evaluation, Item, evaluate, score
from rookworld_trl.evaluation.comparison import Comparison, compare, compare_groups, compare_suites
from rookworld_trl.evaluation.ladder import ladder_table, run_ladder, run_match, standard_anchors
from rookworld_trl.evaluation.metrics import HEADLINES, METRICS
from rookworld_trl.evaluation.problem_files import read_problems
from rookworld_trl.evaluation.problems import Problem, run_problems
from rookworld_trl.evaluation.selfplay import run_selfplay
from rookworld_trl.evaluation.suite import Ask, ModelAnswers, SuiteItem, SuiteResult
from rookworld_trl.evaluation.tables import comparison_table, evaluation_table, suite_table
from rookworld_trl.evaluation.watching import Watch

__all__ = [
    "HEADLINES",
    "METRICS",
    "MODES",
    "Ask",
    "Comparison",
    "Evaluation",
    "Item",
    "ModelAnswers",
    "Problem",
    "SuiteItem",
    "SuiteResult",
    "Watch",
    "compare",
    "compare_groups",
    "compare_suites",
    "comparison_table",
    "evaluate",
    "evaluation_table",
    "ladder_table",
    "read_problems",
    "run_ladder",
    "run_match",
    "run_problems",
    "run_selfplay",
    "score",
    "standard_anchors",
    "suite_table",
]
