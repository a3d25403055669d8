"""What stands on the server beside what the file says, both as plain values that can be compared field by field.

A "thing" is a pool, a queue or a deployment; its state is a mapping of fields in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from crosscal.flows.deployment_file import TRIGGERS, find_flow
from crosscal.service import ServiceConfig

POOL = "gpu"
COMPRESS, SERVICE = "compress", "service"
SERVICE_RUNS = 2
"""The watch and housekeeping, side by side."""
Things = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    thing: str
    field: str
    deployed: Any
    wanted: Any

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def queue_limits(gpus: int) -> dict[str, int]:
    """Queues and how many runs of each may be under way: `compress`, one for each GPU, `service`."""
    return {COMPRESS: gpus, **{f"gpu{index}": 1 for index in range(gpus)}, SERVICE: SERVICE_RUNS}


def wanted(content: Mapping[str, Any], service: ServiceConfig, checkout: Path) -> Things:
    """What the filled deployment file and the service ask for."""
    things: Things = {f"pool {POOL}": {"type": "process", "paused": False}}
    for name, limit in queue_limits(service.gpus).items():
        things[f"queue {name}"] = {"limit": limit, "paused": False}
    for deployment in content["deployments"]:
        flow = find_flow(deployment["entrypoint"], checkout)
        things[f"deployment {flow.name}/{deployment['name']}"] = _plain(
            {
                "entrypoint": deployment["entrypoint"],
                "description": deployment.get("description") or flow.description,
                "parameters": deployment["parameters"],
                "takes": _schema(parameter_schema(flow).model_dump(mode="json")),
                "enforce_parameter_schema": deployment.get("enforce_parameter_schema", True),
                "paused": deployment["paused"],
                "limit": deployment["concurrency_limit"]["limit"],
                "collision_strategy": deployment["concurrency_limit"]["collision_strategy"],
                "pool": deployment["work_pool"]["name"],
                "queue": deployment["work_pool"]["work_queue_name"],
                "job_variables": deployment["work_pool"].get("job_variables", {}),
                "pull": deployment.get("pull", content.get("pull")),
                "schedules": [_wanted_schedule(schedule) for schedule in deployment["schedules"]],
                "triggers": [_wanted_trigger(trigger) for trigger in deployment["triggers"]],
            }
        )
    return things


def deployed(client: SyncPrefectClient) -> Things:
    """What stands on the server: the pool, its queues and the deployments that use it."""
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return {}
    things: Things = {f"pool {POOL}": {"type": pool.type, "paused": pool.is_paused}}
    for queue in client.read_work_queues(work_pool_name=POOL):
        if queue.name != "default":  # the server's own
            things[f"queue {queue.name}"] = {"limit": queue.concurrency_limit, "paused": queue.is_paused}
    in_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for deployment in client.read_deployments(work_pool_filter=in_pool):
        flow = client.read_flow(deployment.flow_id)
        things[f"deployment {flow.name}/{deployment.name}"] = _deployment_state(client, deployment)
    return things


def differences(deployed: Things, wanted: Things) -> Iterator[Difference]:
    """Every field in which they differ; a thing that is on one side alone differs as a whole."""
    for thing in sorted({*deployed, *wanted}):
        if thing not in deployed or thing not in wanted:
            yield Difference(thing, "", "yes" if thing in deployed else "no", "yes" if thing in wanted else "no")
            continue
        for field, value in wanted[thing].items():
            if deployed[thing].get(field) != value:
                yield Difference(thing, field, deployed[thing].get(field), value)


def _deployment_state(client: SyncPrefectClient, deployment: DeploymentResponse) -> dict[str, Any]:
    limit, options = deployment.global_concurrency_limit, deployment.concurrency_options
    related = client.read_resource_related_automations(f"prefect.deployment.{deployment.id}")
    automations = [each for each in related if each.name.startswith(TRIGGERS)]  # others may be somebody's own
    return _plain(
        {
            "entrypoint": deployment.entrypoint,
            "description": deployment.description,
            "parameters": deployment.parameters,
            "takes": _schema(deployment.parameter_openapi_schema or {}),
            "enforce_parameter_schema": deployment.enforce_parameter_schema,
            "paused": deployment.paused,
            "limit": limit.limit if limit and limit.active else None,
            "collision_strategy": options.collision_strategy if options else None,
            "pool": deployment.work_pool_name,
            "queue": deployment.work_queue_name,
            "job_variables": deployment.job_variables,
            "pull": deployment.pull_steps,
            "schedules": [_deployed_schedule(each) for each in deployment.schedules],
            "triggers": [_trigger_state(a) for a in sorted(automations, key=lambda a: a.name)],
        }
    )


def _wanted_schedule(schedule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "slug": schedule.get("slug"),
        "cron": schedule.get("cron"),
        "every_seconds": schedule.get("interval"),
        "timezone": schedule.get("timezone"),
        "active": schedule.get("active", True),
        "parameters": schedule.get("parameters", {}),
    }


def _deployed_schedule(each: Any) -> dict[str, Any]:
    interval = getattr(each.schedule, "interval", None)
    return {
        "slug": each.slug,
        "cron": getattr(each.schedule, "cron", None),
        "every_seconds": interval.total_seconds() if interval else None,
        "timezone": each.schedule.timezone,
        "active": each.active,
        "parameters": each.parameters,
    }


def _wanted_trigger(spec: Mapping[str, Any]) -> dict[str, Any]:
    trigger = DeploymentEventTrigger.model_validate(spec)
    trigger.set_deployment_id(_NOBODY)
    return _trigger_state(trigger.as_automation())


_NOBODY: UUID = uuid4()


def _trigger_state(automation: Any) -> dict[str, Any]:
    """An automation without what names this server's own objects; sets in order."""
    state = TypeAdapter(Any).dump_python(automation.model_dump(mode="json"))
    trigger = {k: sorted(v) if isinstance(v, list) else v for k, v in state["trigger"].items() if k != "id"}
    actions = [{k: v for k, v in action.items() if k != "deployment_id"} for action in state["actions"]]
    return {"name": state["name"], "enabled": state["enabled"], "trigger": trigger, "actions": actions}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Of a flow's parameters; the server drops sections that are empty."""
    return {key: value for key, value in schema.items() if value}


def _plain(value: Any) -> Any:
    """As it comes out of JSON, so that tuples, enumerations and models compare equal to what a server returns."""
    return json.loads(json.dumps(value, default=lambda each: getattr(each, "value", str(each))))
