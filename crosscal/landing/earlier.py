"""Reader for the ledger of earlier versions, with one ref per item. It is read once and copied into the journal.

refs/ledger/<domain>/<sha256, 16 digits>  refs/refusals/<digest, 16 digits>  refs/requests/<domain>
refs/recompressions/<domain>/<number>
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crosscal.store.refs import Refs

KINDS = {"ledger": "file", "refusals": "refusal", "requests": "request", "recompressions": "run"}


def earlier_ledger(refs: Refs) -> dict[str, dict[str, Any]]:
    """Return journal key → newest value. The earlier refs are not removed."""
    found = ((name, refs.read(name)[1]) for folder in KINDS for name in _names(refs, folder))
    return {_key(name): value for name, value in found if value is not None}


def _names(refs: Refs, folder: str) -> Iterator[str]:
    for name in refs.names(folder):
        yield from refs.names(name) if folder in ("ledger", "recompressions") else [name]


def _key(name: str) -> str:
    folder, _, rest = name.partition("/")
    return f"{KINDS[folder]}/{rest}"
