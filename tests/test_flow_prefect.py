"""The same run as a Prefect flow run: named task runs, nothing pickled, errors with their exit code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH
from prefect.testing.utilities import prefect_test_harness

from crosscal.errors import CorpusError
from tasks import corpora, model, results
from tasks.options import RETRIED
from tests.helpers.tiny_place import Place, crosscal, make_place, values

pytestmark = pytest.mark.slow

TASK_RUNS = [
    "identify model",
    *("ingest general", "ingest legal", "sample general, seed 0", "sample legal, seed 0", "describe calibration"),
    *("read general, seed 0", "read legal, seed 0", "solve block 0", "solve block 1", "publish models"),
    *("evaluate models", "write report"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A temporary server with its own database: about ten seconds."""
    with prefect_test_harness():
        yield PREFECT_API_URL.value()


@pytest.fixture
def place(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = make_place(tmp_path)
    place.run()
    monkeypatch.setenv("PREFECT_API_URL", server)
    return place


def task_runs(flow: str) -> list[str]:
    """Names of the completed task runs of the newest flow run of this name; the server lags behind."""
    with get_client(sync_client=True) as client:
        for _ in range(50):
            runs = [run for run in client.read_flow_runs() if run.name == flow]
            found = [run for run in client.read_task_runs() if runs and run.flow_run_id == runs[-1].id]
            if len(found) >= len(TASK_RUNS) and all(run.state and run.state.is_completed() for run in found):
                return sorted(run.name for run in found)
            time.sleep(0.2)
    return sorted(run.name for run in found)


def test_a_flow_run_does_what_a_plain_run_does(place: Place) -> None:
    before = values(place.run_dir / "results.jsonl")
    results_before = stored_results()
    record = place.run("--out", str(place.folder / "run2"))
    assert record["calibration_tokens_read"] == 0
    assert values(place.folder / "run2" / "results.jsonl") == before
    assert json.loads((place.folder / "run2" / "run.json").read_text())["variants"] == 2
    assert task_runs("plan · sparsegpt 50 % · alpha 0, 0.5") == sorted(TASK_RUNS)
    assert stored_results() == results_before, "results are not persisted, so nothing can be pickled"


def stored_results() -> list[str]:
    folder = PREFECT_LOCAL_STORAGE_PATH.value()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def test_an_error_is_one_message_with_its_exit_code(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.write_plan(compress=[{"method": "rtn", "bits": 4, "group_size": 24}])
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.folder / "run2"))
    assert done.code == 2
    assert "group_size must divide" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err + "".join(capfd.readouterr())


def test_only_what_a_network_may_mend_is_tried_again() -> None:
    tried_again = {each.name for each in TASKS if each.retries}
    assert tried_again == {"identify", "ingest", "sample", "moments-part", "moments", "solve-block"}
    for each in TASKS:
        assert each.persist_result is False
        assert each.task_run_name


def test_a_lost_connection_is_tried_again_and_a_mistake_is_not(server: str) -> None:
    calls: list[str] = []

    @task(**RETRIED | {"retry_delay_seconds": 0})
    def flaky() -> int:
        calls.append("flaky")
        if len(calls) == 1:
            raise CorpusError("the hub gave nothing") from ConnectionResetError()
        return len(calls)

    @task(**RETRIED | {"retry_delay_seconds": 0})
    def mistaken() -> None:
        calls.append("mistaken")
        raise CorpusError("no such file")

    assert flow(lambda: flaky(), name="flaky")() == 2
    with pytest.raises(CorpusError):
        flow(lambda: mistaken(), name="mistaken")()
    assert calls == ["flaky", "flaky", "mistaken"]


TASKS = (
    *(corpora.ingest_corpus, corpora.draw_sample, model.identify_model, model.read_part, model.read_moments),
    *(
        model.solve_block,
        model.solve_sequential,
        model.publish_models,
        results.describe_samples,
        results.evaluate_models,
    ),
    results.make_report,
)
