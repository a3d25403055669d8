"""State lines of the histories that the ledger keeps."""

from __future__ import annotations

import datetime
from typing import Any

Value = dict[str, Any]


def now() -> str:
    """Return the current UTC time to the millisecond: 2026-11-22T21:55:01.123Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def state(name: str, **facts: Any) -> Value:
    """Return one line of a history, without the facts that are None."""
    return {"state": name, "at": now(), **{fact: value for fact, value in facts.items() if value is not None}}
