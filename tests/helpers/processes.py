"""Processes forked from one that has imported everything already, for tests that kill, measure or inspect them."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import runpy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import torch

PROCESSES = multiprocessing.get_context("forkserver")
# One list for all tests: there is one fork server, started once with the list that was set last.
PROCESSES.set_forkserver_preload(["crosscal.flows.drive", "crosscal.landing", "tests.helpers.tiny_place"])
Input = TypeVar("Input")


def peak_bytes(work: Callable[[Input], object], first: Input, then: Input, *, threads: int = 1) -> int:
    """Return the peak growth of resident memory during `work(then)` in a fresh process, after `work(first)`, which
    makes the libraries' one-time allocations."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(_peak_bytes, work, first, then, threads).result()


def modules_after(work: Callable[[], object]) -> set[str]:
    """Return the top-level packages imported by a fresh process after `work()`."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(_modules_after, work).result()


def _modules_after(work: Callable[[], object]) -> set[str]:
    work()
    return {name.partition(".")[0] for name in sys.modules}


def script_output(script: Path, *arguments: str) -> str:
    """Return the output of `python SCRIPT ARGUMENTS`; raise an error if the script exits with one."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(_script_output, script, arguments).result()


def _script_output(script: Path, arguments: tuple[str, ...]) -> str:
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.parent)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script.name} ended with {end.code}") from None
    return printed.getvalue()


def _peak_bytes(work: Callable[[Input], object], first: Input, then: Input, threads: int) -> int:
    torch.set_num_threads(threads)
    work(first)
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work(then)
    finally:
        done.set()
        watcher.join()
    return peak - start
