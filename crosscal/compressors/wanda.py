"""Wanda: prune by |weight| · input norm, in each output row separately, without weight update.

Sun et al. 2023, arXiv 2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.compressors.state import Layer, Site, Statistic


@dataclass(frozen=True)
class Wanda:
    """Settings of Wanda; call with a `Site`, or `compress` one `LayerProblem`."""

    sparsity: Sparsity
    """Fraction (or n:m) removed in every row."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def __call__(self, site: Site) -> Site:
        """Prune by score_oi = |W_oi| √H_ii."""
        norm_I = site.statistics.square_I.sqrt()

        def prune(layer: Layer) -> Layer:
            score_OI = layer.base.weight_OI.abs() * norm_I
            return pruned(layer, self.sparsity.keep_OI(score_OI, per="row", name=layer.name))

        return site.each(prune)
