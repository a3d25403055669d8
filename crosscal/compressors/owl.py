"""OWL: less is removed from blocks with more outliers.

A block's outlier ratio is the fraction of its scores |W_oi| √H_ii above `threshold` times their mean; ratios, scaled to
a width of 2 · spread and moved so that the mean is 1 - sparsity, are the fractions that are kept.

Yin et al. 2023, arXiv 2310.05175: the allocation by blocks, in which all matrices of a block have one sparsity, from
the dense model's inputs (the authors' code measures them before it prunes, too). Not built: their mixed n:m. Means are
over weights, which for blocks of one size are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.allocation import ALLOCATE, Unit, check_spread, of_units, spread_out
from crosscal.compressors.recipe import alone
from crosscal.compressors.selection import count_true
from crosscal.compressors.state import Site, Statistic
from crosscal.errors import UsageError


@dataclass(frozen=True)
class OWL:
    spread: float = 0.08
    """Half the range of the sparsities: λ in the paper."""
    threshold: float = 5.0
    """A score is an outlier above so many times the mean: M in the paper."""
    per: Unit = "block"
    """What has a sparsity of its own: `block` as published, or every `layer`."""

    kind: ClassVar = ALLOCATE
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_spread(self.spread, self.per)
        if not self.threshold > 0:
            raise UsageError("`threshold` is above 0", got=f"{self.threshold}")

    def summarise(self, block: Sequence[Site]) -> dict[str, float]:
        """The outlier ratio of the block, for each of its layers; or each layer's own."""
        return of_units(block, self.per, self._outlier_ratio)

    def allocate(self, summary: Mapping[str, float], target: float, weights: Mapping[str, int]) -> dict[str, float]:
        """The more outliers, the less is removed."""
        return spread_out(summary, target, weights, self.spread)

    def _outlier_ratio(self, scores: list[Tensor]) -> float:
        weights = sum(score_OI.numel() for score_OI in scores)
        mean = sum(float(score_OI.sum(dtype=torch.float64)) for score_OI in scores) / weights
        return sum(count_true(score_OI > self.threshold * mean) for score_OI in scores) / weights
