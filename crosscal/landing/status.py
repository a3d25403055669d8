"""The ledger for users: the state of each domain, and the full history of one."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosscal.errors import UsageError, nearest
from crosscal.landing.ledger import Ledger
from crosscal.landing.ledger_view import LedgerView
from crosscal.landing.refused import refused
from crosscal.landing.runs import Run


def overview(ledger: Ledger) -> list[dict[str, Any]]:
    """Return a row for each domain: newest version, state, last run."""
    view = ledger.look()
    return [_row(ledger, view, domain) for domain in view.domains()]


def domain_history(ledger: Ledger, domain: str) -> dict[str, Any]:
    """Return everything about one domain: its row, its files with their histories, its runs, its refused files."""
    view = ledger.look()
    return {
        **_row(ledger, view, domain),
        "files": [dataclasses.asdict(entry) for entry in view.entries(domain)],
        "runs": [dataclasses.asdict(run) for run in view.runs(domain)],
        "refused": [dataclasses.asdict(each) for each in refused(view, domain)],
    }


def check_known(ledger: Ledger, domain: str) -> None:
    """Raise `UsageError`, with the known names, for a domain of which nothing has landed."""
    known = ledger.domains()
    if domain not in known:
        where, do = ledger.store.location, nearest(domain, known)
        raise UsageError("nothing of this domain has landed", where=where, got=domain, do=do)


def why_nothing(view: LedgerView, domain: str) -> str:
    """Return a sentence that explains why there is nothing to do for a domain."""
    last = view.last_run(domain)
    begin = f"`crosscal run PLAN --domain {domain} --again`, or a new version, starts it"
    if (version := view.given_up(domain)) is not None and last is not None:
        return f"{domain} v{version} was given up: {reason_of(last)}; {begin} again"
    if (version := view.cancelled(domain)) is not None:
        return f"{domain} v{version} was cancelled; {begin} again"
    if last is not None and last.is_open:
        return f"nothing to do for {domain}: run {last.number} ({last.run_id}) works on v{last.version}"
    if view.is_paused(domain):
        return f"{domain} is paused; `crosscal domain resume {domain}` resumes it"
    if view.requested(domain) is None:
        return f"nothing is pending for {domain}: nothing usable has landed"
    return f"nothing is pending for {domain}: v{last.version if last else 0} is {last.state if last else 'done'}"


def reason_of(run: Run) -> str:
    """Return the reason of a run's last state, or else that state."""
    return run.states[-1].get("reason", run.state)


def _row(ledger: Ledger, view: LedgerView, domain: str) -> dict[str, Any]:
    last, request = view.last_run(domain), view.items.get(f"request/{domain}", {})
    row = {"domain": domain, "version": view.requested(domain), "state": _state(ledger, view, domain)}
    if view.pending(domain) is not None and "why" in request:
        row["why"] = request["why"]
    return row if last is None else {**row, "run": last.number, "run_id": last.run_id, "at": last.states[-1]["at"]}


def _state(ledger: Ledger, view: LedgerView, domain: str) -> str:
    """Return `running`, `paused`, `waiting`, `given up`, `nothing usable`, or the state of the last run."""
    last = view.last_run(domain)
    if ledger.living(last) is not None:
        return "running"
    if view.is_paused(domain):
        return "paused"
    if view.pending(domain) is not None:
        return "waiting"
    if view.given_up(domain) is not None:
        return "given up"
    return "nothing usable" if last is None else last.state
