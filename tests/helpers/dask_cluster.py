"""A Dask cluster of separate processes, like several machines: a scheduler, and workers that can be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.process
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from distributed import Client
from distributed.comm import CommClosedError

from tests.helpers.processes import PROCESSES

Found = TypeVar("Found")
SECONDS = 120
SERVICE = ("--host", "127.0.0.1", "--no-dashboard")
SETTINGS = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}
"""Dask's profiler calls `sys._current_frames` a hundred times a second, which can deadlock a worker on Python 3.11
(CPython issue 106883, dask/distributed issue 8616)."""


@dataclass(frozen=True)
class Cluster:
    address: str
    workers: list[multiprocessing.process.BaseProcess]
    folder: Path

    def logs(self) -> str:
        return "".join(log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log")))

    def children(self) -> list[str]:
        """Return the commands of the processes that living workers have started."""
        alive = [psutil.Process(worker.pid) for worker in self.workers if worker.is_alive()]
        return [" ".join(child.cmdline()) for worker in alive for child in worker.children(recursive=True)]

    def kill_one_at(self, task: str, while_true: Callable[[], bool]) -> int | None:
        """Kill the first worker that runs a task of this name; return its exit code, or None if none did in time."""
        with Client(self.address, set_as_default=False) as client:
            while while_true():
                for address, keys in _processing(client).items():
                    if any(task in key for key in keys):
                        pid = client.run(os.getpid, workers=[address])[address]
                        worker = next(worker for worker in self.workers if worker.pid == pid)
                        worker.kill()
                        worker.join()
                        return worker.exitcode
                time.sleep(0.1)
        return None


@contextlib.contextmanager
def dask_cluster(folder: Path, workers: int, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Run a scheduler and workers of one thread each; workers that die are not restarted."""
    folder.mkdir(parents=True, exist_ok=True)
    contact = folder / "scheduler.json"
    started: list[multiprocessing.process.BaseProcess] = []

    def start(name: str, *arguments: str) -> None:
        command = (*arguments, *SERVICE, "--scheduler-file", str(contact))
        # The fork server may have been started earlier, in another environment.
        env = {**os.environ, **SETTINGS, **(environment or {})}
        started.append(PROCESSES.Process(target=_serve, args=(folder / f"{name}.log", env, command)))
        started[-1].start()

    try:
        start("scheduler", "scheduler", "--port", "0")
        for number in range(workers):
            start(f"worker{number}", "worker", "--no-nanny", "--nthreads", "1", "--memory-limit", "0")
        address = _until(lambda: _address(contact))
        yield Cluster(address, started[1:], folder)
    finally:
        for process in started:
            process.kill()
            process.join()


def _serve(log: Path, environment: Mapping[str, str], command: tuple[str, ...]) -> None:
    """Target of a process: the command `dask …`, its output in a file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(log.parent)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from dask.__main__ import main  # reads the settings

    sys.argv = ["dask", *command]
    main()


def _processing(client: Client) -> dict[str, tuple[str, ...]]:
    """Return the tasks given to each worker; {} if the connection broke because a worker disconnected: call again.

    The scheduler answers. The workers' call stacks would be exact, and take `sys._current_frames` (see `SETTINGS`).
    """
    try:
        return client.processing()
    except CommClosedError:
        return {}


def _address(contact: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError, ValueError):  # missing or incomplete so far
        return json.loads(contact.read_text())["address"]
    return None


def _until(look: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.005)
    raise TimeoutError("it never happened")
