"""Recompressions of a domain, one after the other, as the ledger has them.

    claimed → recompressed → evaluated → published | kept | failed | abandoned | cancelled
    claimed → unchanged

Creating the next number is the claim, and only one process can. It holds while its process gives signs of life in the
store (`store.heartbeat`). A run whose process is gone is marked abandoned before the next number is made, so that a
holder which was only slow finds its run closed and stops.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

FINISHED = ("published", "kept", "unchanged")
"""`unchanged`: the newest version makes the models of the last finished run, or has too little text for any."""
ENDED = (*FINISHED, "failed", "abandoned", "cancelled")
"""`cancelled`: a person ended it; nobody starts it again by themselves."""


@dataclass(frozen=True)
class Run:
    """One claim of a domain and what came of it."""

    domain: str
    number: int
    version: int
    """Of the corpus: what was claimed, or, once finished, what was used (the same or newer)."""
    run_id: str
    holder: str | None
    """Its process (see `store.processes`); None in what earlier versions wrote."""
    states: tuple[dict[str, Any], ...]
    request: dict[str, Any]
    """What it answers, as it stood when it was claimed; empty in what earlier versions wrote."""

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


def run_key(domain: str, number: int) -> str:
    return f"run/{domain}/{number:08d}"


def run_of(key: str, value: dict[str, Any]) -> Run:
    _, domain, number = key.split("/")
    states, request = tuple(value["states"]), value.get("request", {})
    return Run(domain, int(number), value["version"], value["run_id"], value.get("holder"), states, request)
