"""Keep unwanted output of other libraries out of a run's output."""

from __future__ import annotations

import logging

from transformers.utils.logging import disable_progress_bar

from crosscal.errors import CrosscalError
from crosscal.models.loading import without_bars

PREFECT = ("prefect", "prefect.flow_runs", "prefect.task_runs")


def quiet_libraries() -> None:
    """Disable transformers' loading bars, and tracebacks in Prefect's log for errors that have a remedy."""
    disable_progress_bar()
    without_bars()
    for name in PREFECT:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(without_expected_traceback)


def without_expected_traceback(record: logging.LogRecord) -> bool:
    """Log filter that passes every record, but drops the traceback of a `CrosscalError`: its message is enough."""
    if record.exc_info and isinstance(record.exc_info[1], CrosscalError):
        record.exc_info = record.exc_text = None
    return True
