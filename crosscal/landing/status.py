"""The ledger for people: where each domain stands, and the whole way of one."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosscal.landing.ledger import Ledger


def overview(ledger: Ledger) -> list[dict[str, Any]]:
    """A row for each domain: newest version, state, its last run."""
    return [_row(ledger, domain) for domain in ledger.domains()]


def whole_way(ledger: Ledger, domain: str) -> dict[str, Any]:
    """Everything about one domain: its row, its files with their histories, its runs, what was refused."""
    return {
        **_row(ledger, domain),
        "files": [dataclasses.asdict(entry) for entry in ledger.entries(domain)],
        "runs": [dataclasses.asdict(run) for run in ledger.runs.newest_first(domain)][::-1],
        "refused": [each for each in ledger.refusals() if each["domain"] == domain],
    }


def _row(ledger: Ledger, domain: str) -> dict[str, Any]:
    last = ledger.runs.newest(domain)
    row = {"domain": domain, "version": ledger.requested(domain), "state": _state(ledger, domain)}
    return row if last is None else {**row, "run": last.number, "run_id": last.run_id, "at": last.states[-1]["at"]}


def _state(ledger: Ledger, domain: str) -> str:
    """`running`, `waiting`, `given up`, `published`, `kept`, `unchanged`, or `nothing usable`."""
    if ledger.holder(domain) is not None:
        return "running"
    if ledger.pending(domain) is not None:
        return "waiting"
    if ledger.given_up(domain) is not None:
        return "given up"
    last = ledger.runs.newest(domain)
    return "nothing usable" if last is None else last.state
