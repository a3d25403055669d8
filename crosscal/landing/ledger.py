"""The ledger: what landed, what became of it, and what is still to be done. Events only wake; this decides.

refs/ledger/<domain>/<sha256, 16 digits>     a landed file, by content: landed → ingested | refused, all its names
refs/refusals/<digest, 16 digits>            what was not even read: an odd name, a link that leads out, too large
refs/requests/<domain>                       the newest ingested version of the domain's corpus
refs/recompressions/<domain>/<number>        the runs (see `runs`): … → published | kept | unchanged

A domain is pending while its requested version is newer than the one of its last finished run. Three failed runs of
one version, or ten that were killed, and the version is given up, until a newer version or `request(again=True)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crosscal.errors import StoreError
from crosscal.landing.items import LandedFile, Refusal
from crosscal.landing.records import again_on_conflict, now, update
from crosscal.landing.runs import FINISHED, HasEnded, Run, Runs, is_dead, nobody_knows
from crosscal.store import Store, digest_of

MOST_FAILED = 3
MOST_KILLED = 10


@dataclass(frozen=True)
class Entry:
    """A landed file and its whole way, that of the runs that used it included."""

    domain: str
    sha256: str
    bytes: int
    names: dict[str, str]
    """Name → signature (see `LandedFile`) of every file that had this content."""
    states: tuple[dict[str, Any], ...]

    @property
    def state(self) -> str:
        return self.states[-1]["state"]

    @property
    def version(self) -> int | None:
        """Of the corpus that first held it; None before it is ingested, or when it was refused."""
        return next((line["version"] for line in self.states if line["state"] == "ingested"), None)


class Ledger:
    """The ledger in a store. Safe for any number of processes at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.refs = store.refs
        self.runs = Runs(store)

    def domains(self) -> list[str]:
        """Every domain of which something landed or was asked for."""
        names = [*self.refs.names("ledger"), *self.refs.names("requests")]
        return sorted({name.partition("/")[2] for name in names})

    # Files

    def files(self, domain: str) -> Iterator[Entry]:
        """What landed, without the runs that followed."""
        for name in self.refs.names(f"ledger/{domain}"):
            _, value = self.refs.read(name)
            if value is not None:
                yield _entry(domain, value)

    def file(self, domain: str, sha256: str) -> Entry | None:
        _, value = self.refs.read(_file_name(domain, sha256))
        return None if value is None else _entry(domain, value)

    def record(self, file: LandedFile, sha256: str, line: dict[str, Any] | None) -> None:
        """Note a file's name and, unless the file has come that far already, the next line of its history."""

        def change(value: dict[str, Any] | None) -> dict[str, Any] | None:
            value = value or {"sha256": sha256, "bytes": file.bytes, "names": {}, "states": []}
            is_new = line is not None and line["state"] not in [known["state"] for known in value["states"]]
            states = [*value["states"], line] if is_new else value["states"]
            changed = {**value, "names": {**value["names"], file.name: file.signature}, "states": states}
            return None if changed == value else changed

        update(self.refs, _file_name(file.domain, sha256), change)

    def refuse(self, refusal: Refusal) -> bool:
        """Note, once, what is not taken. False when it is known already."""
        name = f"refusals/{digest_of(dataclasses.asdict(refusal))[:16]}"
        if self.refs.versions(name):
            return False
        update(self.refs, name, lambda value: value or {**dataclasses.asdict(refusal), "at": now()})
        return True

    def refusals(self) -> list[dict[str, Any]]:
        return [value for name in self.refs.names("refusals") if (value := self.refs.read(name)[1]) is not None]

    # What is asked for

    def request(self, domain: str, version: int, *, again: bool = False) -> None:
        """Ask for a recompression on this version. `again` starts the count of attempts anew."""

        def change(value: dict[str, Any] | None) -> dict[str, Any] | None:
            if value is not None and version <= value["version"] and not again:
                return None
            last = self.runs.newest(domain)
            newest = max(version, value["version"] if value else 0)
            return {"version": newest, "after_run": last.number if last else 0, "at": now()}

        update(self.refs, f"requests/{domain}", change)

    def requested(self, domain: str) -> int | None:
        """The newest version that was asked for."""
        value = self.refs.read(f"requests/{domain}")[1]
        return None if value is None else value["version"]

    def pending(self, domain: str) -> int | None:
        """The version that waits for a run, or is being worked on; None when there is none, or it was given up."""
        version, is_given_up = self._open_version(domain)
        return None if is_given_up else version

    def given_up(self, domain: str) -> int | None:
        """The version that failed too often."""
        version, is_given_up = self._open_version(domain)
        return version if is_given_up else None

    def _open_version(self, domain: str) -> tuple[int | None, bool]:
        request = self.refs.read(f"requests/{domain}")[1]
        if request is None:
            return None, False
        counts = {"failed": 0, "abandoned": 0}
        for run in self.runs.newest_first(domain):
            if run.version < request["version"]:
                break
            if run.state in FINISHED:
                return None, False
            if run.state in counts and run.number > request["after_run"]:
                counts[run.state] += 1
        given_up = counts["failed"] >= MOST_FAILED or counts["abandoned"] >= MOST_KILLED
        return request["version"], given_up

    # Runs

    def claim(self, domain: str, run_id: str, has_ended: HasEnded = nobody_knows) -> Run | None:
        """Take a pending domain for one run; None when nothing is pending or a living run has it.

        The newest run is read before what is pending: whoever finishes or claims in between has the next number, and
        this attempt conflicts and looks again.
        """

        def attempt() -> Run | None:
            last = self.runs.newest(domain)
            if last is not None and last.is_open:
                if not is_dead(last, has_ended):
                    return None
                self._abandon(last)
            version = self.pending(domain)
            if version is None:
                return None
            return self.runs.begin(domain, last.number + 1 if last else 1, version, run_id)

        return again_on_conflict(attempt)

    def holder(self, domain: str, has_ended: HasEnded = nobody_knows) -> Run | None:
        """The living run that works on a domain."""
        last = self.runs.newest(domain)
        return last if last is not None and last.is_open and not is_dead(last, has_ended) else None

    def mark(self, run: Run, name: str, *, version: int | None = None, **facts: Any) -> Run:
        """Add a line to a run's history; `published`, `kept`, `unchanged`, `failed` and `abandoned` close it."""
        return self.runs.mark(run, name, version=version, **facts)

    def entries(self, domain: str) -> list[Entry]:
        """Every landed file with its whole way, in the order of landing."""
        runs = list(self.runs.newest_first(domain))[::-1]
        found = [_with_run(entry, runs) for entry in self.files(domain)]
        return sorted(found, key=lambda entry: entry.states[0]["at"])

    def _abandon(self, run: Run) -> None:
        try:
            self.runs.mark(run, "abandoned", reason="its process is gone")
        except StoreError:
            if self.runs.newest(run.domain) == run:  # not closed by another: something else is wrong
                raise


def _with_run(entry: Entry, runs: list[Run]) -> Entry:
    """A file shares the way of the run that finished its version, or else of the last that tried."""
    tried = [run for run in runs if entry.version is not None and run.version >= entry.version]
    if not tried:
        return entry
    run = next((run for run in tried if run.state in FINISHED), tried[-1])
    lines = tuple({**line, "run_id": run.run_id, "run": run.number} for line in run.states)
    return dataclasses.replace(entry, states=(*entry.states, *lines))


def _entry(domain: str, value: dict[str, Any]) -> Entry:
    return Entry(domain, value["sha256"], value["bytes"], value["names"], tuple(value["states"]))


def _file_name(domain: str, sha256: str) -> str:
    return f"ledger/{domain}/{sha256[:16]}"
