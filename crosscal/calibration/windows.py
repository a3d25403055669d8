"""Windows drawn with a seed: from documents, or from the bare vocabulary."""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.sets import CalibrationSet, WindowRequest, stored_windows
from crosscal.calibration.tokens import ordinary_tokens, tokenize
from crosscal.corpora import Shard, documents
from crosscal.errors import CalibrationError
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64


def draw_windows(
    store: Store,
    shard: Shard,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    *,
    max_length: int | None = None,
) -> CalibrationSet:
    """Cut `request.windows` non-overlapping windows from the documents of a shard's split.

    The documents come in an order shuffled by the seed, each tokenized with the tokenizer's own special tokens and
    closed by end-of-text, joined, and cut; no more of them are tokenized than needed. Windows are shortened to the
    model's `max_length`, and are fewer where the documents do not suffice: both leave a note. What was drawn is
    stored, and found again instead of being drawn again.

    Raises `CalibrationError` when the documents do not fill one window or the tokenizer has no end-of-text token.
    """
    request, notes = request.within(max_length)
    provenance = {
        "source": "documents",
        "rule": 1,
        "shard": shard.key,
        "split": request.split,
        "tokenizer": tokenizer_digest,
        "windows": request.windows,
        "length": request.length,
        "seed": request.seed,
    }
    tokens_SL = stored_windows(store, provenance, lambda: _cut(store, shard, tokenizer, request))
    if len(tokens_SL) < request.windows:
        notes += (f"{len(tokens_SL)} windows instead of {request.windows}: the {request.split} split holds no more.",)
    return CalibrationSet(tokens_SL, provenance, notes)


def random_windows(
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    *,
    max_length: int | None = None,
) -> CalibrationSet:
    """Tokens drawn uniformly from the vocabulary without special tokens: the floor any real text must beat.

    Source: "Vocabulary" in arXiv:2410.17170.
    """
    request, notes = request.within(max_length)
    provenance: dict[str, Any] = {
        "source": "vocabulary",
        "rule": 1,
        "tokenizer": tokenizer_digest,
        "windows": request.windows,
        "length": request.length,
        "seed": request.seed,
        "split": request.split,  # a held-out set is drawn anew, too
    }
    tokens_SL = stored_windows(store, provenance, lambda: _scatter(tokenizer, request, seed=digest_of(provenance)))
    return CalibrationSet(tokens_SL, provenance, notes)


def _cut(store: Store, shard: Shard, tokenizer: PreTrainedTokenizerBase, request: WindowRequest) -> torch.Tensor:
    order = np.random.Generator(np.random.PCG64(request.seed)).permutation(shard.documents.get(request.split, 0))
    texts = documents(store, shard, request.split, order.tolist())
    tokens = _join(tokenizer, texts, request.windows * request.length)
    windows = min(request.windows, len(tokens) // request.length)
    if not windows:
        raise _too_little(shard, request, len(tokens))
    return torch.from_numpy(tokens[: windows * request.length]).reshape(windows, request.length)


def _join(tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], enough: int) -> np.ndarray:
    pieces, count = [np.empty(0, dtype=np.int64)], 0
    while count < enough and (batch := list(islice(texts, BATCH_DOCUMENTS))):
        for ids in tokenize(tokenizer, batch):
            pieces.append(np.array(ids, dtype=np.int64))
            count += len(ids)
    return np.concatenate(pieces)


def _too_little(shard: Shard, request: WindowRequest, tokens: int) -> CalibrationError:
    return CalibrationError(
        f"the {request.split} split does not fill one window of {request.length} tokens",
        where=f"shard {shard.key[:12]}",
        got=f"{tokens} tokens in {shard.documents.get(request.split, 0)} documents",
        do="Add documents or ask for a shorter `length`.",
    )


def _scatter(tokenizer: PreTrainedTokenizerBase, request: WindowRequest, seed: str) -> torch.Tensor:
    vocabulary = np.array(ordinary_tokens(tokenizer), dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(int(seed, 16)))
    return torch.from_numpy(vocabulary[generator.integers(len(vocabulary), size=(request.windows, request.length))])
