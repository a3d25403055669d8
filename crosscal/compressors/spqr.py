"""SpQR: round in small groups whose scales are quantized too, and keep the few outlier weights unrounded.

    V = scale · (ints - zero),  V = w for an outlier w;   scale = least + step · codes, over 16 outputs

A weight w (errors of earlier inputs included) is an outlier if rounding it to q exceeds a bound, (H + λI)⁻¹ = Uᵀ U:

    ((w - q) / U_jj)² > threshold · mean_j (var_i(W_ij) / U_jj²)

Inputs are processed as in GPTQ; an outlier, which is not rounded to the grid, has no error to feed forward. A group's
grid is fitted without its likely outliers, the weights whose omission lowers the group's error by more than the bound
(leave-one-out); the mean of the other weights replaces them.

Dettmers et al. 2023 (arXiv 2306.03078), following their code. Implemented: outliers, leave-one-out fits, two-level
scales. Different: zero is an integer level of every grid (their `round_zero`, and 0 inside the range), so pruned
weights stay exactly 0 and zero points need no second level. Not implemented: reordered inputs, the packed format and
its kernel.

Shapes: O outputs, I inputs, G groups of inputs, C inputs of one group, B blocks of 16 outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors import grid
from crosscal.compressors.amount import Amount
from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Layer, Site, Statistic
from crosscal.errors import UsageError
from crosscal.statistics.factor import InverseFactor, check_damping

BLOCK_OUTPUTS = 16
"""Outputs whose scales share one second-level grid, per group of inputs."""
VALUE_BITS, OUTLIER_BITS = 16, 32
"""Bits of an unquantized number; bits of an outlier, such a number with the index of its input."""


@dataclass(frozen=True, eq=False)
class GridOutliers:
    """Integers, two-level scales and outliers. No checkpoint format that inference engines load can hold them."""

    ints_OI: Tensor
    zero_OG: Tensor
    scale_codes_OG: Tensor
    scale_step_BG: Tensor
    scale_least_BG: Tensor
    is_outlier_OI: Tensor
    outlier_OI: Tensor
    """Values of the outliers; 0 elsewhere."""
    bits: int
    scale_bits: int
    stored_dtype: torch.dtype | None = None

    @property
    def weight_OI(self) -> Tensor:
        return self._weight_OI

    @cached_property
    def _weight_OI(self) -> Tensor:
        outputs, groups = self.zero_OG.shape
        scale_OG = _scales(self.scale_codes_OG, self.scale_step_BG, self.scale_least_BG)
        ints_OGC = self.ints_OI.view(outputs, groups, -1).to(scale_OG.dtype) - self.zero_OG[..., None]
        value_OI = grid.from_ints(ints_OGC, scale_OG[..., None], self.stored_dtype).view(outputs, -1)
        return torch.where(self.is_outlier_OI, self.outlier_OI, value_OI)

    @property
    def mean_bits(self) -> float:
        """Bits per weight, everything included."""
        scales = (self.scale_bits + self.bits) * self.zero_OG.numel() + 2 * VALUE_BITS * self.scale_step_BG.numel()
        outliers = OUTLIER_BITS * float(self.is_outlier_OI.sum())
        return self.bits + (scales + outliers) / self.ints_OI.numel()


@dataclass(frozen=True)
class SpQR:
    bits: int
    """2 to 8."""
    group_size: int | None = 16
    """Inputs per scale; None means one scale per row."""
    scale_bits: int = 3
    """Bits of a scale, on a grid over 16 outputs."""
    threshold: float = 0.2
    """A weight is an outlier if its rounding error exceeds this multiple of the mean sensitivity."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "quantize"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    is_packed: ClassVar = False
    compress = alone

    def __post_init__(self) -> None:
        grid.check_settings(self.bits, self.group_size)
        if self.scale_bits not in grid.BITS:
            raise UsageError("scale_bits must be 2 to 8", got=str(self.scale_bits))
        if not self.threshold > 0:
            raise UsageError("threshold must be above 0", got=str(self.threshold))
        check_damping(self.damping)

    @property
    def amounts(self) -> tuple[Amount, ...]:
        suffix = f"g{self.group_size}" if self.group_size else ""
        text = " ".join(part for part in (f"{self.bits} bits", suffix, "and outliers") if part)
        return (Amount("bits", self.bits, text, f"w{self.bits}{suffix}", ("bits", "group_size")),)

    def __call__(self, site: Site) -> Site:
        factored = site.statistics.factor(self.damping)
        return site.each(lambda layer: _Walk(self, layer, factored).layer())


