"""Bias correction: compensate the mean output error of compression by the layer's bias.

    b ← b + c,  c = (W - V) E[x];   E‖(W - V) x - c‖² = tr(D H Dᵀ) - 2 cᵀ D E[x] + ‖c‖²,  D = W - V

This c is optimal; the loss becomes tr(D (H - E[x] E[x]ᵀ) Dᵀ), the loss on centred inputs. Needs linears with a bias.
Nagel et al. 2019 (arXiv 1906.04721, sec. 4.2); here the mean comes from the cached sums, not from batch norms.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Layer, Site, Statistic


@dataclass(frozen=True)
class Bias:
    kind: ClassVar = "repair"
    needs: ClassVar = frozenset({Statistic.SUM})
    version: ClassVar = 1
    changes_bias: ClassVar = True
    compress = alone

    def __call__(self, site: Site) -> Site:
        mean_I = site.statistics[Statistic.SUM]

        def corrected(layer: Layer) -> Layer:
            return dataclasses.replace(layer, bias_change_O=(layer.target_OI - layer.weight_OI) @ mean_I)

        return site.each(corrected)
