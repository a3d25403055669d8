"""The column loop that SparseGPT and GPTQ share, over the stacked rows of many layers and settings at once.

Columns are fixed one after another; the error of each is compensated by the columns not yet fixed:

    q = rule(w_j),  e = (w_j - q) / U_jj,  W[:, j:] -= e U[j, j:]          (H + λI)⁻¹ = Uᵀ U

Rows do not speak to each other except when a pruning threshold is drawn, so all layers that read the same inputs,
and all sparsities or bit widths of a sweep, run through one loop as one tall matrix. Updates are lazy on two
levels, panels
of 32 columns inside blocks of 128, so that nearly all work is matrix products. The matrix is held transposed, because
the loop walks columns.

Shapes: I inputs, R stacked rows, B columns of a block, O outputs of one layer.
Source: Frantar & Alistarh 2023 (arXiv 2301.00774, alg. 1); Frantar et al. 2022 (arXiv 2210.17323, alg. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.compressors.grid import check_grid, fit_scale_R, from_ints, to_ints
from crosscal.compressors.problem import Grid, LayerProblem, LayerSolution, solved
from crosscal.compressors.sparsity import Sparsity, lowest, lowest_per_row
from crosscal.errors import UsageError
from crosscal.statistics.factor import InverseFactor, factor

PANEL_COLUMNS = 32


@dataclass(frozen=True)
class ColumnRule:
    """What happens to a column: pruned, rounded to a grid, or both."""

    sparsity: Sparsity | None = None
    bits: int | None = None
    group_size: int | None = None
    activation_order: bool = False
    """Walk the inputs from the largest H_jj to the smallest; the grids of all groups are then fitted beforehand."""
    damping: float = 0.01
    block_columns: int = 128

    @property
    def stack_key(self) -> tuple[object, ...]:
        """Rules with equal keys can run in one loop."""
        return (self.bits is None, self.group_size, self.activation_order, self.damping, self.block_columns)

    def check(self, inputs: int, name: str) -> None:
        if self.sparsity:
            self.sparsity.check(inputs, name)
            if self.sparsity.group and (self.activation_order or PANEL_COLUMNS % self.sparsity.group):
                raise UsageError(
                    "n:m cannot be combined with activation order, and m must divide 32",
                    where=name,
                    got=str(self.sparsity),
                )
        if self.bits is not None:
            check_grid(self.bits, self.group_size, inputs, name)


@dataclass(frozen=True)
class Segment:
    """The rows of the stack that belong to one layer under one rule."""

    problem: LayerProblem
    rule: ColumnRule
    rows: slice


def solve_columns(problems: Sequence[LayerProblem], rules: Sequence[ColumnRule]) -> list[list[LayerSolution]]:
    """Solutions [rule][problem]. The problems share one Hessian, the rules one `stack_key`.

    Pruning is exact: `sparsity.removed` weights of every layer, spread over the blocks by cumulative rounding;
    among equal scores the earlier column, then the earlier row, goes first. Dead inputs have the lowest scores, so
    they are
    pruned first, inside the budget. Raises what `factor` raises.
    """
    rule = rules[0]
    segments = _segments(problems, rules)
    order_I, shared = _ordered_factor(problems[0], rule)
    loop = _Loop(segments, order_I, shared, rule)
    for start in range(0, len(order_I), rule.block_columns):
        loop.solve_block(start, min(start + rule.block_columns, len(order_I)))
    solutions = [loop.solution(segment) for segment in segments]
    return [solutions[i : i + len(problems)] for i in range(0, len(solutions), len(problems))]


def _segments(problems: Sequence[LayerProblem], rules: Sequence[ColumnRule]) -> list[Segment]:
    segments, first = [], 0
    for rule in rules:
        for problem in problems:
            outputs, inputs = problem.weight_OI.shape
            rule.check(inputs, problem.name)
            segments.append(Segment(problem, rule, slice(first, first + outputs)))
            first += outputs
    return segments


def _ordered_factor(problem: LayerProblem, rule: ColumnRule) -> tuple[Tensor, InverseFactor]:
    hessian_II = problem.hessian_II
    if not rule.activation_order:
        return torch.arange(len(hessian_II), device=hessian_II.device), problem.factor(rule.damping)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    return order_I, factor(hessian_II[order_I][:, order_I], rule.damping, name=problem.name)


class _Loop:
    """The state of one pass: the stacked weights, fixed so far up to some column."""

    def __init__(self, segments: list[Segment], order_I: Tensor, shared: InverseFactor, rule: ColumnRule) -> None:
        self.segments, self.order_I, self.rule, self.damping = segments, order_I, rule, shared.damping
        self.upper_II = shared.upper_II
        self.diagonal_I = shared.upper_II.diagonal()
        dtype = shared.upper_II.dtype
        self.work_IR = torch.cat([s.problem.weight_OI.to(dtype).mT[order_I] for s in segments], dim=1)
        self.pruning = any(s.rule.sparsity for s in segments)
        if rule.bits is not None:
            self._prepare_grid(dtype)

    def _prepare_grid(self, dtype: torch.dtype) -> None:
        inputs, rows = self.work_IR.shape
        device = self.work_IR.device
        outputs = [s.rows.stop - s.rows.start for s in self.segments]
        bits = torch.tensor([float(s.rule.bits or 0) for s in self.segments], dtype=dtype, device=device)
        self.bits_R = bits.repeat_interleave(torch.tensor(outputs, device=device))
        self.columns = self.rule.group_size or inputs
        self.stored_dtype = self.segments[0].problem.stored_dtype
        self.scale_GR = torch.ones(inputs // self.columns, rows, dtype=dtype, device=device)
        self.ints_IR = torch.zeros(inputs, rows, dtype=torch.int8, device=device)
        self.group_I = self.order_I // self.columns  # the group of every column, in walking order
        if self.rule.activation_order:
            original_RI = torch.cat([s.problem.weight_OI.to(dtype) for s in self.segments])
            for group in range(len(self.scale_GR)):
                part_RC = original_RI[:, group * self.columns : (group + 1) * self.columns]
                self.scale_GR[group] = fit_scale_R(part_RC, self.bits_R, self.stored_dtype)

    def solve_block(self, start: int, stop: int) -> None:
        keep_BR = self._block_mask(start, stop) if self.pruning else None
        error_BR = torch.empty_like(self.work_IR[start:stop])
        for first in range(start, stop, PANEL_COLUMNS):
            last = min(first + PANEL_COLUMNS, stop)
            for j in range(first, last):
                self._fix_column(j, last, start, keep_BR, error_BR)
            self.work_IR[last:stop].addmm_(
                self.upper_II[first:last, last:stop].mT, error_BR[first - start : last - start], alpha=-1
            )
        self.work_IR[stop:].addmm_(self.upper_II[start:stop, stop:].mT, error_BR, alpha=-1)

    def _fix_column(self, j: int, panel_stop: int, start: int, keep_BR: Tensor | None, error_BR: Tensor) -> None:
        if keep_BR is not None:
            self._group_mask(j, start, keep_BR)
        column_R = self.work_IR[j]
        fixed_R = column_R if keep_BR is None else torch.where(keep_BR[j - start], column_R, 0.0)
        if self.rule.bits is not None:
            fixed_R = self._round(j, fixed_R)
        error_R = torch.div(column_R - fixed_R, self.diagonal_I[j], out=error_BR[j - start])
        self.work_IR[j + 1 : panel_stop].addr_(self.upper_II[j, j + 1 : panel_stop], error_R, alpha=-1)
        self.work_IR[j] = fixed_R  # assigned, not reached by subtraction: a pruned weight is exactly zero

    def _round(self, j: int, column_R: Tensor) -> Tensor:
        group = int(self.group_I[j])
        if not self.rule.activation_order and j % self.columns == 0:
            # The grid is fitted to the weights as they stand now, errors of earlier columns included.
            self.scale_GR[group] = fit_scale_R(self.work_IR[j : j + self.columns].mT, self.bits_R, self.stored_dtype)
        scale_R = self.scale_GR[group]
        ints_R = to_ints(column_R, scale_R, self.bits_R)
        self.ints_IR[j] = ints_R.to(torch.int8)
        return from_ints(ints_R, scale_R, self.stored_dtype)

    def _block_mask(self, start: int, stop: int) -> Tensor:
        """True = survives, for the fractional sparsities; drawn once a block from w² / U_jj² (2301.00774, eq. 5)."""
        score_BR = (self.work_IR[start:stop] / self.diagonal_I[start:stop, None]).square_()
        keep_BR = torch.ones_like(score_BR, dtype=torch.bool)
        for segment in self.segments:
            sparsity = segment.rule.sparsity
            if sparsity and not sparsity.group:
                outputs = segment.rows.stop - segment.rows.start
                count = sparsity.removed(stop * outputs) - sparsity.removed(start * outputs)
                keep_BR[:, segment.rows] = ~lowest(score_BR[:, segment.rows], count)
        return keep_BR

    def _group_mask(self, j: int, start: int, keep_BR: Tensor) -> None:
        """n:m masks are drawn when the loop reaches their group, from the weights as updated so far."""
        for segment in self.segments:
            sparsity = segment.rule.sparsity
            if sparsity and sparsity.group and j % sparsity.group == 0:
                columns = slice(j, j + sparsity.group)
                score_RC = (self.work_IR[columns, segment.rows] / self.diagonal_I[columns, None]).square_().mT
                keep_RC = ~lowest_per_row(score_RC, sparsity.group - (sparsity.kept or 0))
                keep_BR[j - start : j - start + sparsity.group, segment.rows] = keep_RC.mT

    def solution(self, segment: Segment) -> LayerSolution:
        back_I = self.order_I.argsort()
        weight_OI = self.work_IR[:, segment.rows][back_I].mT.contiguous()
        grid = None
        if segment.rule.bits is not None:
            ints_OI = self.ints_IR[:, segment.rows][back_I].mT.contiguous()
            scale_OG = self.scale_GR[:, segment.rows].mT.contiguous()
            grid = Grid(ints_OI, scale_OG, segment.rule.bits, segment.rule.group_size)
        return solved(segment.problem, weight_OI, grid=grid, damping=self.damping)
