"""Wanda: prune by |weight| · input norm, each output row on its own, no weight update.

Sun et al. 2023, arXiv 2306.11695. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosscal.compressors.problem import LayerProblem, LayerSolution, solved
from crosscal.compressors.sparsity import Sparsity


@dataclass(frozen=True)
class Wanda:
    sparsity: Sparsity
    """Fraction (or n:m) removed in every row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def compress(self, problem: LayerProblem) -> LayerSolution:
        """score_oi = |W_oi| √H_ii."""
        score_OI = problem.weight_OI.abs() * problem.hessian_II.diagonal().sqrt()
        keep_OI = self.sparsity.keep_OI(score_OI, per="row", name=problem.name)
        return solved(problem, torch.where(keep_OI, problem.weight_OI, 0.0))
