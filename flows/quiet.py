"""What other libraries print of their own accord, kept out of a run's output."""

from __future__ import annotations

import logging

from transformers.utils.logging import disable_progress_bar

from crosscal.errors import CrosscalError
from crosscal.models.loading import without_bars

PREFECT = ("prefect", "prefect.flow_runs", "prefect.task_runs")


def quiet_libraries() -> None:
    """No bar for every model that transformers loads; no traceback in Prefect's log for an error with a remedy."""
    disable_progress_bar()
    without_bars()
    for name in PREFECT:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(without_expected_traceback)


def without_expected_traceback(record: logging.LogRecord) -> bool:
    """Lets every record pass; drops the traceback of a `CrosscalError`, whose message says all there is to do."""
    if record.exc_info and isinstance(record.exc_info[1], CrosscalError):
        record.exc_info = record.exc_text = None
    return True
