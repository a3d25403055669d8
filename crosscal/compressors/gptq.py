"""GPTQ: round column by column and compensate each error in the columns still to be rounded.

Symmetric grids, 2 to 8 bits. Frantar et al. 2022, arXiv 2210.17323. The scale search is weighted and on by
default; the paper's code has an unweighted one, off by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.column_loop import rule_key, solve_by_rule, solve_by_rules
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Statistic


@dataclass(frozen=True)
class GPTQ:
    """Settings of GPTQ; call with a `Site`, or `compress` one `LayerProblem`."""

    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None means one scale per row."""
    activation_order: bool = True
    """Round the inputs with the largest H_jj first (`desc_act`). Grids are then fitted beforehand, so that groups stay
    contiguous on disk; otherwise when the loop reaches their group, earlier errors included."""
    scale_search: bool = True
    """Choose each scale by the least Σ_j H_jj (w_j - q_j)² over its group; otherwise by the largest weight."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`)."""

    kind: ClassVar = "quantize"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 2
    compress = alone
    stack_key = property(rule_key)
    __call__ = solve_by_rule
    many = staticmethod(solve_by_rules)

    def __post_init__(self) -> None:
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(
            bits=self.bits,
            group_size=self.group_size,
            activation_order=self.activation_order,
            scale_search=self.scale_search,
            damping=self.damping,
        )
