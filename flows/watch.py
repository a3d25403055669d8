"""The flow that looks at the landing place, once a minute: takes in what is complete and wakes what waits.

One mechanism for everything: documents that have just landed, events that were lost, a server that was down, a run that
died. Whatever the ledger says is pending and nobody works on is announced, and announced again by the next watch.
"""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging import get_run_logger

from crosscal.flows.stuck_runs import close_stuck_runs, note_process, runs_in
from crosscal.landing import Ledger, take_in
from crosscal.store import Store
from crosscal.tasks.announce import announce

LIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
SOON = datetime.timedelta(minutes=10)
"""A run planned for later than this does not keep a domain from being announced."""


@flow(name="watch", persist_result=False, result_serializer="json", on_running=[note_process])
def watch(landing: str, home: str, settle_seconds: float = 10.0, stuck_minutes: float = 60.0) -> dict[str, Any]:
    """Take in what landed, close runs that died, announce what is pending; returns what was done."""
    log, store = get_run_logger(), Store(home)
    taken = take_in(store, landing, settle_seconds)
    closed = close_stuck_runs(stuck_minutes)
    waiting = waiting_domains(Ledger(store))
    announced = {domain: announce(domain, version) for domain, version in waiting.items()}
    for domain, arrived in announced.items():
        log.info("%s v%d: %s", domain, waiting[domain], "announced" if arrived else "the event did not get through")
    for run in closed:
        log.warning("run %s closed: %s", run["run"], run["reason"])
    return {"files": dict(Counter(each.state for each in taken)), "announced": waiting, "closed": closed}


def waiting_domains(ledger: Ledger) -> dict[str, int]:
    """Pending domains that no live run works on, and their versions."""
    picture = ledger.look()
    pending = {domain: version for domain in picture.domains() if (version := picture.pending(domain)) is not None}
    if not pending:
        return {}
    with get_client(sync_client=True) as client:
        busy = _busy_domains(client)
    return {d: v for d, v in pending.items() if d not in busy and ledger.living(picture.last_run(d)) is None}


def _busy_domains(client: SyncPrefectClient) -> set[str]:
    """Domains that a flow run of now or soon names."""
    runs = runs_in(client, *LIVE, flows=("recompress",))
    return {str(run.parameters.get("domain")) for run in runs if not _is_for_later(run)}


def _is_for_later(run: FlowRun) -> bool:
    planned = run.next_scheduled_start_time
    return planned is not None and planned > datetime.datetime.now(datetime.UTC) + SOON
