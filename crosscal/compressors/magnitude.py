"""Magnitude pruning: remove the smallest |weight| of the whole matrix. Needs no data; the control for every other
method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.compressors.state import Layer, Site, Statistic


@dataclass(frozen=True)
class Magnitude:
    sparsity: Sparsity
    """Fraction (or n:m) removed, over the whole matrix."""

    kind: ClassVar = "prune"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def __call__(self, site: Site) -> Site:
        """score = |W|."""

        def prune(layer: Layer) -> Layer:
            weight_OI = layer.base.weight_OI
            return pruned(layer, self.sparsity.keep_OI(weight_OI.abs(), per="matrix", name=layer.name))

        return site.each(prune)
