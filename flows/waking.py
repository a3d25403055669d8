"""Waking the service from the command line, where something was ingested by hand."""

from __future__ import annotations

from collections.abc import Iterable

from crosscal.landing import Ledger
from crosscal.store import Store
from crosscal.tasks.announce import announce


def announce_pending(home: str, domains: Iterable[str] | None = None) -> dict[str, bool]:
    """Announce the domains (left out, all) that wait for a run: domain → whether the event was sent."""
    picture = Ledger(Store(home)).look()
    pending = {domain: picture.pending(domain) for domain in (picture.domains() if domains is None else domains)}
    return {domain: announce(domain, version) for domain, version in pending.items() if version is not None}
