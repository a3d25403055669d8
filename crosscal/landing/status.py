"""The ledger for people: where each domain stands, and the whole way of one."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosscal.landing.ledger import Ledger
from crosscal.landing.picture import Picture
from crosscal.landing.refused import refused


def overview(ledger: Ledger) -> list[dict[str, Any]]:
    """A row for each domain: newest version, state, its last run."""
    picture = ledger.look()
    return [_row(ledger, picture, domain) for domain in picture.domains()]


def whole_way(ledger: Ledger, domain: str) -> dict[str, Any]:
    """Everything about one domain: its row, its files with their histories, its runs, what was refused."""
    picture = ledger.look()
    return {
        **_row(ledger, picture, domain),
        "files": [dataclasses.asdict(entry) for entry in picture.entries(domain)],
        "runs": [dataclasses.asdict(run) for run in picture.runs(domain)],
        "refused": [dataclasses.asdict(each) for each in refused(picture, domain)],
    }


def _row(ledger: Ledger, picture: Picture, domain: str) -> dict[str, Any]:
    last = picture.last_run(domain)
    row = {"domain": domain, "version": picture.requested(domain), "state": _state(ledger, picture, domain)}
    return row if last is None else {**row, "run": last.number, "run_id": last.run_id, "at": last.states[-1]["at"]}


def _state(ledger: Ledger, picture: Picture, domain: str) -> str:
    """`running`, `waiting`, `given up`, `published`, `kept`, `unchanged`, or `nothing usable`."""
    last = picture.last_run(domain)
    if ledger.living(last) is not None:
        return "running"
    if picture.pending(domain) is not None:
        return "waiting"
    if picture.given_up(domain) is not None:
        return "given up"
    return "nothing usable" if last is None else last.state
