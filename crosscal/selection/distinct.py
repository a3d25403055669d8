"""Deduplication: the first documents of an order that are near-duplicates neither of held-out nor of chosen ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from crosscal.corpora.shards import BATCH_DOCUMENTS
from crosscal.progress import Report
from crosscal.selection.near_duplicates import NearDuplicates, Sketch, sketches
from crosscal.selection.texts import DocumentTexts

LEAST_AT_ONCE, MOST_AT_ONCE = 256, 16_384


@dataclass
class DedupResult:
    """Result of examining documents in order: the chosen positions and counts of rejected documents."""

    wanted: int
    chosen: list[int]
    held_out: int = 0
    """Number rejected because they are equal or nearly equal to a validation or test document."""
    near_duplicates: int = 0
    """Number rejected because they are nearly equal to a document chosen before."""

    @property
    def is_done(self) -> bool:
        return len(self.chosen) >= self.wanted


def equal_apart(pool: DocumentTexts, order: Iterable[int], wanted: int, held_out: DocumentTexts) -> DedupResult:
    """Reject only documents equal to a held-out one; a pool contains no equal documents itself."""
    walk, excluded = DedupResult(wanted, []), set(held_out.digests())
    for position in order:
        if pool.digest(position) in excluded:
            walk.held_out += 1
        else:
            walk.chosen.append(position)
        if walk.is_done:
            break
    return walk


def distinct(
    pool: DocumentTexts, order: Iterable[int], wanted: int, held_out: DocumentTexts, threshold: float, report: Report
) -> DedupResult:
    """Choose the first `wanted` positions of `order` that are not near-duplicates of held-out or chosen documents.

    The order is processed in chunks. Only the chunk and the chosen documents are indexed; held-out documents are
    queried against the index of the chunk. Memory: about 12 KiB per document that is chosen or in the chunk, and
    0.5 KiB per held-out document.
    """
    walk, remaining = DedupResult(wanted, []), iter(order)
    chosen = NearDuplicates(threshold, pool.text)
    passing: list[Sketch] = []
    while not walk.is_done:
        missing = wanted - len(walk.chosen)
        stretch = list(islice(remaining, min(MOST_AT_ONCE, max(LEAST_AT_ONCE, missing + missing // 4))))
        if not stretch:
            break
        sketched = dict(zip(stretch, _sketched(map(pool.text, stretch)), strict=True))
        if not passing:
            passing = list(_sketched(held_out))
        excluded = _like_held_out(pool, sketched, held_out, passing, threshold)
        for position, sketch in sketched.items():
            if position in excluded:
                walk.held_out += 1
            elif chosen.of(sketch, lambda at=position: pool.text(at)):
                walk.near_duplicates += 1
            else:
                chosen.add(position, sketch)
                walk.chosen.append(position)
            if walk.is_done:
                break
        report("choosing documents", len(walk.chosen), wanted)
    return walk


def _like_held_out(
    pool: DocumentTexts,
    sketched: dict[int, Sketch],
    held_out: DocumentTexts,
    passing: Sequence[Sketch],
    threshold: float,
) -> set[int]:
    stretch = NearDuplicates(threshold, pool.text)
    for position, sketch in sketched.items():
        stretch.add(position, sketch)
    return {
        position
        for number, sketch in enumerate(passing)
        for position in stretch.of(sketch, lambda at=number: held_out.text(at))
    }


def _sketched(texts: Iterable[str]) -> Iterator[Sketch]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        yield from sketches(batch)
