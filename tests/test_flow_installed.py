"""crosscal installed from a wheel, without a checkout, started by the systemd units' commands, on a real server."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.worker import EventsWorker
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Failed, Running

from benchmarks.local_service import WITH_PASSWORD, free_port, is_healthy, process, receiver, wait_for
from crosscal.errors import UsageError
from crosscal.flows.deploying import compare, deploy
from crosscal.flows.stuck_runs import runs_in
from crosscal.flows.watch import watch
from crosscal.landing import Ledger
from crosscal.service import ServiceConfig, load_service
from crosscal.store import Store
from crosscal.tasks.announce import KEPT, PUBLISHED, emit
from tests.helpers.tiny_place import write_documents
from tests.helpers.wheel import install_wheel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FILES = ROOT / "docs/deploy"
SECONDS = 200.0
OVER = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)


def unit_command(unit: str, settings: Mapping[str, str], instance: str = "") -> list[str]:
    """Return the command that a systemd unit starts."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read_string((FILES / "systemd" / unit).read_text())
    line = parser["Service"]["ExecStart"].replace("%i", instance)
    for name, value in settings.items():
        line = line.replace(f"${{{name}}}", value)
    return shlex.split(line)


@dataclass(frozen=True)
class Machine:
    """A folder that replaces the machine's root, and the variables of the units' environment file."""

    root: Path
    settings: dict[str, str]
    port: int

    def here(self, text: str) -> str:
        """Return `text` with its paths moved under the root and with this machine's port."""
        moved = text.replace("/var/lib/", f"{self.root}/var/lib/").replace("/etc/", f"{self.root}/etc/")
        return moved.replace("4200", str(self.port))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    root = tmp_path_factory.mktemp("machine")
    machine = Machine(root, {}, free_port())
    lines = machine.here((FILES / "systemd/crosscal.env").read_text()).splitlines()
    machine.settings.update(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    machine.settings.update(WITH_PASSWORD | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(install_wheel(root))})
    machine.settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), machine.settings["PATH"]])
    service = machine.here((FILES / "service.yaml").read_text()).replace("every_seconds: 30", "every_seconds: 10")
    for folder in ("etc/crosscal", "var/lib/crosscal"):
        (root / folder).mkdir(parents=True)
    (root / "etc/crosscal/service.yaml").write_text(service)
    return machine


@pytest.fixture(scope="module")
def client(machine: Machine) -> Iterator[SyncPrefectClient]:
    """A client of the server that the unit starts."""
    command, home = unit_command("crosscal-server.service", machine.settings), machine.root / "var/lib/crosscal"
    url, password = machine.settings["PREFECT_API_URL"], machine.settings["PREFECT_API_AUTH_STRING"]
    settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: password, PREFECT_LOGGING_TO_API_ENABLED: False}
    with process(command, machine.settings, machine.root / "server.log", home), pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME"):
            patch.setenv(name, machine.settings[name])
        wait_for(lambda: is_healthy(url), SECONDS)
        with temporary_settings(settings), get_client(sync_client=True) as client:
            yield client
            EventsWorker.drain_all()


