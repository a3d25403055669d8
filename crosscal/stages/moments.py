"""Calibration passes over calibration sets, with their moments cached in the store.

One artifact per (model, calibration set, upstream, block, site, dtype, content): the Gram matrix in one, the small sums
in another (`Statistic.stored_in`). A set whose sites are all stored is never run again. If more statistics are wanted,
or after an interruption, only the missing sums are computed. Earlier versions stored all sums in one artifact.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.lanes import WriteBehind
from crosscal.models.sites import InputNorm, LeftDense, Matrices, MatrixRef, Site
from crosscal.models.source import ModelSource
from crosscal.models.walk import BlockMoments, walk
from crosscal.progress import Report
from crosscal.stages.spill import spill_folder
from crosscal.statistics import EVERY, InputMoments, Statistic
from crosscal.store import Artifact, Store, digest_of
from crosscal.store.moments import read_moments, write_moments

FORMAT = 1  # of everything below; bump when the meaning changes
SITES_FORMAT = 3  # of a block's stored `Matrices`; since 3 with the producer of each site
DENSE, MOMENTS = "dense", "moments"
LIKELIHOODS, NLL = "likelihoods", "nll.json"


@dataclass(frozen=True)
class CachedMoments:
    """The stored moments of one model under one upstream."""

    store: Store
    model: str
    """The model's digest."""
    upstream: str
    """`dense`, or a key of what determines the compressed blocks that the inputs pass through."""
    dtype: str
    """Dtype of the activations, e.g. `float32`."""
    kind: str = MOMENTS
    """Kind of the artifacts."""
    wanted: frozenset[Statistic] = EVERY
    """The statistics to find, read and sum; without `gram` no loss is measured."""

    @property
    def measures_losses(self) -> bool:
        """Whether H is summed, so that losses can be measured."""
        return Statistic.GRAM in self.wanted

    def sites(self, block: int) -> tuple[Site, ...] | None:
        found = self.matrices(block)
        return found and found.sites

    def matrices(self, block: int) -> Matrices | None:
        artifact = self.store.find("sites", self._sites_key(block))
        if artifact is None:
            return None
        value = json.loads(self.store.read_bytes(artifact, "sites.json"))
        left_dense = tuple(LeftDense(**one) for one in value["left_dense"])
        return Matrices(tuple(_site(one) for one in value["sites"]), left_dense)

    def has(self, calibration: str, block: int) -> bool:
        sites = self.sites(block)
        return sites is not None and all(self.has_site(calibration, block, site) for site in sites)

    def lacking(self, calibration: str, block: int) -> frozenset[Statistic]:
        """Return the wanted sums that some site of a block lacks; all of them if its sites are not known."""
        sites = self.sites(block)
        if sites is None:
            return self.wanted
        return frozenset().union(*(self.missing(calibration, block, site) for site in sites))

    def has_site(self, calibration: str, block: int, site: Site) -> bool:
        return not self.missing(calibration, block, site)

    def missing(self, calibration: str, block: int, site: Site) -> frozenset[Statistic]:
        """Return the wanted sums that a site lacks."""
        parts = {which.stored_in for which in self.wanted}
        lacking = {part for part in parts if self._find(calibration, block, site, part) is None}
        return frozenset(which for which in self.wanted if which.stored_in in lacking)

    def read(self, calibration: str, block: int, site: Site) -> InputMoments:
        """Return the wanted sums of a site. Raises `MissingArtifact`, `CorruptArtifact`."""
        artifacts: dict[str, Artifact] = {}
        for part in sorted({which.stored_in for which in self.wanted}):
            found = self._find(calibration, block, site, part)
            found = found or self.store.get(self.kind, self._key(calibration, block, site, part))
            artifacts[found.key] = found
        read = [read_moments(self.store, artifact) for artifact in artifacts.values()]
        sums = {which: sum_ for moments in read for which, sum_ in moments.sums.items()}
        return dataclasses.replace(read[0], sums=sums).only(self.wanted)

    def tokens(self, calibration: str, block: int, site: Site) -> int | None:
        """Return the number of tokens summed at a site, without reading its sums; None if there are none."""
        parts = dict.fromkeys(which.stored_in for which in self.wanted)
        found = next((one for part in parts if (one := self._find(calibration, block, site, part))), None)
        return found and int(found.provenance["tokens"])

    def discard(self, calibration: str, block: int, site: Site) -> None:
        for key in self._keys(calibration, block, site):
            self.store.discard(self.kind, key)

    def is_kept(self, calibration: str, block: int, site: Site) -> bool:
        """Whether any sums of a site are stored, wanted or not; this does not count as a use."""
        return any(self.store.is_kept(self.kind, key) for key in self._keys(calibration, block, site))

    def discard_unused(self, calibration: str, block: int, site: Site) -> None:
        """As `discard`, unless another running process may need it."""
        for key in self._keys(calibration, block, site):
            self.store.discard_unused(self.kind, key)

    def publish(self, seen: BlockMoments) -> int:
        """Store the missing moments of one block; return the number of sites for which something was stored."""
        made = 0
        for calibration, sites in seen.moments.items():
            for site in seen.sites:
                if not self.has_site(calibration, seen.block, site):
                    self.publish_site(calibration, seen.block, site, sites[site.name])
                    made += 1
        # Written last: a block without stored sites counts as not calibrated.
        if self.sites(seen.block) is None:
            provenance = {"model": self.model, "block": seen.block}
            with self.store.publish("sites", self._sites_key(seen.block), provenance) as folder:
                found = dataclasses.asdict(Matrices(seen.sites, seen.left_dense))
                (folder / "sites.json").write_text(json.dumps(found))
        return made

    def publish_site(self, calibration: str, block: int, site: Site, moments: InputMoments) -> None:
        """Store the missing sums of a site."""
        missing = self.missing(calibration, block, site)
        for part in sorted({which.stored_in for which in missing}):
            held = [which for which in Statistic if which in moments.sums and which.stored_in == part]
            provenance = {
                "model": self.model,
                "calibration": calibration,
                "upstream": self.upstream,
                "block": block,
                "site": site.name,
                "dtype": self.dtype,
                "tokens": moments.tokens,
                "sums": held,
            }
            with self.store.publish(self.kind, self._key(calibration, block, site, part), provenance) as folder:
                write_moments(folder, moments.only(held))

    def _find(self, calibration: str, block: int, site: Site, part: str) -> Artifact | None:
        keys = (self._key(calibration, block, site, part), self._key(calibration, block, site))
        return next((found for key in keys if (found := self.store.find(self.kind, key))), None)

    def _keys(self, calibration: str, block: int, site: Site) -> list[str]:
        """Keys of everything that may be stored of a site."""
        parts = dict.fromkeys(which.stored_in for which in Statistic)
        return [*(self._key(calibration, block, site, part) for part in parts), self._key(calibration, block, site)]

    def _key(self, calibration: str, block: int, site: Site, *part: str) -> str:
        """Without `part`, the key of earlier versions, whose artifacts hold all sums."""
        return digest_of([FORMAT, self.model, calibration, self.upstream, block, site.name, self.dtype, *part])

    def _sites_key(self, block: int) -> str:
        return digest_of([SITES_FORMAT, self.model, block])


