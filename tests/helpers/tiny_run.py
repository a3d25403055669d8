"""Inputs of a run's stages: a tiny model and made-up windows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crosscal.calibration.sets import stored_windows
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.compress import RunContext
from crosscal.stages.moments import DENSE, CachedMoments, MomentsReport, collect_moments
from crosscal.stages.sample import PoolPart, Sample, SplitSets
from crosscal.statistics import Mixture
from crosscal.store import Store, digest_of
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_text import tiny_llama

VOCABULARY = 400
LENGTH = 32


def tiny_source(folder: Path, dtype: torch.dtype = torch.float32) -> ModelSource:
    tiny_llama().to(dtype).save_pretrained(folder)
    return ModelSource.open(folder)


def windows(count: int, seed: int, low: int = 3, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def keep_windows(store: Store, tokens_SL: torch.Tensor) -> str:
    provenance = {"made for a test": digest_of(tokens_SL.tolist())}
    stored_windows(store, provenance, lambda: tokens_SL)
    return digest_of(provenance)


def sample(store: Store, corpus: str, *shards: torch.Tensor) -> Sample:
    """Sample of one part per shard, weighted for all its windows; the last two windows of each shard are held out."""
    weights = [len(tokens_SL) / (len(tokens_SL) - 2) for tokens_SL in shards]
    calibration = [part(store, tokens_SL[:-2], weight) for tokens_SL, weight in zip(shards, weights, strict=True)]
    held_out = [part(store, tokens_SL[-2:], len(tokens_SL) / 2) for tokens_SL in shards]
    return Sample(corpus, 0, sums(*calibration), sums(*held_out))


def part(store: Store, tokens_SL: torch.Tensor, weight: float = 1.0) -> PoolPart:
    return PoolPart(keep_windows(store, tokens_SL), tokens_SL.numel(), weight)


def sums(*parts: PoolPart) -> SplitSets:
    """Sets of the parts, none of them folded."""
    return SplitSets(parts, whole=functools.reduce(PoolPart.plus, parts) if len(parts) > 1 else None)


def dense_cache(store: Store, source: ModelSource, dtype: str = "float32") -> CachedMoments:
    return CachedMoments(store, source.digest, DENSE, dtype)


def collect(cached: CachedMoments, source: ModelSource, calibrations: list[str]) -> MomentsReport:
    return collect_moments(cached, source, calibrations, device="cpu", batch_tokens=64, report=silent)


def variant(name: str, method: str, mixture: Mapping[str, float] | None, **more: Any) -> Variant:
    settings = {key: value for key, value in more.items() if key not in ("upstream", "fallback", "trace_normalised")}
    return Variant(
        name,
        (RecipeStep(method, tuple(settings.items())),),
        None if mixture is None else Mixture.of(mixture),
        more.get("upstream", "dense"),
        0,
        more.get("trace_normalised", False),
        more.get("fallback"),
    )


def run_context(folder: Path, store: Store, source: ModelSource, *samples: Sample) -> RunContext:
    return RunContext(
        folder=folder,
        source=source,
        cached=dense_cache(store, source),
        samples={(each.corpus, each.seed): each for each in samples},
        reference=Mixture.of({samples[0].corpus: 1.0}),
        device="cpu",
    )
