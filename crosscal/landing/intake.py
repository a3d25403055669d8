"""One sweep of the landing place: ingest every complete new file once, by content, and record it.

The order of the steps makes a crash harmless: record as landed, ingest into the corpus, request a run, record as
ingested. The sweep after a crash ingests the same documents again, which changes nothing, and continues from there.
This module emits no events.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crosscal.corpora import DocumentLimits, ingest
from crosscal.corpora.records import TEXT
from crosscal.corpora.sources import split_of_file
from crosscal.errors import CorpusError, NoColumn
from crosscal.landing.items import LandedFile, LandingPlace, Refusal
from crosscal.landing.ledger import Ledger
from crosscal.landing.place import MARKER, complete_files, open_place, promise_of, refusal
from crosscal.landing.records import state
from crosscal.store import Store

MOST_FILE_BYTES = 16 * 2**30
MOST_RATIO = 200
FREE_BYTES = 64 * 2**20
"""A compressed file may expand to 200 times its size, and always to 64 MiB: text shrinks to a third or a tenth."""
COPY_AGAIN = "Copy it again, and write its marker once it is whole."
LIMITS = DocumentLimits(max_file_bytes=MOST_FILE_BYTES)
_log = logging.getLogger("crosscal")


@dataclass(frozen=True)
class LandingResult:
    """Result of a sweep for one file: `ingested`, `refused`, or `known` for content that had landed before."""

    domain: str
    name: str
    state: str
    version: int | None = None
    """Version of the corpus, once the file is in it."""
    added_documents: int = 0
    reason: str | None = None
    do: str | None = None
    """How to resolve a refusal."""
    split: str | None = None
    """The split that the file's name assigns to all of its documents."""


@dataclass(frozen=True)
class IntakeOptions:
    """How landed files are read: limits, and the text column of each domain where it is not found automatically."""

    limits: DocumentLimits = LIMITS
    text: Mapping[str, str] | str = field(default_factory=dict)
    """Text column of each domain, or one for all."""

    def column(self, domain: str) -> str | None:
        return self.text if isinstance(self.text, str) else self.text.get(domain)


def take_in(
    store: Store,
    landing: str,
    settle_seconds: float = 10.0,
    limits: DocumentLimits = LIMITS,
    text: Mapping[str, str] | str | None = None,
    ledger: Ledger | None = None,
) -> list[LandingResult]:
    """Sweep the landing place once. Files seen before and unchanged are neither read nor returned.

    `ledger`: a ledger of the same store. It keeps what this sweep read, so that looking again costs little.
    """
    ledger, place, reading = ledger or Ledger(store), open_place(landing), IntakeOptions(limits, text or {})
    view = ledger.take_over()
    settled = functools.cache(lambda domain: view.settled(domain, reading.column(domain)))
    done: list[LandingResult | None] = []
    for found in complete_files(place, settle_seconds):
        if isinstance(found, Refusal):
            done.append(_refuse(ledger, found))
        elif (found.name, found.signature) not in settled(found.domain):
            done.append(_take(store, ledger, place, found, reading))
    return [one for one in done if one is not None]


def _take(
    store: Store, ledger: Ledger, place: LandingPlace, found: LandedFile, reading: IntakeOptions
) -> LandingResult | None:
    most_bytes = reading.limits.max_file_bytes
    if found.bytes > most_bytes:
        reason = f"{found.bytes:,} bytes exceed the limit of {most_bytes:,}"
        return _refuse(ledger, refusal(found.domain, found.name, reason, do="Divide it into several files."))
    try:
        promised = promise_of(place, found)
    except ValueError as error:
        reason = f"its {MARKER} marker is not understood: {error}"
        do = f'Leave {found.name}{MARKER} empty, or write {{"sha256": …, "bytes": …}} into it.'
        return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature, do))
    except OSError as error:
        return _later(f"{found.domain}/{found.name}{MARKER}", error)
    if promised.get("bytes") not in (None, found.bytes):
        reason = f"it has {found.bytes:,} bytes, its marker says {promised['bytes']:,}"
        return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature, COPY_AGAIN))
    known = ledger.seen(found, reading.column(found.domain))
    if known is not None and promised.get("sha256") in (None, known.sha256):  # only the marker is new
        ledger.record(found, known.sha256, None)
        return None
    return _fetch(store, ledger, place, found, promised.get("sha256"), reading)


