"""A journal of verified artifacts and the stamps of their files, so that unchanged ones are not read every night.

refs/verified/…     a journal: artifact → digest of its files' names, sizes and stamps

An object store's checksums change with the bytes. Without checksums the stamp is the modification time, which does not
show silent corruption: there, 1 in SAMPLED_DAYS artifacts is read again each day, so that each is within that period.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict

from crosscal.errors import StoreError
from crosscal.store.home import Home
from crosscal.store.journal import Journal
from crosscal.store.keys import digest_of
from crosscal.store.refs import Refs

SAMPLED_DAYS = 30
TIME = "time"
"""Prefix of a stamp that is not a checksum."""
_KEPT_AT_ONCE = 256
_DAY_SECONDS = 86400


class Verified:
    """Compares the artifacts of a home, as they are at construction, with what was verified earlier."""

    def __init__(self, home: Home, refs: Refs) -> None:
        self._journal = Journal(refs, "verified")
        self._stamps: dict[str, dict[str, str]] = defaultdict(dict)
        for path, stamp in home.stamps("objects").items():
            parts = path.split("/")
            self._stamps["/".join(parts[:2])]["/".join(parts[2:])] = stamp
        self._new: dict[str, dict[str, str]] = {}

    def holds(self, kind: str, key: str) -> bool:
        """Return whether an artifact was verified, its stamps have not changed, and it is not due to be read today."""
        artifact = f"{kind}/{key}"
        is_sampled = any(stamp.startswith(TIME) for stamp in self._stamps[artifact].values())
        is_due = is_sampled and (int(key[:8], 16) - int(time.time() // _DAY_SECONDS)) % SAMPLED_DAYS == 0
        return not is_due and self._journal.items.get(artifact) == self._seen(artifact)

    def note(self, kind: str, key: str) -> None:
        """Record that an artifact was just verified, with the stamps taken at construction."""
        artifact = f"{kind}/{key}"
        if self._journal.items.get(artifact) != self._seen(artifact):
            self._new[artifact] = self._seen(artifact)
        if len(self._new) >= _KEPT_AT_ONCE:
            self.keep()

    def keep(self) -> None:
        """Write what was recorded. If the store cannot be written, the next verification reads the artifacts again."""
        new, self._new = self._new, {}
        if new:
            with contextlib.suppress(StoreError, OSError):
                self._journal.put(new)

    def _seen(self, artifact: str) -> dict[str, str]:
        return {"files": digest_of(self._stamps[artifact])[:16]}
