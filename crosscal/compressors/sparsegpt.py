"""SparseGPT: prune column by column, repairing each removal with the columns still to come.

Frantar & Alistarh 2023, arXiv 2301.00774.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.problem import LayerProblem, LayerSolution
from crosscal.compressors.sparsity import Sparsity


@dataclass(frozen=True)
class SparseGPT:
    sparsity: Sparsity
    """Fraction removed (a threshold per block of 128 columns), or n:m."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(sparsity=self.sparsity, damping=self.damping)

    def compress(self, problem: LayerProblem) -> LayerSolution:
        return solve_columns([problem], [self.rule])[0][0]
