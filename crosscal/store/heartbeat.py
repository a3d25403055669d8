"""Heartbeats: which of the processes that use a home are alive, on any machine.

<home>/users/<process>      a file that its process touches every BEAT_SECONDS while it lives

A process counts as gone once its file is older than LEASE_SECONDS; one of the same boot and process namespace, as soon
as it has ended. Times are the home's own, compared with a file that has just been written: the machines' clocks do not
matter. A process that cannot write to the home for that long loses its claims and gets an error when it continues.
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
"""Lease of processes of earlier versions, which send no heartbeats."""
USERS = "users"


class HeartbeatHome(Protocol):
    """The part of a home that heartbeats need."""

    @property
    def location(self) -> str: ...

    def touch(self, place: str, *, is_first: bool = False) -> None: ...

    def times(self, place: str) -> dict[str, float]: ...


@dataclass(frozen=True)
class Heartbeats:
    """Heartbeats of all processes, at one time of the home's clock."""

    now: float
    """Seconds since 1970."""
    last: Mapping[str, float]
    """Process → time of its last heartbeat, in seconds since 1970."""

    def is_gone(self, process: str, otherwise: float = float("-inf")) -> bool:
        """Return whether a process is gone. `otherwise` is its last activity if it has no heartbeat file."""
        ended = has_ended(process)
        if ended is not None:
            return ended
        silent_seconds = self.now - self.last.get(process, otherwise)
        return silent_seconds > (LEASE_SECONDS if is_name(process) else EARLIER_SECONDS)


def begin(home: HeartbeatHome) -> str:
    """Return this process's name. The first call starts heartbeats in the home, which last until the process ends."""
    _heart(os.getpid()).begin(home)
    return this_process()


def heartbeats(home: HeartbeatHome) -> Heartbeats:
    """Return the current heartbeats in a home. Raises `StoreError` or `OSError` if it cannot be written."""
    me = begin(home)
    _beat(home)
    last = home.times(USERS)
    return Heartbeats(last[me], last)


class _Heart:
    """A thread that sends heartbeats to every home this process uses, also while Torch and Numba compute (no GIL)."""

    def __init__(self) -> None:
        self._homes: dict[str, HeartbeatHome] = {}
        self._wait = threading.Event().wait
        threading.Thread(target=self._beat_on, name="crosscal-heartbeat", daemon=True).start()

    def begin(self, home: HeartbeatHome) -> None:
        if home.location not in self._homes:
            _beat(home, is_first=True)
            self._homes[home.location] = home

    def _beat_on(self) -> None:
        while not self._wait(BEAT_SECONDS):
            for home in list(self._homes.values()):
                with contextlib.suppress(OSError, StoreError):  # the next one may succeed
                    _beat(home)


@functools.cache
def _heart(process_number: int) -> _Heart:
    """One per process: a forked child does not inherit its parent's threads."""
    return _Heart()


def _beat(home: HeartbeatHome, *, is_first: bool = False) -> None:
    home.touch(f"{USERS}/{this_process()}", is_first=is_first)
