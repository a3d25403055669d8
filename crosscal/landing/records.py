"""Records that several processes write: read, change, append on top, and again when another was faster."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from crosscal.errors import StoreConflict

R = TypeVar("R")
Value = dict[str, Any]
ATTEMPTS = 50


def again_on_conflict(attempt: Callable[[], R]) -> R:
    """Call until nobody else wrote in between; after 50 conflicts in a row the last is raised."""
    retrying = Retrying(
        retry=retry_if_exception_type(StoreConflict),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random(0, 0.05),
        reraise=True,
    )
    return retrying(attempt)


def now() -> str:
    """UTC, to the millisecond: 2026-11-22T21:55:01.123Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def state(name: str, **facts: Any) -> Value:
    """One line of a history; facts that are None are left out."""
    return {"state": name, "at": now(), **{fact: value for fact, value in facts.items() if value is not None}}
