"""The whole run in one typed file: what to read, how to calibrate, what to solve, what to measure, what to publish.

A plan is read from YAML and checked once, here; every default is written back by `dump_plan`. Relative paths are
relative to the plan file. `$domain` stands for a domain that is named when the plan is read.
"""

from crosscal.plan.domain import WORD
from crosscal.plan.files import dump_plan, load_plan, parse_plan, read_plan
from crosscal.plan.sections import (
    BEST,
    Calibration,
    Compress,
    CompressionPlan,
    Documents,
    Evaluate,
    Execution,
    Publish,
    RandomTokens,
    SelfGenerated,
)
from crosscal.plan.sources import Select
from crosscal.plan.study import Study
from crosscal.plan.tasks import ContinuationTask, FileTask, SummariesTask, Task, TextTask

__all__ = [
    "BEST",
    "WORD",
    "Calibration",
    "Compress",
    "CompressionPlan",
    "ContinuationTask",
    "Documents",
    "Evaluate",
    "Execution",
    "FileTask",
    "Publish",
    "RandomTokens",
    "Select",
    "SelfGenerated",
    "Study",
    "SummariesTask",
    "Task",
    "TextTask",
    "dump_plan",
    "load_plan",
    "parse_plan",
    "read_plan",
]
