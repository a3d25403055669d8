"""Removal of what a service need not keep for ever: old run directories, and models that were published long ago.

Never removed are the published model of a domain and its run directory, those of the pointer moves that are kept, and
anything that is not a run directory of crosscal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crosscal.publication.models import MODELS
from crosscal.publication.pointer import Pointer, Published
from crosscal.publication.run_folders import old_runs, remove_run
from crosscal.store import Store


def kept_moves(store: Store, keep: int | None) -> tuple[list[Pointer], list[Pointer]]:
    """Return the last `keep` pointer moves of every domain (at least one; None: all), and the moves before them."""
    published, kept, older = Published(store), list[Pointer](), list[Pointer]()
    for domain in published.domains():
        moves = published.history(domain)
        first = 0 if keep is None else max(len(moves) - max(keep, 1), 0)
        kept += moves[first:]
        older += moves[:first]
    return kept, older


def drop_models(store: Store, keep: int) -> Iterator[tuple[str, str]]:
    """Remove models that no kept move names from the store; yield (place, reason). The pointer's history is kept."""
    kept, older = kept_moves(store, keep)
    wanted = {move.model for move in kept}
    for key in dict.fromkeys(move.model for move in older if move.model not in wanted):
        if store.is_kept(MODELS, key):
            store.discard(MODELS, key)
            yield f"objects/{MODELS}/{key}", f"published before the last {keep} moves"


def remove_old_runs(store: Store, runs: Path, days: float, keep: int | None) -> Iterator[tuple[str, str]]:
    """Remove run directories in which nothing was written for `days` days; yield (path, reason)."""
    named = {Path(str(move.facts.get("run_dir"))).resolve() for move in kept_moves(store, keep)[0]}
    for folder in old_runs(runs, named, days):
        remove_run(folder)
        yield str(folder), f"not written for {days:g} days"
