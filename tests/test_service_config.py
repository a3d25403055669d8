"""A service file is validated completely before anything is deployed; errors state what to write instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscal.errors import UsageError
from crosscal.service import load_service
from tests.helpers.tiny_place import crosscal

ROOT = Path(__file__).parents[1]


def write(folder: Path, **fields: Any) -> Path:
    file = folder / "service.yaml"
    file.write_text(yaml.safe_dump({"landing": "landing", **fields}))
    return file


WRONG = {
    "unknown key": ({"gpu": 1}, "gpu: unknown field; did you mean `gpus`"),
    "unknown nested key": ({"sweep": {"crom": "0 3 * * 0"}}, "sweep.crom: unknown field; did you mean `cron`"),
    "nothing like it": ({"qqq": 1}, "qqq: unknown field; known: gpus"),
    "no landing place": ({"landing": None}, "landing"),
    "no GPU": ({"gpus": 0}, "gpus"),
    "six fields": ({"watch": {"cron": "* * * * * *"}}, "five fields"),
    "no such minute": ({"watch": {"cron": "99 99 * * *"}}, "watch.cron: not a cron that Prefect can schedule"),
    "no such day": ({"sweep": {"cron": "0 3 32 * *"}}, "(got '0 3 32 * *')"),
    "a time that Prefect leaves out": ({"housekeeping": {"cron": "H 4 * * *"}}, "housekeeping.cron: not a cron"),
    "cron and seconds": ({"watch": {"cron": "* * * * *", "every_seconds": 20}}, "either cron or every_seconds"),
    "a plan from outside": ({"plan": "../plan.yaml"}, "as in the checkout"),
    "an absolute plan": ({"sweep": {"plan": "/plan.yaml"}}, "as in the checkout"),
    "time zone": ({"timezone": "Mars/Olympus"}, "time zone"),
    "a password in a URL": ({"home": "s3://key:secret@bucket"}, "no keys in a URL"),
    "an address in the file": ({"notify": [{"slack": "https://hooks/secret"}]}, "name the environment variable"),
    "two channels in one": ({"notify": [{"slack": "A", "email": "B"}]}, "give one of slack, email, webhook, block"),
    "no such event": ({"notify": [{"slack": "A", "events": ["publishd"]}]}, "'published'"),
    "unknown key of a message": ({"notify": [{"slak": "A"}]}, "slak: unknown field; did you mean `slack`"),
    "unused in a bucket": (
        {"home": "s3://bucket/x", "housekeeping": {"unused_days": 3}},
        "does not know what is unused",
    ),
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG.keys())
def test_every_slip_is_said(fields: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    content, says = fields
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        load_service(write(tmp_path, **content))
    assert "service.yaml" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("cron", ["*/5 * * * *", "0 3 * * mon-fri", "0 0 L * *", "15,45 8-18 * jan 1#2"])
def test_what_prefect_can_schedule_is_a_cron(cron: str, tmp_path: Path) -> None:
    assert load_service(write(tmp_path, watch={"cron": f" {cron} "})).watch.cron == cron


@pytest.mark.parametrize("content", ["[]", "landing: [", "- a"])
def test_what_is_no_mapping_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(content)
    with pytest.raises(UsageError, match="service"):
        load_service(tmp_path / "service.yaml")


def test_folders_are_relative_to_the_file_and_urls_stay(tmp_path: Path) -> None:
    service = load_service(write(tmp_path, home="s3://bucket/home", runs="../runs"))
    assert service.landing == str(tmp_path / "landing")
    assert service.runs == str(tmp_path.parent / "runs")
    assert service.home == "s3://bucket/home"


def test_the_example_is_complete() -> None:
    """It contains every field, so that readers see all options."""
    path = ROOT / "plans/service.yaml"
    assert yaml.safe_load(path.read_text()).keys() == type(load_service(path)).model_fields.keys()


def test_no_server_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write(tmp_path))
    none_named = crosscal("deploy", file)
    assert none_named.code == 2
    assert "PREFECT_API_URL names none" in none_named.err
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    down = crosscal("deploy", file, "--check")
    assert down.code == 1
    assert "does not answer" in down.err
