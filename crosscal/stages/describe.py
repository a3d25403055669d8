"""Describe the calibration windows of a run: sample text and quality measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from crosscal.calibration import CalibrationSet, faults, readable, text_quality
from crosscal.calibration.sets import windows_by_key
from crosscal.calibration.tokens import begin_token, end_token
from crosscal.models.source import ModelSource
from crosscal.stages.moments import CachedMoments, perplexity_of
from crosscal.stages.sample import Sample
from crosscal.store import Store

SHOWN_CHARACTERS = 600


def readable_samples(
    store: Store, source: ModelSource, samples: Sequence[Sample], kinds: Mapping[str, str], per_corpus: int = 2
) -> list[dict[str, str]]:
    """Return the beginning of the first windows of every corpus, as in a run's `samples.json`.

    `kinds`: corpus -> the source of its text: `documents`, `self` or `random`.
    """
    tokenizer, shown = source.tokenizer(), []
    for sample in first_draws(samples):
        tokens_SL = windows_by_key(store, sample.calibration.apart[0].key)
        for text in readable(CalibrationSet(tokens_SL, {}, ()), tokenizer, per_corpus):
            cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
            shown.append({"corpus": sample.corpus, "source": kinds[sample.corpus], "text": cut})
    return shown


def sample_quality(
    store: Store,
    source: ModelSource,
    samples: Sequence[Sample],
    kinds: Mapping[str, str] | None = None,
    begin: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Return corpus -> the measures of `TextQuality` over its calibration windows; None for an undefined one.

    Of a corpus with folded sets only the newest, those kept apart, are measured. `faults` lists their problems as
    sentences, but not for a corpus of random tokens.
    `begin`: whether windows begin with beginning-of-text (see `crosscal.calibration.tokens`).
    """
    found: dict[str, dict[str, Any]] = {}
    for sample in first_draws(samples):
        tokens_SL = torch.cat([windows_by_key(store, part.key) for part in sample.calibration.apart])
        is_text = (kinds or {}).get(sample.corpus) != "random"
        found[sample.corpus] = quality_of(tokens_SL, source, begin, is_text=is_text)
    return found


def quality_of(tokens_SL: torch.Tensor, source: ModelSource, begin: bool | None, *, is_text: bool) -> dict[str, Any]:
    """Return the measures of some windows and, if they are meant to be text, their faults."""
    tokenizer = source.tokenizer()
    marks = {"begin": begin_token(tokenizer, begin), "end": end_token(tokenizer)}
    quality = text_quality(tokens_SL, source.config.get_text_config().vocab_size, **marks)
    measured = dataclasses.asdict(quality).items()
    numbers = {name: value if math.isfinite(value) else None for name, value in measured}
    return {**numbers, "is_text": is_text, "faults": faults(quality) if is_text else []}


def with_perplexities(
    quality: Mapping[str, dict[str, Any]], cached: CachedMoments, samples: Sequence[Sample], vocabulary: int
) -> dict[str, dict[str, Any]]:
    """Return the same with the dense model's `perplexity` and `held_out_perplexity` on the first windows of the newest
    set; None if no calibration pass stored it. For text, a perplexity no better than guessing is a fault."""
    found = {corpus: dict(measured) for corpus, measured in quality.items()}
    for sample in first_draws(samples):
        one = found[sample.corpus]
        for name, sums in (("perplexity", sample.calibration), ("held_out_perplexity", sample.held_out)):
            one[name] = perplexity_of(cached, sums.apart[-1].key)
        if one["perplexity"] is not None and one["perplexity"] >= vocabulary and one["is_text"]:
            guessing = f"no better than uniform guessing among {vocabulary:,} tokens"
            worse = f"its perplexity is {one['perplexity']:,.0f}, {guessing}"
            one["faults"] = [*one["faults"], worse]
    return found


def starved_experts(cached: CachedMoments, blocks: int, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Return corpus → how many experts' input sites had fewer tokens than inputs, so that their Hessians are singular,
    and the one with the fewest tokens; corpora without any are left out."""
    found: dict[str, dict[str, Any]] = {}
    for sample in first_draws(samples):
        seen: list[tuple[int, int, str]] = []
        for block in range(blocks):
            for site in (site for site in cached.sites(block) or () if site.matrices[0].expert is not None):
                tokens = [cached.tokens(part.key, block, site) or 0 for part in sample.calibration.parts]
                seen.append((sum(tokens), site.inputs, f"block {block}, {site.name}"))
        starved = [each for each in seen if each[0] < each[1]]
        if starved:
            least = dict(zip(("least_tokens", "least_inputs", "least"), min(starved), strict=True))
            found[sample.corpus] = {"experts": len(seen), "starved": len(starved), **least}
    return found


def first_draws(samples: Iterable[Sample]) -> list[Sample]:
    """Return the first sample of each corpus: other seeds draw from the same text."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.corpus, sample)
    return list(first.values())
