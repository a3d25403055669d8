"""The housekeeping flow: verifies the store, sets damaged artifacts aside, removes old data, closes dead flow runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger

from crosscal.flows.old_runs import remove_quiet
from crosscal.flows.outcome import NEWS, change_run
from crosscal.flows.stuck_runs import close_stuck_runs, note_process
from crosscal.publication.retention import drop_models, remove_old_runs
from crosscal.store import Store
from crosscal.tasks.artifacts import make_artifact

MOST_SHOWN = 50
"""Entries of each list in the artifact and the log; counts always cover all."""


@flow(name="housekeeping", persist_result=False, result_serializer="json", on_running=[note_process])
def housekeeping(
    home: str,
    unused_days: float | None = None,
    stuck_minutes: float = 60.0,
    runs: str | None = None,
    runs_days: float | None = None,
    keep_published: int | None = None,
    watch_days: float | None = None,
) -> dict[str, Any]:
    """Verify new and changed artifacts, set damaged ones aside, close dead flow runs, remove what is abandoned or old.

    Removed are artifacts unused for `unused_days`, directories in `runs` not written for `runs_days`, published models
    before the last `keep_published` of a domain, and watches that found nothing `watch_days` ago. None keeps for ever.
    """
    closed, store = close_stuck_runs(stuck_minutes), Store(home)
    report = look_after(store, unused_days)
    old = list(drop_models(store, keep_published)) if keep_published is not None else []
    if runs is not None and runs_days is not None:
        old += remove_old_runs(store, Path(runs), runs_days, keep_published)
    report["removed"] += [{"place": place, "reason": reason} for place, reason in old]
    report = {**report, "watches": 0 if watch_days is None else _remove_quiet(watch_days), "closed": closed}
    if report["damaged"] or closed:
        change_run([NEWS])
    get_run_logger().info(json.dumps(shortened(report)))
    make_artifact(
        create_markdown_artifact,
        markdown=markdown(report),
        key="housekeeping",
        description="What housekeeping found and did.",
    )
    return report


def _remove_quiet(days: float) -> int:
    with get_client(sync_client=True) as client:
        return remove_quiet(client, days)


def look_after(store: Store, unused_days: float | None) -> dict[str, Any]:
    """Verify and clean the store; return counts, damaged artifacts (set aside, computed again if needed), removals."""
    from crosscal.flows.taken_out import discard_taken_out

    checked = list(store.verify(quarantine=True, quick=True))
    damaged = [{"kind": kind, "key": key, "problem": problem} for kind, key, problem in checked if problem]
    gone = [*store.sweep(unused_days=unused_days), *discard_taken_out(store)]
    removed = [{"place": place, "reason": reason} for place, reason in gone]
    return {"artifacts": len(checked), "damaged": damaged, "removed": removed}


def shortened(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with every list cut to `MOST_SHOWN` entries."""
    return {name: value[:MOST_SHOWN] if isinstance(value, list) else value for name, value in report.items()}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page: a sentence, then a table for each list that is not empty."""
    names = ("damaged", "removed", "closed")
    damaged, removed, closed = (len(report[name]) for name in names)
    counts = f"{report['artifacts']} artifacts verified; {damaged} damaged and set aside; {removed} removed"
    parts = [f"{counts}; {closed} runs closed; {report['watches']} watches that found nothing removed."]
    for name in names:
        if report[name]:
            parts.append(f"## {name.capitalize()}\n\n{_table(report[name][:MOST_SHOWN])}")
            if len(report[name]) > MOST_SHOWN:
                parts.append(f"and {len(report[name]) - MOST_SHOWN} more")
    return "\n\n".join(parts)


def _table(rows: list[dict[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:200]
