"""GBLM: prune by |weight| · (input norm + a · gradient norm), in each output row separately, without weight update.

Das et al. 2023, arXiv 2311.04902. Their norms are roots of sums, over the 2048 tokens of one window for inputs and over
128 windows for gradients, with a = 100. Here both are roots of means, over tokens and over windows, so the score does
not depend on either number; a = 100 · √(128 / 2048) = 25 gives their score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.compressors.state import Layer, Site, Statistic
from crosscal.errors import UsageError
from crosscal.statistics.gradients import Gradient


@dataclass(frozen=True)
class GBLM:
    sparsity: Sparsity
    """Fraction (or n:m) removed in every row."""
    gradient_weight: float = 25.0
    """a; 0 is Wanda."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM, Gradient.SQUARE})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        if not (self.gradient_weight >= 0 and math.isfinite(self.gradient_weight)):
            raise UsageError("gradient_weight must be a number of at least 0", got=str(self.gradient_weight))

    def __call__(self, site: Site) -> Site:
        """Prune by score_oi = |W_oi| (√E[x_i²] + a √E[g_oi²])."""
        norm_I = site.statistics.square_I.sqrt()

        def prune(layer: Layer) -> Layer:
            gradient_OI = site.statistics.grad_square_OI(layer.name).sqrt()
            score_OI = layer.base.weight_OI.abs() * (norm_I + self.gradient_weight * gradient_OI)
            return pruned(layer, self.sparsity.keep_OI(score_OI, per="row", name=layer.name))

        return site.each(prune)
