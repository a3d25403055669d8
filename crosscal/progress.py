"""Progress display: a bar in a terminal, log lines at intervals elsewhere, each with an estimate of the time left.

Work that reports nothing for long stays visible: bars show the elapsed time, logs repeat every minute what is running.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

Report = Callable[[str, int, int | None], None]
"""Callback (what, done, total or None), called as work proceeds; cheap to call often."""
Progress = Callable[[int, int], None]
"""Callback (done, total) of work that consists of one task."""

Added = Callable[[int], None]
"""Callback (number) of what was done since the last call."""

LOG_EVERY_SECONDS = 10.0
REMIND_EVERY_SECONDS = 60.0


def silent(what: str, done: int, total: int | None) -> None:
    """A `Report` that does nothing."""


@contextmanager
def reporting() -> Iterator[Report]:
    """Yield a `Report` that draws bars if standard error is a terminal and otherwise logs every ten seconds."""
    with _bars() if sys.stderr.isatty() else logged(logging.getLogger("crosscal").info) as report:
        yield report


def adding(progress: Progress | None, done: int, total: int, *, share: float = 1.0) -> Added | None:
    """Return a callback that reports `done` and `share` times what it was called with so far, at most `total`."""
    if progress is None:
        return None
    made = 0

    def add(number: int) -> None:
        nonlocal made
        made += number
        progress(min(total, done + int(share * made)), total)

    return add


def each(*reports: Report) -> Report:
    """Return one `Report` that calls several."""

    def report(what: str, done: int, total: int | None) -> None:
        for listener in reports:
            listener(what, done, total)

    return report


class Pace:
    """The last report as text with the time left, estimated from the mean speed since the first report of its task."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._last: tuple[str, int, int | None] | None = None

    def report(self, what: str, done: int, total: int | None) -> None:
        self._began.setdefault(what, (time.monotonic(), done))
        self._last = what, done, total

    def words(self) -> str:
        """E.g. `general: reading: 3 of 32, about 4 min left`; empty before the first report."""
        if self._last is None:
            return ""
        what, done, total = self._last
        began, done_before = self._began[what]
        if not total:
            return f"{what}: {done:,}" if done else what
        words, speed = f"{what}: {done:,} of {total:,}", (done - done_before) / max(1e-9, time.monotonic() - began)
        return f"{words}, about {_duration((total - done) / speed)} left" if speed and done < total else words


@contextmanager
def logged(log: Callable[[str], None]) -> Iterator[Report]:
    """Yield a `Report` that logs news every ten seconds, and once a minute that the same task is still running."""
    pace, is_over, started = Pace(), threading.Event(), time.monotonic()

    def tell() -> None:
        said, said_at = "", started
        while not is_over.wait(LOG_EVERY_SECONDS):
            words, now = pace.words(), time.monotonic()
            if words and words.partition(", about")[0] != said:
                said, said_at = words.partition(", about")[0], now
                log(words)
            elif words and now - said_at >= REMIND_EVERY_SECONDS:
                said_at = now
                log(f"{words} (still at work, {_duration(now - started)} since the start)")

    # Prefect's log handler finds its server in the context. Without one, a Dask worker would start a server of its own.
    teller = threading.Thread(target=copy_context().run, args=(tell,), name="progress", daemon=True)
    teller.start()
    try:
        yield pace.report
    finally:
        is_over.set()
        teller.join()


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def _bars() -> Iterator[Report]:
    from rich import progress as bar
    from rich.console import Console

    times = (bar.TimeElapsedColumn(), bar.TextColumn("left:"), bar.TimeRemainingColumn())
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn(), *times)
    bars: dict[str, bar.TaskID] = {}
    with bar.Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def report(what: str, done: int, total: int | None) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield report