class _Walk:
    """One pass over the groups of inputs of one layer."""

    def __init__(self, step: SpQR, layer: Layer, factored: InverseFactor) -> None:
        outputs, inputs = layer.target_OI.shape
        grid.check_grid(step.group_size, inputs, layer.name)
        self.step, self.before, self.root_II = step, layer, factored.root_II
        self.original_OI = layer.base.weight_OI
        self.keep_OI = torch.ones_like(self.original_OI, dtype=torch.bool) if layer.keep_OI is None else layer.keep_OI
        self.weight_I = self.root_II.diagonal().masked_fill(factored.dead_I, 0.0)  # 1 / U_jj
        variance_I = self.original_OI.var(0, correction=min(1, outputs - 1))
        unit = float((variance_I * self.weight_I.square()).sum() / (~factored.dead_I).sum())
        self.most = step.threshold * unit if unit > 0 else math.inf
        self.highest = 2**step.bits - 1
        self.answer_OI = torch.empty_like(self.original_OI)
        self.ints_OI = torch.empty_like(self.original_OI, dtype=torch.uint8)
        self.is_outlier_OI = torch.zeros_like(self.keep_OI)
        self.grids: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def layer(self) -> Layer:
        size = self.step.group_size or self.original_OI.shape[1]
        for start in range(0, self.original_OI.shape[1], size):
            self._solve_group(slice(start, start + size))
        zero_OG, codes_OG, step_BG, least_BG = (torch.stack(part, 1) for part in zip(*self.grids, strict=True))
        base = GridOutliers(
            self.ints_OI,
            zero_OG,
            codes_OG,
            step_BG,
            least_BG,
            self.is_outlier_OI,
            torch.where(self.is_outlier_OI, self.answer_OI, 0.0),
            self.step.bits,
            self.step.scale_bits,
            self.before.stored_dtype,
        )
        return self.before.changed(base, damping=self.step.damping)

    def _solve_group(self, own: slice) -> None:
        upper_CC = torch.linalg.inv(self.root_II[own, own]).triu()
        change_OI = self.original_OI[:, : own.start] - self.answer_OI[:, : own.start]
        work_OC = self.original_OI[:, own] + change_OI @ (self.root_II[: own.start, own] @ upper_CC)
        keep_OC, weight_C = self.keep_OI[:, own], self.weight_I[own]
        scale_O, zero_O = self._fit(torch.where(keep_OC, work_OC, 0.0), keep_OC, weight_C)
        for column in range(work_OC.shape[1]):
            value_O, kept_O = work_OC[:, column], keep_OC[:, column]
            ints_O = torch.where(kept_O, self._ints(value_O, scale_O, zero_O), zero_O)
            rounded_O = grid.from_ints(ints_O - zero_O, scale_O, self.before.stored_dtype)
            is_outlier_O = (((value_O - rounded_O) * weight_C[column]).square() > self.most) & kept_O
            answer_O = torch.where(is_outlier_O, _as_stored(value_O, self.before.stored_dtype), rounded_O)
            error_O = (value_O - answer_O) / upper_CC[column, column]
            work_OC[:, column + 1 :].addr_(error_O, upper_CC[column, column + 1 :], alpha=-1)
            at = own.start + column
            self.ints_OI[:, at], self.answer_OI[:, at], self.is_outlier_OI[:, at] = ints_O, answer_O, is_outlier_O

    def _fit(self, value_OC: Tensor, keep_OC: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero) of every output, the scale as quantized in two levels."""
        likely_OC = (self._gains(value_OC, weight_C) > self.most) & keep_OC
        others = (~likely_OC).sum(1).clamp(min=1)
        mean_O = torch.where(likely_OC, 0.0, value_OC).sum(1) / others
        scale_O, zero_O = self._grid(torch.where(likely_OC, mean_O[:, None], value_OC))
        codes_O, step_B, least_B = self._two_levels(scale_O)
        self.grids.append((zero_O, codes_O, step_B, least_B))
        return _scales(codes_O, step_B, least_B), zero_O

    def _gains(self, value_OC: Tensor, weight_C: Tensor) -> Tensor:
        """Decrease of a group's error if one weight is left out of both the grid fit and the error."""
        whole_O = self._errors(value_OC).square() @ weight_C.square()
        gains = []
        for column in range(value_OC.shape[1]):
            others = [other for other in range(value_OC.shape[1]) if other != column]
            if others:
                gains.append(whole_O - self._errors(value_OC[:, others]).square() @ weight_C[others].square())
        return torch.stack(gains, 1) if gains else whole_O[:, None]

    def _errors(self, value_OC: Tensor) -> Tensor:
        scale_O1, zero_O1 = (part_O[:, None] for part_O in self._grid(value_OC))
        return value_OC - (self._ints(value_OC, scale_O1, zero_O1) - zero_O1) * scale_O1

    def _grid(self, value_OC: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero) from the smallest to the largest weight, 0 included; all-zero rows get scale 0."""
        least_O, most_O = value_OC.amin(1).clamp(max=0), value_OC.amax(1).clamp(min=0)
        scale_O = (most_O - least_O) / self.highest
        return scale_O, torch.where(scale_O > 0, -least_O / scale_O, 0.0).round()

    def _ints(self, value: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (torch.where(scale > 0, value / scale, 0.0).round() + zero).clamp(0, self.highest)

    def _two_levels(self, scale_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, step, least): scale ≈ least + step · code within every 16 outputs. All-zero rows are ignored: they
        have no weight to round."""
        outputs = len(scale_O)
        padded = torch.nn.functional.pad(scale_O, (0, -outputs % BLOCK_OUTPUTS)).view(-1, BLOCK_OUTPUTS)
        most_B = padded.amax(1)
        least_B = torch.where(padded > 0, padded, most_B[:, None]).amin(1)
        least_B = torch.where(least_B > 0, least_B, 1.0)
        step_B = (most_B - least_B).clamp(min=0) / (2**self.step.scale_bits - 1)
        least_B, step_B = (_as_stored(part_B, self.before.stored_dtype) for part_B in (least_B, step_B))
        codes = torch.where(step_B[:, None] > 0, (padded - least_B[:, None]) / step_B[:, None], 0.0).round()
        return codes.clamp(0, 2**self.step.scale_bits - 1).flatten()[:outputs], step_B, least_B


def _scales(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """Return least + step · codes for codes [O, ...], with step and least [B, ...] shared by every 16 outputs."""
    step, least = (part.repeat_interleave(BLOCK_OUTPUTS, 0)[: len(codes)] for part in (step, least))
    return least + step * codes


def _as_stored(value: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
    return value if stored_dtype is None else value.to(stored_dtype).to(value.dtype)
