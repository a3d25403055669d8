"""Predict the calibration passes that a run still needs. Nothing is drawn or generated here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from crosscal.calibration import WindowRequest, tokenizer_digest
from crosscal.calibration.pool import find_pool, most_windows
from crosscal.calibration.sets import KIND as SETS
from crosscal.calibration.windows import random_provenance
from crosscal.corpora import Corpus, load_corpus
from crosscal.errors import CorpusError
from crosscal.models.source import ModelSource
from crosscal.plan import Documents, RandomTokens, SelfGenerated
from crosscal.stages.folding import SumStore, unread_tokens
from crosscal.stages.preflight import is_read
from crosscal.stages.sample import Draw, sums_of, written_provenance
from crosscal.store import digest_of
from crosscal.tasks.corpora import seeds_of, stored_name, temperature_of
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import Variant


def reading(
    spec: RunSpec, source: ModelSource, name: str, seed: int, cached: SumStore, *, held_out: bool = True
) -> dict[str, Any]:
    """Describe the calibration pass over one corpus in one draw, as of its last ingest: its sets, its state, and the
    tokens still to read and already cached, for both splits or the calibration windows alone."""
    plan = spec.parsed
    calibration, origin = plan.calibration, plan.corpora[name]
    draw = Draw(
        calibration.windows,
        calibration.length,
        seed,
        calibration.held_out_windows,
        begin_token=calibration.begin_token,
        plain_text=calibration.plain_text,
    )
    asked = [draw.calibration(draw.windows), *([draw.held_out(draw.held_out_windows)] if held_out else [])]
    requests = [request.within(source.max_positions)[0] for request in asked]
    found: dict[str, Any] = {"corpus": name, "seed": seed, "sets": []}
    if not isinstance(origin, Documents):
        return found | _told([_generated(spec, source, request, origin, cached) for request in requests])
    try:
        corpus = load_corpus(spec.store, stored_name(name, origin))
    except CorpusError:
        tokens = sum(request.windows * request.length for request in requests)
        return {**found, "state": "not ingested yet", "tokens_to_read": tokens, "tokens_cached": 0}
    requests = [dataclasses.replace(request, chat=origin.chat) for request in requests]
    return found | _told(
        [_drawn(spec, source, corpus, request, calibration.parts_kept_apart, cached) for request in requests]
    )


def _told(splits: Sequence[tuple[list[str | None], int, int]]) -> dict[str, Any]:
    """Merge the splits: keys of sets that a solve reads (None: not drawn yet), state, tokens to read and cached."""
    keys = [key for found, _, _ in splits for key in found]
    unread = sum(to_read for _, to_read, _ in splits)
    state = "not sampled yet" if None in keys else "to read" if unread else "cached"
    cached = sum(tokens for _, _, tokens in splits) - unread
    return {"sets": keys, "state": state, "tokens_to_read": unread, "tokens_cached": cached}


def _generated(
    spec: RunSpec, source: ModelSource, request: WindowRequest, origin: SelfGenerated | RandomTokens, cached: SumStore
) -> tuple[list[str | None], int, int]:
    tokens = request.windows * request.length
    try:
        key = digest_of(_provenance(spec, source, request, origin))
    except CorpusError:  # the documents that the model continues are not ingested yet
        return [None], tokens, tokens
    if spec.store.find(SETS, key) is None:
        return [None], tokens, tokens
    return [key], 0 if is_read(cached, key, source.blocks) else tokens, tokens


def _provenance(
    spec: RunSpec, source: ModelSource, request: WindowRequest, origin: SelfGenerated | RandomTokens
) -> dict[str, Any]:
    if not isinstance(origin, SelfGenerated):
        return random_provenance(source.tokenizer(), tokenizer_digest(source.path), request)
    return written_provenance(
        source,
        request,
        temperature=temperature_of(origin),
        first_tokens=origin.first_tokens,
        dtype=getattr(torch, spec.dtype),
        seeds=seeds_of(spec, origin),
    )


def _drawn(
    spec: RunSpec,
    source: ModelSource,
    corpus: Corpus,
    request: WindowRequest,
    parts_kept_apart: int,
    cached: SumStore,
) -> tuple[list[str | None], int, int]:
    """Count what is already drawn, and for later shards the most windows that the drawing rule allows."""
    pool, undrawn = find_pool(spec.store, corpus.shards, source.tokenizer(), tokenizer_digest(source.path), request)
    keys: list[str | None] = []
    unread = tokens = 0
    if pool is not None and pool.parts:
        sums = sums_of(pool, parts_kept_apart)
        keys += [part.key for part in sums.parts]
        tokens = sums.tokens
        unread = unread_tokens(cached, source.blocks, sums)
    windows, characters = (pool.windows, pool.characters) if pool else (0, 0)
    for shard in undrawn:
        characters += shard.characters[request.split]
        most = most_windows(request, windows, shard.characters[request.split], characters)
        windows += most
        keys.append(None)
        unread += most * request.length
        tokens += most * request.length
    return keys, unread, tokens


def reading_again(variant: Variant, readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the extra calibration pass of a sequential variant over its mixtures, through its own compressed blocks.

    An upper bound: whether an earlier run has stored its moments is not known before the windows are drawn.
    """
    mixtures = (variant.mixture, *(step.mixture for step in variant.recipe))
    corpora = {corpus for mixture in mixtures if mixture for corpus in mixture.corpora}
    mine = [reading for reading in readings if reading["corpus"] in corpora and reading["seed"] == variant.seed]
    tokens = sum(reading["tokens_to_read"] + reading["tokens_cached"] for reading in mine)
    sets = [key for reading in mine for key in reading["sets"] or (None, None)]
    found = {"variant": variant.name, "seed": variant.seed, "sets": sets, "state": "at most"}
    return {**found, "tokens_to_read": tokens, "tokens_cached": 0}
