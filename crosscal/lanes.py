"""Work side by side on a CPU's cores.

The products of one layer are small and follow one another: two threads inside each operation wait for each other a
good part of the time. A lane is a thread with one core (or a few) to itself, which works on its own batch or site from
beginning to end.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

MOST_LANES = 4
"""Sums that all lanes add to in turn leave no work for more; further cores are shared out among the lanes."""

T = TypeVar("T")


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device | str = "cpu") -> list[T]:
    """The jobs' results in their order, as `each_side_by_side` gives them."""
    return list(each_side_by_side(jobs, device))


def each_side_by_side(
    jobs: Sequence[Callable[[], T]], device: torch.device | str = "cpu", *, most: int = MOST_LANES
) -> Iterator[T]:
    """The jobs' results in their order; they start in that order, as many at once as there are lanes.

    On a CPU there are as many lanes as torch has threads in the calling thread, `most` at most; on a GPU there is one,
    and one lane is a plain loop. When a job fails no further one starts, and the first error is raised once those
    running have ended.
    """
    threads = torch.get_num_threads()
    lanes = min(threads, most, MOST_LANES, len(jobs)) if torch.device(device).type == "cpu" else 1
    if lanes <= 1:
        yield from (job() for job in jobs)
        return
    wants_gradients, threads_each = torch.is_grad_enabled(), threads // lanes

    def run(job: Callable[[], T]) -> T:
        with torch.set_grad_enabled(wants_gradients):  # it is each thread's own
            return job()

    # SciPy's BLAS has threads of its own, which would wait for work at full speed on the other lanes' cores.
    with threadpool_limits(threads_each, user_api="blas"), _restored_threads(threads):
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(threads_each,)) as pool:
            running = [pool.submit(run, job) for job in jobs]
            try:
                while running:
                    yield running.pop(0).result()  # let go: results may be large
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    _give_memory_back()


def _give_memory_back() -> None:
    """glibc keeps for each thread what that thread has freed, up to 150 MiB here; others should have the use of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def _restored_threads(threads: int) -> Iterator[None]:
    """torch keeps a thread's number of threads with the thread, and the last one set for threads to come."""
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Behind:
    """Does things one after another in a thread of its own, at most one behind whoever hands them over."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[object] | None = None

    def hand_over(self, job: Callable[[], object]) -> None:
        """Wait for the last thing, raise what it raised, and have the next one begun."""
        self._wait()
        self._last = self._pool.submit(job)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None:
                self._wait()


class Turns:
    """Lets lanes do something in the order of their jobs' numbers, 0, 1, 2, …: a sum then does not depend on lanes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: defaultdict[Hashable, int] = defaultdict(int)
        self._over: set[int] = set()

    @contextmanager
    def turn(self, key: Hashable, number: int) -> Iterator[None]:
        """Inside, every smaller number has had its turn with this key, or is over, and no other number has it."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached(key, number))
        try:
            yield
        finally:
            with self._changed:
                self._next[key] = number + 1
                self._changed.notify_all()

    @contextmanager
    def job(self, number: int) -> Iterator[None]:
        """What a job does under its number stands inside; behind it nobody waits for that number any more."""
        try:
            yield
        finally:
            with self._changed:
                self._over.add(number)
                self._changed.notify_all()

    def _reached(self, key: Hashable, number: int) -> bool:
        while self._next[key] in self._over:
            self._next[key] += 1
        return self._next[key] >= number
