"""Recompression runs of a domain, one after another, as the ledger records them.

    claimed → recompressed → evaluated → published | kept | failed | abandoned | cancelled
    claimed → unchanged

Creating the next number is the claim; only one process can create it. The claim holds while its process sends
heartbeats to the store (`store.heartbeat`). A run whose process is gone is marked abandoned before the next number is
created, so that a holder which was only slow finds its run closed and stops.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

FINISHED = ("published", "kept", "unchanged")
"""`unchanged`: the newest version yields the models of the last finished run, or has too little text for any."""
ENDED = (*FINISHED, "failed", "abandoned", "cancelled")
"""`cancelled`: a user ended it; it is not started again automatically."""


@dataclass(frozen=True)
class Run:
    """One claim of a domain and its outcome."""

    domain: str
    number: int
    version: int
    """Version of the corpus: the claimed one or, once finished, the one that was used (the same or newer)."""
    run_id: str
    holder: str | None
    """Name of its process (see `store.processes`); None in records of earlier versions."""
    states: tuple[dict[str, Any], ...]
    request: dict[str, Any]
    """The request that it answers, as it was at the claim; empty in records of earlier versions."""

    @property
    def state(self) -> str:
        return self.states[-1]["state"]

    @property
    def is_open(self) -> bool:
        return self.state not in ENDED

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last line of its history."""
        last = datetime.datetime.fromisoformat(self.states[-1]["at"])
        return (datetime.datetime.now(datetime.UTC) - last).total_seconds()


def run_key(domain: str, number: int) -> str:
    return f"run/{domain}/{number:08d}"


def run_of(key: str, value: dict[str, Any]) -> Run:
    _, domain, number = key.split("/")
    states, request = tuple(value["states"]), value.get("request", {})
    return Run(domain, int(number), value["version"], value["run_id"], value.get("holder"), states, request)
