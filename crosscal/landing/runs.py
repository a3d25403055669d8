"""Recompressions of a domain, one after the other: refs `recompressions/<domain>/<number>`, one for each run.

    claimed → recompressed → evaluated → published | kept | failed | abandoned
    claimed → unchanged

Creating the next number is the claim, and only one process can. A run whose process is gone is marked abandoned before
the next number is made, so that a holder which was only slow finds its run closed and stops.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crosscal.errors import StoreError
from crosscal.landing.records import state, update
from crosscal.store import Store
from crosscal.store.processes import is_ended, is_here, process_started, this_process

FINISHED = ("published", "kept", "unchanged")
"""`unchanged`: the newest version makes the models of the last finished run, or has too little text for any."""
ENDED = (*FINISHED, "failed", "abandoned")
LEASE_SECONDS = 86400.0
"""A run of another machine, of which no API knows the state, is taken for dead this long after its last sign."""


@dataclass(frozen=True)
class Run:
    """One claim of a domain and what came of it."""

    domain: str
    number: int
    version: int
    """Of the corpus: what was claimed, or, once finished, what was used (the same or newer)."""
    run_id: str
    process: str
    process_started: float
    states: tuple[dict[str, Any], ...]

    @property
    def state(self) -> str:
        return self.states[-1]["state"]

    @property
    def is_open(self) -> bool:
        return self.state not in ENDED

    @property
    def silent_seconds(self) -> float:
        """Since the last line of its history."""
        last = datetime.datetime.fromisoformat(self.states[-1]["at"])
        return (datetime.datetime.now(datetime.UTC) - last).total_seconds()


HasEnded = Callable[[Run], bool | None]
"""Asks an orchestrator whether a run is over; None when it does not know."""


def nobody_knows(run: Run) -> bool | None:
    """Where there is nobody to ask."""
    return None


def is_dead(run: Run, has_ended: HasEnded) -> bool:
    """Whether a run's holder is gone: its process on this machine, else what the orchestrator says, else the lease."""
    if is_here(run.process):
        return is_ended(run.process, run.process_started)
    ended = has_ended(run)
    return run.silent_seconds > LEASE_SECONDS if ended is None else ended


class Runs:
    """The recompressions in a store."""

    def __init__(self, store: Store) -> None:
        self.refs = store.refs

    def domains(self) -> list[str]:
        return [name.removeprefix("recompressions/") for name in self.refs.names("recompressions")]

    def newest_first(self, domain: str) -> Iterator[Run]:
        """Read one by one, so that looking at the newest costs one read."""
        for name in sorted(self.refs.names(f"recompressions/{domain}"), reverse=True):
            _, value = self.refs.read(name)
            if value is not None:
                yield _run(domain, int(name.rpartition("/")[2]), value)

    def newest(self, domain: str) -> Run | None:
        return next(self.newest_first(domain), None)

    def begin(self, domain: str, number: int, version: int, run_id: str) -> Run:
        """Claim. Raises `StoreConflict` when somebody else has this number."""
        value = {
            "version": version,
            "run_id": run_id,
            "host": platform.node(),
            "pid": os.getpid(),
            "process": this_process(),
            "process_started": process_started(),
            "states": [state("claimed")],
        }
        self.refs.append(_name(domain, number), 0, value)
        return _run(domain, number, value)

    def mark(self, run: Run, name: str, *, version: int | None = None, **facts: Any) -> Run:
        """Add a line to a run's history. Raises `StoreError` when it was closed, that is, taken from its holder."""

        def change(value: dict[str, Any] | None) -> dict[str, Any]:
            if value is None or value["states"][-1]["state"] in ENDED:
                raise StoreError(
                    "this run has been closed by another",
                    where=f"{run.domain}, run {run.number}",
                    got=value["states"][-1]["state"] if value else "nothing",
                    do="Whoever took over carries on; nothing is lost.",
                )
            states = [*value["states"], state(name, **facts)]
            return {**value, "version": version or value["version"], "states": states}

        value = update(self.refs, _name(run.domain, run.number), change)
        assert value is not None
        return _run(run.domain, run.number, value)


def _name(domain: str, number: int) -> str:
    return f"recompressions/{domain}/{number:08d}"


def _run(domain: str, number: int, value: dict[str, Any]) -> Run:
    fields = ("version", "run_id", "process", "process_started")
    return Run(domain, number, *(value[field] for field in fields), states=tuple(value["states"]))
