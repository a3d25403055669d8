"""One thing that was looked at: well, worth a look, or not well, and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    """`ok`, `warn` (the service goes on without anybody) or `fail` (it does not do its work)."""
    said: str
    do: str = ""
    """Empty where there is nothing to do."""

    def as_json(self) -> dict[str, str]:
        return asdict(self)
