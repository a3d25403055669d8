"""DLP: more is removed from blocks whose median of weight times input norm is higher.

A block's score is the median of |W_oi| √H_ii over its weights; importances 1 - score / Σ scores, scaled to a width of
2 · spread and moved so that the mean is 1 - sparsity, are the fractions that are kept. Scaling undoes what 1 - s / Σ s
does to s but for its sign, so that -s is scaled here.

Chen et al. 2025, arXiv 2505.23807: the allocation by blocks, in which all matrices of a block have one sparsity. Means
are over weights, which for blocks of one size are the paper's; sparsities outside [0, 1] are cut with the mean kept,
where the authors' code sets what would be kept whole to 1 %. Not built: their allocation for structured pruning.
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
    """What has a sparsity of its own: `block` as published, or every `layer`."""

    kind: ClassVar = ALLOCATE
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_spread(self.spread, self.per)

    def summarise(self, block: Sequence[Site]) -> dict[str, float]:
        """The median score of the block, for each of its layers; or each layer's own."""
        return of_units(block, self.per, _median)

    def allocate(self, summary: Mapping[str, float], target: float, weights: Mapping[str, int]) -> dict[str, float]:
        """The higher the median, the more is removed."""
        return spread_out({name: -median for name, median in summary.items()}, target, weights, self.spread)


def _median(scores: list[Tensor]) -> float:
    """The lower one of an even number, as `torch.median`."""
    score_N = torch.cat([score_OI.flatten() for score_OI in scores])
    return kth_lowest(score_N, (len(score_N) + 1) // 2)
