"""Refused files, whether they were read or not, with reason and remedy: the newest refusal of each name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crosscal.landing.ledger_view import LedgerView


@dataclass(frozen=True)
class RefusedFile:
    domain: str
    """Empty for entries beside the domains' folders."""
    name: str
    reason: str
    do: str
    """How to resolve it; empty in records of earlier versions."""
    at: str


def refused(view: LedgerView, domain: str | None = None) -> list[RefusedFile]:
    """Return the current refusals, newest first, without those that a later file of the same name has resolved."""
    newest: dict[tuple[str, str], tuple[str, RefusedFile | None]] = {}
    for place, at, found in _told(view, domain):
        if place not in newest or newest[place][0] <= at:
            newest[place] = at, found
    standing = [found for _, found in newest.values() if found is not None]
    return sorted(standing, key=lambda each: (each.at, each.domain, each.name), reverse=True)


def _told(view: LedgerView, domain: str | None) -> Iterator[tuple[tuple[str, str], str, RefusedFile | None]]:
    """Yield (domain and name, time, refusal); the refusal is None for a file that is not refused."""
    for each in view.refusals():
        if domain in (None, each["domain"]):
            place = each["domain"], each["name"]
            yield place, each["at"], RefusedFile(*place, each["reason"], each.get("do", ""), each["at"])
    for name in view.domains() if domain is None else [domain]:
        for entry in view.files(name):
            last = entry.states[-1]
            for file in entry.names:
                is_refused = last["state"] == "refused"
                told = RefusedFile(name, file, last["reason"], last.get("do", ""), last["at"]) if is_refused else None
                yield (name, file), last["at"], told
