"""What was read whole and found sound, and what the home said of its files then: it need not be read again each night.

refs/verified/…     a journal: artifact → digest of its files' names, sizes and stamps

An object store's checksums change with the bytes. Where there are none a file's time is its stamp, which does not show
what a disk lost by itself: there one artifact of SAMPLED_DAYS is read again each day, every one within that time.
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
"""What a stamp begins with that is no checksum."""
_KEPT_AT_ONCE = 256
_DAY_SECONDS = 86400


class Verified:
    """The artifacts of a home, as they stand now, against what was verified earlier."""

    def __init__(self, home: Home, refs: Refs) -> None:
        self._journal = Journal(refs, "verified")
        self._stamps: dict[str, dict[str, str]] = defaultdict(dict)
        for path, stamp in home.stamps("objects").items():
            parts = path.split("/")
            self._stamps["/".join(parts[:2])]["/".join(parts[2:])] = stamp
        self._new: dict[str, dict[str, str]] = {}

    def holds(self, kind: str, key: str) -> bool:
        """Whether an artifact was found sound, nothing says that it changed, and it is not its day to be read."""
        artifact = f"{kind}/{key}"
        is_sampled = any(stamp.startswith(TIME) for stamp in self._stamps[artifact].values())
        is_due = is_sampled and (int(key[:8], 16) - int(time.time() // _DAY_SECONDS)) % SAMPLED_DAYS == 0
        return not is_due and self._journal.items.get(artifact) == self._seen(artifact)

    def note(self, kind: str, key: str) -> None:
        """An artifact was just found sound, in the state in which it was when this object was made."""
        artifact = f"{kind}/{key}"
        if self._journal.items.get(artifact) != self._seen(artifact):
            self._new[artifact] = self._seen(artifact)
        if len(self._new) >= _KEPT_AT_ONCE:
            self.keep()

    def keep(self) -> None:
        """Write down what was noted. A store that cannot be written is verified all the same, and again next time."""
        new, self._new = self._new, {}
        if new:
            with contextlib.suppress(StoreError, OSError):
                self._journal.put(new)

    def _seen(self, artifact: str) -> dict[str, str]:
        return {"files": digest_of(self._stamps[artifact])[:16]}