def test_what_lands_is_taken_in(machine: Machine, client: SyncPrefectClient) -> None:
    """Deploying creates the landing place, so that no watch fails because it is missing."""
    home, log = machine.root / "var/lib/crosscal", machine.root / "worker.log"
    command = unit_command("crosscal-deploy.service", machine.settings)
    done = subprocess.run(command, cwd=home, env=machine.settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    starting = unit_command("crosscal-worker@.service", machine.settings, "service")
    assert done.stdout.splitlines()[-1].endswith(" ".join(starting[-3:])), "the printed command is the unit's"
    landed = home / "landing/legal/a.jsonl"
    landed.parent.mkdir()
    write_documents(landed, seed="legal", count=30)
    landed.with_name("a.jsonl.done").touch()
    on_a_gpu = unit_command("crosscal-worker@.service", machine.settings, "gpu0")
    with process(starting, machine.settings, log, home), process(on_a_gpu, machine.settings, log, home):
        (run, *_) = wait_for(lambda: runs(client, "recompress", *OVER), SECONDS, every=1.0)
    assert (run.state_type, run.parameters["domain"]) == (StateType.COMPLETED, "legal"), run.state
    assert {run.state_type for run in runs(client, "watch", *OVER)} == {StateType.COMPLETED}
    assert [row.number for row in Ledger(Store(home / "store")).look().runs("legal")]
    assert "is no folder" not in log.read_text()
    assert list(home.glob("*")) == [
        path for path in home.glob("*") if path.name in ("prefect", "landing", "store", "runs")
    ]


def runs(client: SyncPrefectClient, flow: str, *states: StateType) -> list[FlowRun]:
    return list(runs_in(client, *states, flows=(flow,)))


def test_nothing_reports_to_its_makers(machine: Machine, client: SyncPrefectClient) -> None:
    told = client._client.get("/admin/settings").json()
    assert told["server"]["analytics_enabled"] is False
    assert "telemetry" not in (machine.root / "server.log").read_text().lower()
    ask = "from prefect._internal.analytics.enabled import is_telemetry_enabled; print(is_telemetry_enabled())"
    assert subprocess.check_output([sys.executable, "-c", ask], env=machine.settings, text=True).split() == ["False"]
    off = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    assert off.items() <= image_settings().items() & machine.settings.items()


def image_settings() -> dict[str, str]:
    """Return the environment variables that the image sets in every container."""
    _, _, given = (FILES / "compose/Dockerfile").read_text().replace("\\\n", " ").rpartition("ENV ")
    return dict(pair.split("=", 1) for pair in given.split())


def test_compose_starts_what_the_units_start() -> None:
    services: dict[str, Any] = yaml.safe_load((FILES / "compose/compose.yaml").read_text())["services"]
    own = {"CROSSCAL_SERVICE": "/etc/crosscal/service.yaml"}
    for name, unit, instance in (
        ("server", "crosscal-server.service", ""),
        ("deploy", "crosscal-deploy.service", ""),
        ("worker-service", "crosscal-worker@.service", "service"),
        ("worker-gpu0", "crosscal-worker@.service", "gpu0"),
    ):
        assert ["/usr/bin/env", *services[name]["command"]] == unit_command(unit, own, instance)
    for service in services.values():
        secrets = [v for k, v in service.get("environment", {}).items() if k.endswith(("PASSWORD", "STRING", "URL"))]
        assert all("${" in value or value.startswith("http://server") for value in secrets)


def test_prefect_deploy_makes_the_same_of_the_file(client: SyncPrefectClient) -> None:
    """`deployment.yaml` is valid unchanged, and `prefect deploy` drops none of its keys."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deployment.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {"landing": "landing", "home": ".crosscal", "runs": "runs"}
    service = load_service(ROOT / "plans/service.yaml").model_copy(update=folders)
    found = [each for each in compare(service) if each.thing.startswith("deployment ")]
    assert {each.field for each in found} == {"entrypoint"}, "by file in the checkout, by module in an environment"


def test_messages_are_posted_and_their_addresses_stay_secret(
    machine: Machine, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as (address, received):
        check_messages(machine, client, monkeypatch, address, received)


def config(machine: Machine, **changes: Any) -> ServiceConfig:
    folder = machine.root / "etc/crosscal"
    content = yaml.safe_load((folder / "service.yaml").read_text())
    (folder / "changed.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return load_service(folder / "changed.yaml")


def check_messages(
    machine: Machine, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, address: str, received: list[Any]
) -> None:
    deploy(config(machine))
    monkeypatch.setenv("OPS_HOOK", address)
    service = config(machine, notify=[{"webhook": "OPS_HOOK", "events": ["kept", "failed"]}])
    automations = ["failed", "failed-service", "kept"]
    made = [*(f"automation crosscal-notify-{name} to ops-hook" for name in automations)]
    assert deploy(service)["made"] == [*made, "block custom-webhook/crosscal-notify-ops-hook"]
    assert [each for each in compare(service) if each.field] == []

    emit(KEPT, "crosscal.model.legal", {"domain": "legal", "version": 3})
    emit(PUBLISHED, "crosscal.model.legal", {"domain": "legal", "version": 4})
    for _ in range(2):  # a watch that fails every minute sends one message an hour
        failing = client.create_flow_run(watch, state=Running())
        client.set_flow_run_state(failing.id, Failed(message="no such store"), force=True)
    emit(KEPT, "crosscal.model.medical", {"domain": "medical", "version": 5})
    wait_for(lambda: len(received) >= 3, SECONDS)
    subjects = sorted(message["subject"].partition(" · ")[0] for message in received)
    assert subjects == ["crosscal: legal: kept", "crosscal: medical: kept", "crosscal: watch"]
    assert [message for message in received if "no such store" in message["body"] and "flow-run/" in message["body"]]
    assert [message for message in received if message["body"] == "domain: legal\nversion: 3\n"]

    monkeypatch.setenv("OPS_HOOK", f"{address}/another")
    (changed,) = (each for each in compare(service) if each.field)
    assert "127.0.0.1" not in json.dumps(changed.as_json())
    assert deploy(config(machine))["removed"] == [*made, "block custom-webhook/crosscal-notify-ops-hook"]
    missing = config(machine, notify=[{"block": "slack-webhook/ops"}])
    with pytest.raises(UsageError, match=r"no such block .*slack-webhook/ops"):
        deploy(missing)
