"""Work side by side on a CPU's cores.

The products of one layer are small and follow one another: two threads inside each operation wait for each other a
good part of the time. A lane is a thread with one core (or a few) to itself, which works on its own batch or site from
beginning to end. Several threads may work in lanes at once, each with the number of threads that is its own.
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

_USUAL_THREADS = threading.Lock()  # held while torch's number of threads for threads to come is another one

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
    """The jobs' results in their order, as `each_side_by_side` gives them."""
    return list(each_side_by_side(jobs, device, most=most, threads_each=threads_each))


def each_side_by_side(
    jobs: Sequence[Callable[[], T]],
    device: torch.device | str = "cpu",
    *,
    most: int | None = None,
    threads_each: int | None = None,
) -> Iterator[T]:
    """The jobs' results in their order; they start in that order, as many at once as there are lanes.

    On a CPU there are as many lanes as torch has threads in the calling thread, `most` at most, and they share these
    threads out; torch's roundoff then depends on how many there are. With `threads_each=1` it does not: every job
    computes with one thread, also where there are fewer jobs than threads. On a GPU there is one lane.

    Once a job has failed, or the caller has left, no further one starts. The error is raised once those running have
    ended; of several, that of the job that comes first.
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
            yield answers.popleft().result()  # let go: results may be large
    finally:
        lane.left.clear()
        for thread in at_work:
            if thread.ident is not None:
                thread.join()
    _give_memory_back()


@dataclass(frozen=True, eq=False)
class _Lane(Generic[T]):
    left: deque[tuple[Future[T], Callable[[], T]]]
    """Jobs not begun. Who takes one runs it: others may be waiting for their turn behind it."""
    threads: int
    wants_gradients: bool

    def work(self) -> None:
        """Take one job after another, until none is left or one fails. To be called in a new thread."""
        answer: Future[T] = Future()
        try:
            _compute_with(self.threads)
            with torch.set_grad_enabled(self.wants_gradients):  # it is each thread's own
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
    """From now on torch computes with so many threads in this new thread.

    torch keeps the number with the thread, and the last one set for threads to come, which take it over when they
    first ask. Here this thread has asked, and those to come get what they would have got.
    """
    with _USUAL_THREADS:
        usual = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = threading.Thread(target=torch.set_num_threads, args=(usual,))
        again.start()
        again.join()


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc use freed memory again for tensors up to `LARGE_BYTES`, instead of handing it to the system and asking
    for it anew: zeroing fresh pages was a fifth of measuring a small model. Once, for the whole process."""
    for setting, size in ((M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES)):
        _glibc("mallopt", setting, size)


def _give_memory_back() -> None:
    """What threads have freed and glibc has kept for each, up to 150 MiB here: others should have the use of it."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call it where there is glibc; elsewhere nothing is done."""
    if sys.platform == "linux" and (found := getattr(ctypes.CDLL(None), function, None)) is not None:
        found(*arguments)


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
