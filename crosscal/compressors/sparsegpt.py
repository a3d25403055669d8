"""SparseGPT: prune column by column, repairing each removal with the columns still to come.

Frantar & Alistarh 2023, arXiv 2301.00774.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.state import Site, Statistic


@dataclass(frozen=True)
class SparseGPT:
    sparsity: Sparsity
    """Fraction removed (a threshold per block of 128 columns), or n:m."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        self.rule.check_settings()

    @property
    def rule(self) -> ColumnRule:
        return ColumnRule(sparsity=self.sparsity, damping=self.damping)

    @property
    def stack_key(self) -> tuple[object, ...]:
        return self.rule.stack_key

    def __call__(self, site: Site) -> Site:
        return self.many(site, [self])[0]

    @staticmethod
    def many(site: Site, steps: Sequence[SparseGPT]) -> list[Site]:
        return solve_columns(site, [step.rule for step in steps])
