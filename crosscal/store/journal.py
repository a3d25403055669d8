"""An append-only map that can be read completely in few reads, however often it was written.

refs/<name>/<thousand>/<number in it>.json     record n holds the keys of the last lowbit(n) changes, merged

lowbit(n) is the largest power of two that divides n: a Fenwick tree over the changes. The records n, n - lowbit(n), …
down to 0 contain the whole map. There are at most log2(n) + 1 of them, and each change is copied into at most as many.
Like every ref, a record is written once, on top of the previous one, by one writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from crosscal.errors import StoreConflict
from crosscal.store.refs import Refs

Value = dict[str, Any]
PER_FOLDER = 1000
"""Records per folder: finding the newest takes two short listings."""


def _nothing() -> dict[str, Value]:
    return {}


class Journal:
    """The map as last read. `earlier` returns its content before the first record, which then includes that content."""

    def __init__(self, refs: Refs, name: str, earlier: Callable[[], Mapping[str, Value]] = _nothing) -> None:
        self._refs, self._name, self._earlier = refs, name, earlier
        self._parts: list[tuple[int, Mapping[str, Value]]] = []  # the newest last
        self._items: dict[str, Value] | None = None

    @property
    def number(self) -> int:
        """Number of the newest record read; 0 if there is none."""
        return self._parts[-1][0] if self._parts else 0

    @property
    def items(self) -> Mapping[str, Value]:
        if self._items is None:
            self.refresh()
        assert self._items is not None
        return self._items

    def refresh(self) -> None:
        """Read what other processes wrote: two listings, and one read per record that is new."""
        number, known, parts = self._newest(), dict(self._parts), []
        if self._items is not None and number == self.number:
            return
        while number:
            items = known[number] if number in known else self._read(number)
            if items is None:  # a damaged record was removed: those before it contain the rest
                number -= 1
                continue
            parts.append((number, items))
            number &= number - 1
        self._parts = parts[::-1]
        self._items = dict(self._earlier()) if not parts else {}
        for _, items in self._parts:
            self._items.update(items)

    def put(self, changes: Mapping[str, Value]) -> None:
        """Write new values of some keys. If another process wrote meanwhile, refresh and raise `StoreConflict`."""
        items = dict(self.items)  # refreshes on first use
        number = self.number + 1
        covered = [part for part in self._parts if part[0] > number & (number - 1)]
        merged = dict(items) if number == 1 else {}
        for _, part in covered:
            merged.update(part)
        merged.update(changes)
        try:
            self._refs.append(*_at(self._name, number), {"items": merged})
        except StoreConflict:
            self.refresh()
            raise
        self._parts = [*self._parts[: len(self._parts) - len(covered)], (number, merged)]
        self._items = {**items, **changes}

    def _read(self, number: int) -> Mapping[str, Value] | None:
        name, before = _at(self._name, number)
        value = self._refs.read(name, before + 1)[1]
        return None if value is None else value["items"]

    def _newest(self) -> int:
        for name in sorted(self._refs.names(self._name), reverse=True):
            last = max(self._refs.versions(name), default=0)
            if last:
                return int(name.rpartition("/")[2]) * PER_FOLDER + last
        return 0


def _at(name: str, number: int) -> tuple[str, int]:
    """Return the ref that contains a record, and the ref's version before that record."""
    folder, before = divmod(number - 1, PER_FOLDER)
    return f"{name}/{folder:05d}", before
