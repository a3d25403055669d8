"""Gradients of the dense model's loss over calibration sets, and finding again what was computed before.

One artifact per (model, calibration set, block, site, dtype): Σ g² of the site's matrices, as large as its weights. A
set whose blocks are all there is never read again; an interrupted walk repeats the way to the first block it lacks and
stores what is missing. They are always the dense model's: of a variant with `upstream: sequential` the inputs come
through its compressed blocks, and what the loss says of its weights is still taken where nothing is compressed, as the
published method does.

`CachedGradients` answers to what `folding` asks of `Cached`, so that a corpus that grows keeps one sum of them as well.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.lanes import Behind
from crosscal.models.gradients import BlockGradients, walk_back
from crosscal.models.sites import Site
from crosscal.models.source import ModelSource
from crosscal.progress import Report
from crosscal.stages.moments import Cached, MomentsReport, unread_blocks
from crosscal.stages.sample import Sample
from crosscal.stages.spill import spill_folder
from crosscal.statistics import Gradient, GradientSums
from crosscal.store import Store, digest_of
from crosscal.store.gradients import read_gradients, write_gradients

KIND = "gradients"
FORMAT = 1  # a change of what is summed makes new keys


@dataclass(frozen=True)
class CachedGradients:
    """The gradients of one dense model, in the store."""

    moments: Cached
    """Of the same model: they say which matrices read which site, and come first."""

    @property
    def store(self) -> Store:
        return self.moments.store

    def sites(self, block: int) -> tuple[Site, ...] | None:
        return self.moments.sites(block)

    def has(self, calibration: str, block: int) -> bool:
        sites = self.sites(block)
        return sites is not None and all(self.has_site(calibration, block, site) for site in sites)

    def has_site(self, calibration: str, block: int, site: Site) -> bool:
        return self.store.find(KIND, self._key(calibration, block, site)) is not None

    def read(self, calibration: str, block: int, site: Site) -> GradientSums:
        """Raises `MissingArtifact`, `CorruptArtifact`."""
        return read_gradients(self.store, self.store.get(KIND, self._key(calibration, block, site)))

    def publish(self, windows: Mapping[str, int], seen: BlockGradients) -> int:
        """Store one block's sums, leaving what is there; returns the number of sites that were stored."""
        made = 0
        for calibration, squares in seen.squares.items():
            for site in self.sites(seen.block) or ():
                if not self.has_site(calibration, seen.block, site):
                    of_site = {matrix.name: matrix.weight_OI(squares) for matrix in site.matrices}
                    self.publish_site(calibration, seen.block, site, GradientSums(of_site, windows[calibration]))
                    made += 1
        return made

    def publish_site(self, calibration: str, block: int, site: Site, sums: GradientSums) -> None:
        provenance = {
            "model": self.moments.model,
            "calibration": calibration,
            "block": block,
            "site": site.name,
            "dtype": self.moments.dtype,
            "windows": sums.windows,
            "sums": [Gradient.SQUARE],
        }
        with self.store.publish(KIND, self._key(calibration, block, site), provenance) as folder:
            write_gradients(folder, sums)

    def is_kept(self, calibration: str, block: int, site: Site) -> bool:
        """Whether it is there, without counting as a use."""
        return self.store.is_kept(KIND, self._key(calibration, block, site))

    def discard_unused(self, calibration: str, block: int, site: Site) -> None:
        """Remove it, unless another process at work may need it."""
        self.store.discard_unused(KIND, self._key(calibration, block, site))

    def _key(self, calibration: str, block: int, site: Site) -> str:
        known = self.moments
        return digest_of([FORMAT, known.model, calibration, block, site.name, known.dtype, Gradient.SQUARE])


@dataclass(frozen=True)
class Gradients:
    """What a solve asks for: means per window of what stands for each corpus."""

    cached: CachedGradients
    samples: Mapping[tuple[str, int], Sample]
    """(corpus, seed) -> what stands for it."""

    def means(self, corpus: str, seed: int, block: int, site: Site, where: str) -> dict[str, Tensor]:
        """E[g²] = Σ_k weight_k · sum_k / Σ_k weight_k · windows_k by the site's matrices. Raises `NotFinite`, and what
        reading the store raises."""
        parts = self.samples[corpus, seed].calibration.parts
        sums = (self.cached.read(part.key, block, site).weighted(part.weight) for part in parts)
        return functools.reduce(operator.add, sums).means(f"{where} ({corpus})")


def collect_gradients(
    cached: CachedGradients,
    source: ModelSource,
    calibrations: Sequence[str],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> MomentsReport:
    """See that the gradients over these calibration sets are in the store; the model is run for what is not."""
    missing, hits = unread_blocks(cached.has, cached.sites, calibrations, source.blocks)
    unread = list(missing)
    if not unread:
        return MomentsReport(0, hits, 0, 0.0)
    slices, dtype = {key: windows_by_key(cached.store, key) for key in unread}, gradient_dtype(cached.moments.dtype)
    windows, misses = {key: len(tokens_SL) for key, tokens_SL in slices.items()}, 0

    def keep(seen: BlockGradients) -> None:
        nonlocal misses
        misses += cached.publish(windows, seen)

    kept = [*slices.values()] * (source.blocks + 1)  # inputs of every block, and what the last one gives
    with Behind() as behind:
        done = walk_back(
            source,
            slices,
            on_block=lambda seen: behind.hand_over(partial(keep, seen)),
            parameters=lambda block: _parameters(cached, block),
            wanted=lambda block: {key for key in unread if block in missing[key]},
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            spill_to=spill_folder(source, kept, dtype=dtype, device=device),
            progress=report,
        )
    return MomentsReport(done.tokens, hits, misses, done.seconds)


def gradient_dtype(dtype: str) -> torch.dtype:
    """That of activations and their gradients, by that of a reading: gradients are often below what float16 can hold,
    so they are computed in float32 then."""
    return torch.float32 if dtype == "float16" else getattr(torch, dtype)


def _parameters(cached: CachedGradients, block: int) -> list[str]:
    matrices = (matrix for site in cached.sites(block) or () for matrix in site.matrices)
    return list(dict.fromkeys(matrix.parameter for matrix in matrices))
