"""`deployment.yaml` says only what Prefect understands, and fits the flows. (Prefect drops unknown keys in silence.)"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscal.errors import PlanError, UsageError
from crosscal.flows.deployed import queue_limits
from crosscal.flows.deployment_file import FILE, check, check_plans, fill, read_deployments
from crosscal.service import ServiceConfig, load_service

ROOT = Path(__file__).parents[1]
SERVICE = load_service(ROOT / "plans/service.yaml")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return yaml.safe_load((ROOT / FILE).read_text())


def by_name(filled: dict[str, Any]) -> dict[str, Any]:
    return {deployment["name"]: deployment for deployment in filled["deployments"]}


def test_the_file_is_understood_whole() -> None:
    filled = read_deployments(ROOT, SERVICE)
    assert list(by_name(filled)) == ["recompress", "sweep", "watch", "housekeeping"]
    check_plans(SERVICE, ROOT)


SLIPS = {
    "a key of the file": (("deployment",), [], "did you mean `deployments`"),
    "parameters": (("deployments", 0, "paramaters"), {}, "did you mean `parameters`"),
    "triggers": (("deployments", 0, "trigers"), [], "did you mean `triggers`"),
    "limit": (("deployments", 0, "concurrency_limit", "limits"), 1, "did you mean `limit`"),
    "a limit that is no number": (("deployments", 0, "concurrency_limit", "limit"), "one", "limit"),
    "queue": (("deployments", 0, "work_pool", "queue"), "gpu0", "work_queue_name"),
    "job variables": (("deployments", 0, "work_pool", "job_variables", "environ"), {}, "did you mean `env`"),
    "a parameter the flow has not": (("deployments", 0, "parameters", "plan"), "x", "did you mean `plan_path`"),
    "a parameter of another type": (("deployments", 0, "parameters", "overrides"), "no list", "overrides"),
    "a trigger's key": (("deployments", 0, "triggers", 0, "expects"), [], "did you mean `expect`"),
    "a trigger's value": (("deployments", 0, "triggers", 0, "posture"), "Lazy", "posture|Reactive"),
    "a trigger's parameter": (("deployments", 0, "triggers", 0, "parameters", "domains"), "x", "did you mean `domain`"),
    "a trigger's name": (("deployments", 0, "triggers", 0, "name"), "mine", "begin it with crosscal-"),
    "a schedule's key": (("deployments", 1, "schedules", 0, "crom"), "0 0 * * *", "did you mean `cron`"),
    "two schedules in one": (("deployments", 1, "schedules", 0, "interval"), 60, "Exactly one"),
    "a schedule's parameter": (("deployments", 1, "schedules", 0, "parameters"), {"plan": "x"}, "plan_path"),
    "a value of the service": (
        ("deployments", 2, "parameters", "home"),
        "{{ service.hom }}",
        "no value of the service",
    ),
    "a missing section": (("deployments", 2, "schedules"), None, "schedules"),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS.keys())
def test_every_slip_is_noticed(content: dict[str, Any], slip: tuple[tuple[Any, ...], Any, str]) -> None:
    path, value, says = slip
    spoiled = copy.deepcopy(content)
    place: Any = spoiled
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    problems = "; ".join(check(fill(spoiled, SERVICE), ROOT))
    assert re.search(says, problems), problems


def test_a_flow_that_is_not_there_is_said(content: dict[str, Any]) -> None:
    spoiled = copy.deepcopy(content)
    spoiled["deployments"][2]["entrypoint"] = "flows/watch.py:watches"
    with pytest.raises(UsageError, match="names no flow"):
        list(check(fill(spoiled, SERVICE), ROOT))


def test_a_plan_that_is_not_there_is_said() -> None:
    with pytest.raises(PlanError, match=r"plans/gone\.yaml"):
        check_plans(SERVICE.model_copy(update={"plan": "plans/gone.yaml"}), ROOT)


def test_an_event_brings_a_name_and_nothing_else(content: dict[str, Any]) -> None:
    """Neither a plan nor a path nor an override: whoever can send events can choose among domains, no more."""
    triggers = [trigger for deployment in content["deployments"] for trigger in deployment["triggers"]]
    assert [trigger["parameters"] for trigger in triggers] == [{"domain": "{{ event.payload.domain }}"}]
    assert triggers[0]["for_each"] == ["prefect.resource.id"]


def test_the_service_is_filled_in_with_its_types(content: dict[str, Any]) -> None:
    service = ServiceConfig.model_validate(
        {"landing": "/l", "gpus": 3, "settle_seconds": 2, "watch": {"every_seconds": 20}, "timezone": "Europe/Berlin"}
    )
    filled = by_name(fill(content, service))
    assert filled["recompress"]["concurrency_limit"]["limit"] == 3
    assert filled["watch"]["parameters"]["settle_seconds"] == 2.0
    assert filled["housekeeping"]["parameters"]["unused_days"] is None
    (schedule,) = filled["watch"]["schedules"]
    assert schedule == {"slug": "watch", "interval": 20, "timezone": "Europe/Berlin", "active": True}
    assert filled["recompress"]["triggers"][0]["parameters"] == {"domain": "{{ event.payload.domain }}"}


def test_no_deployment_names_a_gpu_and_the_watch_has_a_queue_of_its_own(content: dict[str, Any]) -> None:
    filled = by_name(fill(content, SERVICE))
    queues = {name: deployment["work_pool"]["work_queue_name"] for name, deployment in filled.items()}
    assert queues == {"recompress": "compress", "sweep": "compress", "watch": "service", "housekeeping": "service"}
    devices = {
        name: deployment["work_pool"]["job_variables"]["env"].get("CUDA_VISIBLE_DEVICES")
        for name, deployment in filled.items()
    }
    assert devices == {"recompress": None, "sweep": None, "watch": "", "housekeeping": ""}
    assert queue_limits(2) == {"compress": 2, "gpu0": 1, "gpu1": 1, "service": 2}


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_no_machine_is_named(content: dict[str, Any]) -> None:
    assert strings({"a": [{"b": "/x"}]}) == ["a", "b", "/x"]
    assert not [text for text in strings(content) if text.startswith(("/", "~"))]
