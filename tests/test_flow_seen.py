"""What operators see, on a real server: what a watch did, the health of the service, and removal of old records."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Scheduled

from benchmarks.local_service import environment, free_port, server, wait_for
from crosscal.corpora import ingest
from crosscal.flows.check import FAIL, OK, WARN, Check
from crosscal.flows.deploying import deploy
from crosscal.flows.housekeeping import housekeeping
from crosscal.flows.old_runs import QUIET, in_state, remove_quiet
from crosscal.flows.recompress import recompress
from crosscal.flows.status import status
from crosscal.flows.watch import waiting_domains, watch
from crosscal.landing import Ledger
from crosscal.service import ServiceConfig, load_service
from crosscal.store import Store
from crosscal.tasks.announce import FILE_REFUSED, GIVEN_UP
from tests.helpers.tiny_place import crosscal, make_place, write_documents

pytestmark = pytest.mark.slow
SECONDS = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[SyncPrefectClient]:
    """A client of a server for this module, which this process uses as well."""
    shared = environment(folder, free_port())
    with server(folder, shared), pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.setenv(name, shared[name])
        with temporary_settings({PREFECT_API_URL: shared["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
            yield client
            EventsWorker.drain_all()


@pytest.fixture(scope="module")
def service(folder: Path) -> ServiceConfig:
    (folder / "landing").mkdir()
    file = folder / "service.yaml"
    places = {name: str(folder / name) for name in ("landing", "home", "runs")}
    file.write_text(yaml.safe_dump({**places, "gpus": 2, "watch": {"cron": "0 0 1 1 *"}}))
    return load_service(file)


def look(service: ServiceConfig, **text: str) -> dict[str, Any]:
    return watch(service.landing, service.home, 0.0, text=text)


def finish(service: ServiceConfig) -> None:
    """Finish the pending version as a run of the domain would."""
    ledger = Ledger(Store(service.home))
    run = ledger.claim("legal", "somebody's")
    assert run is not None
    ledger.mark(run, "kept")


def newest(client: SyncPrefectClient) -> FlowRun:
    ended = FlowRunFilter(state=in_state(StateType.COMPLETED, StateType.FAILED))
    (run,) = client.read_flow_runs(flow_run_filter=ended, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run


def refused_page(client: SyncPrefectClient) -> list[Artifact]:
    return [each for each in client.read_artifacts() if each.key == "refused-files"]


def refused_events(client: SyncPrefectClient) -> list[dict[str, Any]]:
    found = client.read_events(EventFilter(event=EventNameFilter(name=[FILE_REFUSED])), limit=50).events
    return [{"resource": each.resource.id, **each.payload} for each in found]


def logged(client: SyncPrefectClient, run: FlowRun) -> str:
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
    return "\n".join(each.message for each in logs)


def test_a_watch_is_called_by_what_it_did(client: SyncPrefectClient, service: ServiceConfig) -> None:
    legal = Path(service.landing, "legal")
    legal.mkdir()
    for name, column in (("bad.jsonl", "abstract"), ("worse.jsonl", "title"), ("test.jsonl", "text")):
        write_documents(legal / name, seed=name, count=5)
        (legal / name).write_text((legal / name).read_text().replace('"text"', json.dumps(column)))
    assert look(service)["message"] == "1 announced, 2 refused, 1 taken in"
    run = newest(client)
    assert run.name == "watch · 1 announced, 2 refused, 1 taken in"
    assert run.state is not None
    assert run.state.message == "1 announced, 2 refused, 1 taken in"
    assert run.tags == ["news", "domain:legal"]
    (page,) = refused_page(client)
    rows = {row["file"]: row for row in json.loads(str(page.data))}
    assert set(rows) == {"bad.jsonl", "worse.jsonl"}
    assert rows["bad.jsonl"].keys() == {"file", "domain", "reason", "what to do", "since"}
    assert "text: {legal: COLUMN}" in rows["bad.jsonl"]["what to do"]
    events = wait_for(lambda: found if len(found := refused_events(client)) >= 2 else None, SECONDS)
    assert {(each["resource"], each["domain"], each["file"]) for each in events} == {
        ("crosscal.landing.legal", "legal", "bad.jsonl"),
        ("crosscal.landing.legal", "legal", "worse.jsonl"),
    }
    text = wait_for(lambda: found if "taken" in (found := logged(client, run)) else None, SECONDS)
    assert "legal/bad.jsonl is refused: no column 'text' (abstract)" in text
    assert "5 documents of test.jsonl, all of the test split" in text


def test_refusals_are_reported_once(client: SyncPrefectClient, service: ServiceConfig) -> None:
    finish(service)
    assert look(service)["message"] == "nothing new"
    assert (newest(client).name, newest(client).tags) == ("watch · nothing new", [QUIET])
    assert len(refused_page(client)) == 1
    assert look(service, legal="abstract")["files"] == {"ingested": 1, "refused": 1}
    rows = json.loads(str(max(refused_page(client), key=lambda each: str(each.updated)).data))
    assert [row["file"] for row in rows] == ["worse.jsonl"], "the other is read, with its column"
    events = wait_for(lambda: found if len(found := refused_events(client)) >= 3 else None, SECONDS)
    assert len(events) == 3


def test_a_landing_place_that_is_gone_fails_with_what_to_do(client: SyncPrefectClient, service: ServiceConfig) -> None:
    with pytest.raises(Exception, match="no folder"):
        watch(service.landing + "x", service.home)
    run = newest(client)
    assert run.state is not None
    assert (run.state.is_failed(), run.name) == (True, "watch")
    assert "Make it, with a folder for each domain" in str(run.state.message)


def test_watches_that_were_missed_do_not_stay(client: SyncPrefectClient, service: ServiceConfig) -> None:
    now = datetime.datetime.now(datetime.UTC)
    ago, soon = (now + datetime.timedelta(minutes=minutes) for minutes in (-30, 30))
    missed = [client.create_flow_run(watch, state=Scheduled(scheduled_time=ago)) for _ in range(3)]
    planned = client.create_flow_run(watch, state=Scheduled(scheduled_time=soon))
    look(service)
    left = {run.id for run in client.read_flow_runs()}
    assert planned.id in left
    assert not left & {run.id for run in missed}


def checks(service: ServiceConfig) -> dict[str, Check]:
    return {check.name: check for check in status(service)}


def test_status_says_what_is_not_well(client: SyncPrefectClient, service: ServiceConfig, folder: Path) -> None:
    assert checks(service)["deployments"].state == FAIL
    assert crosscal("status", str(folder / "service.yaml")).code == 1
    deploy(service)
    found = checks(service)
    assert found["deployments"].state == OK
    assert [found[f"queue {name}"].state for name in ("compress", "service", "gpu0")] == [FAIL, FAIL, WARN]
    assert "crosscal deploy" in found["queue service"].do
    assert found["landing"].state == WARN
    assert "1 refused: legal/worse.jsonl" in found["landing"].said
    for queue in client.read_work_queues(work_pool_name="gpu"):
        assert queue.name != "default", "nobody would ever ask it for work"
        client.update_work_queue(queue.id, last_polled=datetime.datetime.now(datetime.UTC))
    done = crosscal("status", str(folder / "service.yaml"), "--json")
    answer = json.loads(done.out)
    assert {check["name"]: check["said"] for check in answer["checks"] if check["state"] == FAIL} == {}, done.out
    assert (done.code, answer["well"]) == (0, True)
    (folder / "landing" / "legal" / "worse.jsonl").unlink()
    assert checks(service)["landing"].state == OK, "what is taken away is refused no longer"


def test_status_names_domains_that_need_somebody(client: SyncPrefectClient, service: ServiceConfig) -> None:
    ledger = Ledger(Store(service.home))
    ledger.request("sick", 1)
    for number, state in enumerate((WARN, WARN, FAIL)):
        run = ledger.claim("sick", "run")
        assert run is not None
        ledger.mark(run, "failed", reason=f"reason {number}")
        check = checks(service)["domain sick"]
        assert (check.state, f"reason {number}" in check.said) == (state, True)


def test_a_service_without_server_or_store_is_not_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "service.yaml").write_text("{landing: landing, home: home, runs: runs}")
    done = crosscal("status", str(tmp_path / "service.yaml"), "--json")
    failed = {check["name"]: check for check in json.loads(done.out)["checks"] if check["state"] == FAIL}
    assert (done.code, set(failed)) == (1, {"server", "store", "landing"})
    assert all(check["do"] for check in failed.values())
    assert not (tmp_path / "home").exists()
    assert crosscal("status", str(tmp_path / "nowhere.yaml")).code == 2


def test_what_quiet_watches_left_is_removed(client: SyncPrefectClient, service: ServiceConfig) -> None:
    finish(service)
    look(service)
    quiet = newest(client)
    assert quiet.tags == [QUIET]
    skipped = client.create_flow_run(watch, state=Scheduled())
    client.set_flow_run_state(skipped.id, Cancelled(), force=True)
    others = {run.id for run in client.read_flow_runs() if QUIET not in run.tags} - {skipped.id}
    assert others
    wait_for(lambda: "Finished" in logged(client, quiet), SECONDS)  # else later lines would belong to no run
    assert remove_quiet(client, 1.0) == 0
    assert remove_quiet(client, 0.0) >= 2
    left = {run.id for run in client.read_flow_runs()}
    assert others <= left
    assert not left & {quiet.id, skipped.id}
    wait_for(lambda: not logged(client, quiet), SECONDS)


def test_housekeeping_removes_old_runs_alone(client: SyncPrefectClient, service: ServiceConfig) -> None:
    old = Path(service.runs, "model-0123abcd")
    (old / "models").mkdir(parents=True)
    (old / "identity.json").write_text('{"identity": "x"}')
    (old / "plan.yaml").write_text("model: x")
    long_ago = time.time() - 5 * 86400
    for path in old.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    report = housekeeping(service.home, runs=service.runs, runs_days=3, keep_published=1, watch_days=7)
    assert [each for each in report["removed"] if each["place"] == str(old)]
    assert not old.exists()
    assert report["watches"] == 0


LONG = """
import sys
from crosscal.flows.recompress import recompress

