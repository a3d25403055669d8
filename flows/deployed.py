"""Read what is deployed on the Prefect server and compare it with what is wanted, field by field.

A "thing" is a pool, a queue, a deployment, a block or an automation; its fields are Prefect's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from pydantic import TypeAdapter

POOL = "gpu"
COMPRESS, SERVICE = "compress", "service"
SERVICE_RUNS = 2
"""Concurrent runs: the watch and housekeeping."""
OURS = "crosscal-"
"""Prefix of our automations' names: the server does not report which automations a deployment created."""
NOBODY = UUID(int=0)
SAME = (
    *("entrypoint", "description", "parameters", "enforce_parameter_schema", "paused", "tags"),
    *("concurrency_options", "work_pool_name", "work_queue_name", "job_variables"),
)
"""Fields of a deployment that have the same name when written and when read."""
Things = dict[str, Mapping[str, Any]]


def queue_limits(gpus: int) -> dict[str, int]:
    """Return queue → its limit of concurrent runs: `compress`, one queue per GPU, and `service`."""
    return {COMPRESS: gpus, **{f"gpu{index}": 1 for index in range(gpus)}, SERVICE: SERVICE_RUNS}


@dataclass(frozen=True)
class DeployedObject:
    """One wanted thing with its fields, and `put`, which creates or updates it on the server."""

    name: str
    fields: Mapping[str, Any]
    put: Callable[[SyncPrefectClient], object]


@dataclass(frozen=True)
class FieldDifference:
    """A field (empty: the whole thing) whose deployed and wanted values differ."""

    thing: str
    field: str
    deployed: Any
    wanted: Any

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, with secrets hidden."""
        return TypeAdapter(Any).dump_python(asdict(self), mode="json")


def differences(standing: Things, wanted: Sequence[DeployedObject]) -> Iterator[FieldDifference]:
    """Yield every field that differs; a thing that exists on one side only differs as a whole."""
    fields = {thing.name: thing.fields for thing in wanted}
    for name in sorted({*standing, *fields}):
        if name not in standing or name not in fields:
            yield FieldDifference(name, "", "yes" if name in standing else "no", "yes" if name in fields else "no")
            continue
        for field, value in fields[name].items():
            if standing[name].get(field) != value:
                yield FieldDifference(name, field, standing[name].get(field), value)


def deployed(client: SyncPrefectClient) -> Things:
    """Return the pool, its queues and the deployments that use it, as they are on the server."""
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return {}
    things: Things = {f"pool {POOL}": {"type": pool.type, "is_paused": pool.is_paused}}
    for queue in client.read_work_queues(work_pool_name=POOL):
        if queue.name != "default":  # the server's own
            fields = {"concurrency_limit": queue.concurrency_limit, "is_paused": queue.is_paused}
            things[f"queue {queue.name}"] = fields
    in_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for deployment in client.read_deployments(work_pool_filter=in_pool):
        flow = client.read_flow(deployment.flow_id)
        things[f"deployment {flow.name}/{deployment.name}"] = _fields(client, deployment)
    return things


def essence(automation: AutomationCore, blocks: Mapping[UUID, str] | None = None) -> dict[str, Any]:
    """Return an automation's fields without server-specific ids; blocks are given by name."""
    dumped = automation.model_dump(exclude={"id", "owner_resource"})
    for action in dumped["actions"]:
        action.pop("deployment_id", None)
        if "block_document_id" in action:
            action["block_document_id"] = (blocks or {}).get(action["block_document_id"])
    return dumped


def schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flow's parameter schema without empty sections, as the server drops them."""
    return {key: value for key, value in schema.items() if value}


def _fields(client: SyncPrefectClient, deployment: DeploymentResponse) -> dict[str, Any]:
    limit = deployment.global_concurrency_limit
    related = client.read_resource_related_automations(f"prefect.deployment.{deployment.id}")
    known = set(DeploymentScheduleCreate.model_fields)
    return {
        **{name: getattr(deployment, name) for name in SAME},
        "concurrency_limit": limit.limit if limit and limit.active else None,
        "schedules": [DeploymentScheduleCreate(**each.model_dump(include=known)) for each in deployment.schedules],
        "pull_steps": deployment.pull_steps,
        "parameter_openapi_schema": schema(deployment.parameter_openapi_schema or {}),
        "triggers": [essence(each) for each in related if each.name.startswith(OURS)],  # others are the user's own
    }