def _fetch(
    store: Store, ledger: Ledger, place: LandingPlace, found: LandedFile, promised: str | None, reading: IntakeOptions
) -> LandingResult | None:
    with tempfile.TemporaryDirectory(prefix="crosscal-landing-") as folder:
        copy = Path(folder, found.name)
        try:
            sha256 = place.fetch(found, copy)
        except PermissionError as error:
            reason, do = f"it may not be read: {error.strerror or error}", "Let the worker's account read it."
            return _refuse(ledger, refusal(found.domain, found.name, reason, do=do))
        except OSError as error:  # removed meanwhile, or a network error: nothing is known of the file
            return _later(f"{found.domain}/{found.name}", error)
        if sha256 is None:
            _log.info("%s/%s changed while it was read; the next sweep takes it", found.domain, found.name)
            return None
        if promised not in (None, sha256):
            reason = f"its digest is {sha256[:16]}…, its marker says {promised[:16]}…"
            return _refuse(ledger, refusal(found.domain, found.name, reason, found.signature, COPY_AGAIN))
        return _ingest(store, ledger, found, sha256, copy, reading)


def _ingest(
    store: Store, ledger: Ledger, file: LandedFile, sha256: str, copy: Path, reading: IntakeOptions
) -> LandingResult:
    def record(name: str | None, **facts: object) -> None:
        ledger.record(file, sha256, None if name is None else state(name, **facts))

    text, limits = reading.column(file.domain), reading.limits
    known = ledger.file(file.domain, sha256)
    if known is not None and known.is_settled(text):
        record(None)
        return LandingResult(file.domain, file.name, "known", known.version, reason=known.states[-1].get("reason"))
    record("landed")
    most_bytes = min(limits.max_file_bytes, max(FREE_BYTES, MOST_RATIO * file.bytes))
    bounded = dataclasses.replace(limits, max_file_bytes=most_bytes)
    try:
        report = ingest(store, file.domain, [str(copy)], text=text or TEXT, with_removed=False, limits=bounded)
    except CorpusError as error:
        reason, do = f"{error.what} ({error.got})" if error.got else error.what, _remedy(file, error)
        record("refused", reason=reason, do=do, text=text)
        refused = LandingResult(file.domain, file.name, "refused", reason=reason, do=do)
        _log.warning("%s", sentence(refused))
        return refused
    version, split = report.corpus.version, split_of_file(file.name)
    ledger.request(file.domain, version)
    facts = {"documents": report.added_documents, "duplicates": report.duplicates, "rejected": report.rejected or None}
    record("ingested", version=version, split=split, **facts)
    landed = LandingResult(file.domain, file.name, "ingested", version, report.added_documents, split=split)
    _log.info("%s", sentence(landed))
    return landed


def sentence(landed: LandingResult) -> str:
    """Return the result for a file as a sentence for the log."""
    if landed.state == "refused":
        where = "/".join(part for part in (landed.domain, landed.name) if part)
        return f"{where} is refused: {landed.reason}. {landed.do or ''}".rstrip()
    whole = f", all of the {landed.split} split, for that is its name" if landed.split else ""
    return f"{landed.domain} v{landed.version}: {landed.added_documents} documents of {landed.name}{whole}"


def _remedy(file: LandedFile, error: CorpusError) -> str:
    if isinstance(error, NoColumn):
        return (
            f"Name it in the service file, `text: {{{file.domain}: COLUMN}}`, and deploy: the file is then read again."
        )
    return "Put a sound file in its place."


def _refuse(ledger: Ledger, found: Refusal) -> LandingResult | None:
    """Record a refusal and log a warning, once. Return None if it was recorded before."""
    if not ledger.refuse(found):
        return None
    landed = LandingResult(found.domain, found.name, "refused", reason=found.reason, do=found.do)
    _log.warning("%s", sentence(landed))
    return landed


def _later(path: str, error: OSError) -> None:
    _log.warning("%s cannot be read now, the next sweep tries again: %s", path, error)
