"""How a step is run: through Prefect inside a flow run, as a plain call otherwise. One pipeline, driven two ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from prefect import Task
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from crosscal.progress import Report, reporting, silent

P = ParamSpec("P")
R = TypeVar("R")


def step(task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a task. Without a flow run there is no server to tell, so the task's function is called as it is."""
    if FlowRunContext.get() is not None:
        return task(*args, **kwargs)
    return task.fn(*args, **kwargs)


@contextmanager
def step_report() -> Iterator[Report]:
    """Progress over the steps of a stage; a flow run shows them as its task runs already."""
    if FlowRunContext.get() is not None:
        yield silent
    else:
        with reporting() as report:
            yield report


@dataclass
class Stopwatch:
    """Seconds of each stage, in order; each is logged as it ends."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)
        log = get_run_logger() if FlowRunContext.get() is not None else logging.getLogger("crosscal")
        log.info("%s: %.1f s", name, self.seconds[name])
