"""DLP: remove more weights from blocks with a higher median of weight times input norm.

A block's score s is the median of |W_oi| √H_ii over its weights. The kept fractions are the importances 1 - s / Σ s,
scaled to a width of 2 · spread and shifted so that their mean is 1 - sparsity. Scaling cancels everything that
1 - s / Σ s does to s except its sign, so the code scales -s.

Chen et al. 2025, arXiv 2505.23807: the allocation by blocks, with one sparsity for all matrices of a block. Means are
taken over weights; for blocks of equal size they are the paper's. Sparsities are clipped to [0, 1] with the mean
preserved; the authors' code sets those of blocks that would be kept whole to 1 %. Not implemented: their allocation for
structured pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.allocation import ALLOCATE, Unit, check_spread, of_units, spread_out
from crosscal.compressors.recipe import alone
from crosscal.compressors.selection import kth_lowest
from crosscal.compressors.state import Site, Statistic


@dataclass(frozen=True)
class DLP:
    spread: float = 0.15
    """Half the range of the sparsities: α in the paper."""
    per: Unit = "block"
    """Unit that gets its own sparsity: `block` as published, or `layer`."""

    kind: ClassVar = ALLOCATE
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_spread(self.spread, self.per)

    def summarise(self, block: Sequence[Site]) -> dict[str, float]:
        """Return the block's median score for each of its layers, or each layer's own."""
        return of_units(block, self.per, _median)

    def allocate(self, summary: Mapping[str, float], target: float, weights: Mapping[str, int]) -> dict[str, float]:
        """The higher the median, the more is removed."""
        return spread_out({name: -median for name, median in summary.items()}, target, weights, self.spread)


def _median(scores: list[Tensor]) -> float:
    """The lower middle score of an even number, as in `torch.median`."""
    score_N = torch.cat([score_OI.flatten() for score_OI in scores])
    return kth_lowest(score_N, (len(score_N) + 1) // 2)
