"""Round to nearest: the same grid as GPTQ without its error feedback. Needs no data; the control for quantization.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosscal.compressors.grid import check_grid, check_settings, fit_scale_R, from_ints, to_ints
from crosscal.compressors.problem import Grid, LayerProblem, LayerSolution, solved


@dataclass(frozen=True)
class RoundToNearest:
    bits: int
    """2 to 8."""
    group_size: int | None = 128
    """Inputs per scale; None is one scale a row."""

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)

    def compress(self, problem: LayerProblem) -> LayerSolution:
        """V = scale · round(W / scale)."""
        outputs, inputs = problem.weight_OI.shape
        check_grid(self.group_size, inputs, problem.name)
        columns = self.group_size or inputs
        rows_RC = problem.weight_OI.reshape(-1, columns)
        bits_R = torch.full((len(rows_RC),), float(self.bits), dtype=rows_RC.dtype, device=rows_RC.device)
        scale_R = fit_scale_R(rows_RC, bits_R, problem.stored_dtype)
        ints_RC = to_ints(rows_RC, scale_R[:, None], bits_R[:, None])
        weight_OI = from_ints(ints_RC, scale_R[:, None], problem.stored_dtype).reshape(outputs, inputs)
        grid = Grid(
            ints_RC.reshape(outputs, inputs).to(torch.int8), scale_R.reshape(outputs, -1), self.bits, self.group_size
        )
        return solved(problem, weight_OI, grid=grid)
