"""Gradients of the dense model's loss over calibration sets, cached in the store.

One artifact per (model, calibration set, block, site, dtype): Σ g² of the site's matrices, as large as its weights. A
set whose blocks are all stored is never run again. After an interruption the walk is repeated back to the first missing
block, and only what is missing is stored. The gradients are always the dense model's. With `upstream: sequential` the
inputs come through a variant's compressed blocks, but gradients are still taken at the dense weights, as in the
published method.

`CachedGradients` has the interface that `folding` needs (`SumStore`): a growing corpus keeps one sum of gradients, too.
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
from crosscal.lanes import WriteBehind
from crosscal.models.gradients import BlockGradients, walk_back
from crosscal.models.sites import Site
from crosscal.models.source import ModelSource
from crosscal.progress import Report
from crosscal.stages.moments import CachedMoments, MomentsReport, unread_blocks
from crosscal.stages.sample import Sample
from crosscal.stages.spill import spill_folder
from crosscal.statistics import Gradient, GradientSums
from crosscal.store import Store, digest_of
from crosscal.store.gradients import read_gradients, write_gradients

KIND = "gradients"
FORMAT = 1  # bump when something else is summed


@dataclass(frozen=True)
class CachedGradients:
    """The stored gradients of one dense model."""

    moments: CachedMoments
    """Of the same model, collected first: they record which matrices read which site."""

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
        """Return the sums of one site. Raises `MissingArtifact`, `CorruptArtifact`."""
        return read_gradients(self.store, self.store.get(KIND, self._key(calibration, block, site)))

    def publish(self, windows: Mapping[str, int], seen: BlockGradients) -> int:
        """Store the missing sums of one block; return the number of sites that were stored."""
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
        """Whether the sums are stored; this does not count as a use."""
        return self.store.is_kept(KIND, self._key(calibration, block, site))

    def discard_unused(self, calibration: str, block: int, site: Site) -> None:
        """Remove the sums, unless another running process may need them."""
        self.store.discard_unused(KIND, self._key(calibration, block, site))

    def _key(self, calibration: str, block: int, site: Site) -> str:
        known = self.moments
        return digest_of([FORMAT, known.model, calibration, block, site.name, known.dtype, Gradient.SQUARE])


@dataclass(frozen=True)
class Gradients:
    """Gradients as a solve needs them: means per window over each corpus's sample."""

    cached: CachedGradients
    samples: Mapping[tuple[str, int], Sample]
    """(corpus, seed) -> its windows."""

    def means(self, corpus: str, seed: int, block: int, site: Site, where: str) -> dict[str, Tensor]:
        """Return E[g²] = Σ_k weight_k · sum_k / Σ_k weight_k · windows_k for each of the site's matrices. Raises
        `NotFinite`, and the errors of reading the store."""
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
    """Compute and store the missing gradients over these calibration sets; the model is run for those only."""
    missing, hits = unread_blocks(cached.has, cached.sites, calibrations, source.blocks)
    unread = list(missing)
    if not unread:
        return MomentsReport(0, hits, 0, 0.0)
    slices, dtype = {key: windows_by_key(cached.store, key) for key in unread}, gradient_dtype(cached.moments.dtype)
    windows, misses = {key: len(tokens_SL) for key, tokens_SL in slices.items()}, 0

    def keep(seen: BlockGradients) -> None:
        nonlocal misses
        misses += cached.publish(windows, seen)

    kept = [*slices.values()] * (source.blocks + 1)  # every block's inputs and the last one's outputs
    with WriteBehind() as behind:
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
    """Return the dtype of activations and their gradients, given that of a calibration pass: float32 for float16, in
    which gradients often underflow."""
    return torch.float32 if dtype == "float16" else getattr(torch, dtype)


def _parameters(cached: CachedGradients, block: int) -> list[str]:
    matrices = (matrix for site in cached.sites(block) or () for matrix in site.matrices)
    return list(dict.fromkeys(matrix.parameter for matrix in matrices))
