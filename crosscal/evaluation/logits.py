"""Logits of a few positions at a time: the decoder runs once, and the layers after it run on pieces of its output.

This needs no table of model families: the model is called with its decoder's forward replaced. The replacement either
stops the forward pass after the decoder, or returns some rows of an earlier decoder output, so that everything a family
does to its logits (scales, caps) is applied. All logits of a batch would often be the largest tensor in memory: 800 MB
for 4096 tokens and a vocabulary of 49 thousand. Several threads may use one model at once.

Shapes: B sequences, L tokens, D hidden size, T positions wanted, R of them, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscal.lanes import side_by_side

LOGITS_BYTES = 2**28
"""Maximum bytes of logits held at once, with the copies that a loss makes (or those of a single token)."""
F32_BYTES = 4
PROBE_TOKENS = 4
ROUNDOFF = 1e-2
"""Tolerance for bfloat16 roundoff; what a family does to its logits changes them by far more."""
NOT_SUPPORTED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors of model families that do not support the way in which they are called."""


class _Stop(Exception):
    """Ends a forward pass after the decoder."""


def row_bytes(vocabulary: int, itemsize: int) -> int:
    """Return the bytes per token: logits in the model's dtype, in float32 unless that is it, and their log-softmax."""
    return vocabulary * (2 * F32_BYTES + (itemsize if itemsize != F32_BYTES else 0))


def rows_at_once(vocabulary: int, itemsize: int, lanes: int = 1) -> int:
    """Return how many tokens' logits fit in one worker thread's share of `LOGITS_BYTES`, at least one."""
    return max(1, LOGITS_BYTES // lanes // row_bytes(vocabulary, itemsize))


@dataclass(frozen=True)
class DecoderOutput:
    """A model's output for some tokens: the decoder's hidden states, or logits if it does not run in pieces."""

    rows_BLX: Tensor
    output: Any
    """The decoder output that contains the hidden states."""
    cache: Any
    """Cache for the tokens that follow, if requested and supported."""


class LogitReader:
    """A model whose decoder and head are run separately. Use `reading` to make one."""

    def __init__(self, model: Any, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        self.is_in_pieces = True
        """Whether logits of single rows can be computed."""
        self.device: torch.device = next(model.parameters()).device
        self._plain = model.get_decoder().forward
        self._turn = threading.local()  # per thread: what the replaced forward does

    def read(self, tokens_BL: Tensor, after: Any = None, *, keep: bool = False) -> DecoderOutput:
        """Process tokens, after those in cache `after` if given, which is extended in place; `keep`: make a cache."""
        arguments: dict[str, Any] = {"input_ids": tokens_BL, "use_cache": keep or after is not None}
        if after is not None:
            arguments["past_key_values"] = after
        if not self.is_in_pieces:
            whole = self.model(**arguments)
            return DecoderOutput(whole.logits, None, getattr(whole, "past_key_values", None))
        with self._told(stop=True):
            try:
                self.model(**arguments)
            except _Stop as stopped:
                output = stopped.args[0]
                return DecoderOutput(output[0], output, getattr(output, "past_key_values", None))
        raise RuntimeError("the model did not call its decoder")

    def nll(self, decoded: DecoderOutput, at_T: Tensor, target_T: Tensor) -> Tensor:
        """Return the negative log-likelihood of each target at its position in the flattened batch: float32 [T]."""
        rows_NX = decoded.rows_BLX.flatten(0, 1)
        if not self.is_in_pieces:
            return _nll(rows_NX[at_T], target_T)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = rows_at_once(vocabulary, rows_NX.element_size(), self.lanes)
        pairs = zip(at_T.split(rows), target_T.split(rows), strict=True)
        return torch.cat([_nll(self.logits(decoded, rows_NX[at_R]), target_R) for at_R, target_R in pairs])

    def logits(self, decoded: DecoderOutput, hidden_RD: Tensor) -> Tensor:
        """Return logits_RV of rows of the decoder's output."""
        rows_BLD = hidden_RD[None]
        if isinstance(decoded.output, tuple):
            output: Any = (rows_BLD,)
        else:
            output = type(decoded.output)(**{next(iter(decoded.output)): rows_BLD})
        unread_BL = torch.zeros(rows_BLD.shape[:2], dtype=torch.int64, device=rows_BLD.device)
        with self._told(output=output):
            return self.model(input_ids=unread_BL, use_cache=False).logits[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the decoder's forward: return a given output, or run the decoder and stop if requested."""
        turn = vars(self._turn)
        if "output" in turn:
            return turn["output"]
        output = self._plain(*args, **kwargs)
        if "stop" in turn:
            raise _Stop(output)
        return output

    @contextmanager
    def _told(self, **what: Any) -> Iterator[None]:
        vars(self._turn).update(what)
        try:
            yield
        finally:
            vars(self._turn).clear()


@contextmanager
def reading(model: Any, tokens_L: Tensor, lanes: int = 1) -> Iterator[LogitReader]:
    """Yield a `LogitReader` of the model, in evaluation mode and on its device; restores the model afterwards.

    `tokens_L`: valid tokens to probe whether logits can be computed in pieces. `lanes`: number of threads that will use
    it.
    """
    decoder, was_training = model.get_decoder(), model.training
    own = {name: value for name, value in vars(decoder).items() if name == "forward"}  # as other hooks may have set it
    model.eval()
    try:
        reader = LogitReader(model, lanes)
        decoder.forward = reader.forward  # on this instance; its class is unchanged
        tried, one = [partial(are_in_pieces, reader, tokens_L)], 1 if lanes > 1 else None
        (reader.is_in_pieces,) = side_by_side(tried, reader.device, threads_each=one)
        yield reader
    finally:
        vars(decoder).pop("forward", None)
        vars(decoder).update(own)
        model.train(was_training)


@torch.inference_mode()
def are_in_pieces(reader: LogitReader, tokens_L: Tensor) -> bool:
    """Return whether logits of pieces equal those of a whole forward pass, tested on a few tokens."""
    probe_BL = tokens_L[None, :PROBE_TOKENS]
    whole_RV = reader.model(input_ids=probe_BL, use_cache=False).logits[0].float()
    try:
        decoded = reader.read(probe_BL)
        pieces = [reader.logits(decoded, row_RD).float() for row_RD in decoded.rows_BLX[0].split(1)]
    except NOT_SUPPORTED:
        return False
    found_RV = torch.cat(pieces)
    near = {"rtol": ROUNDOFF, "atol": ROUNDOFF * float(whole_RV.nan_to_num().abs().max()), "equal_nan": True}
    return found_RV.shape == whole_RV.shape and torch.allclose(found_RV, whole_RV, **near)


def _nll(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    return F.cross_entropy(logits_RV.float(), target_R, reduction="none")  # the model's dtype may be bfloat16
