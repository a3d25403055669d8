"""Processes of their own, forked from one that has imported everything already: to be killed, or to be measured."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import psutil
import torch

PROCESSES = multiprocessing.get_context("forkserver")
# One list for all tests: the one process that all are forked from is started once, with the list that was set last.
PROCESSES.set_forkserver_preload(["crosscal.flows.drive", "crosscal.landing", "tests.helpers.tiny_place"])
Input = TypeVar("Input")


def peak_bytes(work: Callable[[Input], object], first: Input, then: Input, *, threads: int = 1) -> int:
    """By how much memory grows while a fresh process does `work(then)`, which it has done with `first` before: that
    takes what the libraries take once."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(_peak_bytes, work, first, then, threads).result()


def _peak_bytes(work: Callable[[Input], object], first: Input, then: Input, threads: int) -> int:
    torch.set_num_threads(threads)
    work(first)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
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
