"""SparseGPT with GPTQ: prune and round column by column in one pass and compensate the joint error in later columns.
Each column is masked as in SparseGPT, then rounded as in GPTQ.

Frantar & Alistarh 2023, arXiv 2301.00774, section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.column_loop import rule_key, solve_by_rule, solve_by_rules
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.state import Statistic


@dataclass(frozen=True)
class SparseGPTQ:
    """Settings of the joint method; call with a `Site`, or `compress` one `LayerProblem`."""

    sparsity: Sparsity
    """Fraction removed, or n:m. Zero is on the grid, so rounding may add zeros and removes none."""
    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None means one scale per row."""
    scale_search: bool = True
    """Choose each scale by the least Σ_j H_jj (w_j - q_j)² over its group; otherwise by the largest weight."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "quantize"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 3
    compress = alone
    stack_key = property(rule_key)
    __call__ = solve_by_rule
    many = staticmethod(solve_by_rules)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(
            sparsity=self.sparsity,
            bits=self.bits,
            group_size=self.group_size,
            scale_search=self.scale_search,
            damping=self.damping,
        )
