"""Prune and quantize in one pass: each column is masked as in SparseGPT, then rounded as in GPTQ; one error repairs
both.

Frantar & Alistarh 2023, arXiv 2301.00774, section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.problem import LayerProblem, LayerSolution
from crosscal.compressors.sparsity import Sparsity


@dataclass(frozen=True)
class SparseGPTQ:
    sparsity: Sparsity
    """Fraction removed, or n:m. Zero is on the grid, so rounding may add zeros; none is lost."""
    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None is one scale a row."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(sparsity=self.sparsity, bits=self.bits, group_size=self.group_size, damping=self.damping)

    def compress(self, problem: LayerProblem) -> LayerSolution:
        return solve_columns([problem], [self.rule])[0][0]
