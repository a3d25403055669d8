"""GPTQ: round column by column, repairing each rounding with the columns still to come. Symmetric grids, 2 to 8 bits.

Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class GPTQ:
    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None is one scale a row. Grids are fitted when the loop reaches their group."""
    activation_order: bool = False
    """Round the inputs with the largest H_jj first; grids are then fitted beforehand, so that groups stay contiguous
    on disk."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    def __post_init__(self) -> None:
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(
            bits=self.bits, group_size=self.group_size, activation_order=self.activation_order, damping=self.damping
        )

    def compress(self, problem: LayerProblem) -> LayerSolution:
        return solve_columns([problem], [self.rule])[0][0]
