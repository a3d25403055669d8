"""Reading the model over calibration sets, and finding again what was read before.

One artifact per (model, calibration set, upstream, block, site, dtype). A set whose sites are all there is never read
again; after an interruption only the blocks that are missing are summed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.lanes import Behind
from crosscal.models.sites import MatrixRef, Site
from crosscal.models.source import ModelSource
from crosscal.models.walk import BlockMoments, walk
from crosscal.progress import Report
from crosscal.stages.spill import spill_folder
from crosscal.statistics import InputMoments
from crosscal.store import Store, digest_of
from crosscal.store.moments import read_moments, write_moments

FORMAT = 1  # of everything below; a change of meaning makes new keys
DENSE = "dense"


@dataclass(frozen=True)
class Cached:
    """The moments of one model under one upstream, in the store."""

    store: Store
    model: str
    """The model's digest."""
    upstream: str
    """`dense`, or what determines the compressed blocks that the inputs went through."""
    dtype: str
    """Of the activations, e.g. `float32`."""
    kind: str = "moments"
    """Of the artifacts."""

    def sites(self, block: int) -> tuple[Site, ...] | None:
        artifact = self.store.find("sites", self._sites_key(block))
        if artifact is None:
            return None
        return tuple(_site(value) for value in json.loads(self.store.read_bytes(artifact, "sites.json")))

    def has(self, calibration: str, block: int) -> bool:
        sites = self.sites(block)
        return sites is not None and all(self.has_site(calibration, block, site) for site in sites)

    def has_site(self, calibration: str, block: int, site: Site) -> bool:
        return self.store.find(self.kind, self._key(calibration, block, site)) is not None

    def read(self, calibration: str, block: int, site: Site) -> InputMoments:
        return read_moments(self.store, self.store.get(self.kind, self._key(calibration, block, site)))

    def discard(self, calibration: str, block: int, site: Site) -> None:
        self.store.discard(self.kind, self._key(calibration, block, site))

    def is_kept(self, calibration: str, block: int, site: Site) -> bool:
        """As `has_site`, without counting as a use."""
        return self.store.is_kept(self.kind, self._key(calibration, block, site))

    def discard_unused(self, calibration: str, block: int, site: Site) -> None:
        """As `discard`, unless another process at work may need it."""
        self.store.discard_unused(self.kind, self._key(calibration, block, site))

    def publish(self, seen: BlockMoments) -> int:
        """Store one block's moments, leaving what is there; returns the number of artifacts made."""
        made = 0
        for calibration, sites in seen.moments.items():
            for site in seen.sites:
                if not self.has_site(calibration, seen.block, site):
                    self.publish_site(calibration, seen.block, site, sites[site.name])
                    made += 1
        # Last: without its sites a block counts as unread.
        if self.sites(seen.block) is None:
            provenance = {"model": self.model, "block": seen.block}
            with self.store.publish("sites", self._sites_key(seen.block), provenance) as folder:
                (folder / "sites.json").write_text(json.dumps([dataclasses.asdict(site) for site in seen.sites]))
        return made

    def publish_site(self, calibration: str, block: int, site: Site, moments: InputMoments) -> None:
        provenance = {
            "model": self.model,
            "calibration": calibration,
            "upstream": self.upstream,
            "block": block,
            "site": site.name,
            "dtype": self.dtype,
            "tokens": moments.tokens,
        }
        with self.store.publish(self.kind, self._key(calibration, block, site), provenance) as folder:
            write_moments(folder, moments)

    def _key(self, calibration: str, block: int, site: Site) -> str:
        return digest_of([FORMAT, self.model, calibration, self.upstream, block, site.name, self.dtype])

    def _sites_key(self, block: int) -> str:
        return digest_of([FORMAT, self.model, block])


def _site(value: dict[str, Any]) -> Site:
    return Site(value["name"], tuple(MatrixRef(**matrix) for matrix in value["matrices"]), value["inputs"])


@dataclass(frozen=True)
class MomentsReport:
    """What one reading cost: calibration tokens run through the model, and artifacts found or made."""

    tokens_read: int
    hits: int
    misses: int
    seconds: float

    def __add__(self, other: MomentsReport) -> MomentsReport:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MomentsReport(*(a + b for a, b in pairs))


def collect_moments(
    cached: Cached, source: ModelSource, calibrations: Sequence[str], *, device: str, batch_tokens: int, report: Report
) -> MomentsReport:
    """See that the dense moments of these calibration sets are in the store; the model is read for what is not."""
    windows = {key: partial(windows_by_key, cached.store, key) for key in calibrations}
    return read_windows(cached, source, windows, device=device, batch_tokens=batch_tokens, report=report)


def read_windows(
    cached: Cached,
    source: ModelSource,
    windows: Mapping[str, Callable[[], Tensor]],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> MomentsReport:
    """As `collect_moments`, for windows_SL by the key of their moments; only what is read is asked for."""
    blocks = range(source.blocks)
    missing = {key: {block for block in blocks if not cached.has(key, block)} for key in windows}
    hits = sum(len(cached.sites(block) or ()) for found in missing.values() for block in blocks if block not in found)
    unread = [key for key, found in missing.items() if found]
    if not unread:
        return MomentsReport(0, hits, 0, 0.0)
    misses = 0

    def keep(seen: BlockMoments) -> None:
        nonlocal misses
        misses += cached.publish(seen)

    slices, dtype = {key: windows[key]() for key in unread}, getattr(torch, cached.dtype)
    with Behind() as behind:  # the next block is read while this one's moments are written
        done = walk(
            source,
            slices,
            on_block=lambda seen: behind.hand_over(partial(keep, seen)),
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            spill_to=spill_folder(source, slices.values(), dtype=dtype, device=device),
            wanted=lambda block: any(block in missing[key] for key in unread),
            progress=report,
        )
    return MomentsReport(done.tokens, hits, misses, done.seconds)
