"""Reference sampler: one text at a time, without a cache, one forward pass over the whole text per token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from crosscal.calibration.sampling import SequenceWriter

ROUNDING = 1e-7
"""Above the error of a float32 softmax of float64 logits."""


@torch.inference_mode()
def uncached(
    model: PreTrainedModel, settings: SequenceWriter, number: int, seed: int, prompt: Sequence[int] | None = None
) -> list[int]:
    """Return the tokens that the settings define for the sequence of this number."""
    stream = np.random.Generator(np.random.PCG64([seed, number]))
    tokens = list(prompt or [settings.start])
    for step in range(settings.length - len(tokens)):
        logits_V = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double().numpy()
        if step == 0 and settings.first_ids is not None:
            logits_V[[index for index in range(len(logits_V)) if index not in settings.first_ids]] = -np.inf
        temperature, drawn = settings.temperature.at(step), stream.random()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            odds_V = np.exp((logits_V - logits_V.max()) / temperature)
            share_V = odds_V.cumsum() / odds_V.sum()
            assert np.abs(share_V - drawn).min() > ROUNDING, "rounding decides this token: take another seed"
            token = next(index for index, share in enumerate(share_V) if share > drawn)
        tokens.append(token)
        if token == settings.end:
            break
    return tokens
