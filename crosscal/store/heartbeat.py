"""Signs of life: which of the processes that use a home are at work, whatever machines they are on.

<home>/users/<process>      a file that its process touches every BEAT_SECONDS for as long as it lives

A process counts as gone once its file is older than LEASE_SECONDS; one of the same boot and process namespace as soon
as it has ended. Times are the home's own, of a file against another that has just been written: the clocks of the
machines do not enter. What cannot write to the home for so long loses its claims, and is told when it goes on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from crosscal.errors import StoreError
from crosscal.store.processes import has_ended, is_name, this_process

BEAT_SECONDS = 20.0
LEASE_SECONDS = 300.0
EARLIER_SECONDS = 7 * 86400
"""For processes of earlier versions, which do not beat."""
USERS = "users"


class Beaten(Protocol):
    """What a heartbeat needs of a home."""

    @property
    def location(self) -> str: ...

    def touch(self, place: str, *, is_first: bool = False) -> None: ...

    def times(self, place: str) -> dict[str, float]: ...


@dataclass(frozen=True)
class Signs:
    """What is seen of all processes at one time of the home's clock."""

    now: float
    """Seconds since 1970."""
    last: Mapping[str, float]
    """Process → when it last gave a sign."""

    def is_gone(self, process: str, otherwise: float = float("-inf")) -> bool:
        """`otherwise`: the last sign of one that has no file."""
        ended = has_ended(process)
        if ended is not None:
            return ended
        silent_seconds = self.now - self.last.get(process, otherwise)
        return silent_seconds > (LEASE_SECONDS if is_name(process) else EARLIER_SECONDS)


def begin(home: Beaten) -> str:
    """This process's name. From the first call on it gives signs of life in the home until it ends."""
    _heart(os.getpid()).begin(home)
    return this_process()


def signs(home: Beaten) -> Signs:
    """What the home shows now. Raises `StoreError` or `OSError` when it cannot be written."""
    me = begin(home)
    _beat(home)
    last = home.times(USERS)
    return Signs(last[me], last)


class _Heart:
    """A thread that beats in every home this process is at work in. Torch and Numba let it run while they compute."""

    def __init__(self) -> None:
        self._homes: dict[str, Beaten] = {}
        self._wait = threading.Event().wait
        threading.Thread(target=self._beat_on, name="crosscal-heartbeat", daemon=True).start()

    def begin(self, home: Beaten) -> None:
        if home.location not in self._homes:
            _beat(home, is_first=True)
            self._homes[home.location] = home

    def _beat_on(self) -> None:
        while not self._wait(BEAT_SECONDS):
            for home in list(self._homes.values()):
                with contextlib.suppress(OSError, StoreError):  # the next may come through
                    _beat(home)


@functools.cache
def _heart(process_number: int) -> _Heart:
    """Of this process: a forked child has no threads of its parent."""
    return _Heart()


def _beat(home: Beaten, *, is_first: bool = False) -> None:
    home.touch(f"{USERS}/{this_process()}", is_first=is_first)
