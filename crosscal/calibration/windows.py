"""Windows drawn with a seed from the bare vocabulary."""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.sets import CalibrationSet, WindowRequest, stored_windows
from crosscal.calibration.tokens import ordinary_tokens
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


def _scatter(tokenizer: PreTrainedTokenizerBase, request: WindowRequest, seed: str) -> torch.Tensor:
    vocabulary = np.array(ordinary_tokens(tokenizer), dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(int(seed, 16)))
    return torch.from_numpy(vocabulary[generator.integers(len(vocabulary), size=(request.windows, request.length))])
