"""How a step is run: through Prefect inside a flow run, as a plain call otherwise. One pipeline, two ways to drive it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.context import FlowRunContext

P = ParamSpec("P")
R = TypeVar("R")


def step(task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a task. Without a flow run there is no server to tell, so the task's function is called as it is."""
    if FlowRunContext.get() is not None:
        return task(*args, **kwargs)
    return task.fn(*args, **kwargs)


@dataclass
class Stopwatch:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    say: Callable[[str], Any] = print

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)
