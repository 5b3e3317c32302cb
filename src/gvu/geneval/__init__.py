"""GenEval and GenEval++: rule engines over detections, and the report with intervals."""

from gvu.geneval.report import Interval, Report, aggregate, paired_difference
from gvu.geneval.rules import Clause, Detection, Metadata, Rules, Verdict, judge
from gvu.geneval.rules_pp import judge_pp

__all__ = [
    "Clause",
    "Detection",
    "Interval",
    "Metadata",
    "Report",
    "Rules",
    "Verdict",
    "aggregate",
    "judge",
    "judge_pp",
    "paired_difference",
]