recompress(sys.argv[1], [], sys.argv[2], sys.argv[3], "legal")
"""


def test_a_cancelled_process_is_told_from_one_that_is_ended(client: SyncPrefectClient, tmp_path: Path) -> None:
    """SIGTERM ends two runs, the second cancelled by a user. Then a cancelled run that died before it could check."""
    place = make_place(tmp_path)
    place.write_plan(
        corpora={"general": {"source": "random"}, "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain", "alpha": 0.5}],
        calibration={"windows": 200000, "length": 32},
        evaluate={"perplexity": []},
    )
    ledger = Ledger(Store(place.home))
    ledger.request("legal", ingest(ledger.store, "legal", [str(place.folder / "legal")]).corpus.version)
    for outcome in ("abandoned", "cancelled"):
        command = [sys.executable, "-c", LONG, str(place.plan), str(place.home), str(place.folder / "runs")]
        with subprocess.Popen(command, env={**os.environ}) as process:
            run = wait_for(lambda: ledger.holder("legal"), 4 * SECONDS)
            if outcome == "cancelled":
                client.set_flow_run_state(UUID(run.run_id), State(type=StateType.CANCELLING), force=True)
            process.terminate()
        last = ledger.last_run("legal")
        assert last is not None
        assert (last.state, ledger.cancelled("legal")) == (outcome, 1 if outcome == "cancelled" else None)
        assert waiting_domains(ledger) == ({} if outcome == "cancelled" else {"legal": 1})
    ledger.request("legal", 1, again=True)
    killed = client.create_flow_run(recompress, parameters={"plan_path": "x", "domain": "legal"}, state=Cancelled())
    run = ledger.claim("legal", str(killed.id))
    assert run is not None
    ledger.mark(run, "abandoned")
    assert (waiting_domains(ledger), ledger.cancelled("legal")) == ({}, 1)


def test_given_up_is_an_event_with_its_reason(client: SyncPrefectClient, tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path / "home"))
    ledger.request("wrong", 1)
    for _ in range(2):  # the second run finds the version given up and emits no event
        recompress(str(tmp_path / "nowhere.yaml"), [], str(tmp_path / "home"), None, "wrong", return_state=True)
    assert [run.state for run in ledger.runs("wrong")] == ["failed"]

    def told() -> list[Any]:
        return client.read_events(EventFilter(event=EventNameFilter(name=[GIVEN_UP])), limit=9).events

    (event,) = wait_for(told, SECONDS)
    assert event.resource.id == "crosscal.domain.wrong"
    assert "the plan cannot be read" in event.payload["reason"]
