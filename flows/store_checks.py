"""Check the store and the disks of the service: domains, refused files, damaged artifacts, free space."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from crosscal.errors import CrosscalError
from crosscal.flows.check import FAIL, OK, WARN, Check
from crosscal.landing import Ledger
from crosscal.landing.ledger_view import LedgerView
from crosscal.landing.place import open_place, refusal
from crosscal.landing.refused import refused
from crosscal.landing.status import overview
from crosscal.service import ServiceConfig
from crosscal.store import Store

LITTLE, TOO_LITTLE = 0.1, 0.02
"""Free share of a disk below which its check warns, and below which it fails."""
MOST_SHOWN = 5
REASON_LETTERS = 200


def store_checks(service: ServiceConfig) -> Iterator[Check]:
    """Yield the checks of the store, its domains, the landing place and the disks."""
    try:
        store = Store(service.home)
        if not store.exists:
            do = "Is `home` the right one in the service file? The first landing makes it."
            yield Check("store", FAIL, f"there is none at {store.home.location}", do)
            yield _landing(service, LedgerView({}))
        else:
            yield Check("store", OK, store.home.location)
            yield from _domains(Ledger(store))
            yield _landing(service, Ledger(store).look())
            yield _damaged(store)
    except (CrosscalError, OSError) as error:
        yield Check("store", FAIL, f"cannot be read: {error}", getattr(error, "do", ""))
    yield from _disks(service)


def _domains(ledger: Ledger) -> Iterator[Check]:
    """Yield one check with the number of domains in each state, and one for each domain that needs attention."""
    rows, view = overview(ledger), ledger.look()
    counts = Counter(row["state"] for row in rows)
    yield Check("domains", OK, ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none yet")
    for row in rows:
        name, last = row["domain"], view.last_run(row["domain"])
        reason = "" if last is None else str(last.states[-1].get("reason", last.state))[:REASON_LETTERS]
        if row["state"] == "given up":
            do = f"Fix it, then request a new run: `crosscal ledger {name}` shows the history."
            yield Check(f"domain {name}", FAIL, f"v{row['version']} was given up: {reason}", do)
        elif row["state"] == "waiting" and last is not None and last.state in ("failed", "abandoned"):
            said = f"run {last.number} of v{last.version} {last.state}: {reason}"
            yield Check(f"domain {name}", WARN, said, "It is retried automatically.")


def _landing(service: ServiceConfig, view: LedgerView) -> Check:
    """Check for refused files that are still in the landing place."""
    try:
        place = open_place(service.landing)
        there = functools.cache(lambda domain: {refusal(domain, each.name, "").name for each in place.items(domain)})
        standing = [each for each in refused(view) if each.name in there(each.domain)]
    except (CrosscalError, OSError) as error:
        said = f"{service.landing}: {getattr(error, 'what', error)}"
        return Check("landing", FAIL, said, f"Make it: `mkdir -p {service.landing}`.")
    if not standing:
        return Check("landing", OK, f"{service.landing}; no file is refused")
    shown = ", ".join("/".join(filter(None, (each.domain, each.name))) for each in standing[:MOST_SHOWN])
    more = f" and {len(standing) - MOST_SHOWN} more" if len(standing) > MOST_SHOWN else ""
    return Check(
        "landing", WARN, f"{len(standing)} refused: {shown}{more}", "`crosscal ledger` says why, and what to do."
    )


def _damaged(store: Store) -> Check:
    aside = store.home.names("quarantine")
    if not aside:
        return Check("artifacts", OK, "none is damaged")
    shown = ", ".join(name[:40] for name in aside[:MOST_SHOWN])
    do = "Look at the disk; the next run that needs them recomputes them. Then remove the folder `quarantine`."
    return Check("artifacts", WARN, f"{len(aside)} damaged, set aside: {shown}", do)


def _disks(service: ServiceConfig) -> Iterator[Check]:
    for name, place in (("store", service.home), ("runs", service.runs)):
        if "://" in place:
            continue  # an object store has no size limit
        usage = shutil.disk_usage(_nearest(Path(place)))
        free = usage.free / usage.total
        state = FAIL if free < TOO_LITTLE else WARN if free < LITTLE else OK
        do = "" if state == OK else "`crosscal store du` says what takes it; housekeeping: unused_days, runs_days."
        yield Check(f"disk of {name}", state, f"{usage.free / 1e9:,.1f} GB free, {free:.0%}", do)


def _nearest(place: Path) -> Path:
    """Return the place, or its nearest parent that exists."""
    return next(folder for folder in (place, *place.parents) if folder.exists())
