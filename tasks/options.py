"""Prefect options of every task: results are small JSON values and never stored; the artifact store is the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
from prefect import State, Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun

from crosscal.errors import StoreConflict

PLAIN: dict[str, Any] = {"persist_result": False, "result_serializer": "json", "cache_policy": NO_CACHE}
"""By default, Prefect would hash the arguments, and pickle results wherever persistence is on."""
TRANSIENT = (ConnectionError, TimeoutError, httpx.TransportError, StoreConflict)


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether the network or another process caused a failure: only then can a retry succeed."""
    return has_transient_cause(state.data)


def has_transient_cause(error: object) -> bool:
    return any(isinstance(each, TRANSIENT) for each in chain(error))


def chain(error: object) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while isinstance(error, BaseException):
        yield error
        error = error.__cause__ or error.__context__


RETRIED: dict[str, Any] = {**PLAIN, "retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": is_transient}
"""For tasks that read from the hub or a remote store."""
