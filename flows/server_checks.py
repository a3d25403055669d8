"""Check the service on the Prefect server: its deployments, its workers, and the last watch."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from crosscal.flows.check import FAIL, OK, WARN, Check
from crosscal.flows.deployments import COMPRESS, POOL, SERVICE, queue_limits
from crosscal.flows.old_runs import WATCHES, in_state
from crosscal.service import ServiceConfig

DEPLOYMENTS = ("recompress/recompress", "recompress/sweep", "watch/watch", "housekeeping/housekeeping")
POLLED_SECONDS = 60.0
"""A queue that no worker polled for this long has no worker."""
GRACE_SECONDS = 60.0
"""A run may start this much later than planned."""
MOST_OVERDUE = 3
"""With this many overdue watches, the landing place counts as unwatched."""
START = "Start the worker as `crosscal deploy` prints it."
DEPLOY = "Deploy: `crosscal deploy`."


def server_checks(service: ServiceConfig, url: str) -> Iterator[Check]:
    """Yield the checks of a server that has already answered."""
    yield Check("server", OK, f"{url} answers")
    with get_client(sync_client=True) as client:
        yield _deployments(client)
        yield from _queues(client, service)
        yield _watch(client)


def _deployments(client: SyncPrefectClient) -> Check:
    missing, paused = [], []
    for name in DEPLOYMENTS:
        try:
            if client.read_deployment_by_name(name).paused:
                paused.append(name)
        except ObjectNotFound:
            missing.append(name)
    if missing:
        return Check("deployments", FAIL, f"not on the server: {', '.join(missing)}", DEPLOY)
    if paused:
        return Check("deployments", FAIL, f"paused: {', '.join(paused)}", "Resume them, in the UI or by deploying.")
    return Check("deployments", OK, f"{len(DEPLOYMENTS)} on the server")


def _queues(client: SyncPrefectClient, service: ServiceConfig) -> Iterator[Check]:
    """Check that a worker polls each queue."""
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        yield Check(f"pool {POOL}", FAIL, "not on the server", DEPLOY)
        return
    if pool.is_paused:
        yield Check(f"pool {POOL}", FAIL, "paused", f"Resume it: `prefect work-pool resume {POOL}`.")
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=POOL)}
    for name in queue_limits(service.gpus):
        queue, thing = queues.get(name), f"queue {name}"
        is_needed = name in (COMPRESS, SERVICE)  # another GPU can do the work of a missing one
        if queue is None:
            yield Check(thing, FAIL, "not on the server", DEPLOY)
        elif queue.is_paused:
            yield Check(thing, FAIL if is_needed else WARN, "paused", "Resume it in the UI, or deploy again.")
        elif queue.last_polled is None:
            yield Check(thing, FAIL if is_needed else WARN, "no worker ever asked for its runs", START)
        elif (silent := _age(queue.last_polled)) > POLLED_SECONDS:
            said = f"no worker asks for its runs; the last one did {_words(silent)} ago"
            yield Check(thing, FAIL if is_needed else WARN, said, START)
        else:
            yield Check(thing, OK, "a worker asks for its runs")


def _watch(client: SyncPrefectClient) -> Check:
    """Compare when the watch last ran with when it was scheduled."""
    last, planned = _last_ended(client), _planned(client)
    overdue = [run for run in planned if (at := run.expected_start_time) and _age(at) > GRACE_SECONDS]
    if last is None or last.end_time is None or last.state is None:
        said = "has not looked at the landing place yet"
    else:
        said = f"{_words(_age(last.end_time))} ago: {last.state.message or last.state.name}"
    if len(overdue) >= MOST_OVERDUE:
        return Check("watch", FAIL, f"{said}; {len(overdue)} or more are overdue", START)
    if last is not None and last.state is not None and last.state.is_failed():
        return Check("watch", FAIL, said, "Do what the message says; its page in the UI has the log.")
    if not planned:
        return Check(
            "watch", FAIL, f"{said}; no other is planned", "Is its schedule active? `crosscal deploy --check`."
        )
    if last is None or overdue or (last.state is not None and last.state.is_crashed()):
        return Check("watch", WARN, f"{said}; {len(overdue)} overdue", "Look again in a minute.")
    return Check("watch", OK, said)


def _last_ended(client: SyncPrefectClient) -> FlowRun | None:
    found = client.read_flow_runs(
        flow_filter=WATCHES,
        flow_run_filter=FlowRunFilter(state=in_state(StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)),
        sort=FlowRunSort.END_TIME_DESC,
        limit=1,
    )
    return found[0] if found else None


def _planned(client: SyncPrefectClient) -> list[FlowRun]:
    """Return watches that are scheduled, pending or running; the earliest planned first."""
    open_ones = FlowRunFilter(state=in_state(StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING))
    sort = FlowRunSort.EXPECTED_START_TIME_ASC
    return client.read_flow_runs(flow_filter=WATCHES, flow_run_filter=open_ones, sort=sort, limit=MOST_OVERDUE)


def _age(moment: datetime.datetime) -> float:
    return (datetime.datetime.now(datetime.UTC) - moment).total_seconds()


def _words(seconds: float) -> str:
    """As in "40 s", "12 minutes", "3 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
