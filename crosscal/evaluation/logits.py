"""Logits of a few positions at a time: the decoder is run once, and what follows it on pieces of its output.

No table of model families: the model is called again with its decoder replaced by a stub, which returns some rows of
what the decoder had returned, so that whatever a family does to its logits (scales, caps) is done. All logits of a
batch would often be the largest thing in memory: 800 MB for 4096 tokens and a vocabulary of 49 thousand.

Shapes: B windows, L tokens, D hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_BYTES = 2**28
"""Of logits at most held at once, with the copies that a loss makes of them (or those of a single token)."""
F32_BYTES = 4
PROBE_TOKENS = 4
ROUNDOFF = 1e-2
"""Of bfloat16; what a family does to its logits changes them by far more."""
NOT_IN_PIECES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise that ask more of their decoder's output than hidden states."""


class _Stop(Exception):
    """Ends a forward pass behind the decoder."""


def row_bytes(vocabulary: int, itemsize: int) -> int:
    """Of one token: logits in the model's dtype, in float32 unless that is it, and the logarithm of their softmax."""
    return vocabulary * (2 * F32_BYTES + (itemsize if itemsize != F32_BYTES else 0))


def rows_at_once(vocabulary: int, itemsize: int) -> int:
    return max(1, LOGITS_BYTES // row_bytes(vocabulary, itemsize))


def vocabulary_in_pieces(model: Any, tokens_L: Tensor) -> int | None:
    """How many logits a row has; None where those of pieces are not those of the whole, tried on a few tokens."""
    probe_BL = tokens_L[None, :PROBE_TOKENS]
    whole_RV = model(input_ids=probe_BL, use_cache=False).logits[0].float()
    try:
        hidden_BLD, decoder_output = run_decoder(model, probe_BL)
        pieces = [logits_of_rows(model, decoder_output, row_RD).float() for row_RD in hidden_BLD[0].split(1)]
    except NOT_IN_PIECES:
        return None
    found_RV = torch.cat(pieces)
    scale = float(whole_RV.nan_to_num().abs().max())
    near = {"rtol": ROUNDOFF, "atol": ROUNDOFF * scale, "equal_nan": True}
    are_equal = found_RV.shape == whole_RV.shape and torch.allclose(found_RV, whole_RV, **near)
    return whole_RV.shape[-1] if are_equal else None


def run_decoder(model: Any, tokens_BL: Tensor) -> tuple[Tensor, Any]:
    """hidden_BLD that leave the decoder, and the output that held them."""
    found: list[Any] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output)
        raise _Stop

    handle = model.get_decoder().register_forward_hook(stop)
    try:
        model(input_ids=tokens_BL, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0][0], found[0]


def logits_of_rows(model: Any, decoder_output: Any, hidden_RD: Tensor) -> Tensor:
    """logits_RV: what the model makes of rows of its decoder's output."""
    rows_BLD = hidden_RD[None]
    if isinstance(decoder_output, tuple):
        output: Any = (rows_BLD,)
    else:
        output = type(decoder_output)(**{next(iter(decoder_output)): rows_BLD})
    unread_BL = torch.zeros(rows_BLD.shape[:2], dtype=torch.int64, device=rows_BLD.device)
    with _replaced_forward(model.get_decoder(), output):
        return model(input_ids=unread_BL, use_cache=False).logits[0]


@contextmanager
def _replaced_forward(decoder: nn.Module, output: Any) -> Iterator[None]:
    decoder.forward = lambda *args, **kwargs: output  # of this one module; its class keeps its own
    try:
        yield
    finally:
        del decoder.forward
