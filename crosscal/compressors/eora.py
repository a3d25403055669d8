"""EoRA: add the low-rank matrix that best corrects the compression error in the metric of the Hessian.

With Δ = W - V, the L of rank r that minimises tr((Δ - L) H (Δ - L)ᵀ) is U_r U_rᵀ Δ, where U_r are the top eigenvectors
of Δ H Δᵀ. The remaining loss is the sum of the other eigenvalues. No root or inverse of H is needed; H may be singular.

Liu et al. 2024, arXiv 2410.21271, whose factors through a root of H give the same matrix. With a mixture of its own,
this step corrects a generic compressed model for one domain. Shapes: O outputs, I inputs, K rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Layer, LowRank, Site, Statistic
from crosscal.errors import UsageError


@dataclass(frozen=True)
class EoRA:
    rank: int = 32
    """Rank of the correction; capped at the smaller dimension of the matrix."""

    kind: ClassVar = "repair"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError("a rank is 0 or more", got=str(self.rank))

    @property
    def has_low_rank(self) -> bool:
        return self.rank > 0

    def __call__(self, site: Site) -> Site:
        return site.each(lambda layer: self._repair(layer, site.statistics.hessian_II))

    def _repair(self, layer: Layer, hessian_II: Tensor) -> Layer:
        if self.rank == 0:
            return layer
        repair = best_low_rank(layer.target_OI - layer.weight_OI, hessian_II, self.rank)
        if layer.low_rank is not None:
            left_OK = torch.cat([layer.low_rank.left_OK, repair.left_OK], dim=1)
            repair = LowRank(left_OK, torch.cat([layer.low_rank.right_KI, repair.right_KI]))
        return dataclasses.replace(layer, low_rank=repair)


def best_low_rank(difference_OI: Tensor, hessian_II: Tensor, rank: int) -> LowRank:
    """Return the L of at most this rank that is nearest to Δ in the metric of H."""
    rank = min(rank, *difference_OI.shape)
    _, vectors_OO = torch.linalg.eigh(difference_OI @ hessian_II @ difference_OI.mT)
    left_OK = vectors_OO[:, -rank:].flip(1)
    return LowRank(left_OK, left_OK.mT @ difference_OI)
