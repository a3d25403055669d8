"""OWL: remove fewer weights from blocks with more outliers.

A block's outlier ratio is the fraction of its scores |W_oi| √H_ii above `threshold` times their mean. The kept
fractions are these ratios, scaled to a width of 2 · spread and shifted so that their mean is 1 - sparsity.

Yin et al. 2023, arXiv 2310.05175: the allocation by blocks, with one sparsity for all matrices of a block, from the
dense model's inputs (the authors' code also measures them before it prunes). Not implemented: their mixed n:m. Means
are taken over weights; for blocks of equal size they are the paper's.
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
    """A score is an outlier if it exceeds this multiple of the mean: M in the paper."""
    per: Unit = "block"
    """Unit that gets its own sparsity: `block` as published, or `layer`."""

    kind: ClassVar = ALLOCATE
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_spread(self.spread, self.per)
        if not self.threshold > 0:
            raise UsageError("`threshold` is above 0", got=f"{self.threshold}")

    def summarise(self, block: Sequence[Site]) -> dict[str, float]:
        """Return the block's outlier ratio for each of its layers, or each layer's own."""
        return of_units(block, self.per, self._outlier_ratio)

    def allocate(self, summary: Mapping[str, float], target: float, weights: Mapping[str, int]) -> dict[str, float]:
        """The more outliers, the less is removed."""
        return spread_out(summary, target, weights, self.spread)

    def _outlier_ratio(self, scores: list[Tensor]) -> float:
        weights = sum(score_OI.numel() for score_OI in scores)
        mean = sum(float(score_OI.sum(dtype=torch.float64)) for score_OI in scores) / weights
        return sum(count_true(score_OI > self.threshold * mean) for score_OI in scores) / weights
