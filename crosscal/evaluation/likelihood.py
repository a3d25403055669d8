"""Perplexity over non-overlapping windows of held-out text.

Shapes: S windows, L tokens in a window, P = L - 1 predictions, B windows in a batch, T tokens, R of them,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from crosscal.calibration.packing import fill
from crosscal.calibration.tokens import EncodedDocuments, Readable, begin_token, chat_begin_token
from crosscal.errors import EvaluationError, TooLittleText
from crosscal.evaluation.logits import logits_of_rows, rows_at_once, run_decoder, vocabulary_in_pieces
from crosscal.evaluation.measurement import Measurement

NLL_DECIMALS = 7
"""Of what is kept of each window: paired differences of interest are a thousand times as large."""

Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""


def perplexity(
    model: Any,
    tokens_SL: torch.Tensor,
    *,
    name: str,
    split: str,
    device: str | torch.device,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Measurement:
    """exp of the mean negative log-likelihood per predicted token of windows drawn from corpus `name`.

    Every token of a window is predicted from those before it but the first: where windows begin with
    beginning-of-text, that token is read and not scored. P counts all others, the special tokens between documents
    among them. With n_s the negative log-likelihood of window s divided by its P predictions: value = exp(mean n_s),
    and by the delta method stderr = value * sd(n_s) / sqrt(S), sd with S - 1 in its denominator. The windows are the
    independent unit, because the tokens of one window depend on each other; with one window there is no estimate
    (None).

    Raises `EvaluationError` naming the corpus when the windows do not fit the model or the likelihood is not finite.
    """
    started = time.perf_counter()
    nll_S = window_nll(model, tokens_SL, device=device, batch_tokens=batch_tokens, name=name, progress=progress)
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
    kept = tuple(round(nll, NLL_DECIMALS) for nll in mean_S.tolist())
    return Measurement(name, split, "perplexity", value, stderr, tokens_SL.numel(), seconds, window_nll=kept)


def window_nll(
    model: Any,
    tokens_SL: torch.Tensor,
    *,
    device: str | torch.device,
    batch_tokens: int = 4096,
    name: str = "tokens",
    progress: Progress | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each window in nats: float64 [S], on the CPU.

    The first token of a window has no prediction. `model` must be on `device` already. `batch_tokens` bounds what the
    decoder reads at once, but a batch never holds less than one window; of logits there are at most
    `logits.LOGITS_BYTES` at a time. `progress` is told the windows measured.
    """
    _check_windows(model, tokens_SL, name)
    windows_per_batch = max(1, batch_tokens // tokens_SL.shape[1])
    found: list[torch.Tensor] = []
    with _evaluating(model), torch.inference_mode():
        vocabulary = vocabulary_in_pieces(model, tokens_SL[0].to(device))
        for tokens_BL in tokens_SL.split(windows_per_batch):
            found.append(_batch_nll(model, tokens_BL.to(device), vocabulary))
            if progress:
                progress(sum(map(len, found)), len(tokens_SL))
    return torch.cat(found)


def windows_of(
    documents: Iterable[Readable],
    tokenizer: Any,
    length: int,
    windows: int | None = None,
    *,
    begin: bool | None = None,
    plain_text: bool = False,
) -> torch.Tensor:
    """`windows` windows (None: all) of `length` tokens, spread evenly over the documents in their order: int64 [S, L].

    They are cut as calibration windows are, `begin` and `plain_text` meaning the same (see
    `crosscal.calibration.tokens`), but for a tokenizer without end-of-text. Of W windows the n wanted are numbers
    floor(i W / n): the first n would cover a few documents, and measure those. There may be fewer than asked for,
    never none.
    """
    encoded = EncodedDocuments(tokenizer, documents, tokenizer.eos_token_id, plain_text=plain_text)
    begins = begin_token(tokenizer, begin), chat_begin_token(tokenizer, begin)
    whole = [window.tokens_L for window in fill(encoded, length, *begins)]
    if not whole:
        raise TooLittleText(
            "not enough text for one window",
            got=f"{encoded.tokens} tokens for a window of {length}",
            do="Add test documents, or shorten the evaluation windows.",
        )
    wanted = len(whole) if windows is None else min(windows, len(whole))
    return torch.from_numpy(np.stack([whole[i * len(whole) // wanted] for i in range(wanted)])).long()


def _batch_nll(model: Any, tokens_BL: torch.Tensor, vocabulary: int | None) -> torch.Tensor:
    """`vocabulary` None: the logits cannot be had in pieces, and are those of one window at a time."""
    if vocabulary is None:
        logits_of = (model(input_ids=tokens_L[None], use_cache=False).logits[0, :-1] for tokens_L in tokens_BL)
        nll = [_nll(logits_RV, tokens_L[1:]) for logits_RV, tokens_L in zip(logits_of, tokens_BL, strict=True)]
    else:
        hidden_BLD, decoder_output = run_decoder(model, tokens_BL)
        hidden_TD = hidden_BLD[:, :-1].reshape(-1, hidden_BLD.shape[-1])
        rows = rows_at_once(vocabulary, hidden_TD.element_size())
        pairs = zip(hidden_TD.split(rows), tokens_BL[:, 1:].reshape(-1).split(rows), strict=True)
        nll = [_nll(logits_of_rows(model, decoder_output, hidden_RD), target_R) for hidden_RD, target_R in pairs]
    return torch.cat(nll).view(len(tokens_BL), -1).double().sum(dim=1).cpu()


def _nll(logits_RV: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_RV.float(), target_R, reduction="none")  # the model's dtype may be bfloat16


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
