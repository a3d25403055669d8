"""Claim: workers solve the blocks of a sweep in parallel, and a worker that dies costs only its block.

    python benchmarks/dask_workers.py TESTBED [--repeats 3]

A small real model of six blocks; a sweep of 33 variants (SparseGPT over eight sparsities, GPTQ over three bit widths,
three mixtures each), solved locally, by one Dask worker and by two, each a process with one thread, all from the same
moments; then by two, one of which is killed (SIGKILL) while it solves. Every shard must equal the local one byte for
byte. The figures are seconds of the solve stage, in which solved blocks also pass through the store; workers have
finished their imports before. Set OMP_NUM_THREADS=1, so that the local run also has one thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from records import load_average, median_record, record, write

sys.path.insert(0, str(Path(__file__).parents[1]))
from crosscal.flows.cluster import temporary_server
from crosscal.flows.recompress import recompress
from crosscal.plan import dump_plan, parse_plan
from crosscal.stages import made_variants, solved_blocks
from crosscal.store import Store
from tests.helpers.dask_cluster import Cluster, dask_cluster


def plan(testbed: Path, execution: dict[str, Any]) -> dict[str, Any]:
    domain = {"domain": "biomedical", "alpha": [0, 0.5, 1]}
    return {
        "model": str(testbed / "models" / "llama-mix-8m"),
        "corpora": {name: str(testbed / "corpora" / name) for name in ("general", "biomedical")},
        "calibration": {"windows": 32, "length": 256, "held_out_windows": 8},
        "compress": [
            {"method": "sparsegpt", "sparsity": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, "2:4"], **domain},
            {"method": "gptq", "bits": [2, 3, 4], "group_size": 32, **domain},
        ],
        "evaluate": {"windows": 2, "validation_windows": 2},
        "execution": {"device": "cpu", **execution},
    }


class Sweep:
    """Runs of one plan that share a store, each with its own run directory."""

    def __init__(self, folder: Path, testbed: Path) -> None:
        self.folder, self.home, self.testbed = folder, str(folder / "home"), testbed
        os.environ["PREFECT_HOME"] = str(folder / "prefect")

    def local(self) -> dict[str, Any]:
        return recompress.fn(self._plan({}), None, self.home, str(self.folder / "local"))

    def on(self, cluster: Cluster, name: str) -> dict[str, Any]:
        """Run with every block solved again; raise `AssertionError` unless its shards equal the local run's."""
        store = Store(self.home)
        for known in (solved_blocks.KIND, made_variants.KIND):
            for kind, key in list(store.keys(known)):
                store.discard(kind, key)
        file = self._plan({"runner": "dask", "address": cluster.address})
        with temporary_server():
            run = recompress(file, None, self.home, str(self.folder / name))
        local = self.folder / "local" / "models"
        shards = [shard.relative_to(local) for shard in local.glob(f"*/{made_variants.BLOCKS}")]
        assert len(shards) == len(list(store.keys(solved_blocks.KIND))) > 0, "not every block was solved by a worker"
        for shard in shards:
            assert (local / shard).read_bytes() == (self.folder / name / "models" / shard).read_bytes(), shard
        assert run["calibration_tokens_read"] == 0
        return run

    def _plan(self, execution: dict[str, Any]) -> str:
        file = self.folder / "plan.yaml"
        file.write_text(dump_plan(parse_plan(plan(self.testbed, execution))))
        return str(file)


@contextmanager
def workers(folder: Path, count: int) -> Iterator[Cluster]:
    threads = {"OMP_NUM_THREADS": "1"}
    with dask_cluster(folder / f"cluster{len(list(folder.iterdir()))}", count, threads) as cluster:
        yield cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sweep, folder, seconds = Sweep(Path(place), asked.testbed.resolve()), Path(place), {}
        rows = [record("machine", "load average before", load_average(), "processes")]
        rows.append(record("local, in this process", "solve", sweep.local()["stages"]["solve"], "s"))
        for count in (1, 2):
            with workers(folder, count) as cluster:
                sweep.on(cluster, f"warm {count}")
                runs = [sweep.on(cluster, f"{count} workers, {n}") for n in range(asked.repeats)]
            seconds[count] = [run["stages"]["solve"] for run in runs]
            rows.append(median_record(f"{count} worker{'s' * (count > 1)}", "solve", seconds[count], "s"))
        ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
        rows.append(median_record("2 workers over 1", "speed of solving", ratios, "times"))
        with workers(folder, 2) as cluster:
            sweep.on(cluster, "warm killed")
            killed: list[int | None] = []
            is_over = threading.Event()
            killer = threading.Thread(
                target=lambda: killed.append(cluster.kill_one_at("solve_block", lambda: not is_over.is_set()))
            )
            killer.start()
            run = sweep.on(cluster, "killed")
            is_over.set()
            killer.join()
        assert killed == [-signal.SIGKILL], killed
        rows.append(record("2 workers, one killed while it solves", "solve", run["stages"]["solve"], "s"))
    write("dask_workers", rows)


if __name__ == "__main__":
    main()
