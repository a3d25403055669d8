"""The same run as a Prefect flow run: named task runs, nothing pickled, errors with their exit code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH
from prefect.testing.utilities import prefect_test_harness

from crosscal.errors import CorpusError
from crosscal.tasks import artifacts, corpora, evaluation, model, results
from crosscal.tasks.artifacts import MOST_BYTES
from crosscal.tasks.options import RETRIED
from tests.helpers.tiny_place import Place, crosscal, make_place, values

pytestmark = pytest.mark.slow

TASK_RUNS = [
    "identify model",
    *("ingest general", "ingest legal", "sample general, seed 0", "sample legal, seed 0", "describe calibration"),
    *("read general, seed 0", "read legal, seed 0", "take blocks of earlier runs", "publish models"),
    *("evaluate dense", "evaluate sparsegpt-50-general", "evaluate sparsegpt-50-legal-a0.5"),
    *("write results", "write report"),
]
SOLVES = ["solve block 0", "solve block 1"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A temporary server with its own database: about ten seconds."""
    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture
def place(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = make_place(tmp_path)
    place.run()
    monkeypatch.setenv("PREFECT_API_URL", server)
    return place


def newest_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def task_runs(expected: int = len(TASK_RUNS)) -> list[str]:
    """Return the names of the newest flow run's task runs; wait until they are complete, for the server lags behind."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[newest_run().id]))
    with get_client(sync_client=True) as client:
        for _ in range(50):
            found = client.read_task_runs(flow_run_filter=of_run)
            if len(found) >= expected and all(run.state and run.state.is_completed() for run in found):
                break
            time.sleep(0.2)
    return sorted(run.name for run in found)


def arrows() -> int:
    """Count the edges between task runs in the graph of the newest flow run."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[newest_run().id]))
    with get_client(sync_client=True) as client:
        return sum(len(of) for run in client.read_task_runs(flow_run_filter=of_run) for of in run.task_inputs.values())


def test_a_flow_run_does_what_a_plain_run_does(place: Place) -> None:
    before = values(place.run_dir / "results.jsonl")
    results_before = stored_results()
    record = place.run("--out", str(place.folder / "run2"))
    assert record["calibration_tokens_read"] == 0
    assert values(place.folder / "run2" / "results.jsonl") == before
    assert json.loads((place.folder / "run2" / "run.json").read_text())["variants"] == 2
    assert task_runs() == sorted(TASK_RUNS)
    assert arrows() == 0, "the graph of a run stays readable"
    assert stored_results() == results_before, "results are not persisted, so nothing can be pickled"


def test_blocks_solved_side_by_side_are_task_runs_and_the_same_models(place: Place) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        place.run("--out", str(place.folder / "run2"), "--home", str(place.folder / "home2"))
    finally:
        torch.set_num_threads(before)
    expected = sorted([*TASK_RUNS, *SOLVES])
    assert task_runs(len(expected)) == expected
    assert shards(place.folder / "run2") == shards(place.run_dir)


def shards(run: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.safetensors")}
    assert found
    return found


def test_a_study_is_one_flow_run_with_every_part_s_steps(place: Place) -> None:
    place.write_plan(study={"draws": 2}, evaluate={"windows": 4, "validation_windows": 2})
    folder = place.folder / "study"
    done = crosscal("study", str(place.plan), "--home", str(place.home), "--out", str(folder), "--json")
    assert done.code == 0, done.err
    run = newest_run()
    assert run.name == "plan · sparsegpt 50 % · alpha 0, 0.5"
    assert run.state
    assert run.state.is_completed()
    names = task_runs(23)
    assert names.count("evaluate dense") == 2
    assert (names.count("write results"), names.count("write report"), names.count("identify model")) == (2, 1, 1)
    assert {"sample legal, seed 0", "sample legal, seed 1", "read general, seed 1"} <= set(names)


def test_a_run_is_tagged_and_shows_progress_results_and_files(place: Place) -> None:
    place.run("--out", str(place.folder / "run2"), "--home", str(place.folder / "home2"))
    run = newest_run()
    assert set(run.tags) == {"news", "model:model", "sparsegpt"}
    assert run.state
    assert run.state.name == "Completed"
    assert run.state.message
    assert run.state.message.startswith("2 variants in ")
    assert run.state.message.endswith("768 calibration tokens read")
    made = artifacts_of(run)
    bars = tuple(f"progress-{name}" for name in ("ingest", "moments", "blocks", "publish", "evaluate"))
    assert made.keys() == {*bars, "plan-results", "plan-trade-off", "plan-files"}
    for key in bars:
        assert made[key].data == 100
    first, *others = [row["variant"] for row in json.loads(str(made["plan-results"].data))]
    assert first == "dense"
    assert sorted(others) == ["sparsegpt-50-general", "sparsegpt-50-legal-a0.5"]  # the recommended one comes first
    assert str(place.folder / "run2" / "report.html") in str(made["plan-files"].data)
    assert len(str(made["plan-trade-off"].data)) < MOST_BYTES


def artifacts_of(run: FlowRun) -> dict[str, Artifact]:
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=of_run, sort=ArtifactSort.CREATED_DESC)
        return {str(artifact.key): artifact for artifact in reversed(found)}


def test_an_artifact_that_cannot_be_made_is_a_warning(server: str, caplog: pytest.LogCaptureFixture) -> None:
    def carry_on() -> str:
        update = partial(update_progress_artifact, progress=50.0)
        assert artifacts.make_artifact(update, artifact_id=uuid4()) is None, "there is no such artifact"
        assert artifacts.make_artifact(create_markdown_artifact, key="large", markdown="x" * MOST_BYTES) is None
        return "went on"

    with caplog.at_level("WARNING", "crosscal"):
        assert flow(carry_on, name="carry on")() == "went on"
    assert [record.levelname for record in caplog.records if record.name == "crosscal"] == ["WARNING"] * 2


def test_outside_a_flow_run_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "make_artifact", lambda *_, **__: pytest.fail("an artifact was made"))
    artifacts.show_run(tmp_path / "nowhere")
    artifacts.show_decision("legal", 1, {})
    with artifacts.progress_shown("blocks") as report:
        report("solving blocks", 1, 2)


def stored_results() -> list[str]:
    folder = PREFECT_LOCAL_STORAGE_PATH.value()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def test_an_error_is_one_message_with_its_exit_code(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.write_plan(compress=[{"method": "rtn", "bits": 4, "group_size": 24}])
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.folder / "run2"))
    assert done.code == 2
    assert "group_size must divide" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err + "".join(capfd.readouterr())
    state = newest_run().state
    assert state
    assert state.is_failed()
    assert f"crosscal: {state.message}" == done.err.splitlines()[-1], "the page says what the terminal says"


def test_only_what_a_network_may_mend_is_tried_again() -> None:
    tried_again = {each.name for each in TASKS if each.retries}
    reading = {"identify", "ingest", "select", "sample", "moments-part", "moments"}
    assert tried_again == reading | {"solve-block", "evaluate"}
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
    *(corpora.ingest_corpus, corpora.select_corpus, corpora.draw_sample),
    *(model.identify_model, model.read_part, model.read_moments),
    *(
        model.reuse_blocks,
        model.solve_block,
        model.solve_sequential,
        model.publish_models,
        results.describe_samples,
        evaluation.evaluate_model,
        results.write_results,
    ),
    results.make_report,
)
