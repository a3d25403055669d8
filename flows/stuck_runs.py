"""Flow runs in state Running without a live process, and how they are distinguished from slow ones.

Every flow records its process on its run at the start. Within one boot of a machine the answer is exact: the process
is alive or has ended (even if another process has its number by now). Any other process cannot be observed, whatever
its host's name; its run counts as stuck after `stuck_minutes` without a sign of life: no change of state, no log line,
no heartbeat.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Cancelled, Crashed

from crosscal.store.processes import has_ended, number_of, this_process

FLOWS = ("recompress", "study", "watch", "housekeeping")
PROCESS = "crosscal.process"
HEARTBEAT = "prefect.flow-run.heartbeat"
AT_WORK = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
PAGE = 200


def note_process(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Record on the flow run which process works on it; a flow's `on_running` hook."""
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run.id, {PROCESS: this_process()})


def close_stuck_runs(stuck_minutes: float) -> list[dict[str, str]]:
    """Close flow runs that no process works on any more; return which, and why."""
    closed = []
    with get_client(sync_client=True) as client:
        for run in list(runs_in(client, *AT_WORK)):
            reason = _why_stuck(client, run, stuck_minutes)
            # Read the state again: a run that completed just now has no process either.
            if reason and (state := client.read_flow_run(run.id).state) and state.type in AT_WORK:
                _close(client, run, reason)
                closed.append({"run": run.name, "id": str(run.id), "reason": reason})
    return closed


def runs_in(
    client: SyncPrefectClient,
    *states: StateType,
    flows: tuple[str, ...] = FLOWS,
    ended: FlowRunFilterEndTime | None = None,
) -> Iterator[FlowRun]:
    """Yield runs of our flows in these states, optionally filtered by end time."""
    of_ours = FlowFilter(name=FlowFilterName(any_=list(flows)))
    in_states = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))), end_time=ended)
    offset = 0
    while page := client.read_flow_runs(flow_filter=of_ours, flow_run_filter=in_states, limit=PAGE, offset=offset):
        yield from page
        offset += len(page)


def _why_stuck(client: SyncPrefectClient, run: FlowRun, stuck_minutes: float) -> str | None:
    process = run.labels.get(PROCESS)
    ended = has_ended(process) if isinstance(process, str) else None
    if isinstance(process, str) and ended is not None:
        return f"its process {number_of(process)} has ended" if ended else None
    since = _last_sign(client, run)
    silent_minutes = (datetime.datetime.now(datetime.UTC) - since).total_seconds() / 60
    return f"no sign of life since {since:%Y-%m-%d %H:%M} UTC" if silent_minutes > stuck_minutes else None


def _last_sign(client: SyncPrefectClient, run: FlowRun) -> datetime.datetime:
    assert run.state is not None
    since: datetime.datetime = run.state.timestamp
    logs = client.read_logs(
        LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), limit=1, sort=LogSort.TIMESTAMP_DESC
    )
    heartbeats = client.read_events(
        EventFilter(
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            occurred=EventOccurredFilter(since=since),
        ),
        limit=1,
    )
    return max([since, *(log.timestamp for log in logs), *(event.occurred for event in heartbeats.events)])


def _close(client: SyncPrefectClient, run: FlowRun, reason: str) -> None:
    """Close a flow run, its task runs first: later, nothing would. A run being cancelled ends as cancelled."""
    at_work = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=list(AT_WORK))))
    only = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    message = f"Closed by crosscal: {reason}."
    for task_run in client.read_task_runs(flow_run_filter=only, task_run_filter=at_work):
        client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
    is_cancelling = run.state is not None and run.state.is_cancelling()
    client.set_flow_run_state(run.id, (Cancelled if is_cancelling else Crashed)(message=message), force=True)
