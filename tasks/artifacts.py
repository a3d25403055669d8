"""Prefect artifacts of a run: progress, the results, the trade-off, where the files are.

Outside a flow run nothing happens. Artifacts are for display only: if one cannot be made, that is logged, and the run
continues without it.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from crosscal.plan import load_plan
from crosscal.progress import Pace, Report, silent

UPDATE_EVERY_SECONDS = 5.0
"""An update costs some 40 ms: below 1 % of the time."""
MOST_BYTES = 640 * 1024
"""Size limit of any artifact."""
MOST_WORDS = 300
"""Maximum characters of a description."""
FAILURES = (httpx.HTTPError, PrefectException, RuntimeError, ValueError, OSError)
"""What Prefect's client raises when its server is gone or slow, or denies a request."""


def show_run(run_dir: Path) -> None:
    """Show results, trade-off and file locations of a finished run, each as an artifact of the running task."""
    if not in_run():
        return
    from crosscal.report.exhibits import files_page, measured, results_table, trade_off_page

    groups, columns, kept = measured(run_dir)
    table, subject = results_table(groups, columns), subject_of_run()
    make_artifact(create_table_artifact, key=f"{subject}-results", table=table.rows, description=table.about)
    publish = load_plan(run_dir / "plan.yaml").publish
    page = trade_off_page(groups, kept, str(run_dir / "models"), published=publish.domain if publish else "")
    about = "General against domain perplexity, and what to take at each level."
    if page:
        make_artifact(create_markdown_artifact, key=f"{subject}-trade-off", markdown=page, description=about)
    files = files_page(run_dir, json.loads((run_dir / "run.json").read_text(encoding="utf-8")))
    where = "Where the files are, on the machine that carried out the run."
    make_artifact(create_markdown_artifact, key=f"{subject}-files", markdown=files, description=where)


def show_decision(domain: str, version: int, decided: Mapping[str, Any]) -> None:
    """Show why a new model was published, or kept and not published; `decided` as in `decision_page`."""
    if not in_run():
        return
    from crosscal.report.exhibits import decided_among, decision_page

    page = decision_page(domain, version, decided, *decided_among(Path(decided["run_dir"])))
    about = f"{decided['outcome']}: {decided['reason']}"
    make_artifact(
        create_markdown_artifact, key=f"{_slug(domain)}-decision", markdown=page, description=about[:MOST_WORDS]
    )


@contextmanager
def progress_shown(name: str | None = None) -> Iterator[Report]:
    """Yield a report that updates the artifact `progress-<name>`; the default name is that of the running task."""
    if not in_run():
        yield silent
        return
    task_run = TaskRunContext.get()
    bar = _Bar(f"progress-{_slug(name or (task_run.task.name if task_run else 'run'))}")
    yield bar.report
    bar.finish()


def in_run() -> bool:
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def subject_of_run() -> str:
    """Return the key prefix that artifacts of several runs share: the landed domain, or else the plan's name."""
    context = FlowRunContext.get()
    parameters = context.parameters or {} if context else {}
    return _slug(str(parameters.get("domain") or Path(str(parameters.get("plan_path", "run"))).stem))


class _Bar:
    """One progress artifact on the server, created by the first report and updated every few seconds."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._next = 0.0
        self._percent: float | None = None
        self._pace = Pace()

    def report(self, what: str, done: int, total: int | None) -> None:
        if not done and total is None:
            return  # without a total there is no percentage; the log shows it
        self._pace.report(what[:100], done, total)
        self._percent = 100.0 * min(done, total) / total if total else 0.0
        if time.monotonic() >= self._next:
            self._show()
            self._next = time.monotonic() + UPDATE_EVERY_SECONDS

    def finish(self) -> None:
        """Show the last report."""
        if self._percent is not None and self._next < float("inf"):
            self._show()

    def _show(self) -> None:
        percent, about = self._percent, self._pace.words()
        if self._artifact is None:
            self._artifact = make_artifact(create_progress_artifact, key=self._key, progress=percent, description=about)
        else:
            self._artifact = make_artifact(update_progress_artifact, self._artifact, percent, about)
        if self._artifact is None:  # the server does not answer: do not wait for it again
            self._next = float("inf")


def make_artifact(make: Callable[..., UUID], *args: Any, **kwargs: Any) -> UUID | None:
    """Create or update an artifact, without retries; None outside a run, or when it is too large or fails."""
    if not in_run():
        return None
    size = len(json.dumps(kwargs, default=str))
    if size > MOST_BYTES:
        logging.getLogger("crosscal").warning("artifact %s left out: %d bytes", kwargs.get("key"), size)
        return None
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            return make(*args, **kwargs)
    except FAILURES as error:
        logging.getLogger("crosscal").warning("no artifact was made: %s", error)
        return None


def _slug(name: str) -> str:
    """Return a part of an artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:64].strip("-") or "run"