@dataclass(frozen=True)
class InMemoryMoments(CachedMoments):
    """`CachedMoments` while a block's moments are still in memory: `read` does not load them from disk."""

    seen: BlockMoments | None = None

    @classmethod
    def of(cls, cached: CachedMoments, seen: BlockMoments) -> InMemoryMoments:
        return cls(**{field.name: getattr(cached, field.name) for field in dataclasses.fields(cached)}, seen=seen)

    def read(self, calibration: str, block: int, site: Site) -> InputMoments:
        if self.seen is None or self.seen.block != block:
            return super().read(calibration, block, site)
        return self.seen.moments[calibration][site.name].only(self.wanted)


def _site(value: dict[str, Any]) -> Site:
    matrices, made = tuple(MatrixRef(**matrix) for matrix in value["matrices"]), value["producer"]
    producer = made and InputNorm(made["name"], tuple(made["parameters"]), made["offset"])
    return Site(value["name"], matrices, value["inputs"], producer, value["no_producer"])


@dataclass(frozen=True)
class MomentsReport:
    """Cost of a calibration pass: tokens run through the model, site sums found (hits) or computed (misses), time."""

    tokens_read: int
    hits: int
    misses: int
    seconds: float

    def __add__(self, other: MomentsReport) -> MomentsReport:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MomentsReport(*(a + b for a, b in pairs))


