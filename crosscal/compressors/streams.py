"""Two streams: losses against the dense model's outputs, for layers behind compressed blocks.

For a token, x is the input in the dense model and y the input behind compressed blocks. V y should equal W x, and

    E‖W x - V y‖² = tr(W E[(x-y)(x-y)ᵀ] Wᵀ) + 2 tr(W E[(x-y) yᵀ] Dᵀ) + tr(D E[y yᵀ] Dᵀ),   D = W - V

The first term is the effect of the compressed blocks before, the same for every V; the others depend on this layer.
In this form no large terms cancel: if both streams are equal, the first two terms are 0.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.statistics.statistic import Statistic


@dataclass(frozen=True, eq=False)
class Streams:
    """Second moments of two inputs of the same tokens, per token."""

    hessian_II: Tensor
    """E[y yᵀ]."""
    cross_II: Tensor
    """E[x yᵀ]."""
    drift_II: Tensor
    """E[(x - y)(x - y)ᵀ]."""

    @classmethod
    def of(cls, mean: Callable[[Statistic], Tensor | None]) -> Streams | None:
        """Return None unless all three are available; losses are then those of one stream."""
        hessian_II, cross_II, drift_II = map(mean, (Statistic.GRAM, Statistic.CROSS, Statistic.DRIFT))
        return (
            None if hessian_II is None or cross_II is None or drift_II is None else cls(hessian_II, cross_II, drift_II)
        )

    def loss(self, weight_OI: Tensor, difference_OI: Tensor) -> float:
        """Return E‖W x - (W - D) y‖²; negative by roundoff at most."""
        drifted = trace_of(weight_OI, self.drift_II, weight_OI)
        crossed = trace_of(weight_OI, self.cross_II - self.hessian_II, difference_OI)
        return drifted + 2 * crossed + trace_of(difference_OI, self.hessian_II, difference_OI)

    def energy(self, weight_OI: Tensor) -> float:
        """Return the output energy E‖W x‖²: E[x xᵀ] = E[(x-y)(x-y)ᵀ] + E[x yᵀ] + E[y xᵀ] - E[y yᵀ]."""
        drifted = trace_of(weight_OI, self.drift_II, weight_OI)
        return drifted + trace_of(weight_OI, 2 * self.cross_II - self.hessian_II, weight_OI)


def trace_of(left_OI: Tensor, matrix_II: Tensor, right_OI: Tensor) -> float:
    """Return tr(A M Bᵀ), M of any kind. Sums in float64."""
    return float(((left_OI @ matrix_II) * right_OI).sum(1).sum(dtype=torch.float64))
