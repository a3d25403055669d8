"""Runs that a user cancelled: their version is not run again until it is requested again, or a new version lands.

A cancelled process gets a SIGTERM, like a process whose machine shuts down. Only the flow run's state on the server
distinguishes the two. If a process is killed before it can ask the server, the next watch records the cancellation.
"""

from __future__ import annotations

import datetime
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilterEndTime
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from crosscal.flows.stuck_runs import runs_in
from crosscal.landing import Ledger
from crosscal.tasks.artifacts import FAILURES

CANCELLED = (StateType.CANCELLING, StateType.CANCELLED)


def is_cancelled(run_id: str) -> bool:
    """Return whether a user cancelled this process's flow run; False if the server cannot be asked."""
    if FlowRunContext.get() is None:
        return False
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run_id)).state
    except FAILURES:
        return False
    return state is not None and state.type in CANCELLED


def note_cancelled(ledger: Ledger, client: SyncPrefectClient) -> None:
    """Record in the ledger which pending versions had their run cancelled, while running or while still queued."""
    view = ledger.look()
    idle = [d for d in view.domains() if view.pending(d) and ledger.living(view.last_run(d)) is None]
    asked = {domain: datetime.datetime.fromisoformat(view.items[f"request/{domain}"]["at"]) for domain in idle}
    if not asked:
        return
    since = FlowRunFilterEndTime(after_=min(asked.values()))  # pyright: ignore[reportArgumentType]
    for run in list(runs_in(client, StateType.CANCELLED, flows=("recompress",), ended=since)):
        domain = str(run.parameters.get("domain"))
        if domain in asked and run.end_time is not None and run.end_time > asked[domain]:
            ledger.cancel(domain, str(run.id))
