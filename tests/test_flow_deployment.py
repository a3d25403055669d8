"""Deployments match the flows and plans; `deployment.yaml` tells `prefect deploy` the same, key by key."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._schedules import _construct_schedules
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from rich.console import Console

from crosscal.errors import PlanError
from crosscal.flows.deploying import check_plans
from crosscal.flows.deployments import PULL, _fields, deployments, queue_limits
from crosscal.service import ServiceConfig, load_service

ROOT = Path(__file__).parents[1]
FOLDERS = {"landing": "landing", "home": ".crosscal", "runs": "runs"}
SERVICE = load_service(ROOT / "plans/service.yaml").model_copy(update=FOLDERS)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deployment.yaml").read_text())


def by_name(service: ServiceConfig) -> dict[str, RunnerDeployment]:
    return {each.name: each for each in deployments(service)}


def without_entrypoint(runner: RunnerDeployment) -> dict[str, Any]:
    return {name: value for name, value in _fields(runner).items() if name != "entrypoint"}


def as_prefect_reads(content: dict[str, Any]) -> dict[str, Any]:
    """Return the deployments that `prefect deploy` makes of a file, by name; raise its errors."""
    content = copy.deepcopy(content)
    PrefectYamlModel.model_validate(content)
    assert content["pull"] == PULL
    read = {}
    for each in content["deployments"]:
        limit = each.get("concurrency_limit") or {}
        strategy = {"collision_strategy": limit.get("collision_strategy")}
        flow = load_flow_from_entrypoint(f"{ROOT}/{each['entrypoint']}")
        runner = RunnerDeployment(
            flow_name=flow.name,
            schedules=[DeploymentScheduleCreate(**schedule) for schedule in _schedules(each)],
            triggers=_initialize_deployment_triggers(each["name"], each.get("triggers") or []),
            concurrency_limit=limit.get("limit"),
            concurrency_options=strategy,
            work_pool_name=each["work_pool"].get("name"),
            work_queue_name=each["work_pool"].get("work_queue_name"),
            job_variables=each["work_pool"].get("job_variables"),
            **{name: each.get(name) for name in ("name", "description", "parameters", "paused", "entrypoint")},
            enforce_parameter_schema=each.get("enforce_parameter_schema"),
        )
        runner._set_defaults_from_flow(flow)
        read[runner.name] = without_entrypoint(runner)
    return read


def _schedules(each: dict[str, Any]) -> list[dict[str, Any]]:
    return _construct_schedules(each, {}, console=Console(), is_interactive=lambda: False)


def is_same(content: dict[str, Any]) -> bool:
    return as_prefect_reads(content) == {name: without_entrypoint(each) for name, each in by_name(SERVICE).items()}


def test_the_file_says_the_same(content: dict[str, Any]) -> None:
    assert is_same(content)
    for each in content["deployments"]:
        flow = load_flow_from_entrypoint(by_name(SERVICE)[each["name"]].entrypoint or "")
        assert Path(inspect.getfile(flow.fn)).resolve() == ROOT / each["entrypoint"].partition(":")[0]


SLIPS = {
    "a key of the file": (("deployment",), []),
    "parameters": (("deployments", 0, "paramaters"), {}),
    "triggers": (("deployments", 0, "trigers"), []),
    "limit": (("deployments", 0, "concurrency_limit", "limits"), 1),
    "a limit that is no number": (("deployments", 0, "concurrency_limit", "limit"), "one"),
    "queue": (("deployments", 0, "work_pool", "queue"), "gpu0"),
    "job variables": (("deployments", 0, "work_pool", "job_variables", "environ"), {}),
    "a trigger's key": (("deployments", 0, "triggers", 0, "expects"), []),
    "a schedule's key": (("deployments", 1, "schedules", 0, "crom"), "0 0 * * *"),
    "a missing section": (("deployments", 2, "schedules"), None),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS.keys())
def test_every_slip_in_the_file_is_noticed(content: dict[str, Any], slip: tuple[tuple[Any, ...], Any]) -> None:
    """Most slips misspell a key, which Prefect drops silently."""
    (*parents, last), value = slip
    spoiled = copy.deepcopy(content)
    place: Any = spoiled
    for part in parents:
        place = place[part]
    right = {"deployment": "deployments", "paramaters": "parameters", "trigers": "triggers", "limits": "limit"}
    right |= {"queue": "work_queue_name", "environ": "env", "expects": "expect", "crom": "cron"}
    del place[right.get(last, last)]
    if value is not None:
        place[last] = value
    with suppress(ValueError, KeyError, TypeError):  # Prefect may raise an error instead
        assert not is_same(spoiled)


def test_every_deployment_gives_its_flow_what_it_takes() -> None:
    for each in deployments(SERVICE):
        flow = load_flow_from_entrypoint(each.entrypoint or "")
        from_events = [getattr(trigger, "parameters", {}) for trigger in each.triggers]
        for more in from_events or [{}]:
            inspect.signature(flow.fn).bind(**{**each.parameters, **more})
            flow.validate_parameters({**each.parameters, **more})


def test_an_event_brings_a_name_and_nothing_else() -> None:
    """An event carries no plan, path or override: its sender can choose a domain and nothing else."""
    triggers: list[Any] = [trigger for deployment in deployments(SERVICE) for trigger in deployment.triggers]
    assert [trigger.parameters for trigger in triggers] == [{"domain": "{{ event.payload.domain }}"}]
    assert triggers[0].for_each == {"prefect.resource.id"}


def test_the_service_is_filled_in() -> None:
    service = ServiceConfig.model_validate(
        {"landing": "/l", "gpus": 3, "settle_seconds": 2, "watch": {"every_seconds": 20}, "timezone": "Europe/Berlin"}
    )
    filled = by_name(service)
    assert filled["recompress"].concurrency_limit == 3
    assert filled["watch"].parameters["settle_seconds"] == 2.0
    assert filled["housekeeping"].parameters["unused_days"] is None
    (schedule,) = filled["watch"].schedules or []
    assert (schedule.slug, schedule.active) == ("watch", True)
    assert (schedule.schedule.interval.total_seconds(), schedule.schedule.timezone) == (20, "Europe/Berlin")  # pyright: ignore
    assert deployments(service)[2].schedules == deployments(service)[2].schedules, "the time of deploying is no part"


def test_no_deployment_names_a_gpu_and_the_watch_has_a_queue_of_its_own() -> None:
    filled = by_name(SERVICE)
    queues = {name: deployment.work_queue_name for name, deployment in filled.items()}
    assert queues == {"recompress": "compress", "sweep": "compress", "watch": "service", "housekeeping": "service"}
    devices = {name: each.job_variables["env"].get("CUDA_VISIBLE_DEVICES") for name, each in filled.items()}
    assert devices == {"recompress": None, "sweep": None, "watch": "", "housekeeping": ""}
    assert queue_limits(2) == {"compress": 2, "gpu0": 1, "gpu1": 1, "service": 2}


LANDING = {"model": "m", "corpora": {"general": "g", "$domain": {}}, "compress": {"method": "rtn", "bits": 4}}
REFUSED = {
    "an unknown field": ({**LANDING, "calibraton": {}}, "calibraton: unknown field; did you mean `calibration`"),
    "an unknown field of a section": ({**LANDING, "evaluate": {"window": 3}}, "evaluate.window: unknown field"),
    "no place for a domain": ({**LANDING, "corpora": {"general": "g"}}, "no place for a domain"),
    "no mapping": ([], "a plan is a mapping"),
}


@pytest.mark.parametrize(("plan", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_plan_that_would_fail_at_night_is_refused(plan: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "service.yaml").write_text("{landing: landing, plan: mine.yaml}")
    with pytest.raises(PlanError, match=says):
        check_plans(load_service(tmp_path / "service.yaml"))


def test_a_sweeps_plan_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(LANDING))
    (tmp_path / "service.yaml").write_text("{landing: landing, sweep: {plan: sweep.yaml}}")
    with pytest.raises(PlanError, match="Give --domain NAME"):
        check_plans(load_service(tmp_path / "service.yaml"))


def test_a_plan_that_is_not_there_is_said() -> None:
    check_plans(SERVICE)
    with pytest.raises(PlanError, match=r"plans/gone\.yaml"):
        check_plans(SERVICE.model_copy(update={"plan": "plans/gone.yaml"}))


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_no_machine_is_named(content: dict[str, Any]) -> None:
    assert strings({"a": [{"b": "/x"}]}) == ["a", "b", "/x"]
    assert not [text for text in strings(content) if text.startswith(("/", "~"))]
