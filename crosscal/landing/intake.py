"""One sweep of the landing place: every complete new file is ingested once, by content, and recorded.

The order makes a crash harmless: landed, ingested into the corpus, asked for, recorded as ingested. A sweep that was
cut off ingests the same documents again, which changes nothing, and carries on from there. Nothing is announced here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from crosscal.corpora import DocumentLimits, ingest
from crosscal.errors import CorpusError
from crosscal.landing.items import LandedFile, Place, Refusal
from crosscal.landing.ledger import Ledger
from crosscal.landing.picture import SETTLED
from crosscal.landing.place import MARKER, complete_files, open_place, promise_of, refusal
from crosscal.landing.records import state
from crosscal.store import Store

MOST_FILE_BYTES = 16 * 2**30
MOST_RATIO = 200
FREE_BYTES = 64 * 2**20
"""A compressed file is read up to 200 times its size, and always up to 64 MiB: text shrinks to a third or a tenth."""
LIMITS = DocumentLimits(max_file_bytes=MOST_FILE_BYTES)
_log = logging.getLogger("crosscal")


@dataclass(frozen=True)
class Landed:
    """What a sweep did with one file: `ingested`, `refused`, or `known` for content that had landed before."""

    domain: str
    name: str
    state: str
    version: int | None = None
    """Of the corpus, once the file is in it."""
    added_documents: int = 0
    reason: str | None = None


def take_in(store: Store, landing: str, settle_seconds: float = 10.0, limits: DocumentLimits = LIMITS) -> list[Landed]:
    """Sweep once. What was seen before and has not changed is neither read nor returned."""
    ledger, place = Ledger(store), open_place(landing)
    settled = functools.cache(ledger.take_over().settled)
    done: list[Landed | None] = []
    for found in complete_files(place, settle_seconds):
        if isinstance(found, Refusal):
            done.append(_refuse(ledger, found))
        elif (found.name, found.signature) not in settled(found.domain):
            done.append(_take(store, ledger, place, found, limits))
    return [one for one in done if one is not None]


def _take(store: Store, ledger: Ledger, place: Place, found: LandedFile, limits: DocumentLimits) -> Landed | None:
    if found.bytes > limits.max_file_bytes:
        reason = f"{found.bytes:,} bytes are more than the {limits.max_file_bytes:,} that are taken"
        return _refuse(ledger, refusal(found.domain, found.name, reason))
    try:
        promised = promise_of(place, found)
    except ValueError as error:
        reason = f"its {MARKER} marker is not understood: {error}"
        return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature))
    except OSError as error:
        return _later(f"{found.domain}/{found.name}{MARKER}", error)
    if promised.get("bytes") not in (None, found.bytes):
        reason = f"it has {found.bytes:,} bytes, its marker says {promised['bytes']:,}"
        return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature))
    known = ledger.seen(found)
    if known is not None and promised.get("sha256") in (None, known.sha256):  # the marker alone is new
        ledger.record(found, known.sha256, None)
        return None
    return _fetch(store, ledger, place, found, promised.get("sha256"), limits)


def _fetch(
    store: Store, ledger: Ledger, place: Place, found: LandedFile, promised: str | None, limits: DocumentLimits
) -> Landed | None:
    with tempfile.TemporaryDirectory(prefix="crosscal-landing-") as folder:
        copy = Path(folder, found.name)
        try:
            sha256 = place.fetch(found, copy)
        except PermissionError as error:
            return _refuse(ledger, refusal(found.domain, found.name, f"it may not be read: {error.strerror or error}"))
        except OSError as error:  # it went meanwhile, or the line is bad: nothing is known of the file
            return _later(f"{found.domain}/{found.name}", error)
        if sha256 is None:
            _log.info("%s/%s changed while it was read; the next sweep takes it", found.domain, found.name)
            return None
        if promised not in (None, sha256):
            reason = f"its digest is {sha256[:16]}…, its marker says {promised[:16]}…"
            return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature))
        return _ingest(store, ledger, found, sha256, copy, limits)


def _ingest(store: Store, ledger: Ledger, file: LandedFile, sha256: str, copy: Path, limits: DocumentLimits) -> Landed:
    def record(name: str | None, **facts: object) -> None:
        ledger.record(file, sha256, None if name is None else state(name, **facts))

    known = ledger.file(file.domain, sha256)
    if known is not None and known.state in SETTLED:
        record(None)
        return Landed(file.domain, file.name, "known", known.version, reason=known.states[-1].get("reason"))
    record("landed")
    most_bytes = min(limits.max_file_bytes, max(FREE_BYTES, MOST_RATIO * file.bytes))
    bounded = dataclasses.replace(limits, max_file_bytes=most_bytes)
    try:
        report = ingest(store, file.domain, [str(copy)], with_removed=False, limits=bounded)
    except CorpusError as error:
        reason = f"{error.what} ({error.got})" if error.got else error.what
        record("refused", reason=reason)
        _log.warning("%s/%s is not taken: %s", file.domain, file.name, reason)
        return Landed(file.domain, file.name, "refused", reason=reason)
    version = report.corpus.version
    ledger.request(file.domain, version)
    facts = {"documents": report.added_documents, "duplicates": report.duplicates, "rejected": report.rejected or None}
    record("ingested", version=version, **facts)
    _log.info("%s v%d: %d documents of %s", file.domain, version, report.added_documents, file.name)
    return Landed(file.domain, file.name, "ingested", version, report.added_documents)


def _refuse(ledger: Ledger, found: Refusal) -> Landed | None:
    """Recorded and warned of once; None when it was before."""
    if not ledger.refuse(found):
        return None
    where = "/".join(part for part in (found.domain, found.name) if part)
    _log.warning("%s is not taken: %s", where, found.reason)
    return Landed(found.domain, found.name, "refused", reason=found.reason)


def _later(path: str, error: OSError) -> None:
    _log.warning("%s cannot be read now, the next sweep tries again: %s", path, error)
