"""Run jobs in parallel worker threads ("lanes") on the cores of a CPU.

The products of one layer are small, and intra-op threading scales poorly for matrices this small. A lane is a worker
thread with one core (or a few) of its own; it processes its own batch or site from beginning to end. Several threads
may start lanes at the same time, each with its own number of torch threads.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

_USUAL_THREADS = threading.Lock()  # held while torch's default for new threads is changed

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 2**25  # glibc takes no more
KEPT_BYTES = 2**27

T = TypeVar("T")


def side_by_side(
    jobs: Sequence[Callable[[], T]],
    device: torch.device | str = "cpu",
    *,
    most: int | None = None,
    threads_each: int | None = None,
) -> list[T]:
    """Return the results of all jobs in their order; see `each_side_by_side`."""
    return list(each_side_by_side(jobs, device, most=most, threads_each=threads_each))


def each_side_by_side(
    jobs: Sequence[Callable[[], T]],
    device: torch.device | str = "cpu",
    *,
    most: int | None = None,
    threads_each: int | None = None,
) -> Iterator[T]:
    """Run the jobs in lanes and yield their results in order. Jobs start in order, one at a time in each lane.

    On a CPU there is one lane for each torch thread of the calling thread, at most `most`, and the lanes share these
    threads; torch's roundoff then depends on the number of threads. With `threads_each=1` it does not: every job
    computes with one thread, even if there are fewer jobs than threads. On a GPU there is one lane.

    After a job fails, or the caller stops iterating, no further job starts. The error is raised after the running jobs
    have ended; of several errors, that of the first job in order.
    """
    on_cpu, threads = torch.device(device).type == "cpu", torch.get_num_threads()
    _keep_freed_memory()
    lanes = max(1, min(threads, most or threads, len(jobs))) if on_cpu else 1
    each = (threads_each or threads // lanes) if on_cpu else threads
    if lanes == 1 and each == threads:
        yield from (job() for job in jobs)
        return
    answers = deque(Future[T]() for _ in jobs)
    lane = _Lane(deque(zip(answers, jobs, strict=True)), each, torch.is_grad_enabled())
    at_work = [threading.Thread(target=lane.work) for _ in range(lanes)]
    try:
        for thread in at_work:
            thread.start()
        while answers:
            yield answers.popleft().result()  # frees the result, which may be large
    finally:
        lane.left.clear()
        for thread in at_work:
            if thread.ident is not None:
                thread.join()
    _give_memory_back()


@dataclass(frozen=True, eq=False)
class _Lane(Generic[T]):
    left: deque[tuple[Future[T], Callable[[], T]]]
    """Jobs not started. A thread that takes a job must run it: later jobs may be waiting for its turn."""
    threads: int
    wants_gradients: bool

    def work(self) -> None:
        """Run jobs until none is left or one fails. Call this in a new thread."""
        answer: Future[T] = Future()
        try:
            _compute_with(self.threads)
            with torch.set_grad_enabled(self.wants_gradients):  # grad mode is per thread
                while taken := self._taken():
                    answer, job = taken
                    answer.set_result(job())
        except BaseException as error:
            while taken := self._taken():
                taken[0].set_exception(error)
            answer.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def _taken(self) -> tuple[Future[T], Callable[[], T]] | None:
        try:
            return self.left.popleft()
        except IndexError:
            return None


def _compute_with(threads: int) -> None:
    """Set the number of torch threads of this new thread, and of no other thread.

    torch stores the number per thread and uses the last number set as the default of new threads, which read it on
    first use. This thread has read it (`get_num_threads`), and a helper thread restores the default.
    """
    with _USUAL_THREADS:
        usual = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = threading.Thread(target=torch.set_num_threads, args=(usual,))
        again.start()
        again.join()


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory for tensors up to `LARGE_BYTES` instead of returning it to the system: zeroing
    fresh pages took a fifth of the time of measuring a small model. Runs once per process."""
    for setting, size in ((M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES)):
        _glibc("mallopt", setting, size)


def _give_memory_back() -> None:
    """Return to the system what threads freed and glibc kept for each of them, up to 150 MiB here."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call a glibc function; do nothing on other systems."""
    if sys.platform == "linux" and (found := getattr(ctypes.CDLL(None), function, None)) is not None:
        found(*arguments)


class WriteBehind:
    """A background thread that runs one job at a time; submitting a job waits for the previous one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[object] | None = None

    def hand_over(self, job: Callable[[], object]) -> None:
        """Wait for the previous job, re-raise its error, and start `job`."""
        self._wait()
        self._last = self._pool.submit(job)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None:
                self._wait()


class OrderedTurns:
    """Orders critical sections of lanes by job number 0, 1, 2, …, so that a sum does not depend on the lanes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: defaultdict[Hashable, int] = defaultdict(int)
        self._over: set[int] = set()

    @contextmanager
    def turn(self, key: Hashable, number: int) -> Iterator[None]:
        """Enter once every smaller number has had its turn with this key or is over; one number is inside at a time."""
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
        """Enclose the work of a job; after it, no thread waits for the job's number any more."""
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
