"""`deployment.yaml`, filled in and checked: Prefect drops keys it does not know, and a typo deploys "successfully"."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from prefect import Flow
from prefect.cli.deploy import _models as prefect_yaml
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ParameterTypeError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.templating import apply_values
from pydantic import BaseModel, ValidationError

from crosscal.errors import PlanError, UsageError
from crosscal.service import ServiceConfig, suggestion

FILE = "deployment.yaml"
JOB_VARIABLES = {"env", "command", "labels", "name", "stream_output", "working_dir"}
"""What a work pool of type `process` takes."""
TRIGGERS = "crosscal-"
"""How the names of our triggers begin: the server does not say which automations a deployment brought along."""
NEEDED = ("name", "entrypoint", "parameters", "concurrency_limit", "work_pool", "triggers", "schedules", "paused")


def read_deployments(checkout: Path, service: ServiceConfig) -> dict[str, Any]:
    """The file with the service's values in it. Raises `UsageError` for anything Prefect would ignore or refuse."""
    path = checkout / FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError("the deployment file cannot be read", where=str(path), got=str(error)) from error
    filled = fill(content, service)
    problems = list(check(filled, checkout))
    if problems:
        raise UsageError("; ".join(problems), where=str(path))
    return filled


def fill(content: dict[str, Any], service: ServiceConfig) -> dict[str, Any]:
    """Put the service's values where `{{ service.… }}` stands; what is null there is left out of a schedule."""
    values = {"service": service.model_dump()}
    filled = cast(dict[str, Any], apply_values(content, values, remove_notset=False))
    deployments = [
        {**each, "schedules": [_without_nulls(schedule) for schedule in each["schedules"]]}
        if isinstance(each.get("schedules"), list)
        else each
        for each in filled.get("deployments", [])
    ]
    return {**filled, "deployments": deployments}


def check(content: Mapping[str, Any], checkout: Path) -> Iterator[str]:
    """Everything in a filled file that Prefect would ignore or refuse, a sentence each."""
    yield from _unknown("", content, _known(prefect_yaml.PrefectYamlModel))
    for deployment in content["deployments"]:
        name = deployment.get("name", "a deployment")
        yield from _check_keys(name, deployment)
        missing = [key for key in NEEDED if key not in deployment]
        yield from (f"{name}.{key}: this key is needed" for key in missing)
        if not missing:
            yield from _check_values(name, deployment, checkout)
    yield from (f"{text!r} is no value of the service" for text in _strings(content) if "{{ service" in text)


def _check_keys(name: str, deployment: Mapping[str, Any]) -> Iterator[str]:
    yield from _unknown(name, deployment, _known(prefect_yaml.DeploymentConfig))
    sections: dict[str, set[str]] = {
        "concurrency_limit": _known(prefect_yaml.ConcurrencyLimitSpec),
        "work_pool": _known(prefect_yaml.WorkPoolConfig),
    }
    for section, known in sections.items():
        yield from _unknown(f"{name}.{section}", deployment.get(section, {}), known)
    job = deployment.get("work_pool", {}).get("job_variables", {})
    yield from _unknown(f"{name}.work_pool.job_variables", job, JOB_VARIABLES)
    for trigger in deployment.get("triggers", []):
        yield from _unknown(f"{name}.triggers", trigger, _known(DeploymentEventTrigger))
    for schedule in deployment.get("schedules", []):
        yield from _unknown(f"{name}.schedules", schedule, _known(prefect_yaml.RawScheduleConfig))


def _check_values(name: str, deployment: Mapping[str, Any], checkout: Path) -> Iterator[str]:
    models = [(prefect_yaml.DeploymentConfig, "", deployment)]
    models += [(DeploymentEventTrigger, ".triggers", trigger) for trigger in deployment["triggers"]]
    models += [(prefect_yaml.RawScheduleConfig, ".schedules", schedule) for schedule in deployment["schedules"]]
    for model, place, value in models:
        try:
            model.model_validate(value)
        except ValidationError as error:
            yield from (f"{name}{place}: {problem['msg']} (got {problem['input']!r:.60})" for problem in error.errors())
    for trigger in deployment["triggers"]:
        if not str(trigger.get("name")).startswith(TRIGGERS):
            yield f"{name}.triggers.name: begin it with {TRIGGERS} (got {trigger.get('name')!r})"
    flow = find_flow(deployment["entrypoint"], checkout)
    yield from _check_parameters(f"{name}.parameters", flow, deployment["parameters"], whole=not deployment["triggers"])
    for kind in ("triggers", "schedules"):
        for each in deployment[kind]:
            parameters = deployment["parameters"] | each.get("parameters", {})
            yield from _check_parameters(f"{name}.{kind}.parameters", flow, parameters, whole=True)


def find_flow(entrypoint: str, checkout: Path) -> Flow[..., Any]:
    """The flow that an entrypoint such as `flows/watch.py:watch` names."""
    try:
        return load_flow_from_entrypoint(f"{checkout}/{entrypoint}")
    except Exception as error:  # whatever importing the file may raise
        raise UsageError("this entrypoint names no flow", where=FILE, got=f"{entrypoint}: {error}") from error


def _check_parameters(place: str, flow: Flow[..., Any], parameters: Mapping[str, Any], *, whole: bool) -> Iterator[str]:
    """Whether the flow takes these parameters; values that an event fills in later count as given."""
    signature = inspect.signature(flow.fn)
    yield from _unknown(place, parameters, set(signature.parameters))
    try:
        signature.bind(**parameters) if whole else signature.bind_partial(**parameters)
        known = {key: value for key, value in parameters.items() if not _comes_later(value)}
        flow.validate_parameters(known)
    except (TypeError, ParameterTypeError) as error:
        yield f"{place}: {' '.join(str(error).split())}"


def _comes_later(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and "{{" in value)


def check_plans(service: ServiceConfig, checkout: Path) -> None:
    """The plans that the service names are there. Raises `PlanError`."""
    for field, plan in {"plan": service.plan, "sweep.plan": service.sweep.plan}.items():
        if not (checkout / plan).is_file():
            raise PlanError("there is no such plan in the checkout", where=field, got=plan)


def _unknown(place: str, content: Any, known: set[str]) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"{place}: a mapping is needed (got {content!r:.60})"
        return
    for key in content.keys() - known:
        yield f"{place}.{key}: unknown key; {suggestion(str(key), known)}".lstrip(".")


def _known(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _without_nulls(schedule: Any) -> Any:
    if not isinstance(schedule, dict):
        return schedule
    return {key: value for key, value in schedule.items() if value is not None}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
