"""Windows of random tokens from the vocabulary."""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.sets import CalibrationSet, WindowRequest, stored_windows
from crosscal.calibration.tokens import begin_token, ordinary_tokens
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def random_windows(
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    *,
    max_length: int | None = None,
) -> CalibrationSet:
    """Build windows of tokens drawn uniformly, without special tokens: the baseline that any real text must beat.

    Windows begin like those of documents. Source: "Vocabulary" in arXiv:2410.17170.
    """
    request, notes = request.within(max_length)
    begin = begin_token(tokenizer, request.begin_token)
    provenance = random_provenance(tokenizer, tokenizer_digest, request)

    def scattered() -> torch.Tensor:
        return _scatter(tokenizer, request, begin, seed=digest_of(provenance))

    return CalibrationSet(stored_windows(store, provenance, scattered), provenance, notes)


def random_provenance(
    tokenizer: PreTrainedTokenizerBase, tokenizer_digest: str, request: WindowRequest
) -> dict[str, Any]:
    """Return the provenance of the windows that `random_windows` builds."""
    begin = begin_token(tokenizer, request.begin_token)
    said = dataclasses.replace(request, plain_text=False).provenance(begin)
    return {"source": "vocabulary", "rule": 1, "tokenizer": tokenizer_digest, **said}


def _scatter(tokenizer: PreTrainedTokenizerBase, request: WindowRequest, begin: int | None, seed: str) -> torch.Tensor:
    vocabulary = np.array(ordinary_tokens(tokenizer), dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(int(seed, 16)))
    places = generator.integers(len(vocabulary), size=(request.windows, request.length))
    tokens_SL = torch.from_numpy(vocabulary[places])
    if begin is not None:
        tokens_SL[:, 0] = begin
    return tokens_SL
