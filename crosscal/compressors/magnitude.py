"""Magnitude pruning: remove the smallest |weight| of the whole matrix. Needs no data; the control for every other
method.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosscal.compressors.problem import LayerProblem, LayerSolution, solved
from crosscal.compressors.sparsity import Sparsity


@dataclass(frozen=True)
class Magnitude:
    sparsity: Sparsity
    """Fraction (or n:m) removed, over the whole matrix."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def compress(self, problem: LayerProblem) -> LayerSolution:
        """score = |W|."""
        keep_OI = self.sparsity.keep_OI(problem.weight_OI.abs(), per="matrix", name=problem.name)
        return solved(problem, torch.where(keep_OI, problem.weight_OI, 0.0))
