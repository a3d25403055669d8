"""What pruning leaves behind: weights at exactly 0, and the mask that later steps respect.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscal.compressors.state import Dense, Layer


def pruned(layer: Layer, keep_OI: Tensor, weight_OI: Tensor | None = None, *, damping: float | None = None) -> Layer:
    """The layer with the other weights 0; `weight_OI`: what the survivors are now, by default what they were.

    A weight that an earlier step removed has the score 0 and stays removed.
    """
    keep_OI = keep_OI if layer.keep_OI is None else keep_OI & layer.keep_OI
    weight_OI = layer.base.weight_OI if weight_OI is None else weight_OI
    return layer.changed(Dense(torch.where(keep_OI, weight_OI, 0.0)), keep_OI=keep_OI, damping=damping)


def kept(layer: Layer) -> Tensor:
    """The mask of a layer; all True where nothing was pruned."""
    return torch.ones_like(layer.target_OI, dtype=torch.bool) if layer.keep_OI is None else layer.keep_OI
