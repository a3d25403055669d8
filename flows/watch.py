"""The watch flow (every minute by default): ingests complete landed files and announces pending domains.

One mechanism covers documents that have just landed, lost events, a server that was down, and a run that died: every
domain that is pending in the ledger and has no live run is announced, and announced again by the next watch.
"""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging import get_run_logger

from crosscal.flows.cancelled import note_cancelled
from crosscal.flows.changes import SETTLE_SECONDS, notice_changes
from crosscal.flows.old_runs import QUIET, remove_missed
from crosscal.flows.outcome import NEWS, call_run, shown
from crosscal.flows.stuck_runs import close_stuck_runs, note_process, runs_in
from crosscal.landing import LandingResult, Ledger, take_in
from crosscal.landing.intake import sentence
from crosscal.landing.ledger_view import LedgerView
from crosscal.landing.refused import refused
from crosscal.resources import plan_file
from crosscal.store import Store
from crosscal.tasks.announce import FILE_REFUSED, announce, emit_each
from crosscal.tasks.artifacts import make_artifact

LIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
SOON = datetime.timedelta(minutes=10)
"""A flow run scheduled later than this does not prevent an announcement."""
MOST_LINES = 200
"""File lines in the log of one run; the ledger has all."""
MOST_REFUSED = 100
MOST_WORDS = 300


@flow(name="watch", flow_run_name="watch", persist_result=False, result_serializer="json", on_running=[note_process])
def watch(
    landing: str,
    home: str,
    settle_seconds: float = 10.0,
    stuck_minutes: float = 60.0,
    text: dict[str, str] | None = None,
    plan_path: str | None = None,
) -> dict[str, Any]:
    """Ingest landed files, close dead flow runs and announce pending domains; return what was done.

    `text`: domain → the column that holds its text, where it is not found automatically. With a plan, domains whose
    models were made by another plan or from another model are pending as well.
    """
    plan = plan_file(Path(plan_path)) if plan_path else None
    return shown(lambda: _watch(Store(home), landing, settle_seconds, stuck_minutes, text or {}, plan))


def _watch(
    store: Store, landing: str, settle_seconds: float, stuck_minutes: float, text: Mapping[str, str], plan: Path | None
) -> dict[str, Any]:
    log, ledger = _log(), Ledger(store)
    taken = take_in(store, landing, settle_seconds, text=text, ledger=ledger)
    _tell_files(ledger, taken)
    with get_client(sync_client=True) as client:
        remove_missed(client)
    closed = close_stuck_runs(stuck_minutes)
    for run in closed:
        log.warning("run %s closed: %s", run["run"], run["reason"])
    changed = notice_changes(ledger, plan, settle_seconds=SETTLE_SECONDS) if plan else {}
    for domain, what in changed.items():
        log.info("%s is to be done again: %s", domain, what)
    waiting = waiting_domains(ledger)
    announced = {domain: announce(domain, version) for domain, version in waiting.items()}
    for domain, arrived in announced.items():
        log.info("%s v%d: %s", domain, waiting[domain], "announced" if arrived else "the event did not get through")
    files = Counter(each.state for each in taken)
    counts = {
        "announced": sum(announced.values()),
        "not heard": len(announced) - sum(announced.values()),
        "refused": files["refused"],
        "taken in": files["ingested"],
        "to be done again": len(changed),
        "closed": len(closed),
    }
    message = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing new"
    domains = sorted({*waiting, *(each.domain for each in taken if each.state != "known" and each.domain)})
    call_run(
        f"watch · {message}", [NEWS, *(f"domain:{domain}" for domain in domains)] if any(counts.values()) else [QUIET]
    )
    return {"message": message, "files": dict(files), "announced": waiting, "closed": closed}


def _tell_files(ledger: Ledger, taken: Sequence[LandingResult]) -> None:
    """Report what a sweep did, for users who do not see the worker's terminal: a log line for each new file, an event
    for each refused one, and an artifact with all files that are still refused."""
    told = [each for each in taken if each.state != "known"]
    if not told:
        return
    log, bad = _log(), [each for each in told if each.state == "refused"]
    for each in sorted(told, key=lambda each: each.state != "refused")[:MOST_LINES]:
        log.warning(sentence(each)) if each.state == "refused" else log.info(sentence(each))
    if len(told) > MOST_LINES:
        log.info("and %d more; `crosscal ledger DOMAIN` has all", len(told) - MOST_LINES)
    facts = [{"domain": each.domain, "file": each.name, "reason": each.reason, "do": each.do} for each in bad]
    emit_each(FILE_REFUSED, [(f"crosscal.landing.{each['domain']}", each) for each in facts])
    view = ledger.look()
    stood = {domain: view.ever_refused(domain) for domain in {each.domain for each in told}}
    if not bad and not any(each.name in stood[each.domain] for each in told):
        return
    standing = refused(view)
    rows = [
        {"file": each.name, "domain": each.domain, "reason": each.reason, "what to do": each.do, "since": each.at}
        for each in standing[:MOST_REFUSED]
    ]
    more = f"; shown are the newest {MOST_REFUSED}" if len(standing) > MOST_REFUSED else ""
    make_artifact(
        create_table_artifact,
        key="refused-files",
        table=[{name: text[:MOST_WORDS] for name, text in row.items()} for row in rows],
        description=f"Landed files that are not taken: {len(standing)}{more}.",
    )


def _log() -> Any:
    """Return this run's logger. PREFECT_LOGGING_LEVEL silences Prefect's own lines, seven a minute, but not these."""
    log = get_run_logger().getChild("watch")
    log.setLevel(logging.INFO)
    return log


def waiting_domains(ledger: Ledger) -> dict[str, int]:
    """Return the versions of pending domains that no live run works on, and no user has paused or cancelled."""
    if not _pending(ledger.look()):
        return {}
    with get_client(sync_client=True) as client:
        note_cancelled(ledger, client)
        busy = _busy_domains(client)
    view = ledger.look()
    return {d: v for d, v in _pending(view).items() if d not in busy and not ledger.living(view.last_run(d))}


def _pending(view: LedgerView) -> dict[str, int]:
    found = {d: view.pending(d) for d in view.domains() if not view.is_paused(d)}
    return {domain: version for domain, version in found.items() if version is not None}


def _busy_domains(client: SyncPrefectClient) -> set[str]:
    """Return the domains of flow runs that are active or start soon."""
    runs = runs_in(client, *LIVE, flows=("recompress",))
    return {str(run.parameters.get("domain")) for run in runs if not _is_for_later(run)}


def _is_for_later(run: FlowRun) -> bool:
    planned = run.next_scheduled_start_time
    return planned is not None and planned > datetime.datetime.now(datetime.UTC) + SOON
