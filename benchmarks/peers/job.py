"""A job of a comparison: a process with a JSON argument and a line of JSON as output. Both sides import it: torch only.

Shapes: S windows, L tokens.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Clock:
    """Wall and CPU seconds of the whole job and of named stages."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = self.stages.setdefault(name, {"wall": 0.0, "cpu": 0.0})
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu

    def timed(self, name: str, function: Callable[..., Answer]) -> Callable[..., Answer]:
        """Return the function, wrapped so that its time is added to a stage."""

        def run(*arguments: Any, **named: Any) -> Answer:
            with self.stage(name):
                return function(*arguments, **named)

        return run


def read_job() -> dict[str, Any]:
    """Return the job of this process, and set torch's number of threads to the job's."""
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    return job


def windows(job: dict[str, Any], name: str) -> Any:
    """Load `calibration` or `held_out` tokens_SL of the job."""
    from safetensors.torch import load_file

    return load_file(job["windows"])[name]


def peak_mib() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def answer(clock: Clock, **more: Any) -> None:
    print(json.dumps({"stages": clock.stages, "peak_mib": peak_mib(), **more}))


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
