"""The typed plan of a run: corpora, calibration, compression, evaluation, execution and publication.

`load_plan` reads YAML and validates it once; `dump_plan` writes the plan with every default. Relative paths are
relative to the plan file. `$domain` stands for a domain that is named when the plan is loaded.
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
from crosscal.plan.tasks import ContinuationTask, FileTask, SummariesTask, Task, TextTask, names_of

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
    "names_of",
    "parse_plan",
    "read_plan",
]
