"""Trigger the service from the command line, after a manual ingest."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from crosscal.errors import CrosscalError
from crosscal.landing import Ledger
from crosscal.landing.status import why_nothing
from crosscal.store import Store
from crosscal.tasks.announce import announce


def announce_pending(home: str, domains: Iterable[str] | None = None) -> dict[str, bool]:
    """Announce the domains (default: all) that wait for a run; return domain → whether the event was sent. Logs what
    was done, or why there is nothing to announce."""
    view, sent = Ledger(Store(home)).look(), {}
    for domain in view.domains() if domains is None else domains:
        version = view.pending(domain)
        if version is not None and not view.is_paused(domain):
            sent[domain] = announce(domain, version)
            said = f"{domain} v{version} is announced" if sent[domain] else f"{domain} v{version} waits"
        else:
            said = why_nothing(view, domain)
        logging.getLogger("crosscal").info(said)
    return sent


def check_sent(sent: dict[str, bool]) -> None:
    """Raise `CrosscalError` naming the domains whose event was not sent."""
    if unsent := [domain for domain, was_sent in sent.items() if not was_sent]:
        raise CrosscalError(
            "taken in and noted in the ledger, but no event could be sent",
            got=", ".join(unsent),
            do="Does PREFECT_API_URL name the service's server? The next watch makes up for it, or `crosscal run`.",
        )
