"""The ledger: what landed, what became of it, and what is still to be done. Events only trigger a check; it decides.

One journal in the store contains all of it (`refs/landings/…`), so that a look takes few reads however much has landed.
`view` describes its items. A change is written on top of the state last read; on a conflict it is computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable
from typing import Any

from crosscal.errors import StoreError
from crosscal.landing.earlier import earlier_ledger
from crosscal.landing.items import LandedFile, Refusal
from crosscal.landing.ledger_view import CANCELLED, REMOVED, LedgerEntry, LedgerView, entry_of, since_removal
from crosscal.landing.records import now, state
from crosscal.landing.runs import ENDED, Run, run_key, run_of
from crosscal.store import Store, digest_of, heartbeat
from crosscal.store.journal import Journal
from crosscal.store.refs import again_on_conflict

JOURNAL = "landings"
EARLIER_SECONDS = 86400.0
"""A run of an earlier version, whose process sent no heartbeats, counts as dead this long after its last line."""
REFUSED_FOR = ("domain", "name", "reason", "signature")
"""Fields that identify a refusal."""
Value = dict[str, Any]


class Ledger:
    """The ledger in a store. Any number of processes may use it at once; one object is for one thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._journal = Journal(store.refs, JOURNAL, functools.partial(earlier_ledger, store.refs))

    def look(self) -> LedgerView:
        """Read the current state of the whole ledger."""
        self._journal.refresh()
        return LedgerView(self._items())

    def take_over(self) -> LedgerView:
        """Like `look`; also converts the records of an earlier version, one per file, into one journal record."""
        view = self.look()
        if view.items and not self._journal.number:
            self._update(lambda items: {} if not self._journal.number else None)
        return view

    def domains(self) -> list[str]:
        return self.look().domains()

    def entries(self, domain: str) -> list[LedgerEntry]:
        return self.look().entries(domain)

    def refusals(self) -> list[Value]:
        return self.look().refusals()

    def requested(self, domain: str) -> int | None:
        return self.look().requested(domain)

    def pending(self, domain: str) -> int | None:
        return self.look().pending(domain)

    def given_up(self, domain: str) -> int | None:
        return self.look().given_up(domain)

    def cancelled(self, domain: str) -> int | None:
        return self.look().cancelled(domain)

    def runs(self, domain: str) -> list[Run]:
        """Return all runs of a domain, oldest first."""
        return self.look().runs(domain)

    def last_run(self, domain: str) -> Run | None:
        return self.look().last_run(domain)

    # Files

    def file(self, domain: str, sha256: str) -> LedgerEntry | None:
        """Return a file's entry in the state last read. A later write detects a stale state."""
        value = self._items().get(_file_key(domain, sha256))
        return None if value is None else entry_of(domain, value)

    def seen(self, file: LandedFile, text: str | None = None) -> LedgerEntry | None:
        """Return the settled entry of a file that was seen before and has not changed, whatever its marker."""
        found = (entry for entry in LedgerView(self._items()).files(file.domain) if entry.is_settled(text))
        same = (each for each in found if each.names.get(file.name, "").partition("-")[0] == file.own_signature)
        return next(same, None)

    def record(self, file: LandedFile, sha256: str, line: Value | None) -> None:
        """Record a file's name and, unless its history already has this state, the next line of its history."""
        key = _file_key(file.domain, sha256)

        def change(items: dict[str, Value]) -> dict[str, Value] | None:
            value = items.get(key) or {"sha256": sha256, "bytes": file.bytes, "names": {}, "states": []}
            is_new = line is not None and not any(_is_same(line, known) for known in since_removal(value["states"]))
            states = [*value["states"], line] if is_new else value["states"]
            changed = {**value, "names": {**value["names"], file.name: file.signature}, "states": states}
            return None if changed == value else {key: changed}

        self._update(change)

    def refuse(self, refusal: Refusal) -> bool:
        """Record a refusal once. Return False if it is known already."""
        value = dataclasses.asdict(refusal)
        key = f"refusal/{digest_of({name: value[name] for name in REFUSED_FOR})[:16]}"
        return self._update(lambda items: None if key in items else {key: {**value, "at": now()}})

    # Requests

    def request(
        self, domain: str, version: int, *, again: bool = False, anew: str | None = None, seen: Value | None = None
    ) -> None:
        """Request a recompression on this version. `again` resets the count of attempts. `anew` (the reason) also
        ignores runs that have finished this version. `seen`: other items to store in the same record."""
        key = f"request/{domain}"

        def change(items: dict[str, Value]) -> dict[str, Value] | None:
            earlier = items.get(key, {"version": 0})
            if version <= earlier["version"] and not (again or anew):
                return None
            runs = max((run_of(name, items[name]).number for name in items if _is_run(name, domain)), default=0)
            value = {"version": max(version, earlier["version"]), "after_run": runs, "at": now()}
            kept = {name: earlier[name] for name in ("anew_after", "why") if name in earlier}
            return {**(seen or {}), key: {**value, **({"anew_after": runs, "why": anew} if anew else kept)}}

        self._update(change)

    def note(self, key: str, value: Value) -> None:
        """Store an observation (see `view`)."""
        self._update(lambda items: None if items.get(key) == value else {key: value})

    def pause(self, domain: str, *, is_paused: bool) -> bool:
        """Pause or resume a domain; return whether that changed anything. A paused domain ingests files, but no run
        claims it."""
        key, value = f"pause/{domain}", {"at": now()} if is_paused else {}
        return self._update(lambda items: None if (key in items) == is_paused else {key: value})

    def remove(self, domain: str) -> None:
        """Forget a domain except for the files that landed, which are not ingested again."""

        def change(items: dict[str, Value]) -> dict[str, Value]:
            keys = LedgerView(items).keys(domain)
            files = {key: _with(items[key], state(REMOVED)) for kind, key in keys if kind == "file"}
            return {key: {} for _, key in keys} | files

        self._update(change)

    def remove_file(self, entry: LedgerEntry) -> None:
        """Record that a file's documents were removed from the corpus: it is not ingested again, whatever its name."""
        key = _file_key(entry.domain, entry.sha256)
        self._update(lambda items: {key: _with(items[key], state(REMOVED))})

    # Runs

    def claim(self, domain: str, run_id: str) -> Run | None:
        """Claim a pending domain for one run. Return None if nothing is pending, it is paused, or a live run has it."""

        def attempt() -> Run | None:
            view = self.look()
            last = view.last_run(domain)
            changes: dict[str, Value] = {}
            if view.is_paused(domain):
                return None
            if last is not None and last.is_open:
                if not self.is_dead(last):
                    return None
                changes = self._abandoned(last)
            key = run_key(domain, last.number + 1 if last else 1)
            version = LedgerView({**view.items, **changes}).pending(domain)
            if version is not None:
                changes[key] = self._claimed(version, run_id, view.items[f"request/{domain}"])
            if changes:
                self._journal.put(changes)
            return run_of(key, changes[key]) if key in changes else None

        return again_on_conflict(attempt)

    def holder(self, domain: str) -> Run | None:
        """Return the live run that holds the claim on a domain."""
        return self.living(self.look().last_run(domain))

    def living(self, last: Run | None) -> Run | None:
        """Return the run if it is open and its process is alive."""
        return last if last is not None and last.is_open and not self.is_dead(last) else None

    def is_dead(self, run: Run) -> bool:
        """Return whether a run's process is gone."""
        if run.holder is None:
            return run.silent_seconds > EARLIER_SECONDS
        return heartbeat.heartbeats(self.store.home).is_gone(run.holder)

    def mark(self, run: Run, name: str, *, version: int | None = None, **facts: Any) -> Run:
        """Add a line to a run's history; `published`, `kept`, `unchanged`, `failed`, `abandoned`, `cancelled` close it.

        Raises `StoreError` if another process has closed it already.
        """
        key = run_key(run.domain, run.number)

        def change(items: dict[str, Value]) -> dict[str, Value]:
            value = items.get(key)
            if value is None or value["states"][-1]["state"] in ENDED:
                raise StoreError(
                    "another process has closed this run",
                    where=f"{run.domain}, run {run.number}",
                    got=value["states"][-1]["state"] if value else "nothing",
                    do="Nothing needs to be done: the process that took over continues.",
                )
            return {key: {**_with(value, state(name, **facts)), "version": version or value["version"]}}

        self._journal.refresh()
        self._update(change)
        return run_of(key, self._journal.items[key])

    def cancel(self, domain: str, run_id: str) -> None:
        """Record that a user cancelled a flow run, whether or not it had claimed the domain yet."""

        def change(items: dict[str, Value]) -> dict[str, Value] | None:
            runs = LedgerView(items).runs(domain)
            mine = next((run for run in reversed(runs) if run.run_id == run_id), None)
            if mine is None:
                version = items[f"request/{domain}"]["version"]
                key = run_key(domain, runs[-1].number + 1 if runs else 1)
                return {key: {"version": version, "run_id": run_id, "states": [state(CANCELLED)]}}
            key = run_key(domain, mine.number)
            can_be = mine.is_open or mine.state == "abandoned"
            return {key: _with(items[key], state(CANCELLED))} if can_be else None

        self._update(change)

    def _claimed(self, version: int, run_id: str, request: Value) -> Value:
        holder = heartbeat.begin(self.store.home)
        facts = {"run_id": run_id, "host": platform.node(), "holder": holder, "request": request}
        return {"version": version, **facts, "states": [state("claimed")]}

    def _abandoned(self, run: Run) -> dict[str, Value]:
        key = run_key(run.domain, run.number)
        return {key: _with(self._journal.items[key], state("abandoned", reason="its process is gone"))}

    def _items(self) -> dict[str, Value]:
        return {key: value for key, value in self._journal.items.items() if value}

    def _update(self, change: Callable[[dict[str, Value]], dict[str, Value] | None]) -> bool:
        """Write the changes that `change` returns for all items, nothing for None. Return whether it wrote."""

        def attempt() -> bool:
            changes = change(self._items())
            if changes is not None:
                self._journal.put(changes)
            return changes is not None

        return again_on_conflict(attempt)


def _with(item: Value, line: Value) -> Value:
    return {**item, "states": [*item["states"], line]}


def _is_run(key: str, domain: str) -> bool:
    return key.startswith(f"run/{domain}/")


def _is_same(line: Value, known: Value) -> bool:
    """Same state and text column: a file may be refused once for each column that was tried."""
    return all(line.get(name) == known.get(name) for name in ("state", "text"))


def _file_key(domain: str, sha256: str) -> str:
    return f"file/{domain}/{sha256[:16]}"
