"""The flow that looks at the landing place, once a minute: takes in what is complete and wakes what waits.

One mechanism for everything: documents that have just landed, events that were lost, a server that was down, a run that
died. Whatever the ledger says is pending and nobody works on is announced, and announced again by the next watch.
"""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging import get_run_logger

from crosscal.flows.cancelled import note_cancelled
from crosscal.flows.changes import SETTLE_SECONDS, notice_changes
from crosscal.flows.stuck_runs import close_stuck_runs, note_process, runs_in
from crosscal.landing import Ledger, take_in
from crosscal.landing.picture import Picture
from crosscal.store import Store
from crosscal.tasks.announce import announce

LIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
SOON = datetime.timedelta(minutes=10)
"""A run planned for later than this does not keep a domain from being announced."""


@flow(name="watch", persist_result=False, result_serializer="json", on_running=[note_process])
def watch(
    landing: str, home: str, settle_seconds: float = 10.0, stuck_minutes: float = 60.0, plan_path: str | None = None
) -> dict[str, Any]:
    """Take in what landed, close runs that died, announce what is pending; returns what was done. With a plan, whatever
    was made by another, or from another model, is pending as well."""
    log, store = get_run_logger(), Store(home)
    taken = take_in(store, landing, settle_seconds)
    closed = close_stuck_runs(stuck_minutes)
    ledger = Ledger(store)
    changed = notice_changes(ledger, Path(plan_path), settle_seconds=SETTLE_SECONDS) if plan_path else {}
    for domain, what in changed.items():
        log.info("%s is to be done again: %s", domain, what)
    waiting = waiting_domains(ledger)
    announced = {domain: announce(domain, version) for domain, version in waiting.items()}
    for domain, arrived in announced.items():
        log.info("%s v%d: %s", domain, waiting[domain], "announced" if arrived else "the event did not get through")
    for run in closed:
        log.warning("run %s closed: %s", run["run"], run["reason"])
    return {"files": dict(Counter(each.state for each in taken)), "announced": waiting, "closed": closed}


def waiting_domains(ledger: Ledger) -> dict[str, int]:
    """Pending domains that no live run works on, and their versions; neither paused nor cancelled by a person."""
    if not _pending(ledger.look()):
        return {}
    with get_client(sync_client=True) as client:
        note_cancelled(ledger, client)
        busy = _busy_domains(client)
    picture = ledger.look()
    return {d: v for d, v in _pending(picture).items() if d not in busy and not ledger.living(picture.last_run(d))}


def _pending(picture: Picture) -> dict[str, int]:
    found = {d: picture.pending(d) for d in picture.domains() if not picture.is_paused(d)}
    return {domain: version for domain, version in found.items() if version is not None}


def _busy_domains(client: SyncPrefectClient) -> set[str]:
    """Domains that a flow run of now or soon names."""
    runs = runs_in(client, *LIVE, flows=("recompress",))
    return {str(run.parameters.get("domain")) for run in runs if not _is_for_later(run)}


def _is_for_later(run: FlowRun) -> bool:
    planned = run.next_scheduled_start_time
    return planned is not None and planned > datetime.datetime.now(datetime.UTC) + SOON
