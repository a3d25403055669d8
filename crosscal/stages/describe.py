"""What the calibration windows of a run look like: some of their text, and its quality in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from crosscal.calibration import CalibrationSet, readable, text_quality
from crosscal.calibration.sets import windows_by_key
from crosscal.models.source import ModelSource
from crosscal.stages.sample import Sample
from crosscal.store import Store

SHOWN_CHARACTERS = 600


def readable_samples(
    store: Store, source: ModelSource, samples: Sequence[Sample], per_corpus: int = 2
) -> list[dict[str, str]]:
    """The beginning of the first windows of every corpus, as `samples.json` of a run holds them."""
    tokenizer, shown = source.tokenizer(), []
    for sample in _first_draws(samples):
        tokens_SL = windows_by_key(store, sample.calibration.apart[0].key)
        for text in readable(CalibrationSet(tokens_SL, {}, ()), tokenizer, per_corpus):
            cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
            shown.append({"corpus": sample.corpus, "text": cut})
    return shown


def sample_quality(store: Store, source: ModelSource, samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """Corpus -> the measures of `TextQuality` over its calibration windows, of a corpus that has grown for long the
    newest (those kept apart); None where one is undefined."""
    vocabulary = source.config.get_text_config().vocab_size
    found: dict[str, dict[str, float | None]] = {}
    for sample in _first_draws(samples):
        tokens_SL = torch.cat([windows_by_key(store, part.key) for part in sample.calibration.apart])
        measured = dataclasses.asdict(text_quality(tokens_SL, vocabulary))
        found[sample.corpus] = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    return found


def _first_draws(samples: Iterable[Sample]) -> list[Sample]:
    """One sample a corpus: other seeds draw from the same text."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.corpus, sample)
    return list(first.values())
