"""A run that is killed at any moment, or started twice at once, gives the results of an undisturbed one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from crosscal.store import Store
from tests.helpers.processes import PROCESSES
from tests.helpers.tiny_place import Place, make_place, run_alone, values

pytestmark = pytest.mark.slow

SECONDS = 90
ENTRIES = [
    {"method": "sparsegpt", "sparsity": [0.3, 0.5, "2:4"], "domain": "legal", "alpha": [0, 0.5, 1]},
    {"method": "wanda", "sparsity": 0.5, "upstream": "sequential"},
]

MOMENTS: dict[str, Callable[[Place], bool]] = {
    "while corpora are ingested": lambda place: (place.home / "staging").exists(),
    "while the model is read": lambda place: any(place.home.glob("objects/moments/*")),
    "while blocks are solved": lambda place: any(place.run_dir.glob("models/*/block-*.safetensors")),
    "while models are measured": lambda place: any(place.home.glob("objects/evaluations/*")),
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    place.write_plan(compress=ENTRIES)
    return place


def start(place: Place, out: Path) -> BaseProcess:
    """Start a run in its own process, forked from one that has imported everything already."""
    process = PROCESSES.Process(target=run_alone, args=(place, out))
    process.start()
    return process


def kill_when(place: Place, is_time: Callable[[Place], bool], chance: random.Random) -> None:
    process = start(place, place.run_dir)
    deadline = time.monotonic() + SECONDS
    while not is_time(place) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"


def test_killed_again_and_again_it_still_ends_the_same(place: Place) -> None:
    chance = random.Random(0)
    for is_time in MOMENTS.values():
        kill_when(place, is_time, chance)
        assert is_time(place)
    place.run()
    assert all(problem is None for _, _, problem in Store(place.home).verify())

    calm = Place(place.folder)
    undisturbed = calm.run("--home", str(place.folder / "home2"), "--out", str(place.folder / "calm"))
    assert undisturbed["cache"]["misses"] > 0
    assert values(place.folder / "calm" / "results.jsonl") == values(place.run_dir / "results.jsonl")
    weights = "models/sparsegpt-2of4-legal-a0.5/block-00001.safetensors"
    assert (place.folder / "calm" / weights).read_bytes() == (place.run_dir / weights).read_bytes()


@pytest.mark.parametrize("directories", [("run", "run"), ("run", "other")], ids=["one directory", "two directories"])
def test_two_runs_at_once_both_finish(place: Place, directories: tuple[str, str]) -> None:
    processes = [start(place, place.folder / name) for name in directories]
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(problem is None for _, _, problem in Store(place.home).verify())
    first, second = (values(place.folder / name / "results.jsonl") for name in directories)
    assert first == second
    assert len(first) == 2 * 2 * 11, "corpora, splits, models"
