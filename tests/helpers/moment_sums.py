"""Compare summed moments of shards with the moments of one calibration pass over all their windows."""

from __future__ import annotations

import functools
import json
import operator
from pathlib import Path

import torch

from crosscal.calibration.sets import stored_windows, windows_by_key
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.moments import DENSE, CachedMoments, collect_moments
from crosscal.store import Store, digest_of


def difference_from_one_reading(run_dir: Path, home: str, corpus: str, source: ModelSource, elsewhere: Path) -> float:
    """Return the largest difference of Σ x xᵀ, over all sites, between the sum of a corpus's stored shards and one
    calibration pass over the same windows into the empty store `elsewhere`; relative to the geometric mean of the two
    diagonal entries, which bounds every entry. Raises `AssertionError` if token counts differ, except for experts."""
    identity = json.loads((run_dir / "identity.json").read_text())
    sums = next(sample["calibration"] for sample in identity["sets"] if sample["corpus"] == corpus)
    keys = [part["key"] for part in sums["apart"]]
    stored = CachedMoments(Store(home), source.digest, DENSE, identity["dtype"])
    windows_SL = torch.cat([windows_by_key(stored.store, key) for key in keys])
    anew = CachedMoments(Store(elsewhere), source.digest, DENSE, identity["dtype"])
    provenance = {"all windows of": keys}
    stored_windows(anew.store, provenance, lambda: windows_SL)
    whole = digest_of(provenance)
    collect_moments(anew, source, [whole], device="cpu", batch_tokens=4096, report=silent)
    largest = 0.0
    for block in range(source.blocks):
        for site in stored.sites(block) or ():
            added = functools.reduce(operator.add, (stored.read(key, block, site) for key in keys))
            once = anew.read(whole, block, site)
            assert added.tokens == once.tokens
            assert added.tokens == windows_SL.numel() or "expert" in site.name  # experts receive a part of the tokens
            scale_I = once.gram_II.diagonal().sqrt().clamp_min(1e-30)
            differences_II = (added.gram_II - once.gram_II) / torch.outer(scale_I, scale_I)
            largest = max(largest, float(differences_II.abs().max()))
    return largest
