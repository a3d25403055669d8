"""Run calibration passes and block solves in this process, or on the workers of a Dask cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task, get_client
from prefect.context import FlowRunContext
from prefect.futures import as_completed
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.task_runners import TaskRunner

from crosscal.errors import CrosscalError, UsageError
from crosscal.plan import Execution

if TYPE_CHECKING:
    from prefect_dask import DaskTaskRunner

P = ParamSpec("P")
R = TypeVar("R")

LOCAL_WORKERS = 2
SECONDS_TO_JOIN = 60
SECONDS_TO_START = 120  # of a first server, which creates its database
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@contextmanager
def cluster(execution: Execution) -> Iterator[TaskRunner | None]:
    """Yield a Prefect task runner for the cluster that a plan asks for; None for `threads`.

    Raises `UsageError` outside a flow run, without Dask, and when no scheduler or no worker can be reached.
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
    # Workers report task states to the server. Without this setting, each would start its own temporary server.
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        with _runner(execution) as runner:
            _wait_for_workers(runner, execution)
            yield runner


def on_workers(runner: TaskRunner, task: Task[P, R], calls: Iterable[Mapping[str, Any]]) -> Iterator[R]:
    """Run a task on the workers for each set of arguments; yield results in order of completion.

    After a failure, tasks that no worker has started are cancelled. Raises `CrosscalError` for a task that killed more
    workers than Dask allows.
    """
    from distributed import KilledWorker

    futures = [runner.submit(task, parameters=dict(call)) for call in calls]  # no `quote`: workers would not unwrap it
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException as error:
        for future in futures:
            future.wrapped_future.cancel()
        if isinstance(error, KilledWorker):
            raise CrosscalError(
                f"this task killed its worker {error.allowed_failures + 1} times",
                where=task.name,
                do="Look at the workers' logs: a machine short of memory kills them. What is done is kept.",
            ) from error
        raise


def needs_server(execution: Execution) -> bool:
    """Return whether a plan can run only as a Prefect flow, because its tasks run on a Dask cluster.

    Raises `UsageError` when nothing listens at the scheduler's address, or when the address is not local: workers on
    other machines could not reach a temporary server here.
    """
    if execution.address:
        host, _, port = execution.address.partition("://")[2].rpartition(":")
        if host not in LOOPBACK:
            raise UsageError(
                "workers of other machines need a Prefect server to tell how their tasks go",
                where="execution.address",
                got=execution.address,
                do="Start one (`prefect server start`) and set PREFECT_API_URL to an address all machines reach.",
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise _unreachable(execution, error) from error
    return execution.runner == "dask"


@contextmanager
def temporary_server() -> Iterator[None]:
    """Let Prefect start a temporary server for one run, with its usage analytics off."""
    logging.getLogger("crosscal").info("no Prefect server is named: a temporary one is started for this run's workers")
    settings = {
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: SECONDS_TO_START,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    with temporary_settings(settings):
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
    except OSError as error:  # includes timeouts
        raise _unreachable(execution, error) from error


def _unreachable(execution: Execution, error: OSError) -> UsageError:
    return UsageError(
        "no Dask worker can be reached",
        where=execution.address or "execution.workers",
        got=str(error),
        do="Start `dask scheduler` and `dask worker`, or leave the address out for workers on this machine.",
    )
