"""Where windows are read and blocks are solved: here, or by the workers of a Dask cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect import get_client
from prefect.context import FlowRunContext
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)
from prefect.task_runners import TaskRunner

from crosscal.errors import UsageError
from crosscal.plan import Execution

if TYPE_CHECKING:
    from prefect_dask import DaskTaskRunner

LOCAL_WORKERS = 2
SECONDS_TO_JOIN = 60
LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


@contextmanager
def cluster(execution: Execution) -> Iterator[TaskRunner | None]:
    """The cluster that a plan asks for, through Prefect's task runner; None for `threads`.

    Raises `UsageError` when there is no flow run, no scheduler at the address, or no worker.
    """
    if execution.runner == "threads":
        yield None
        return
    if FlowRunContext.get() is None:
        raise UsageError(
            "a Dask cluster is asked for outside of a flow run",
            where="execution.runner",
            do="Run the plan with `crosscal run`, or call the flow and not its function.",
        )
    # Workers tell the server how their tasks go. Without this each would start a temporary server of its own.
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        with _runner(execution) as runner:
            _wait_for_workers(runner, execution)
            yield runner


def needs_server(execution: Execution) -> bool:
    """Whether a plan runs as a flow only. Raises `UsageError` when workers could not reach a temporary server here."""
    if execution.address and not execution.address.partition("://")[2].startswith(LOOPBACK):
        raise UsageError(
            "workers of other machines need a Prefect server to tell how their tasks go",
            where="execution.address",
            got=execution.address,
            do="Start one (`prefect server start`) and set PREFECT_API_URL to an address that every machine reaches.",
        )
    return execution.runner == "dask"


@contextmanager
def temporary_server() -> Iterator[None]:
    """Prefect's own server for one run: nothing is sent to its makers."""
    logging.getLogger("crosscal").info("no Prefect server is named: a temporary one is started for this run's workers")
    with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True, PREFECT_SERVER_ANALYTICS_ENABLED: False}):
        yield


def _runner(execution: Execution) -> DaskTaskRunner:
    try:
        import dask
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UsageError(
            "Dask is not installed", where="execution.runner", got=str(error), do="Install `crosscal[dask]`."
        ) from error
    if execution.address:
        return DaskTaskRunner(address=execution.address, client_kwargs={"timeout": SECONDS_TO_JOIN})
    workers = execution.workers or LOCAL_WORKERS
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    dask.config.set({"distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": threads})
    return DaskTaskRunner(
        cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": 0}
    )


def _wait_for_workers(runner: DaskTaskRunner, execution: Execution) -> None:
    try:
        runner.client.wait_for_workers(1, timeout=SECONDS_TO_JOIN)
    except OSError as error:  # of which a timeout is one
        raise UsageError(
            "no Dask worker can be reached",
            where=execution.address or "execution.workers",
            got=str(error),
            do="Start `dask scheduler` and `dask worker`, or leave the address out for workers on this machine.",
        ) from error
