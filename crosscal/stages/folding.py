"""The moments (and gradients) of a growing corpus, stored as one sum and the newest few sets.

    folded_k = folded_k-1 + weight_k · moments_k

Every sum is named after its terms and computed from the newest sum in the store, as a corpus grows from the previous
one. A solve therefore reads at most one set more than the plan keeps apart. Sets and sums that neither the sample nor
the one before its newest set needs are then removed, unless another running process has used them. A run on the corpus
as it was before the last landing still finds everything. If a set is missing, its windows are run again.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from crosscal.calibration.pool import PoolPart, all_parts, read_pool
from crosscal.calibration.sets import stored_windows, windows_by_key
from crosscal.errors import MissingArtifact
from crosscal.models.sites import Site
from crosscal.stages.sample import Sample, SplitSets
from crosscal.store import Store, digest_of


class SumStore(Protocol):
    """Stored sums over calibration sets, one or more artifacts per site: moments or gradients."""

    @property
    def store(self) -> Store: ...
    def sites(self, block: int) -> tuple[Site, ...] | None: ...
    def has(self, calibration: str, block: int) -> bool: ...
    def has_site(self, calibration: str, block: int, site: Site) -> bool: ...
    def read(self, calibration: str, block: int, site: Site) -> Any: ...
    def publish_site(self, calibration: str, block: int, site: Site, sums: Any, /) -> None: ...
    def is_kept(self, calibration: str, block: int, site: Site) -> bool: ...
    def discard_unused(self, calibration: str, block: int, site: Site) -> None: ...


def sets_to_read(cached: SumStore, blocks: int, sample: Sample, *, held_out: bool = True) -> list[str]:
    """Return the keys of all sums that `fold` and a solve need, for both splits or the calibration windows alone; those
    that the store lacks are keys of calibration sets."""
    parts = [part for sums in _splits(sample, held_out) for part in (*_terms(cached, blocks, sums), *sums.apart)]
    return list(dict.fromkeys(part.key for part in parts))


def fold(cached: SumStore, blocks: int, sample: Sample, *, held_out: bool = True) -> None:
    """Compute and store the missing folded sums of a sample, and remove what only older samples need."""
    for sums in _splits(sample, held_out):
        if sums.folded is None:
            continue
        terms = _terms(cached, blocks, sums)
        for block, site in _sites(cached, blocks):
            if not cached.has_site(sums.folded.key, block, site):
                _add(cached, sums.folded, terms, block, site)
        _forget(cached, blocks, sums, [part for part in terms if part.key != sums.folded.key])


def unread_tokens(cached: SumStore, blocks: int, sums: SplitSets) -> int:
    """Return the number of tokens that a calibration pass would have to run."""
    folded = () if sums.folded is None else (sums.folded,)
    kept = _kept(cached, blocks, sums)
    parts = (*(folded if kept is None else kept), *sums.apart)
    return sum(part.tokens for part in parts if not _is_complete(cached, part.key, blocks))


def unfolded(store: Store, sample: Sample) -> Sample:
    """Return the sample as sets of windows only, for a pass over all of them; sets of equal weight are joined."""
    calibration, held_out = (_unfolded(store, sums) for sums in _splits(sample, held_out=True))
    return dataclasses.replace(sample, calibration=calibration, held_out=held_out)


def _unfolded(store: Store, sums: SplitSets) -> SplitSets:
    if sums.folded is None:
        return sums
    return dataclasses.replace(sums, folded=None, apart=(*_windows(store, sums), *sums.apart))


def _terms(cached: SumStore, blocks: int, sums: SplitSets) -> list[PoolPart]:
    """Return the terms of the folded sum: the newest stored sum and the sets since, or else the sets of all windows."""
    kept = _kept(cached, blocks, sums)
    return _windows(cached.store, sums) if kept is None else kept


def _kept(cached: SumStore, blocks: int, sums: SplitSets) -> list[PoolPart] | None:
    if sums.folded is None:
        return []
    if _is_complete(cached, sums.folded.key, blocks):
        return [sums.folded]
    assert sums.pool is not None
    pool = read_pool(cached.store, sums.pool)
    last = pool.sums.index(sums.folded)
    for place in range(last - 1, -1, -1):
        if _is_complete(cached, pool.sums[place].key, blocks):
            return [pool.sums[place], *pool.parts[place + 1 : last + 1]]
    return None


def _windows(store: Store, sums: SplitSets) -> list[PoolPart]:
    """Return the folded sets, joined by weight, so that one pass runs them however many there are."""
    assert sums.pool is not None
    apart = {part.key for part in sums.apart}
    by_weight: dict[float, list[PoolPart]] = {}
    for part in all_parts(store, read_pool(store, sums.pool)):
        if part.key not in apart:
            by_weight.setdefault(part.weight, []).append(part)
    return [_joined(store, parts) for parts in by_weight.values()]


def _joined(store: Store, parts: Sequence[PoolPart]) -> PoolPart:
    if len(parts) == 1:
        return parts[0]
    provenance = {"source": "joined", "sets": [part.key for part in parts]}
    stored_windows(store, provenance, lambda: torch.cat([windows_by_key(store, part.key) for part in parts]))
    return PoolPart(digest_of(provenance), sum(part.tokens for part in parts), parts[0].weight)


def _add(cached: SumStore, folded: PoolPart, terms: Sequence[PoolPart], block: int, site: Site) -> None:
    try:
        moments = (cached.read(part.key, block, site).weighted(part.weight) for part in terms)
        total = functools.reduce(operator.add, moments)
    except MissingArtifact:
        if cached.has_site(folded.key, block, site):
            return  # another run has folded and removed them in the meantime
        raise
    cached.publish_site(folded.key, block, site, total)


def _forget(cached: SumStore, blocks: int, sums: SplitSets, terms: Sequence[PoolPart]) -> None:
    """Remove the sets and sums that neither this sample nor the one before its newest set needs."""
    assert sums.pool is not None
    assert sums.folded is not None
    pool = read_pool(cached.store, sums.pool)
    last = pool.sums.index(sums.folded)
    old = [*pool.sums[: max(last - 1, 0)], *pool.parts[:last]]
    joined = [part for part in terms if part.key not in {each.key for each in (*pool.sums, *pool.parts)}]
    kept = {part.key for part in (*sums.parts, *pool.sums[max(last - 1, 0) : last])}
    for key in dict.fromkeys(part.key for part in (*old, *joined)):
        if key in kept:
            continue
        sites = list(_sites(cached, blocks))
        if cached.is_kept(key, *sites[0]):
            for block, site in reversed(sites):  # the first site last: `is_kept` above checks it
                cached.discard_unused(key, block, site)


def _splits(sample: Sample, held_out: bool) -> tuple[SplitSets, ...]:
    return (sample.calibration, sample.held_out) if held_out else (sample.calibration,)


def _sites(cached: SumStore, blocks: int) -> Iterator[tuple[int, Site]]:
    return ((block, site) for block in range(blocks) for site in cached.sites(block) or ())


def _is_complete(cached: SumStore, calibration: str, blocks: int) -> bool:
    return all(cached.has(calibration, block) for block in range(blocks))
