"""What the service needs on a Prefect server: pool, queues, four deployments and a trigger, as Prefect's own objects.

`deployment.yaml` has the same for `prefect deploy`, with the values of `plans/service.yaml`; a test compares them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import partial
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from crosscal.errors import CrosscalError
from crosscal.flows.deployed import COMPRESS, NOBODY, POOL, SAME, SERVICE, DeployedObject, essence, queue_limits, schema
from crosscal.flows.housekeeping import housekeeping
from crosscal.flows.recompress import recompress
from crosscal.flows.watch import watch
from crosscal.service import ServiceConfig
from crosscal.tasks.announce import LANDED

PULL = [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $CROSSCAL_CHECKOUT }}"}}]
"""Prefect would start flow runs in a temporary folder; the worker's environment names the folder to use."""
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60"}
ANCHOR = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
"""Start of interval schedules. Prefect's default is the time of deployment, which differs each time."""
ON_LANDED = DeploymentEventTrigger(
    name="crosscal-landed",
    match={"prefect.resource.id": "crosscal.corpus.*"},  # pyright: ignore[reportArgumentType]
    expect={LANDED},
    for_each={"prefect.resource.id"},
    within=datetime.timedelta(seconds=10),
    parameters={"domain": "{{ event.payload.domain }}"},
)
"""Trigger: documents of a domain landed. The event is only a hint that carries the domain's name: it may be lost or
duplicated, and the ledger in the store decides what to do. A burst within ten seconds triggers once."""


def deployments(service: ServiceConfig) -> list[RunnerDeployment]:
    """Return the four deployments with the service's settings. None selects a GPU: each worker's environment does."""
    home, looked_after = {"home": service.home}, service.housekeeping
    stuck = {**home, "stuck_minutes": looked_after.stuck_minutes}
    on_a_gpu = _on(COMPRESS, CROSSCAL_RUNS=service.runs)
    on_none = {"CUDA_VISIBLE_DEVICES": ""}
    silent = {"PREFECT_LOGGING_LEVEL": "WARNING"}  # silences Prefect's log lines, not the watch's own
    return [
        _deployment(
            recompress,
            "recompress",
            "Carries out a plan, for a landed domain if one is named; what an earlier run kept is not computed again.",
            parameters={**home, "plan_path": service.plan},
            concurrency_limit=ConcurrencyLimitConfig(limit=service.gpus),
            triggers=[ON_LANDED],
            **on_a_gpu,
        ),
        _deployment(
            recompress,
            "sweep",
            "Carries out the grid of a plan every week, so that its report and its models follow their corpora.",
            parameters={**home, "plan_path": service.sweep.plan},
            schedules=[Cron(service.sweep.cron, timezone=service.timezone, slug="sweep")],
            **on_a_gpu,
        ),
        _deployment(
            watch,
            "watch",
            "Takes in what landed, and announces every domain that waits for a recompression nobody works on.",
            parameters={
                **stuck,
                "landing": service.landing,
                "settle_seconds": service.settle_seconds,
                "plan_path": service.plan,
                "text": service.text,
            },
            schedules=[_watching(service)],
            **_on(SERVICE, **on_none, **silent),
        ),
        _deployment(
            housekeeping,
            "housekeeping",
            "Verifies the store, sets damaged artifacts aside, removes what nobody needs, closes runs that died.",
            parameters={**home, "runs": service.runs, **looked_after.model_dump(exclude={"cron"})},
            schedules=[Cron(looked_after.cron, timezone=service.timezone, slug="housekeeping")],
            **_on(SERVICE, **on_none),
        ),
    ]


def wanted(service: ServiceConfig) -> Iterator[DeployedObject]:
    """Yield each wanted thing with its fields and the function that creates or updates it."""
    yield DeployedObject(f"pool {POOL}", {"type": "process", "is_paused": False}, _put_pool)
    for name, limit in queue_limits(service.gpus).items():
        fields = {"concurrency_limit": limit, "is_paused": False}
        yield DeployedObject(f"queue {name}", fields, partial(_put_queue, name=name, limit=limit))
    for each in deployments(service):
        yield DeployedObject(f"deployment {each.full_name}", _fields(each), partial(_put_deployment, runner=each))


def _deployment(flow: Flow[..., Any], name: str, description: str, **more: Any) -> RunnerDeployment:
    """Without a given concurrency limit, runs do not overlap: one that starts during another is skipped."""
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    settings = {"concurrency_limit": alone, "paused": False, "work_pool_name": POOL, **more}
    return flow.to_deployment(  # pyright: ignore[reportReturnType]  (a coroutine only inside of a running loop)
        name, description=description, entrypoint_type=EntrypointType.MODULE_PATH, **settings
    )


def _on(queue: str, **environment: str) -> dict[str, Any]:
    return {"work_queue_name": queue, "job_variables": {"env": {**environment, **HEARTBEAT}}}


def _watching(service: ServiceConfig) -> Schedule:
    when, zone = service.watch, service.timezone
    if when.every_seconds is None:
        return Cron(when.cron or "", timezone=zone, slug="watch")
    return Interval(when.every_seconds, anchor_date=ANCHOR, timezone=zone, slug="watch")


def _fields(runner: RunnerDeployment) -> dict[str, Any]:
    for trigger in runner.triggers:
        trigger.set_deployment_id(NOBODY)
    return {
        **{name: getattr(runner, name) for name in SAME},
        "concurrency_limit": runner.concurrency_limit,
        "schedules": runner.schedules,
        "pull_steps": PULL,
        "parameter_openapi_schema": schema(runner._parameter_openapi_schema.model_dump(mode="json")),
        "triggers": [essence(trigger.as_automation()) for trigger in runner.triggers],
    }


def _put_pool(client: SyncPrefectClient) -> None:
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    if pool.type != "process":
        raise CrosscalError(
            "there is a work pool of this name and of another type",
            where=POOL,
            got=pool.type,
            do=f"Remove it (`prefect work-pool delete {POOL}`) if nothing else uses it.",
        )
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
    _use_default_queue(client)


def _use_default_queue(client: SyncPrefectClient) -> None:
    """Rename the queue `default`, which every pool has, to `compress`; pause it in a pool that already has both.

    No worker polls `default`, so the UI would show it as not ready for ever.
    """
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=POOL)}
    default = queues.get("default")
    if default is not None and COMPRESS not in queues:
        client.update_work_queue(default.id, name=COMPRESS)
    elif default is not None and not default.is_paused:
        client.update_work_queue(default.id, is_paused=True)


def _put_queue(client: SyncPrefectClient, name: str, limit: int) -> None:
    try:
        queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
        client.update_work_queue(queue.id, concurrency_limit=limit, is_paused=False)
    except ObjectNotFound:
        client.create_work_queue(name, concurrency_limit=limit, work_pool_name=POOL)


def _put_deployment(client: SyncPrefectClient, runner: RunnerDeployment) -> None:
    made: Any = runner.apply()
    client.update_deployment(made, DeploymentUpdate(pull_steps=PULL))
