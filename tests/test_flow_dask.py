"""A run on a Dask cluster whose workers share only the store; one is killed, and results equal those of a local run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness
from prefect_dask import DaskTaskRunner
from s3fs import S3FileSystem

from crosscal.errors import MissingArtifact, ModelError
from crosscal.flows.cluster import on_workers
from crosscal.plan import load_plan
from crosscal.store import Store
from crosscal.tasks.model import take_block
from crosscal.tasks.run_spec import RunSpec
from tests.helpers.dask_cluster import dask_cluster
from tests.helpers.object_store import BUCKET, at, object_store
from tests.helpers.tiny_place import crosscal, make_place, values

SWEEP = [
    {"method": "sparsegpt", "sparsity": [0.5, "2:4"], "domain": "legal", "alpha": [0, 0.5]},
    {"method": "gptq", "bits": 4, "group_size": 32},
    {"steps": [{"method": "owl"}, {"method": "sparsegpt", "sparsity": 0.7}], "domain": "legal", "alpha": 0.5},
]
SET_TOKENS = (8 + 4) * 32


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_block_and_machines_share_nothing_but_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, home = make_place(tmp_path), f"s3://{BUCKET}/home"
    with object_store() as (url, _):
        for name, value in at(url).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        caches = {"CROSSCAL_CACHE": str(tmp_path / "cache of the workers"), "OMP_NUM_THREADS": "1"}
        with dask_cluster(tmp_path / "cluster", workers=2, environment=caches) as cluster:
            execution = {"device": "cpu", "runner": "dask", "address": cluster.address, "part_tokens": 6 * 32}
            place.write_plan(compress=SWEEP, execution=execution)
            with started(place.plan, home, tmp_path / "remote") as run:
                killed = cluster.kill_one_at("solve_block", while_true=lambda: run.poll() is None)
                out, err = run.communicate()
                assert cluster.children() == []  # e.g. a Prefect server for each worker
        assert run.returncode == 0, err + cluster.logs()
        assert killed == -signal.SIGKILL
        record = json.loads(out)
        assert record["calibration_tokens_read"] == 2 * SET_TOKENS
        assert record["cache"] == {"hits": 0, "misses": 32}
        assert "a temporary one is started" in err

        # The local run solves from the same moments: it writes the same models, bit for bit.
        place.write_plan(compress=SWEEP)
        monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
        local = place.run("--home", home, "--out", str(tmp_path / "local"))
        assert local["calibration_tokens_read"] == 0
        shards = [file.relative_to(tmp_path / "local") for file in (tmp_path / "local/models").rglob("*.safetensors")]
        assert len(shards) == local["variants"] * 3
        for shard in shards:
            assert (tmp_path / "local" / shard).read_bytes() == (tmp_path / "remote" / shard).read_bytes(), shard
        assert values(tmp_path / "local" / "results.jsonl") == values(tmp_path / "remote" / "results.jsonl")
        store = Store(home)
        assert list(store.keys("moment-parts")) == []
        assert {problem for *_, problem in store.verify()} == {None}
    S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def started(plan: Path, home: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`crosscal run` without a Prefect server, in its own process."""
    root, pipe = Path(__file__).parents[1], subprocess.PIPE
    command = [sys.executable, "-m", "crosscal", "run", str(plan), "--home", home, "--json", "--out", str(out)]
    environment = {**os.environ, "PREFECT_HOME": str(out.parent / "prefect"), "CROSSCAL_CACHE": str(out.parent / "own")}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


CALLS = 40


@task
def begins(folder: str, number: int) -> int:
    Path(folder, str(number)).touch()
    time.sleep(0.3)
    if number == 1:
        raise ValueError("the second one")
    return number


@pytest.mark.slow
def test_once_a_task_has_failed_no_worker_begins_another(tmp_path: Path) -> None:
    @flow
    def all_of_them(address: str) -> int:
        with DaskTaskRunner(address=address) as runner:
            calls = [{"folder": str(tmp_path / "begun"), "number": number} for number in range(CALLS)]
            with pytest.raises(ValueError, match="the second one"):
                list(on_workers(runner, begins, calls))
            return settled()

    def settled() -> int:
        """Return how many tasks have begun, once the number has not changed for 3 s."""
        begun, found = -1, 0
        while found != begun:
            begun = found
            time.sleep(3.0)
            found = len(list((tmp_path / "begun").iterdir()))
        return begun

    (tmp_path / "begun").mkdir()
    with prefect_test_harness(server_startup_timeout=120), dask_cluster(tmp_path / "cluster", workers=2) as cluster:
        assert all_of_them(cluster.address) < CALLS


@pytest.mark.parametrize(
    ("address", "said"),
    [("tcp://scheduler.example:8786", "need a Prefect server"), ("tcp://127.0.0.1:9", "no Dask worker can be reached")],
)
def test_a_cluster_that_cannot_be_used_is_told_before_anything_starts(tmp_path: Path, address: str, said: str) -> None:
    place = make_place(tmp_path)
    place.write_plan(execution={"runner": "dask", "address": address})
    done = crosscal("run", str(place.plan), "--home", str(place.home))
    assert (done.code, said in done.err) == (2, True), done.err
    assert not place.home.exists()


def spec(folder: Path, **more: Any) -> RunSpec:
    place = make_place(folder)
    place.write_plan(execution={"device": "cpu", "runner": "dask"})
    return RunSpec(
        load_plan(place.plan).model_dump(mode="json"), str(place.home), device="cpu", dtype="float32", **more
    )


def test_a_worker_that_sees_another_model_or_none_refuses(tmp_path: Path) -> None:
    mistaken = spec(tmp_path, model="0" * 64)
    with pytest.raises(ModelError, match=r"the model's files differ from those the run began with.*shared disk"):
        mistaken.source_on_worker()
    os.rename(tmp_path / "model", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"no such model directory.*shared disk"):
        mistaken.source_on_worker()


def test_a_block_that_a_worker_kept_for_itself_is_told(tmp_path: Path) -> None:
    """This happens if each machine has its own folder `.crosscal`."""
    sums = {"apart": [{"key": "0" * 64, "tokens": 1, "weight": 1.0}], "folded": None, "whole": None, "pool": None}
    each = {"calibration": sums, "held_out": sums, "seed": 0, "notes": []}
    samples = [{"corpus": name, **each} for name in ("general", "legal")]
    with pytest.raises(MissingArtifact, match="one place for all workers"):
        take_block(spec(tmp_path, run_dir=str(tmp_path / "run"), samples=samples), 0)
