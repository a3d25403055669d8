"""RTN: round each weight to the nearest grid level, without error feedback. Needs no data; the quantization baseline.

The grid is GPTQ's without scale search. Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from crosscal.compressors.grid import check_grid, check_settings, fit_scale_R, to_ints
from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Grid, Layer, Site, Statistic


@dataclass(frozen=True)
class RoundToNearest:
    """Settings of RTN; call with a `Site`, or `compress` one `LayerProblem`."""

    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None means one scale per row."""

    kind: ClassVar = "quantize"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)

    def __call__(self, site: Site) -> Site:
        """Return V = scale · round(W / scale)."""
        return site.each(self._round)

    def _round(self, layer: Layer) -> Layer:
        weight_OI = layer.base.weight_OI
        outputs, inputs = weight_OI.shape
        check_grid(self.group_size, inputs, layer.name)
        rows_RC = weight_OI.reshape(-1, self.group_size or inputs)
        bits_R = torch.full((len(rows_RC),), float(self.bits), dtype=rows_RC.dtype, device=rows_RC.device)
        scale_R = fit_scale_R(rows_RC, bits_R, layer.stored_dtype)
        ints_OI = to_ints(rows_RC, scale_R[:, None], bits_R[:, None]).reshape(outputs, inputs).to(torch.int8)
        return layer.changed(
            Grid(ints_OI, scale_R.reshape(outputs, -1), self.bits, self.group_size, layer.stored_dtype)
        )
