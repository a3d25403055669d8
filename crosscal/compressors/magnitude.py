"""Magnitude pruning: remove the weights with the smallest |w| of the whole matrix. Needs no data; the baseline for
pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.compressors.state import Layer, Site, Statistic


@dataclass(frozen=True)
class Magnitude:
    """Settings of magnitude pruning; call with a `Site`, or `compress` one `LayerProblem`."""

    sparsity: Sparsity
    """Fraction (or n:m) removed, over the whole matrix."""

    kind: ClassVar = "prune"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def __call__(self, site: Site) -> Site:
        """Prune by score = |W|."""

        def prune(layer: Layer) -> Layer:
            weight_OI = layer.base.weight_OI
            return pruned(layer, self.sparsity.keep_OI(weight_OI.abs(), per="matrix", name=layer.name))

        return site.each(prune)
