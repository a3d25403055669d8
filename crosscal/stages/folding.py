"""The moments (and gradients) of a corpus that grows, kept as one sum and the newest few sets.

    folded_k = folded_k-1 + weight_k · moments_k

Every sum is named after what it is the sum of, and made from the newest one that the store has: as a corpus grows, from
the one before it, so that a solve reads no more sets than the plan keeps apart, and one. What is older by two sets than
anything that is still asked for is removed then: a run on the corpus as it was before the last landing finds all it
needs, and what any other process at work has used stays. Whoever still misses a set reads its windows again.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from crosscal.calibration.pool import Part, all_parts, read_pool
from crosscal.calibration.sets import stored_windows, windows_by_key
from crosscal.errors import MissingArtifact
from crosscal.models.sites import Site
from crosscal.stages.sample import Sample, Sums
from crosscal.store import Store, digest_of


class Kept(Protocol):
    """Sums over calibration sets in the store, an artifact or more a site: moments, gradients."""

    @property
    def store(self) -> Store: ...
    def sites(self, block: int) -> tuple[Site, ...] | None: ...
    def has(self, calibration: str, block: int) -> bool: ...
    def has_site(self, calibration: str, block: int, site: Site) -> bool: ...
    def read(self, calibration: str, block: int, site: Site) -> Any: ...
    def publish_site(self, calibration: str, block: int, site: Site, sums: Any, /) -> None: ...
    def is_kept(self, calibration: str, block: int, site: Site) -> bool: ...
    def discard_unused(self, calibration: str, block: int, site: Site) -> None: ...


def sets_to_read(cached: Kept, blocks: int, sample: Sample, *, held_out: bool = True) -> list[str]:
    """Keys of all sums that `fold` and a solve need, of both splits or of the calibration windows alone; those that the
    store lacks are of calibration sets."""
    parts = [part for sums in _splits(sample, held_out) for part in (*_terms(cached, blocks, sums), *sums.apart)]
    return list(dict.fromkeys(part.key for part in parts))


def fold(cached: Kept, blocks: int, sample: Sample, *, held_out: bool = True) -> None:
    """See that the sums of a sample are in the store, and remove what only older samples need."""
    for sums in _splits(sample, held_out):
        if sums.folded is None:
            continue
        terms = _terms(cached, blocks, sums)
        for block, site in _sites(cached, blocks):
            if not cached.has_site(sums.folded.key, block, site):
                _add(cached, sums.folded, terms, block, site)
        _forget(cached, blocks, sums, [part for part in terms if part.key != sums.folded.key])


def unread_tokens(cached: Kept, blocks: int, sums: Sums) -> int:
    """Of the sets that would have to be read."""
    folded = () if sums.folded is None else (sums.folded,)
    kept = _kept(cached, blocks, sums)
    parts = (*(folded if kept is None else kept), *sums.apart)
    return sum(part.tokens for part in parts if not _is_complete(cached, part.key, blocks))


def unfolded(store: Store, sample: Sample) -> Sample:
    """The same in sets of windows alone, for who has to read them all: sets that weigh alike are one."""
    calibration, held_out = (_unfolded(store, sums) for sums in _splits(sample, held_out=True))
    return dataclasses.replace(sample, calibration=calibration, held_out=held_out)


def _unfolded(store: Store, sums: Sums) -> Sums:
    if sums.folded is None:
        return sums
    return dataclasses.replace(sums, folded=None, apart=(*_windows(store, sums), *sums.apart))


def _terms(cached: Kept, blocks: int, sums: Sums) -> list[Part]:
    """What the folded sum is made of: the newest sum that is there and the sets since, or else all windows anew."""
    kept = _kept(cached, blocks, sums)
    return _windows(cached.store, sums) if kept is None else kept


def _kept(cached: Kept, blocks: int, sums: Sums) -> list[Part] | None:
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


def _windows(store: Store, sums: Sums) -> list[Part]:
    """The sets that were folded, those of one weight joined: read in one pass, however many there were."""
    assert sums.pool is not None
    apart = {part.key for part in sums.apart}
    by_weight: dict[float, list[Part]] = {}
    for part in all_parts(store, read_pool(store, sums.pool)):
        if part.key not in apart:
            by_weight.setdefault(part.weight, []).append(part)
    return [_joined(store, parts) for parts in by_weight.values()]


def _joined(store: Store, parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    provenance = {"source": "joined", "sets": [part.key for part in parts]}
    stored_windows(store, provenance, lambda: torch.cat([windows_by_key(store, part.key) for part in parts]))
    return Part(digest_of(provenance), sum(part.tokens for part in parts), parts[0].weight)


def _add(cached: Kept, folded: Part, terms: Sequence[Part], block: int, site: Site) -> None:
    try:
        moments = (cached.read(part.key, block, site).weighted(part.weight) for part in terms)
        total = functools.reduce(operator.add, moments)
    except MissingArtifact:
        if cached.has_site(folded.key, block, site):
            return  # another run has folded them meanwhile, and removed them
        raise
    cached.publish_site(folded.key, block, site, total)


def _forget(cached: Kept, blocks: int, sums: Sums, terms: Sequence[Part]) -> None:
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
            for block, site in reversed(sites):  # the first last: it says whether anything is there
                cached.discard_unused(key, block, site)


def _splits(sample: Sample, held_out: bool) -> tuple[Sums, ...]:
    return (sample.calibration, sample.held_out) if held_out else (sample.calibration,)


def _sites(cached: Kept, blocks: int) -> Iterator[tuple[int, Site]]:
    return ((block, site) for block in range(blocks) for site in cached.sites(block) or ())


def _is_complete(cached: Kept, calibration: str, blocks: int) -> bool:
    return all(cached.has(calibration, block) for block in range(blocks))
