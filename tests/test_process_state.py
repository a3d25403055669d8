"""Process-wide state is restored once the threads that changed it are done, however they interleave."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import matplotlib as mpl
import pytest

from crosscal.evaluation import harness
from crosscal.report.figure import drawing


def state() -> list[object]:
    import lm_eval.api.task as lm_eval_task

    return [logging.getLogger("lm_eval").level, lm_eval_task.tqdm, dict(mpl.rcParams), list(warnings.filters)]


@pytest.mark.parametrize("inside", [lambda: drawing("chart"), harness._quiet_lm_eval], ids=["drawing", "quiet"])
def test_nothing_is_left_changed(inside: Callable[[], AbstractContextManager[None]]) -> None:
    """The first thread leaves while the second is inside: if each restored what it found, a change would remain."""
    with inside():
        pass  # imports on first use set their own filters
    before = state()

    def enter(seconds: float) -> None:
        with inside():
            time.sleep(seconds)

    threads = [threading.Thread(target=enter, args=(seconds,)) for seconds in (0.1, 0.3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert state() == before
