"""Perplexity over non-overlapping windows of held-out text.

Shapes: S windows, L tokens in a window, P = L - 1 predictions, B windows in a batch, T tokens, R rows of logits,
V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from crosscal.errors import EvaluationError, TooLittleText
from crosscal.evaluation.measurement import Measurement

SOFTMAX_ENTRIES = 2**24
"""Entries of the float32 log-softmax held at once (64 MiB)."""
DOCUMENTS_PER_BATCH = 64


def perplexity(
    model: Any, tokens_SL: torch.Tensor, *, name: str, split: str, device: str | torch.device, batch_tokens: int = 4096
) -> Measurement:
    """exp of the mean negative log-likelihood per predicted token of windows drawn from corpus `name`.

    With n_s the negative log-likelihood of window s divided by its P predictions: value = exp(mean n_s), and by the
    delta method stderr = value * sd(n_s) / sqrt(S), sd with S - 1 in its denominator. The windows are the independent
    unit, because the tokens of one window depend on each other; with one window there is no estimate (None).

    Raises `EvaluationError` naming the corpus when the windows do not fit the model or the likelihood is not finite.
    """
    started = time.perf_counter()
    nll_S = window_nll(model, tokens_SL, device=device, batch_tokens=batch_tokens, name=name)
    mean_S = nll_S / (tokens_SL.shape[1] - 1)
    value = torch.exp(mean_S.mean()).item()
    if not math.isfinite(value):
        raise EvaluationError(
            "the perplexity is not finite",
            where=f"{name} ({split})",
            got=f"a mean negative log-likelihood of {mean_S.mean().item():.4g} per token",
            do="The weights of this model are damaged: compress it less, or raise the damping.",
        )
    stderr = value * mean_S.std().item() / math.sqrt(len(mean_S)) if len(mean_S) > 1 else None
    seconds = time.perf_counter() - started
    return Measurement(name, split, "perplexity", value, stderr, tokens_SL.numel(), seconds)


def window_nll(
    model: Any, tokens_SL: torch.Tensor, *, device: str | torch.device, batch_tokens: int = 4096, name: str = "tokens"
) -> torch.Tensor:
    """Negative log-likelihood of each window in nats: float64 [S], on the CPU.

    The first token of a window has no prediction. `model` must be on `device` already. `batch_tokens` bounds the
    logits, [batch_tokens, V] in the model's dtype, but a batch never holds less than one window.
    """
    _check_windows(model, tokens_SL, name)
    windows_per_batch = max(1, batch_tokens // tokens_SL.shape[1])
    with _evaluating(model), torch.inference_mode():
        batches = [_batch_nll(model, tokens_BL.to(device)) for tokens_BL in tokens_SL.split(windows_per_batch)]
    return torch.cat(batches)


def windows_of(texts: Iterable[str], tokenizer: Any, length: int, windows: int | None = None) -> torch.Tensor:
    """`windows` windows (None: all) of `length` tokens, spread evenly over the documents in their order: int64 [S, L].

    Each document is encoded with the tokenizer's default special tokens and ends with the end-of-text token; the
    documents are joined and cut, and the rest that fills no window is dropped. Of W windows the n wanted are numbers
    floor(i W / n): the first n would cover a few documents, and measure those. There may be fewer than asked for,
    never none.
    """
    tokens_T = torch.cat([torch.empty(0, dtype=torch.int32), *_encoded(texts, tokenizer)])
    whole = len(tokens_T) // length
    if whole == 0:
        raise TooLittleText(
            "not enough text for one window",
            got=f"{len(tokens_T)} tokens for a window of {length}",
            do="Add test documents, or shorten the evaluation windows.",
        )
    wanted = whole if windows is None else min(windows, whole)
    chosen_S = torch.arange(wanted) * whole // wanted
    return tokens_T[: whole * length].view(whole, length)[chosen_S].long()


def _encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[torch.Tensor]:
    end = tokenizer.eos_token_id
    documents = iter(texts)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        for tokens in tokenizer(batch, verbose=False)["input_ids"]:
            ends = [] if end is None or tokens[-1:] == [end] else [end]  # some tokenizers add it by themselves
            yield torch.tensor(tokens + ends, dtype=torch.int32)


def _batch_nll(model: Any, tokens_BL: torch.Tensor) -> torch.Tensor:
    logits_BPV = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1]
    vocabulary = logits_BPV.shape[-1]
    rows = max(1, SOFTMAX_ENTRIES // vocabulary)
    # In float32 and by chunks of rows: the model's dtype may be bfloat16, and a float32 copy of all logits may not fit.
    pairs = zip(logits_BPV.reshape(-1, vocabulary).split(rows), tokens_BL[:, 1:].reshape(-1).split(rows), strict=True)
    nll = [F.cross_entropy(logits_RV.float(), target_R, reduction="none") for logits_RV, target_R in pairs]
    return torch.cat(nll).view(len(tokens_BL), -1).double().sum(dim=1).cpu()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and the model's mode restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_windows(model: Any, tokens_SL: torch.Tensor, name: str) -> None:
    windows, length = tokens_SL.shape
    if windows == 0 or length < 2:
        raise EvaluationError("nothing to predict", where=name, got=f"{windows} windows of {length} tokens")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise EvaluationError(
            "the windows are longer than the model's positions",
            where=name,
            got=f"windows of {length} tokens, {positions} positions",
            do=f"Evaluate at a length of {positions} or less.",
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if tokens_SL.min() < 0 or tokens_SL.max() >= vocabulary:
        raise EvaluationError(
            "token ids outside the model's vocabulary",
            where=name,
            got=f"ids from {tokens_SL.min()} to {tokens_SL.max()}, {vocabulary} embeddings",
            do="Use the tokenizer that belongs to the model.",
        )
