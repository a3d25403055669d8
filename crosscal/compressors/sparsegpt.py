"""SparseGPT: prune column by column and compensate each error in the columns still to be pruned.

Frantar & Alistarh 2023, arXiv 2301.00774.
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
class SparseGPT:
    """Settings of SparseGPT; call with a `Site`, or `compress` one `LayerProblem`."""

    sparsity: Sparsity
    """Fraction removed (a threshold per block of 128 columns), or n:m."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`)."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone
    stack_key = property(rule_key)
    __call__ = solve_by_rule
    many = staticmethod(solve_by_rules)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(sparsity=self.sparsity, damping=self.damping)
