"""`deployment.yaml` says only what Prefect understands, and fits the flow. (Prefect drops unknown keys in silence.)"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from jinja2 import Environment
from prefect.cli.deploy import _models as prefect_yaml
from prefect.events import DeploymentEventTrigger
from pydantic import BaseModel

from crosscal.plan import load_plan
from flows.recompress import recompress

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployment.yaml"
JOB_VARIABLES = {"env", "command", "labels", "name", "stream_output", "working_dir"}
"""What a work pool of type `process` takes."""


def known(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def check(content: dict[str, Any]) -> None:
    """Raises `AssertionError` or a validation error for anything Prefect would ignore or refuse."""
    prefect_yaml.PrefectYamlModel.model_validate(content)
    assert content.keys() <= known(prefect_yaml.PrefectYamlModel)
    for deployment in content["deployments"]:
        assert deployment.keys() <= known(prefect_yaml.DeploymentConfig)
        assert deployment["concurrency_limit"].keys() <= known(prefect_yaml.ConcurrencyLimitSpec)
        assert deployment["work_pool"].keys() <= known(prefect_yaml.WorkPoolConfig)
        assert deployment["work_pool"]["job_variables"].keys() <= JOB_VARIABLES
        fits_the_flow(deployment["parameters"])
        for trigger in deployment["triggers"]:
            assert trigger.keys() <= known(DeploymentEventTrigger)
            DeploymentEventTrigger.model_validate(trigger)
            fits_the_flow(trigger["parameters"])
        for schedule in deployment["schedules"]:
            prefect_yaml.RawScheduleConfig.model_validate(schedule)  # refuses unknown keys itself
            fits_the_flow(deployment["parameters"] | schedule["parameters"])


def fits_the_flow(parameters: dict[str, Any]) -> None:
    signature = inspect.signature(cast(Callable[..., Any], recompress.fn))
    plain = {name: value for name, value in parameters.items() if not isinstance(value, dict)}
    signature.bind(**parameters)
    recompress.validate_parameters(plain)


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_the_file_is_understood_whole(content: dict[str, Any]) -> None:
    check(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("deployments", 0, "paramaters"), {}),
        (("deployments", 0, "trigers"), []),
        (("deployments", 0, "concurrency_limit", "limits"), 1),
        (("deployments", 0, "work_pool", "queue"), "gpu0"),
        (("deployments", 0, "work_pool", "job_variables", "environment"), {}),
        (("deployments", 0, "parameters", "plan"), "x"),
        (("deployments", 0, "parameters", "overrides"), "not a list"),
        (("deployments", 0, "triggers", 0, "expects"), []),
        (("deployments", 0, "triggers", 0, "posture"), "Lazy"),
        (("deployments", 0, "schedules", 0, "crom"), "0 0 * * *"),
        (("deployments", 0, "schedules", 0, "parameters", "plan"), "x"),
        (("deployment",), []),
    ],
)
def test_every_slip_is_noticed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    spoiled = copy.deepcopy(content)
    place: Any = spoiled
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(Exception):
        check(spoiled)


def test_entrypoint_and_plans_exist(content: dict[str, Any]) -> None:
    (deployment,) = content["deployments"]
    file, function = deployment["entrypoint"].split(":")
    assert f"def {function}(" in (ROOT / file).read_text()
    sources = [deployment, *deployment["triggers"], *deployment["schedules"]]
    for source in sources:
        load_plan(ROOT / source["parameters"]["plan_path"])


def test_an_event_becomes_overrides_of_the_plan(content: dict[str, Any], tmp_path: Path) -> None:
    (trigger,) = content["deployments"][0]["triggers"]
    template = trigger["parameters"]["overrides"]["value"]["template"]
    landed = tmp_path / "landed"
    landed.mkdir()
    rendered = Environment().from_string(template).render(event={"payload": {"path": str(landed)}})
    plan = load_plan(ROOT / trigger["parameters"]["plan_path"], tuple(yaml.safe_load(rendered)))
    assert plan.document_corpora["domain"].path == [str(landed)]


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_no_machine_is_named() -> None:
    assert strings({"a": [{"b": "/x"}]}) == ["a", "b", "/x"]
    assert not [text for text in strings(yaml.safe_load(FILE.read_text())) if text.startswith(("/", "~"))]
