"""Split a calibration pass over one set into parts for any number of workers, and add the parts up.

A part is a range of a set's windows. The cuts depend only on the set and on the tokens per part, and parts are added in
order, so the sum does not depend on which worker ran which part or when. It is not bit-identical to that of an
undivided pass, which rounds at other places: the relative difference of Σ x xᵀ and the other sums is below 1e-6 in
float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.calibration.sets import windows_by_key
from crosscal.errors import MissingArtifact
from crosscal.models.sites import Site
from crosscal.models.source import ModelSource
from crosscal.progress import Report
from crosscal.stages.moments import CachedMoments, MomentsReport, read_windows
from crosscal.store import digest_of

KIND = "moment-parts"
"""Kind of the parts' moments. They are not needed once the set's own moments are stored."""


@dataclass(frozen=True)
class WindowSpan:
    """Windows `start` to `stop` of a calibration set."""

    calibration: str
    start: int
    stop: int
    tokens: int

    @property
    def key(self) -> str:
        return digest_of([self.calibration, self.start, self.stop])


def parts_of(cached: CachedMoments, calibration: str, part_tokens: int) -> list[WindowSpan]:
    """Return a set cut into parts of at most `part_tokens` tokens, or of one longer window."""
    windows, length = windows_by_key(cached.store, calibration).shape
    step = max(1, part_tokens // length)
    starts = range(0, windows, step)
    return [
        WindowSpan(calibration, start, min(start + step, windows), (min(step, windows - start)) * length)
        for start in starts
    ]


def loads(
    cached: CachedMoments, blocks: int, calibrations: Sequence[str], part_tokens: int
) -> Iterator[list[WindowSpan]]:
    """Yield the parts of incomplete sets in loads for one pass over the model each, of at most `part_tokens` tokens."""
    unread = (key for key in dict.fromkeys(calibrations) if not _is_complete(cached, key, blocks))
    load: list[WindowSpan] = []
    for part in itertools.chain.from_iterable(parts_of(cached, key, part_tokens) for key in unread):
        if load and sum(each.tokens for each in load) + part.tokens > part_tokens:
            yield load
            load = []
        load.append(part)
    if load:
        yield load


def read_parts(
    cached: CachedMoments,
    source: ModelSource,
    load: Sequence[WindowSpan],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> MomentsReport:
    """Compute and store the missing moments of some parts. They count neither as hits nor as misses: only sums do."""

    def windows(part: WindowSpan) -> Any:
        return windows_by_key(cached.store, part.calibration)[part.start : part.stop]

    done = read_windows(
        _of_parts(cached),
        source,
        {part.key: functools.partial(windows, part) for part in load},
        device=device,
        batch_tokens=batch_tokens,
        report=report,
    )
    return dataclasses.replace(done, hits=0, misses=0)


def add_parts(cached: CachedMoments, blocks: int, calibrations: Sequence[str], part_tokens: int) -> MomentsReport:
    """Store the missing moments of these sets as the sums of their parts, then remove the parts."""
    started, hits, misses = time.monotonic(), 0, 0
    for key in dict.fromkeys(calibrations):
        parts = [] if _is_complete(cached, key, blocks) else parts_of(cached, key, part_tokens)
        for block, site in _sites(cached, blocks):
            if parts and not cached.has_site(key, block, site):
                _add(cached, parts, block, site)
                misses += 1
            else:
                hits += 1
        for part, (block, site) in itertools.product(parts, _sites(cached, blocks)):
            _of_parts(cached).discard(part.key, block, site)
    return MomentsReport(0, hits, misses, time.monotonic() - started)


def _add(cached: CachedMoments, parts: Sequence[WindowSpan], block: int, site: Site) -> None:
    try:
        moments = (_of_parts(cached).read(part.key, block, site) for part in parts)
        total = functools.reduce(operator.add, moments)
    except MissingArtifact:
        if cached.has_site(parts[0].calibration, block, site):
            return  # another run has added and removed them in the meantime
        raise
    cached.publish_site(parts[0].calibration, block, site, total)


def _sites(cached: CachedMoments, blocks: int) -> Iterator[tuple[int, Site]]:
    return ((block, site) for block in range(blocks) for site in cached.sites(block) or ())


def _is_complete(cached: CachedMoments, calibration: str, blocks: int) -> bool:
    return all(cached.has(calibration, block) for block in range(blocks))


def _of_parts(cached: CachedMoments) -> CachedMoments:
    return dataclasses.replace(cached, kind=KIND)
