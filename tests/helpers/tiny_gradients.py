"""A cache of gradients that knows the sites of a tiny model, and backward walks into it."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.gradients import CachedGradients, collect_gradients
from crosscal.stages.moments import MomentsReport
from crosscal.statistics import VECTORS
from crosscal.store import Store
from tests.helpers.tiny_run import collect, dense_cache, keep_windows, windows


def known(store: Store, source: ModelSource, dtype: str = "float32") -> CachedGradients:
    """Return a gradient cache that knows the model's sites from a first calibration pass."""
    cached = dataclasses.replace(dense_cache(store, source, dtype), wanted=frozenset(VECTORS))
    if cached.sites(0) is None:
        collect(cached, source, [keep_windows(store, windows(1, seed=77))])
    return CachedGradients(cached)


def walk(cached: CachedGradients, source: ModelSource, keys: list[str], **more: Any) -> MomentsReport:
    return collect_gradients(cached, source, keys, device="cpu", batch_tokens=64, **{"report": silent, **more})
