"""A map that is only added to, kept so that reading all of it takes few reads however often it was written.

refs/<name>/<thousand>/<number in it>.json     record n holds the keys of the last lowbit(n) changes, merged

lowbit(n) is the largest power of two that divides n: a Fenwick tree over the changes. Everything stands in the records
n, n - lowbit(n), … down to 0, at most log2(n) + 1 of them; each change is kept in as many. Like every ref a record is
written once, on top of the one before, by one writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from crosscal.errors import StoreConflict
from crosscal.store.refs import Refs

Value = dict[str, Any]
PER_FOLDER = 1000
"""Records in one folder: to find the newest takes two lists, each short."""


def _nothing() -> dict[str, Value]:
    return {}


class Journal:
    """The map as last seen. `earlier`: what it holds before its first record; the first record takes it over."""

    def __init__(self, refs: Refs, name: str, earlier: Callable[[], Mapping[str, Value]] = _nothing) -> None:
        self._refs, self._name, self._earlier = refs, name, earlier
        self._parts: list[tuple[int, Mapping[str, Value]]] = []  # the newest last
        self._items: dict[str, Value] | None = None

    @property
    def number(self) -> int:
        """Of the newest record seen."""
        return self._parts[-1][0] if self._parts else 0

    @property
    def items(self) -> Mapping[str, Value]:
        if self._items is None:
            self.refresh()
        assert self._items is not None
        return self._items

    def refresh(self) -> None:
        """Look for what others wrote: two lists, and a read for each record that was not seen before."""
        number, known, parts = self._newest(), dict(self._parts), []
        if self._items is not None and number == self.number:
            return
        while number:
            items = known[number] if number in known else self._read(number)
            if items is None:  # somebody removed a damaged record: those before it have the rest
                number -= 1
                continue
            parts.append((number, items))
            number &= number - 1
        self._parts = parts[::-1]
        self._items = dict(self._earlier()) if not parts else {}
        for _, items in self._parts:
            self._items.update(items)

    def put(self, changes: Mapping[str, Value]) -> None:
        """Write what is new of some keys. Raises `StoreConflict`, having looked again, when others wrote meanwhile."""
        items = dict(self.items)  # looks first, if nothing was seen yet
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
    """The ref that holds a record, and the version of it before the record."""
    folder, before = divmod(number - 1, PER_FOLDER)
    return f"{name}/{folder:05d}", before
