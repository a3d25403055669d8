"""Progress that a person sees: a bar in a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int | None], None]
"""Called with (what, done, total or None) as work goes on; cheap to call often."""

LOG_EVERY_SECONDS = 10.0


def silent(what: str, done: int, total: int | None) -> None:
    """A report that nobody reads."""


@contextmanager
def reporting() -> Iterator[Report]:
    """A report that draws bars when standard error is a terminal and otherwise logs every ten seconds."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield log_lines(logging.getLogger("crosscal").info)


def each(*reports: Report) -> Report:
    """One report for several that listen."""

    def report(what: str, done: int, total: int | None) -> None:
        for listener in reports:
            listener(what, done, total)

    return report


def log_lines(log: Callable[[str], None]) -> Report:
    """A report that logs at most every ten seconds."""
    last = time.monotonic()

    def report(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_SECONDS:
            last = time.monotonic()
            log(f"{what}: {done:,}" + (f" of {total:,}" if total else ""))

    return report


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def report(what: str, done: int, total: int | None) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield report
