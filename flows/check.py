"""The result of one health check: a state, a message and a remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    """`ok`, `warn` (the service continues without intervention) or `fail` (it does not do its work)."""
    said: str
    do: str = ""
    """Remedy; empty if there is nothing to do."""

    def as_json(self) -> dict[str, str]:
        return asdict(self)
