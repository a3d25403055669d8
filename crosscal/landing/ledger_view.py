"""A snapshot of the ledger: what landed, what became of it, what is pending. Plain values; nothing is read here.

file/<domain>/<sha256, 16 digits>     a landed file, by content: landed → ingested | refused (→ removed), all its names
refusal/<digest, 16 digits>           not ingested: an odd name, a link that leads out, too large, a marker that differs
request/<domain>                      the newest requested version of the domain's corpus, and reasons for another run
run/<domain>/<number>                 the runs (see `runs`): … → recompressed → evaluated → published | kept
pause/<domain>                        present while the domain is paused: no run may start
made/<domain>/<digest, 16 digits>     plan and model of the last request, one for each plan file and its overrides
model/<digest, 16 digits>             the digest of a model's files, by the names, sizes and times in its folder

A domain is pending while its requested version is newer than that of its last finished run, or while no run has
finished since a repeat was requested: by a user, or because plan, model or documents changed. A version is given up
after one failure that would repeat, three other failures, or ten killed runs. It is not run again after a user
cancelled its run. Both hold until a newer version or another request. An item with an empty value does not exist.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.landing.runs import FINISHED, Run, run_of

MOST_FAILED = 3
MOST_KILLED = 10
REMOVED = "removed"
WAITING, GIVEN_UP, CANCELLED = "waiting", "given up", "cancelled"
Value = dict[str, Any]


@dataclass(frozen=True)
class LedgerEntry:
    """A landed file and its history, which `LedgerView.entries` extends by that of the run that used it."""

    domain: str
    sha256: str
    bytes: int
    names: dict[str, str]
    """Name → signature (see `LandedFile`) of every file that had this content."""
    states: tuple[Value, ...]

    @property
    def state(self) -> str:
        return self.states[-1]["state"]

    def is_settled(self, text: str | None = None) -> bool:
        """Return whether intake of the file has ended. `text`: the domain's text column; a refused file is read again
        once it differs from the column that was tried."""
        return self.state in ("ingested", REMOVED) or (self.state == "refused" and self.states[-1].get("text") == text)

    @property
    def was_refused(self) -> bool:
        return any(line["state"] == "refused" for line in self.states)

    @property
    def version(self) -> int | None:
        """First version of the corpus that contains it; None before it is ingested, or if it was refused."""
        return next((line["version"] for line in since_removal(self.states) if line["state"] == "ingested"), None)


@dataclass(frozen=True)
class LedgerView:
    """The items of the ledger at one moment, by their keys."""

    items: Mapping[str, Value]

    def domains(self) -> list[str]:
        """Return every domain that has landed files or a request, unless it was removed."""
        landed = {domain for kind, domain in self._grouped if kind == "file" and not self._is_removed(domain)}
        return sorted(landed | {domain for kind, domain in self._grouped if kind == "request"})

    def files(self, domain: str) -> list[LedgerEntry]:
        """Return the domain's landed files, without the runs that followed."""
        return [entry_of(domain, value) for _, value in self._grouped.get(("file", domain), ())]

    def refusals(self) -> list[Value]:
        return [self.items[key] for key in sorted(key for key in self.items if key.startswith("refusal/"))]

    def ever_refused(self, domain: str) -> set[str]:
        """Return the names under which anything was ever refused, whatever became of it."""
        files = (name for each in self.files(domain) for name in each.names if each.was_refused)
        return {*files, *(each["name"] for each in self.refusals() if each["domain"] == domain)}

    def settled(self, domain: str, text: str | None = None) -> set[tuple[str, str]]:
        """Return name and signature of every file whose intake has ended."""
        refused = {(each["name"], each["signature"]) for each in self.refusals() if each["domain"] == domain}
        return refused | {pair for each in self.files(domain) if each.is_settled(text) for pair in each.names.items()}

    def runs(self, domain: str) -> list[Run]:
        """Return the domain's runs, oldest first."""
        return [run_of(key, value) for key, value in sorted(self._grouped.get(("run", domain), ()))]

    def last_run(self, domain: str) -> Run | None:
        return next(reversed(self.runs(domain)), None)

    def requested(self, domain: str) -> int | None:
        """Return the newest requested version."""
        value = self.items.get(f"request/{domain}")
        return None if value is None else value["version"]

    def is_paused(self, domain: str) -> bool:
        return f"pause/{domain}" in self.items

    def pending(self, domain: str) -> int | None:
        """Return the version that waits for a run or is in one; None if none does, or it was given up or cancelled."""
        return self._version_that_is(WAITING, domain)

    def given_up(self, domain: str) -> int | None:
        """Return the requested version if it failed too often."""
        return self._version_that_is(GIVEN_UP, domain)

    def cancelled(self, domain: str) -> int | None:
        """Return the requested version if a user cancelled its run."""
        return self._version_that_is(CANCELLED, domain)

    def entries(self, domain: str) -> list[LedgerEntry]:
        """Return every landed file with its full history, in the order of landing."""
        runs = self.runs(domain)
        found = [entry if entry.state == REMOVED else _with_run(entry, runs) for entry in self.files(domain)]
        return sorted(found, key=lambda entry: entry.states[0]["at"])

    def keys(self, domain: str) -> list[tuple[str, str]]:
        """Return (kind, key) of every item of a domain."""
        return [(kind, key) for (kind, of), items in self._grouped.items() if of == domain for key, _ in items]

    @functools.cached_property
    def _grouped(self) -> dict[tuple[str, str], list[tuple[str, Value]]]:
        groups = defaultdict(list)
        for key, value in self.items.items():
            kind, domain, *_ = key.split("/")
            groups[kind, domain].append((key, value))
        return dict(groups)

    def _is_removed(self, domain: str) -> bool:
        return all(entry.state == REMOVED for entry in self.files(domain))

    def _version_that_is(self, state: str, domain: str) -> int | None:
        return self.requested(domain) if self._standing(domain) == state else None

    def _standing(self, domain: str) -> str | None:
        """Return the state of the requested version; None if a run has finished it, or nothing is requested."""
        request = self.items.get(f"request/{domain}")
        if request is None:
            return None
        counts = {"failed": 0, "abandoned": 0}
        for run in self.runs(domain)[::-1]:
            if run.version < request["version"]:
                break
            if run.state in FINISHED and run.number > request.get("anew_after", 0):
                return None
            if run.number <= request["after_run"]:
                continue
            if run.state == CANCELLED:
                return CANCELLED
            if run.state in counts:
                counts[run.state] += MOST_FAILED if run.states[-1].get("repeats") else 1
        given_up = counts["failed"] >= MOST_FAILED or counts["abandoned"] >= MOST_KILLED
        return GIVEN_UP if given_up else WAITING


def since_removal(states: Sequence[Value]) -> Sequence[Value]:
    """Return a file's history since its documents were last removed from the corpus."""
    removed = [place for place, line in enumerate(states) if line["state"] == REMOVED]
    return states[removed[-1] + 1 :] if removed else states


def entry_of(domain: str, value: Value) -> LedgerEntry:
    return LedgerEntry(domain, value["sha256"], value["bytes"], value["names"], tuple(value["states"]))


def _with_run(entry: LedgerEntry, runs: list[Run]) -> LedgerEntry:
    """Append the history of the run that finished the file's version, or else of the last run that tried."""
    tried = [run for run in runs if entry.version is not None and run.version >= entry.version]
    if not tried:
        return entry
    run = next((run for run in tried if run.state in FINISHED), tried[-1])
    lines = tuple({**line, "run_id": run.run_id, "run": run.number} for line in run.states)
    return dataclasses.replace(entry, states=(*entry.states, *lines))
