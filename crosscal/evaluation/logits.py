"""Logits of a few positions at a time: the decoder is run once, and what follows it on pieces of its output.

No table of model families: the model is called with its decoder's forward replaced. Either that stops behind the
decoder, or it hands back some rows of what the decoder had returned, so that whatever a family does to its logits
(scales, caps) is done. All logits of a batch would often be the largest thing in memory: 800 MB for 4096 tokens and a
vocabulary of 49 thousand. Several threads may read with one model at once.

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
"""Of logits at most held at once, with the copies that a loss makes of them (or those of a single token)."""
F32_BYTES = 4
PROBE_TOKENS = 4
ROUNDOFF = 1e-2
"""Of bfloat16; what a family does to its logits changes them by far more."""
NOT_SUPPORTED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise that are called in a way of which their family knows nothing."""


class _Stop(Exception):
    """Ends a forward pass behind the decoder."""


def row_bytes(vocabulary: int, itemsize: int) -> int:
    """Of one token: logits in the model's dtype, in float32 unless that is it, and the logarithm of their softmax."""
    return vocabulary * (2 * F32_BYTES + (itemsize if itemsize != F32_BYTES else 0))


def rows_at_once(vocabulary: int, itemsize: int, lanes: int = 1) -> int:
    return max(1, LOGITS_BYTES // lanes // row_bytes(vocabulary, itemsize))


@dataclass(frozen=True)
class Decoded:
    """What a model made of some tokens: hidden states that leave its decoder, or else logits."""

    rows_BLX: Tensor
    output: Any
    """What held the hidden states."""
    cache: Any
    """What the tokens that follow need of these, if that was asked for and the model has it."""


class Reader:
    """A model whose decoder and head are run one after the other. Use `reading` to make one."""

    def __init__(self, model: Any, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        self.is_in_pieces = True
        """Whether logits of some rows can be had alone."""
        self.device: torch.device = next(model.parameters()).device
        self._plain = model.get_decoder().forward
        self._turn = threading.local()  # what the decoder is to do, of each thread its own

    def read(self, tokens_BL: Tensor, after: Any = None, *, keep: bool = False) -> Decoded:
        """Read tokens, behind those of a cache if there is one, which then has them too; `keep`: make a cache."""
        arguments: dict[str, Any] = {"input_ids": tokens_BL, "use_cache": keep or after is not None}
        if after is not None:
            arguments["past_key_values"] = after
        if not self.is_in_pieces:
            whole = self.model(**arguments)
            return Decoded(whole.logits, None, getattr(whole, "past_key_values", None))
        with self._told(stop=True):
            try:
                self.model(**arguments)
            except _Stop as stopped:
                output = stopped.args[0]
                return Decoded(output[0], output, getattr(output, "past_key_values", None))
        raise RuntimeError("the model did not call its decoder")

    def nll(self, decoded: Decoded, at_T: Tensor, target_T: Tensor) -> Tensor:
        """Negative log-likelihood of each target at its position, counted through all sequences: float32 [T]."""
        rows_NX = decoded.rows_BLX.flatten(0, 1)
        if not self.is_in_pieces:
            return _nll(rows_NX[at_T], target_T)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = rows_at_once(vocabulary, rows_NX.element_size(), self.lanes)
        pairs = zip(at_T.split(rows), target_T.split(rows), strict=True)
        return torch.cat([_nll(self.logits(decoded, rows_NX[at_R]), target_R) for at_R, target_R in pairs])

    def logits(self, decoded: Decoded, hidden_RD: Tensor) -> Tensor:
        """logits_RV: what the model makes of rows of its decoder's output."""
        rows_BLD = hidden_RD[None]
        if isinstance(decoded.output, tuple):
            output: Any = (rows_BLD,)
        else:
            output = type(decoded.output)(**{next(iter(decoded.output)): rows_BLD})
        unread_BL = torch.zeros(rows_BLD.shape[:2], dtype=torch.int64, device=rows_BLD.device)
        with self._told(output=output):
            return self.model(input_ids=unread_BL, use_cache=False).logits[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's."""
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
def reading(model: Any, tokens_L: Tensor, lanes: int = 1) -> Iterator[Reader]:
    """The model, which stays on its device, in evaluation mode and with its decoder apart; afterwards as it was.

    `tokens_L`: a few that it can read, to see whether logits can be had in pieces. `lanes`: how many threads will read.
    """
    decoder, was_training = model.get_decoder(), model.training
    own = {name: value for name, value in vars(decoder).items() if name == "forward"}  # as hooks of others leave it
    model.eval()
    try:
        reader = Reader(model, lanes)
        decoder.forward = reader.forward  # of this one module; its class keeps its own
        tried, one = [partial(are_in_pieces, reader, tokens_L)], 1 if lanes > 1 else None
        (reader.is_in_pieces,) = side_by_side(tried, reader.device, threads_each=one)
        yield reader
    finally:
        vars(decoder).pop("forward", None)
        vars(decoder).update(own)
        model.train(was_training)


@torch.inference_mode()
def are_in_pieces(reader: Reader, tokens_L: Tensor) -> bool:
    """Whether the logits of pieces are those of the whole, tried on a few tokens."""
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
