"""Perplexity over non-overlapping windows of held-out text.

Shapes: S windows, L tokens in a window, P = L - 1 predictions, B windows in a batch, T tokens, R of them,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from crosscal.calibration.packing import fill
from crosscal.calibration.tokens import EncodedDocuments, Readable, begin_token, chat_begin_token
from crosscal.errors import EvaluationError, TooLittleText
from crosscal.evaluation.batches import Batch, read_each
from crosscal.evaluation.logits import LogitReader
from crosscal.evaluation.measurement import PERPLEXITY, Measurement
from crosscal.progress import Progress

NLL_DECIMALS = 7
"""Decimals stored per window; paired differences of interest are a thousand times larger."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of held-out text; their perplexity is exp of the mean negative log-likelihood per predicted token.

    Every token of a window except the first is predicted from those before it; if windows begin with beginning-of-text,
    that token is an input and not scored. P counts all others, including the special tokens between documents. With n_s
    the negative log-likelihood of window s divided by its P predictions: value = exp(mean n_s), and by the delta method
    stderr = value * sd(n_s) / sqrt(S), sd with S - 1 in its denominator. Windows are the independent unit, because the
    tokens of one window depend on each other; one window gives no estimate (None).
    """

    name: str
    """Name of the corpus."""
    split: str
    tokens_SL: torch.Tensor

    @property
    def items(self) -> int:
        return len(self.tokens_SL)

    @property
    def longest(self) -> list[int]:
        return self.tokens_SL[0].tolist()

    def check(self, model: Any) -> None:
        _check_windows(model, self.tokens_SL, self.name)

    def batches(self, reader: LogitReader, batch_tokens: int) -> list[Batch]:
        at_once = max(1, batch_tokens // self.tokens_SL.shape[1]) if reader.is_in_pieces else 1
        return [(len(each_BL), partial(_batch_nll, reader, each_BL)) for each_BL in self.tokens_SL.split(at_once)]

    def result(self, answers: list[torch.Tensor], seconds: float) -> list[Measurement]:
        """Return the perplexity. Raises `EvaluationError` naming the corpus if it is not finite."""
        mean_S = torch.cat(answers) / (self.tokens_SL.shape[1] - 1)
        value = torch.exp(mean_S.mean()).item()
        if not math.isfinite(value):
            raise EvaluationError(
                "the perplexity is not finite",
                where=f"{self.name} ({self.split})",
                got=f"a mean negative log-likelihood of {mean_S.mean().item():.4g} per token",
                do="The weights of this model are damaged: compress it less, or raise the damping.",
            )
        stderr = value * mean_S.std().item() / math.sqrt(len(mean_S)) if len(mean_S) > 1 else None
        kept, tokens = tuple(round(nll, NLL_DECIMALS) for nll in mean_S.tolist()), self.tokens_SL.numel()
        return [Measurement(self.name, self.split, PERPLEXITY, value, stderr, tokens, seconds, window_nll=kept)]


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
    """Measure the perplexity of a model, already on `device`, on windows of corpus `name`; see `Windows`.

    Raises `EvaluationError` naming the corpus if the windows do not fit the model or the likelihood is not finite.
    """
    windows = Windows(name, split, tokens_SL)
    ((answers, seconds),) = read_each(model, [windows], device=device, batch_tokens=batch_tokens, progress=[progress])
    return windows.result(answers, seconds)[0]


def window_nll(
    model: Any,
    tokens_SL: torch.Tensor,
    *,
    device: str | torch.device,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return the negative log-likelihood of each window in nats, its first token not scored: float64 [S], on the CPU.

    `model` must already be on `device`. `batch_tokens` bounds the tokens of a batch, but a batch holds at least one
    window; logits take at most `logits.LOGITS_BYTES` at a time. `progress` receives the number of windows measured.
    """
    windows = Windows("tokens", "", tokens_SL)
    ((answers, _),) = read_each(model, [windows], device=device, batch_tokens=batch_tokens, progress=[progress])
    return torch.cat(answers)


def windows_of(
    documents: Iterable[Readable],
    tokenizer: Any,
    length: int,
    windows: int | None = None,
    *,
    begin: bool | None = None,
    plain_text: bool = False,
) -> torch.Tensor:
    """Return `windows` windows (None: all) of `length` tokens, spread evenly over the documents in order: int64 [S, L].

    They are cut like calibration windows, with the same `begin` and `plain_text` (see `crosscal.calibration.tokens`),
    but a tokenizer without end-of-text is accepted. Of W windows the n selected are numbers floor(i W / n), because the
    first n would cover only a few documents. There may be fewer than requested. Raises `TooLittleText` if there would
    be none.
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


def _batch_nll(reader: LogitReader, tokens_BL: torch.Tensor) -> torch.Tensor:
    tokens_BL = tokens_BL.to(reader.device)
    decoded = reader.read(tokens_BL)
    at_BL = torch.arange(tokens_BL.numel(), device=tokens_BL.device).view_as(tokens_BL)
    nll_T = reader.nll(decoded, at_BL[:, :-1].flatten(), tokens_BL[:, 1:].flatten())
    return nll_T.view(len(tokens_BL), -1).double().sum(dim=1).cpu()


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
