"""Run steps: through Prefect inside a flow run, as plain calls otherwise. The pipeline is the same for both."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.task_runners import TaskRunner
from prefect.utilities.annotations import quote

from crosscal.flows.cluster import on_workers
from crosscal.lanes import each_side_by_side
from crosscal.progress import Report, each, logged, reporting
from crosscal.tasks.artifacts import progress_shown

P = ParamSpec("P")
R = TypeVar("R")


def step(task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a task. Outside a flow run there is no server to report to, so the task's plain function is called.

    Arguments are quoted: otherwise Prefect looks into them and records which step every part came from, and the graph
    of a run would have an arrow from each step to nearly all that follow.
    """
    if FlowRunContext.get() is not None:
        quoted: Any = partial(task, *map(quote, args))
        return quoted(**{name: quote(value) for name, value in kwargs.items()})
    return task.fn(*args, **kwargs)


def step_each(
    runner: TaskRunner | None, task: Task[P, R], calls: Iterable[Mapping[str, Any]], *, at_once: int = 1
) -> Iterator[R]:
    """Run a task once for each set of arguments. With a cluster, yield results in order of completion.

    If a worker is lost, another one repeats its tasks. Without a cluster, `at_once` tasks run concurrently and share
    the cores, as a task uses all it is given; results keep the order of `calls`.
    """
    if runner is None:
        # Prefect finds the flow run through context variables, which a new thread does not inherit.
        jobs = [partial(copy_context().run, partial(step, task, **call)) for call in calls]
        yield from each_side_by_side(jobs, most=at_once)
        return
    yield from on_workers(runner, task, calls)


@contextmanager
def step_report(name: str = "blocks") -> Iterator[Report]:
    """Yield a progress report over the steps of a stage: log lines and an artifact in a flow run, else a bar or log."""
    if FlowRunContext.get() is not None:
        with progress_shown(name) as shown, logged(get_run_logger().info) as lines:
            yield each(lines, shown)
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
