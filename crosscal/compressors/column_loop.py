"""The column loop that SparseGPT and GPTQ share, over the stacked rows of many layers and settings at once.

Columns are fixed one after another; what a column is off is compensated by the columns not yet fixed. With
H + λI = R Rᵀ and D = W - V, what the changed weights were changed by, the columns of a block B stand at

    W_B + D_{<B} R_{<B,B} R_BB⁻¹

when the loop reaches it: one product over everything before, and the triangle of one block to invert (LDLQ, Chee et al.
2023, arXiv 2307.13304, which is GPTQ). Inside a block the errors of panels of columns are fed
forward as in the papers, so nearly all work is matrix products. Then, E being the errors, tr(D (H + λI) Dᵀ) = |E|²:
the loss comes with the loop.

Rows do not speak to each other except when a pruning threshold is drawn, so all layers that read the same inputs,
and all sparsities or bit widths of a sweep, run through one loop as one tall matrix. The matrix is held transposed,
because the loop walks columns.

Shapes: I inputs, R stacked rows, B columns of a block, C columns of a panel or group, G groups, O outputs of one layer.
Source: Frantar & Alistarh 2023 (arXiv 2301.00774, alg. 1); Frantar et al. 2022 (arXiv 2210.17323, alg. 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.grid import fit_scale_R
from crosscal.compressors.panel import FixedPanel, Panel, Rounding, fix_panel, panel_columns
from crosscal.compressors.problem import Grid, LayerProblem, LayerSolution, solved
from crosscal.compressors.segments import Segment, block_drops, patterns, segments_of
from crosscal.errors import StatisticsError
from crosscal.statistics.factor import InverseFactor, factor

DIGITS_LEFT = 0.1
"""Of |E|², what must remain when λ|D|² is taken away for the difference to be a loss; else it is computed directly."""


def solve_columns(problems: Sequence[LayerProblem], rules: Sequence[ColumnRule]) -> list[list[LayerSolution]]:
    """Solutions [rule][problem]. The problems share one Hessian and stored dtype, the rules one `stack_key`.

    Pruning is exact: `sparsity.removed` weights of every layer, spread over the blocks by cumulative rounding. Dead
    inputs score 0, so they go first inside their block's budget; among equal scores the earlier column, then the
    earlier row, goes first. Raises what `factor` raises, `UsageError` for settings that do not fit the layer.
    """
    first, rule = problems[0], rules[0]
    if any(p.hessian_II is not first.hessian_II or p.stored_dtype != first.stored_dtype for p in problems):
        raise StatisticsError("layers solved together must share a Hessian and a stored dtype", where=first.name)
    segments = segments_of(problems, rules)
    order_I, shared = _ordered_factor(first, rule)
    loop = _Loop(segments, torch.cat([problem.weight_OI.mT for problem in problems], dim=1), order_I, shared)
    for start in range(0, len(order_I), rule.block_columns):
        loop.solve_block(start, min(start + rule.block_columns, len(order_I)))
    solutions = loop.solutions()
    return [solutions[i : i + len(problems)] for i in range(0, len(solutions), len(problems))]


def _ordered_factor(problem: LayerProblem, rule: ColumnRule) -> tuple[Tensor, InverseFactor]:
    hessian_II = problem.hessian_II
    if not rule.activation_order:
        return torch.arange(len(hessian_II), device=hessian_II.device), problem.factor(rule.damping)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    return order_I, factor(hessian_II[order_I][:, order_I], rule.damping, name=problem.name)


class _Loop:
    """The state of one pass: the columns fixed so far, and what that changed."""

    def __init__(self, segments: list[Segment], original_IR: Tensor, order_I: Tensor, shared: InverseFactor) -> None:
        self.segments, self.order_I, self.shared = segments, order_I, shared
        self.rule = segments[0].rule  # for what all rules of the stack have in common
        self.root_II, self.root_I = shared.root_II, shared.root_II.diagonal()
        self.score_I = self.root_I.masked_fill(shared.dead_I, 0.0)
        self.original_IR = original_IR[order_I] if self.rule.activation_order else original_IR
        self.times = segments[-1].rows.stop // original_IR.shape[1]  # rules; the original rows are kept once for all
        self.pruning = any(s.rule.sparsity for s in segments)
        self.patterns = patterns(segments)
        inputs, rows = len(order_I), segments[-1].rows.stop
        self.panel_columns = panel_columns(original_IR.device.type, original_IR.dtype)
        self.change_IR = original_IR.new_empty(inputs, rows)
        self.weights = [torch.empty_like(s.problem.weight_OI) for s in segments]
        self.squared_R = torch.zeros(rows, dtype=torch.float64, device=original_IR.device)
        self.changed_R = torch.zeros_like(self.squared_R)
        if self.rule.bits is not None:
            self._prepare_grid(original_IR)

    def _prepare_grid(self, original_IR: Tensor) -> None:
        inputs, rows = self.change_IR.shape
        outputs = torch.tensor([len(s.problem.weight_OI) for s in self.segments])
        bits = torch.tensor([float(s.rule.bits or 0) for s in self.segments])
        self.bits_R = bits.repeat_interleave(outputs).to(original_IR)
        self.columns = self.rule.group_size or inputs
        self.stored_dtype = self.segments[0].problem.stored_dtype
        self.scale_GR = original_IR.new_ones(inputs // self.columns, rows)
        self.ints = [torch.empty_like(weight_OI, dtype=torch.int8) for weight_OI in self.weights]
        self.group_I = self.order_I // self.columns  # by position in the walk
        if self.rule.activation_order:
            for group, part_CR in enumerate(original_IR.split(self.columns)):
                self._fit_group(group, part_CR.repeat(1, self.times))

    def _fit_group(self, group: int, weight_CR: Tensor) -> None:
        self.scale_GR[group] = fit_scale_R(weight_CR.mT, self.bits_R, self.stored_dtype)

    def _original_CR(self, first: int, last: int) -> Tensor:
        return self.original_IR[first:last].repeat(1, self.times)

    def _standing_CR(self, first: int, last: int) -> Tensor:
        """Some columns as the errors of all columns before the first of them leave them."""
        standing_CR = self._original_CR(first, last)
        if first:
            answer_IC = self.root_II[:first, first:last] @ self._upper_CC(first, last)
            standing_CR.addmm_(answer_IC.mT, self.change_IR[:first])
        return standing_CR

    def _upper_CC(self, first: int, last: int) -> Tensor:
        """The inverse of a triangle on the root's diagonal; to multiply by it beats solving with it."""
        identity_CC = torch.eye(last - first, dtype=self.root_II.dtype, device=self.root_II.device)
        return torch.linalg.solve_triangular(self.root_II[first:last, first:last], identity_CC, upper=True)

    def solve_block(self, start: int, stop: int) -> None:
        work_BR, upper_BB = self._standing_CR(start, stop), self._upper_CC(start, stop)
        drop_BR = block_drops(self.segments, work_BR, start, self.score_I[start:stop]) if self.pruning else None
        for first, last in itertools.pairwise(self._edges(start, stop)):
            own, later = slice(first - start, last - start), slice(last - start, None)
            if self.rule.bits is not None:
                self._meet_group(first, stop, work_BR[own.start :])
            fixed = fix_panel(
                Panel(
                    work_BR[own],
                    upper_BB[own, own],
                    self.root_I[first:last],
                    self.score_I[first:last],
                    None if drop_BR is None else drop_BR[own],
                    self.patterns,
                    self._rounding(first, last),
                )
            )
            work_BR[later].addmm_(upper_BB[own, later].mT, fixed.error_CR, alpha=-1)
            self._keep(first, last, fixed)

    def _edges(self, start: int, stop: int) -> list[int]:
        """Where panels begin and end: also where a grid is fitted, which takes its columns up to date."""
        edges = {*range(start, stop, self.panel_columns), stop}
        if self.rule.bits is not None and not self.rule.activation_order:
            edges.update(range(-(-start // self.columns) * self.columns, stop, self.columns))
        return sorted(edges)

    def _meet_group(self, first: int, stop: int, work_CR: Tensor) -> None:
        """Where a group starts, its grid is fitted to the weights as they stand now, earlier errors included."""
        if self.rule.activation_order or first % self.columns:
            return
        last = first + self.columns
        inside = last <= stop
        self._fit_group(first // self.columns, work_CR[: self.columns] if inside else self._standing_CR(first, last))

    def _rounding(self, first: int, last: int) -> Rounding | None:
        if self.rule.bits is None:
            return None
        return Rounding(self.scale_GR[self.group_I[first:last]], self.bits_R, self.stored_dtype)

    def _keep(self, first: int, last: int, fixed: FixedPanel) -> None:
        columns = self.order_I[first:last] if self.rule.activation_order else slice(first, last)
        for index, segment in enumerate(self.segments):
            self.weights[index][:, columns] = fixed.weight_CR[:, segment.rows].mT
            if fixed.ints_CR is not None:
                self.ints[index][:, columns] = fixed.ints_CR[:, segment.rows].mT
        change_CR = self.change_IR[first:last]
        every_CtO = [part_CR.unflatten(1, (self.times, -1)) for part_CR in (fixed.weight_CR, change_CR)]
        torch.sub(self.original_IR[first:last, None], every_CtO[0], out=every_CtO[1])
        alive_C = (~self.shared.dead_I[first:last]).to(change_CR)
        self.squared_R += alive_C @ fixed.error_CR.square()
        self.changed_R += alive_C @ change_CR.square()

    def solutions(self) -> list[LayerSolution]:
        return [self._solution(index, segment) for index, segment in enumerate(self.segments)]

    def _solution(self, index: int, segment: Segment) -> LayerSolution:
        grid = None
        if segment.rule.bits is not None:
            scale_OG = self.scale_GR[:, segment.rows].mT.contiguous()
            grid = Grid(self.ints[index], scale_OG, segment.rule.bits, segment.rule.group_size)
        squared, changed = (float(part_R[segment.rows].sum()) for part_R in (self.squared_R, self.changed_R))
        loss = squared - self.shared.shift * changed
        known = loss if loss >= DIGITS_LEFT * squared else None
        return solved(segment.problem, self.weights[index], grid=grid, damping=self.shared.damping, loss=known)
