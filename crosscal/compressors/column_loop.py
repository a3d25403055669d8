"""The column loop that SparseGPT and GPTQ share, over the stacked rows of many layers and settings at once.

Columns are fixed one after another; the error of each is compensated by the columns not yet fixed:

    q = rule(w_j),  e = (w_j - q) / U_jj,  W[:, j:] -= e U[j, j:]          (H + λI)⁻¹ = Uᵀ U

Rows do not speak to each other except when a pruning threshold is drawn, so all layers that read the same inputs,
and all sparsities or bit widths of a sweep, run through one loop as one tall matrix. Updates are lazy on two levels,
panels of 32 columns inside blocks of 128, so that nearly all work is matrix products. The matrix is held transposed,
because the loop walks columns.

Shapes: I inputs, R stacked rows, B columns of a block, C columns of a group, G groups, O outputs of one layer.
Source: Frantar & Alistarh 2023 (arXiv 2301.00774, alg. 1); Frantar et al. 2022 (arXiv 2210.17323, alg. 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.compressors.column_rule import PANEL_COLUMNS, ColumnRule
from crosscal.compressors.grid import fit_scale_R, from_ints, to_ints
from crosscal.compressors.problem import Grid, LayerProblem, LayerSolution, solved
from crosscal.compressors.sparsity import lowest, lowest_per_row
from crosscal.errors import StatisticsError
from crosscal.statistics.factor import InverseFactor, factor


@dataclass(frozen=True)
class Segment:
    """The rows of the stack that belong to one layer under one rule."""

    problem: LayerProblem
    rule: ColumnRule
    rows: slice


def solve_columns(problems: Sequence[LayerProblem], rules: Sequence[ColumnRule]) -> list[list[LayerSolution]]:
    """Solutions [rule][problem]. The problems share one Hessian and stored dtype, the rules one `stack_key`.

    Pruning is exact: `sparsity.removed` weights of every layer, spread over the blocks by cumulative rounding. Dead
    inputs score 0, so they go first inside their block's budget; among equal scores the earlier column, then the
    earlier row, goes first. Raises what `factor` raises, `UsageError` for settings that do not fit the layer.
    """
    first, rule = problems[0], rules[0]
    if any(p.hessian_II is not first.hessian_II or p.stored_dtype != first.stored_dtype for p in problems):
        raise StatisticsError("layers solved together must share a Hessian and a stored dtype", where=first.name)
    segments = _segments(problems, rules)
    order_I, shared = _ordered_factor(first, rule)
    original_IR = torch.cat([problem.weight_OI.mT for problem in problems], dim=1).repeat(1, len(rules))
    loop = _Loop(segments, original_IR, order_I, shared)
    for start in range(0, len(order_I), rule.block_columns):
        loop.solve_block(start, min(start + rule.block_columns, len(order_I)))
    solutions = [loop.solution(segment) for segment in segments]
    return [solutions[i : i + len(problems)] for i in range(0, len(solutions), len(problems))]


def _segments(problems: Sequence[LayerProblem], rules: Sequence[ColumnRule]) -> list[Segment]:
    segments, first = [], 0
    for rule, problem in itertools.product(rules, problems):
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

    def __init__(self, segments: list[Segment], original_IR: Tensor, order_I: Tensor, shared: InverseFactor) -> None:
        self.segments, self.order_I, self.shared = segments, order_I, shared
        self.rule = segments[0].rule  # for what all rules of the stack have in common
        self.upper_II = shared.upper_II
        self.diagonal_I = shared.upper_II.diagonal()
        self.work_IR = original_IR[order_I] if self.rule.activation_order else original_IR
        self.pruning = any(s.rule.sparsity for s in segments)
        self.groups = {s.rule.sparsity.group for s in segments if s.rule.sparsity and s.rule.sparsity.group}
        if self.rule.bits is not None:
            self._prepare_grid(original_IR)

    def _prepare_grid(self, original_IR: Tensor) -> None:
        inputs, rows = self.work_IR.shape
        outputs = torch.tensor([len(s.problem.weight_OI) for s in self.segments])
        bits = torch.tensor([float(s.rule.bits or 0) for s in self.segments])
        self.bits_R = bits.repeat_interleave(outputs).to(self.work_IR)
        self.columns = self.rule.group_size or inputs
        self.stored_dtype = self.segments[0].problem.stored_dtype
        self.scale_GR = self.work_IR.new_ones(inputs // self.columns, rows)
        self.ints_IR = torch.zeros_like(self.work_IR, dtype=torch.int8)
        self.group_of = (self.order_I // self.columns).tolist()  # by position in the walk
        if self.rule.activation_order:
            for group, part_CR in enumerate(original_IR.split(self.columns)):
                self.scale_GR[group] = fit_scale_R(part_CR.mT, self.bits_R, self.stored_dtype)

    def solve_block(self, start: int, stop: int) -> None:
        keep_BR = self._block_mask(start, stop) if self.pruning else None
        error_BR = torch.empty_like(self.work_IR[start:stop])
        edges, reach = self._edges(start, stop)
        for first, last in itertools.pairwise(edges):
            for j in range(first, last):
                self._fix_column(j, last, start, keep_BR, error_BR)
            panel_BR = error_BR[first - start : last - start]
            self.work_IR[last:reach].addmm_(self.upper_II[first:last, last:reach].mT, panel_BR, alpha=-1)
        self.work_IR[reach:].addmm_(self.upper_II[start:stop, reach:].mT, error_BR, alpha=-1)

    def _edges(self, start: int, stop: int) -> tuple[list[int], int]:
        """Where panels begin and end, and up to which column they update.

        A grid fitted to the weights as they stand needs its whole group up to date: a panel ends where a group
        starts, and its update reaches the end of every group that starts inside the block.
        """
        edges = {*range(start, stop, PANEL_COLUMNS), stop}
        if self.rule.bits is None or self.rule.activation_order:
            return sorted(edges), stop
        group_starts = range(-(-start // self.columns) * self.columns, stop, self.columns)
        inside = [first for first in group_starts if first > start]
        return sorted(edges.union(inside)), max(stop, inside[-1] + self.columns) if inside else stop

    def _fix_column(self, j: int, panel_stop: int, start: int, keep_BR: Tensor | None, error_BR: Tensor) -> None:
        column_R = fixed_R = self.work_IR[j]
        if keep_BR is not None:
            self._draw_groups(j, start, keep_BR)
            fixed_R = torch.where(keep_BR[j - start], column_R, 0.0)
        if self.rule.bits is not None:
            fixed_R = self._round(j, fixed_R)
        error_R = torch.div(column_R - fixed_R, self.diagonal_I[j], out=error_BR[j - start])
        self.work_IR[j + 1 : panel_stop].addr_(self.upper_II[j, j + 1 : panel_stop], error_R, alpha=-1)
        self.work_IR[j] = fixed_R  # assigned, not reached by subtraction: a pruned weight is exactly zero

    def _round(self, j: int, column_R: Tensor) -> Tensor:
        group = self.group_of[j]
        if not self.rule.activation_order and j % self.columns == 0:
            # The grid is fitted to the weights as they stand now, errors of earlier columns included.
            self.scale_GR[group] = fit_scale_R(self.work_IR[j : j + self.columns].mT, self.bits_R, self.stored_dtype)
        scale_R = self.scale_GR[group]
        ints_R = to_ints(column_R, scale_R, self.bits_R)
        self.ints_IR[j] = ints_R.to(torch.int8)
        return from_ints(ints_R, scale_R, self.stored_dtype)

    def _scores_BR(self, columns: slice, rows: slice) -> Tensor:
        """w² / U_jj² (2301.00774, eq. 5); 0 for a dead input, whose weights cost nothing."""
        score_BR = (self.work_IR[columns, rows] / self.diagonal_I[columns, None]).square_()
        return score_BR.masked_fill_(self.shared.dead_I[columns, None], 0.0)

    def _block_mask(self, start: int, stop: int) -> Tensor:
        """True = survives, for the fractional sparsities; drawn once a block."""
        keep_BR = torch.ones_like(self.work_IR[start:stop], dtype=torch.bool)
        for segment in self.segments:
            sparsity = segment.rule.sparsity
            if sparsity and not sparsity.group:
                outputs = len(segment.problem.weight_OI)
                count = sparsity.removed(stop * outputs) - sparsity.removed(start * outputs)
                keep_BR[:, segment.rows] = ~lowest(self._scores_BR(slice(start, stop), segment.rows), count)
        return keep_BR

    def _draw_groups(self, j: int, start: int, keep_BR: Tensor) -> None:
        """n:m masks are drawn when the loop reaches their group, from the weights as updated so far."""
        if not any(j % group == 0 for group in self.groups):
            return
        for segment in self.segments:
            sparsity = segment.rule.sparsity
            if sparsity and sparsity.group and j % sparsity.group == 0:
                score_CR = self._scores_BR(slice(j, j + sparsity.group), segment.rows)
                drop_RC = lowest_per_row(score_CR.mT, sparsity.group - (sparsity.kept or 0))
                keep_BR[j - start : j - start + sparsity.group, segment.rows] = ~drop_RC.mT

    def solution(self, segment: Segment) -> LayerSolution:
        weight_OI = self._by_input(self.work_IR, segment.rows)
        grid = None
        if segment.rule.bits is not None:
            ints_OI = self._by_input(self.ints_IR, segment.rows)
            scale_OG = self.scale_GR[:, segment.rows].mT.contiguous()
            grid = Grid(ints_OI, scale_OG, segment.rule.bits, segment.rule.group_size)
        return solved(segment.problem, weight_OI, grid=grid, damping=self.shared.damping)

    def _by_input(self, walked_IR: Tensor, rows: slice) -> Tensor:
        """Rows of one segment as [O, I], the inputs back in their own order."""
        if self.rule.activation_order:
            walked_IR = walked_IR[self.order_I.argsort()]
        return walked_IR[:, rows].mT.contiguous()
