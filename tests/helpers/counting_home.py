"""A store that counts the calls to its home."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from crosscal.store import Store
from crosscal.store.refs import Refs


class CountingHome:
    """Wrapper of a home that counts the calls of each method."""

    def __init__(self, home: Any) -> None:
        self._home, self.asked = home, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        move = getattr(self._home, name)
        if not callable(move):
            return move

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.asked[name] += 1
            return move(*args, **kwargs)

        return counted


def counting_store(home: str | Path) -> tuple[Store, Counter[str]]:
    """Return a store and a counter of the calls of each method of its home."""
    store = Store(home)
    counting = CountingHome(store.home)
    store.home = counting  # type: ignore[assignment]
    store.refs = Refs(counting)  # type: ignore[arg-type]
    return store, counting.asked
