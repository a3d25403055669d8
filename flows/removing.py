"""Remove a whole domain, or documents of one, on a user's request, with a preview."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from crosscal.corpora import load_corpus
from crosscal.corpora.corpus import digests
from crosscal.corpora.removing import FoundDocument, search, take_out
from crosscal.errors import CorpusError, UsageError, nearest
from crosscal.flows.outcome import counted
from crosscal.flows.taken_out import discard_taken_out
from crosscal.landing import Ledger, LedgerEntry
from crosscal.landing.ledger_view import REMOVED
from crosscal.publication import Published
from crosscal.store import Store

MOST_SHOWN = 20
LEAST_DIGITS = 8


@dataclass(frozen=True)
class Removal:
    """A removal to be confirmed."""

    shown: dict[str, Any]
    """Preview: what would be removed, and what stays."""
    carry_out: Callable[[], dict[str, Any]]
    """Perform the removal; returns its result."""


def removal_of_domain(ledger: Ledger, domain: str) -> Removal:
    """Prepare the removal of a domain. Raises `UsageError` while a run of it is in progress."""
    _check_idle(ledger, domain)
    published, view = Published(ledger.store), ledger.look()
    shown = {
        "domain": domain,
        "files": len([entry for entry in view.files(domain) if entry.state != REMOVED]),
        "runs": len(view.runs(domain)),
        "moves_of_the_pointer": len(published.history(domain)),
        "stays": f"the documents (corpus {domain}{_version(ledger.store, domain)}), landed files, run directories",
    }

    def carry_out() -> dict[str, Any]:
        published.remove(domain)
        ledger.remove(domain)
        return {"removed": True}

    return Removal(shown, carry_out)


def removal_of_documents(
    ledger: Ledger, domain: str, *, file: str | None, documents: Collection[str], containing: str | None
) -> Removal:
    """Prepare the removal of documents: of a landed `file`, with these digest prefixes, and containing a text. Raises
    `UsageError` when none match, and while a run of the domain is in progress."""
    if "" in (file, containing) or not (file or documents or containing):
        raise UsageError("an empty filter means no document", where=domain, do="Give a file, a digest or a text.")
    _check_idle(ledger, domain)
    entries = _entries(ledger, domain, file) if file else []
    if short := [each for each in documents if len(each) < LEAST_DIGITS]:
        do = f"Give {LEAST_DIGITS} digits or more."
        raise UsageError("too short to mean one document", got=", ".join(short), do=do)
    store = ledger.store
    names = {name for entry in entries for name in entry.names} if file else None
    beginnings = [each.lower() for each in documents] or None
    corpus = load_corpus(store, domain)
    found = list(search(store, corpus, files=names, beginnings=beginnings, containing=containing))
    found = _brought_by(store, domain, entries, found)
    if not found and not entries:
        raise UsageError(
            "no such document", where=f"{domain} v{corpus.version}", got=containing or ", ".join(documents)
        )
    shown = {
        "domain": domain,
        "version": corpus.version,
        "removed_documents": len(found),
        "documents" if len(found) <= MOST_SHOWN else f"first_{MOST_SHOWN}_documents": [
            {"document": each.digest[:16], "file": each.source, "split": each.split, "begins": each.begins}
            for each in found[:MOST_SHOWN]
        ],
        "stays": "run directories, and models made with them, the published one until the next run is decided",
        "also_in": _others(store, domain, {each.digest for each in found}),
    }

    def carry_out() -> dict[str, Any]:
        new = take_out(store, domain, {each.digest for each in found}) if found else corpus
        for entry in entries:
            ledger.remove_file(entry)
        if found:
            ledger.request(domain, new.version, anew=f"{counted(len(found), 'document')} taken out")
        rejects = _discard_rejects(store, domain, names or set())
        gone = list(discard_taken_out(store))
        return {"version": new.version, "removed_artifacts": len(gone) + rejects}

    return Removal(shown, carry_out)


def _check_idle(ledger: Ledger, domain: str) -> None:
    if (run := ledger.holder(domain)) is not None:
        do = "Cancel it in the Prefect UI, or wait for its end; `crosscal domain pause` keeps others from starting."
        raise UsageError("a run of this domain is at work", where=domain, got=f"run {run.number} ({run.run_id})", do=do)


def _entries(ledger: Ledger, domain: str, file: str) -> list[LedgerEntry]:
    """Return the landed file with this name or SHA-256 prefix. Raises `UsageError` for none or several."""
    entries = [entry for entry in ledger.entries(domain) if entry.state not in ("refused", REMOVED)]
    is_digest = len(file) >= LEAST_DIGITS
    found = [entry for entry in entries if file in entry.names or (is_digest and entry.sha256.startswith(file))]
    if not found:
        names = {name for entry in entries for name in entry.names}
        raise UsageError("no such file landed", where=domain, got=file, do=nearest(file, names))
    if len(found) > 1:
        several = ", ".join(f"{entry.sha256[:12]} (v{entry.version})" for entry in found)
        raise UsageError("several files of this name landed", where=domain, got=several, do="Give --file one of these.")
    return found


def _brought_by(
    store: Store, domain: str, entries: Iterable[LedgerEntry], found: list[FoundDocument]
) -> list[FoundDocument]:
    """Of documents from all files of this name, keep those of this file, if its shard still exists."""
    for entry in entries:
        ingested = next((line for line in reversed(entry.states) if line["state"] == "ingested"), {})
        if ingested.get("documents") == 0:  # the documents came with other files of its name
            return []
        before, after = (_shards(store, domain, version) for version in ((entry.version or 1) - 1, entry.version))
        mine = [each for each in found if each.shard in after - before]
        found = mine or found
    return found


def _shards(store: Store, domain: str, version: int | None) -> set[str]:
    return {shard.key for shard in load_corpus(store, domain, version).shards} if version else set()


def _others(store: Store, domain: str, unwanted: set[str]) -> list[str]:
    """Return the names of other corpora that contain these documents."""
    names = (name.partition("/")[2] for name in store.refs.names("corpora"))
    others = (load_corpus(store, name) for name in names if name != domain)
    wanted = set(map(bytes.fromhex, unwanted))
    return [each.name for each in others if any(wanted & digests(store, shard).keys() for shard in each.shards)]


def _discard_rejects(store: Store, domain: str, names: set[str]) -> int:
    """Discard the artifacts with rejected lines of these files; return how many."""
    found = [one for one in store.list("rejects") if one.provenance.get("corpus") == domain]
    mine = [one for one in found if names & _sources(store.read_bytes(one, "rejects.jsonl"))]
    for one in mine:
        store.discard("rejects", one.key)
    return len(mine)


def _sources(content: bytes) -> set[str]:
    return {str(json.loads(line).get("source")) for line in content.splitlines()}


def _version(store: Store, domain: str) -> str:
    try:
        return f" v{load_corpus(store, domain).version}"
    except CorpusError:
        return ""
