"""The service, on a real server: repeated deploys, reported differences, announced domains and closed dead runs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
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
from prefect.states import Cancelled, Running

from benchmarks.local_service import WITH_PASSWORD, environment, free_port, server, wait_for
from crosscal.errors import CrosscalError, UsageError
from crosscal.flows.deploying import compare, deploy
from crosscal.flows.drive import drive
from crosscal.flows.housekeeping import housekeeping
from crosscal.flows.stuck_runs import PROCESS, close_stuck_runs, runs_in
from crosscal.flows.watch import watch
from crosscal.flows.workers import worker
from crosscal.landing import Ledger
from crosscal.service import ServiceConfig, load_service
from crosscal.store import Store
from crosscal.store.processes import number_of
from tests.helpers.tiny_place import write_documents

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SECONDS = 60.0
SLEEPER = """
import sys
import time
from prefect import flow
from crosscal.flows.stuck_runs import note_process

@flow(name=sys.argv[1], on_running=[note_process])
def sleep() -> None:
    time.sleep(600)

sleep()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[SyncPrefectClient]:
    """A client of a server for this module, which this process and its children use as well."""
    shared = environment(folder, free_port(), **WITH_PASSWORD)
    with server(folder, shared), pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME"):
            patch.setenv(name, shared[name])
        settings = {
            PREFECT_API_URL: shared["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: shared["PREFECT_API_AUTH_STRING"],
            PREFECT_LOGGING_TO_API_ENABLED: False,
        }
        with temporary_settings(settings), get_client(sync_client=True) as client:
            yield client
            EventsWorker.drain_all()  # it would seek this server forever and block the next one's events


def config(folder: Path, **changes: Any) -> ServiceConfig:
    file = folder / "service.yaml"
    places = {name: str(folder / name) for name in ("landing", "home", "runs")}
    file.write_text(yaml.safe_dump({**places, "gpus": 2, **changes}))
    return load_service(file)


@pytest.fixture(scope="module")
def first(client: SyncPrefectClient, folder: Path) -> dict[str, Any]:
    return deploy(config(folder))


def test_everything_is_made_and_a_worker_named_for_each_gpu(first: dict[str, Any]) -> None:
    queues = ["queue compress", "queue gpu0", "queue gpu1", "queue service"]
    flows = ("housekeeping/housekeeping", "recompress/recompress", "recompress/sweep", "watch/watch")
    assert first["made"] == [*(f"deployment {name}" for name in flows), "pool gpu", *queues]
    assert first["changed"] == first["unchanged"] == []
    gpu0, gpu1, service = first["workers"]
    assert "CUDA_VISIBLE_DEVICES=0 " in gpu0
    assert "--work-queue compress --work-queue gpu0 --limit 1" in shlex.join(worker("gpu0")[0])
    assert all(each.endswith(name) for each, name in zip(first["workers"], ("gpu0", "gpu1", "service"), strict=True))
    assert "CUDA_VISIBLE_DEVICES=1 " in gpu1
    assert "CUDA_VISIBLE_DEVICES= " in service
    assert "--work-queue service " in shlex.join(worker("service")[0])
    with pytest.raises(UsageError, match="gpu0, gpu1, … or service"):
        worker("gpu")


def test_a_second_time_nothing_is_touched(first: dict[str, Any], client: SyncPrefectClient, folder: Path) -> None:
    trigger = [each.id for each in client.read_automations()]
    again = deploy(config(folder))
    assert again["made"] == again["changed"] == []
    assert again["unchanged"] == first["made"]
    assert [each.id for each in client.read_automations()] == trigger
    assert compare(config(folder)) == []


def test_a_server_that_refuses_is_told_from_one_that_is_down(client: SyncPrefectClient, folder: Path) -> None:
    with temporary_settings({PREFECT_API_AUTH_STRING: "crosscal:something else"}):
        with pytest.raises(CrosscalError, match=r"refuses us .*PREFECT_API_AUTH_STRING"):
            compare(config(folder))
        with pytest.raises(CrosscalError, match=r"refuses us .*PREFECT_API_AUTH_STRING"):
            drive(ROOT / "plans/demo.yaml", [], str(folder / "store"), None)


def test_schedules_make_runs(first: dict[str, Any], client: SyncPrefectClient) -> None:
    """Deploying succeeds even if the server's scheduler fails, so check that it schedules runs."""
    runs = wait_for(lambda: list(runs_in(client, StateType.SCHEDULED, flows=("watch",))), SECONDS)
    assert runs[0].parameters["settle_seconds"] == 10.0


def test_every_change_is_reported_and_put_right(first: dict[str, Any], client: SyncPrefectClient, folder: Path) -> None:
    queue = client.read_work_queue_by_name("gpu1", work_pool_name="gpu")
    client.update_work_queue(queue.id, concurrency_limit=5)
    client.delete_automation(client.read_automations()[0].id)
    client.pause_deployment(client.read_deployment_by_name("watch/watch").id)
    other = config(folder, sweep={"cron": "0 4 * * 1"}, watch={"every_seconds": 20}, gpus=3)
    found = {(each.thing, each.field): (each.deployed, each.wanted) for each in compare(other)}
    assert found["queue gpu1", "concurrency_limit"] == (5, 1)
    assert found["queue gpu2", ""] == ("no", "yes")
    assert found["deployment recompress/recompress", "concurrency_limit"] == (2, 3)
    assert found["deployment recompress/recompress", "triggers"][0] == []
    assert found["deployment watch/watch", "paused"] == (True, False)
    assert found["deployment watch/watch", "schedules"][1][0].schedule.interval.total_seconds() == 20
    assert found["deployment recompress/sweep", "schedules"][0][0].schedule.cron == "0 3 * * 0"
    assert ("deployment housekeeping/housekeeping", "") not in found
    done = deploy(other)
    assert done["made"] == ["queue gpu2"]
    assert "deployment housekeeping/housekeeping" in done["unchanged"]
    assert compare(other) == []
    fewer = [each for each in compare(config(folder, gpus=2)) if not each.field]
    assert [(each.thing, each.wanted) for each in fewer] == [("queue gpu2", "no")]


def domains_of(runs: Iterator[FlowRun]) -> list[str]:
    return sorted(str(run.parameters["domain"]) for run in runs if run.parameters.get("domain"))


def test_the_watch_announces_exactly_what_waits(first: dict[str, Any], client: SyncPrefectClient, folder: Path) -> None:
    """Of the domains fresh, lost, done, claimed by a living process and planned, the first two are announced."""
    landing, store = folder / "landing", Store(folder / "home")
    ledger = Ledger(store)
    for domain in ("lost", "done", "claimed", "planned"):
        ledger.request(domain, 1)
    for domain in ("done", "claimed"):
        run = ledger.claim(domain, "somebody's")
        assert run is not None
        if domain == "done":
            ledger.mark(run, "kept")
    planned = client.read_deployment_by_name("recompress/recompress").id
    client.create_flow_run_from_deployment(planned, parameters={"domain": "planned"})
    (landing / "fresh").mkdir(parents=True)
    write_documents(landing / "fresh" / "a.jsonl", seed="fresh", count=30)

    done = watch(str(landing), str(folder / "home"), 0.0)
    assert done["files"] == {"ingested": 1}
    assert done["announced"] == {"fresh": 1, "lost": 1}

    def scheduled() -> list[str]:
        return domains_of(runs_in(client, StateType.SCHEDULED, flows=("recompress",)))

    wait_for(lambda: len(scheduled()) == 3, SECONDS)
    assert scheduled() == ["fresh", "lost", "planned"], "the trigger passes the domain on"
    assert watch(str(landing), str(folder / "home"), 0.0)["announced"] == {}, "runs wait for them already"

    def waiting_run(domain: str) -> FlowRun:
        runs = runs_in(client, StateType.SCHEDULED, flows=("recompress",))
        return next(run for run in runs if run.parameters.get("domain") == domain)

    client.delete_flow_run(waiting_run("lost").id)
    assert watch(str(landing), str(folder / "home"), 0.0)["announced"] == {"lost": 1}
    client.set_flow_run_state(waiting_run("fresh").id, Cancelled(), force=True)
    ledger.pause("lost", is_paused=True)
    assert watch(str(landing), str(folder / "home"), 0.0)["announced"] == {}
    assert (ledger.cancelled("fresh"), ledger.pending("lost")) == (1, 1), "a person's decisions"
    ledger.request("fresh", 1, again=True)
    assert watch(str(landing), str(folder / "home"), 0.0)["announced"] == {"fresh": 1}


@pytest.fixture
def sleepers(client: SyncPrefectClient, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes, each carrying out a run of its own flow."""
    flows = ("study", "housekeeping")
    started = [subprocess.Popen([sys.executable, "-c", SLEEPER, flow], env={**os.environ}) for flow in flows]
    yield started
    for process in started:
        process.kill()
        process.wait()


def at_work(client: SyncPrefectClient) -> dict[int, FlowRun]:
    """Return running flow runs by the number of the process that labelled them."""
    runs = [run for run in runs_in(client, StateType.RUNNING) if PROCESS in run.labels]
    return {number_of(str(run.labels[PROCESS])): run for run in runs}


def test_housekeeping_closes_a_killed_run_and_leaves_a_living_one(
    client: SyncPrefectClient, folder: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    killed, living = sleepers
    wait_for(lambda: {killed.pid, living.pid} <= at_work(client).keys(), SECONDS)
    runs = at_work(client)
    silent = client.create_flow_run(housekeeping, state=Running())  # its process is unknown
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    store = Store(folder / "other")
    with store.publish("moments", "0" * 64, {}) as place:
        (place / "file").write_bytes(b"whole")
    damaged = next((folder / "other/objects/moments").rglob("file"))
    damaged.chmod(0o644)
    damaged.write_bytes(b"torn")

    report = housekeeping(str(folder / "other"))
    assert [run["id"] for run in report["closed"]] == [str(runs[killed.pid].id)]
    state = client.read_flow_run(runs[killed.pid].id).state
    assert state is not None
    assert state.is_crashed()
    assert state.message == f"Closed by crosscal: its process {killed.pid} has ended."
    assert report["artifacts"] == len(report["damaged"]) == 1
    assert store.find("moments", "0" * 64) is None, "it was set aside"
    (page,) = [each for each in client.read_artifacts() if each.key == "housekeeping"]
    assert "1 damaged and set aside" in str(page.data)

    assert [run["id"] for run in close_stuck_runs(stuck_minutes=0.0)] == [str(silent.id)], "silence counts elsewhere"
    assert living.pid in at_work(client), "a living process may be silent for as long as it likes"
