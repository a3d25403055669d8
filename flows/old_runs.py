"""Remove unneeded flow runs: old watches that found nothing, and watches that were missed."""

from __future__ import annotations

import datetime
from contextlib import suppress

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

WATCHES = FlowFilter(name=FlowFilterName(any_=["watch"]))
QUIET = "quiet"
"""Tag of a watch that found nothing new."""
MISSED = datetime.timedelta(minutes=2)
PAGE = 200


def in_state(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def remove_missed(client: SyncPrefectClient) -> int:
    """Remove watches scheduled while no worker was running; return how many. One later watch covers them all."""
    planned = FlowRunFilterExpectedStartTime(before_=_now() - MISSED)
    return _remove(client, FlowRunFilter(state=in_state(StateType.SCHEDULED), expected_start_time=planned))


def remove_quiet(client: SyncPrefectClient, days: float) -> int:
    """Remove watches that ended more than `days` days ago and found nothing, or were skipped; return how many.

    A run's states, task runs and logs are removed with it. The server removes its events once they are
    PREFECT_SERVER_EVENTS_RETENTION_PERIOD old: the API has no call for that.
    """
    ended = FlowRunFilterEndTime(before_=_now() - datetime.timedelta(days=days))
    quiet = FlowRunFilter(tags=FlowRunFilterTags(all_=[QUIET]), end_time=ended)
    skipped = FlowRunFilter(state=in_state(StateType.CANCELLED), end_time=ended)
    return _remove(client, quiet) + _remove(client, skipped)


def _remove(client: SyncPrefectClient, which: FlowRunFilter) -> int:
    removed = 0
    while page := _some(client, which):
        for run in page:
            with suppress(ObjectNotFound):
                client.delete_flow_run(run.id)
        removed += len(page)
    return removed


def _some(client: SyncPrefectClient, which: FlowRunFilter) -> list[FlowRun]:
    return client.read_flow_runs(flow_filter=WATCHES, flow_run_filter=which, limit=PAGE)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
