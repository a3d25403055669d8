"""QEP: adjust each matrix to compensate the errors of the compressed blocks before it, ahead of its own compression.

    W* = W + propagation · W E[(x - y) yᵀ] (H + λI)⁻¹,   H = E[y yᵀ],   λ = damping · mean(diag H)

x is the input in the dense model, y the input behind the compressed blocks. With propagation 1 and no damping W* is the
least-squares solution of W* y ≈ W x; if nothing has been compressed yet, it is W. A later step that prunes or rounds
uses W* in place of W. Arai and Ichikawa 2025 (arXiv 2504.09629), in closed form as published; their choice of the
propagation per layer is not implemented.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Dense, Layer, Site, Statistic
from crosscal.errors import UsageError
from crosscal.statistics.factor import check_damping


@dataclass(frozen=True)
class QEP:
    propagation: float = 0.5
    """Fraction of the correction that is applied: 0 is none, 1 all of it."""
    damping: float = 1.0
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "correct"
    needs: ClassVar = frozenset({Statistic.GRAM, Statistic.CROSS})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        if not 0 <= self.propagation <= 1:
            raise UsageError("propagation is between 0 and 1", got=str(self.propagation))
        check_damping(self.damping)

    def __call__(self, site: Site) -> Site:
        statistics = site.statistics
        error_II = statistics[Statistic.CROSS] - statistics.hessian_II
        root_II = statistics.factor(self.damping).root_II
        return site.each(lambda layer: self._corrected(layer, error_II, root_II))

    def _corrected(self, layer: Layer, error_II: Tensor, root_II: Tensor) -> Layer:
        if not isinstance(layer.base, Dense) or layer.keep_OI is not None or layer.low_rank is not None:
            do = "Correct first, then prune or round."
            raise UsageError("an already compressed matrix cannot be corrected", where=layer.name, do=do)
        # H + λI = R Rᵀ, so X (H + λI) = B takes two triangular solves.
        half_OI = torch.linalg.solve_triangular(root_II.mT, layer.target_OI @ error_II, upper=False, left=False)
        change_OI = torch.linalg.solve_triangular(root_II, half_OI, upper=True, left=False) * self.propagation
        base = Dense(layer.base.weight_OI + change_OI)
        return layer.changed(base, target_OI=layer.target_OI + change_OI, damping=self.damping or layer.damping)