def collect_moments(
    cached: CachedMoments,
    source: ModelSource,
    calibrations: Sequence[str],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> MomentsReport:
    """Compute and store the missing dense moments of these calibration sets; the model is run for those only."""
    windows = {key: partial(windows_by_key, cached.store, key) for key in calibrations}
    return read_windows(cached, source, windows, device=device, batch_tokens=batch_tokens, report=report)


def read_windows(
    cached: CachedMoments,
    source: ModelSource,
    windows: Mapping[str, Callable[[], Tensor]],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> MomentsReport:
    """As `collect_moments`. `windows`: key of the moments -> loader of windows_SL, called only if they are run."""
    missing, hits = unread_blocks(cached.has, cached.sites, windows, source.blocks)
    unread = list(missing)
    if not unread:
        return MomentsReport(0, hits, 0, 0.0)
    misses = 0

    def keep(seen: BlockMoments) -> None:
        nonlocal misses
        misses += cached.publish(seen)

    lacking = (cached.lacking(key, block) for key in unread for block in missing[key])
    slices, dtype = {key: windows[key]() for key in unread}, getattr(torch, cached.dtype)
    with WriteBehind() as behind:  # the next block runs while this one's moments are written
        done = walk(
            source,
            slices,
            on_block=lambda seen: behind.hand_over(partial(keep, seen)),
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            spill_to=spill_folder(source, slices.values(), dtype=dtype, device=device),
            wanted=lambda block: any(block in missing[key] for key in unread),
            statistics=frozenset().union(*lacking),
            with_nll=cached.kind == MOMENTS,
            progress=report,
        )
    for key, nll in done.nll.items():
        _keep_nll(cached, key, nll)
    return MomentsReport(done.tokens, hits, misses, done.seconds)


def perplexity_of(cached: CachedMoments, calibration: str) -> float | None:
    """Return the dense model's perplexity on the first windows of a set; None if no calibration pass stored it."""
    artifact = cached.store.find(LIKELIHOODS, _nll_key(cached, calibration))
    nll = json.loads(cached.store.read_bytes(artifact, NLL)) if artifact else []
    return math.exp(statistics.mean(nll)) if nll else None


def _keep_nll(cached: CachedMoments, calibration: str, nll: Sequence[float]) -> None:
    if all(map(math.isfinite, nll)):
        provenance = {"model": cached.model, "calibration": calibration, "dtype": cached.dtype}
        with cached.store.publish(LIKELIHOODS, _nll_key(cached, calibration), provenance) as folder:
            (folder / NLL).write_text(json.dumps(nll))


def _nll_key(cached: CachedMoments, calibration: str) -> str:
    return digest_of([FORMAT, cached.model, calibration, cached.dtype])


def unread_blocks(
    has: Callable[[str, int], bool],
    sites: Callable[[int], tuple[Site, ...] | None],
    calibrations: Iterable[str],
    blocks: int,
) -> tuple[dict[str, set[int]], int]:
    """Return the blocks whose sums the store lacks, by calibration set, without complete sets; and the number of site
    sums that it holds in the other blocks. `has`, `sites`: methods of a kind of sums, as of `CachedMoments`."""
    lacking = {key: {block for block in range(blocks) if not has(key, block)} for key in calibrations}
    held = [block for found in lacking.values() for block in range(blocks) if block not in found]
    return {key: found for key, found in lacking.items() if found}, sum(len(sites(block) or ()) for block in held)
