"""The column loop shared by SparseGPT and GPTQ, over the stacked rows of many layers and settings at once.

Columns are fixed (pruned or rounded) one after another; the columns not yet fixed compensate the error of each. With
H + λI = R Rᵀ and D = W - V, the change of the columns fixed so far, the columns of a block B have the values

    W_B + D_{<B} R_{<B,B} R_BB⁻¹

when the loop reaches it: one product over all columns before, and one triangle of a block's size to invert (LDLQ, Chee
et al. 2023, arXiv 2307.13304, which is equivalent to GPTQ). Inside a block the errors of panels of columns are fed
forward as in the papers, so nearly all work is matrix products.

Rows are independent except for the pruning threshold, so all layers that read the same inputs, and all sparsities or
bit widths of a sweep, run through one loop as one tall matrix. The matrix is stored transposed, because the loop runs
over columns.

Shapes: I inputs, R stacked rows, B columns of a block, C columns of a panel or group, G groups, O outputs of one layer.
Source: Frantar & Alistarh 2023 (arXiv 2301.00774, alg. 1); Frantar et al. 2022 (arXiv 2210.17323, alg. 1).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from crosscal.compressors.column_rule import ColumnRule, Segment, block_counts, block_drops, patterns, segments_of
from crosscal.compressors.grid import fit_scale_R, search_scale_R
from crosscal.compressors.kernels import fix_panel, panel_columns
from crosscal.compressors.panel import FixedPanel, Panel, Rounding
from crosscal.compressors.state import Dense, Grid, Layer, Site, Statistics
from crosscal.errors import StatisticsError
from crosscal.statistics.factor import InverseFactor, factor


def solve_columns(site: Site, rules: Sequence[ColumnRule]) -> list[Site]:
    """Return the site after each rule. The rules share one `stack_key`; layers of one stored dtype are stacked.

    Pruning is exact: `sparsity.removed` weights of every layer, those that earlier steps removed included (all of
    them stay removed, should they be more), spread over the blocks by `block_counts`. Weights of dead inputs score 0,
    so they are pruned first; among equal scores the earlier column, then the earlier row. Raises what `factor` raises,
    `UsageError` for settings that do not fit a layer, `StatisticsError` for rules of different stack keys.
    """
    by_dtype: dict[torch.dtype | None, list[int]] = {}
    for index, layer in enumerate(site.layers):
        by_dtype.setdefault(layer.stored_dtype, []).append(index)
    answers: dict[tuple[int, int], Layer] = {}
    for members in by_dtype.values():
        layers = _solve_stack([site.layers[index] for index in members], rules, site.statistics, site.name)
        answers.update(zip(itertools.product(range(len(rules)), members), layers, strict=True))
    order = range(len(site.layers))
    return [
        dataclasses.replace(site, layers=tuple(answers[rule, index] for index in order)) for rule in range(len(rules))
    ]


class _HasRule(Protocol):
    @property
    def rule(self) -> ColumnRule: ...


def rule_key(step: _HasRule) -> tuple[object, ...]:
    """The `stack_key` of a method that is defined by a column rule."""
    return step.rule.stack_key


def solve_by_rule(step: _HasRule, site: Site) -> Site:
    """The `__call__` of such a method."""
    return solve_columns(site, [step.rule])[0]


def solve_by_rules(site: Site, steps: Sequence[_HasRule]) -> list[Site]:
    """The `many` of such a method."""
    return solve_columns(site, [step.rule for step in steps])


def _solve_stack(
    layers: Sequence[Layer], rules: Sequence[ColumnRule], statistics: Statistics, name: str
) -> list[Layer]:
    """Solve one stack; the layers returned are ordered by rule, then by layer."""
    rule = rules[0]
    if any(each.stack_key != rule.stack_key for each in rules):
        raise StatisticsError("rules solved together must have one stack key", where=name)
    segments = segments_of(layers, rules)
    order_I, shared = _ordered_factor(statistics, rule, name)
    weight_IR = torch.cat([layer.base.weight_OI.mT for layer in layers], dim=1)
    loop = _Loop(segments, weight_IR, order_I, shared, statistics.square_I)
    for start in range(0, len(order_I), rule.block_columns):
        loop.solve_block(start, min(start + rule.block_columns, len(order_I)))
    return loop.layers()


def _ordered_factor(statistics: Statistics, rule: ColumnRule, name: str) -> tuple[Tensor, InverseFactor]:
    hessian_II = statistics.hessian_II
    if not rule.activation_order:
        return torch.arange(len(hessian_II), device=hessian_II.device), statistics.factor(rule.damping)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    return order_I, factor(hessian_II[order_I][:, order_I], rule.damping, name=name)


class _Loop:
    """State of one column loop: the columns fixed so far, and by how much they changed."""

    def __init__(
        self, segments: list[Segment], original_IR: Tensor, order_I: Tensor, shared: InverseFactor, square_I: Tensor
    ) -> None:
        self.segments, self.order_I, self.shared, self.square_I = segments, order_I, shared, square_I
        self.rule = segments[0].rule  # for the settings that all rules of the stack share
        self.root_II, self.root_I = shared.root_II, shared.root_II.diagonal()
        self.pivot_I = self.root_I.masked_fill(shared.dead_I, 0.0)
        self.original_IR = original_IR[order_I] if self.rule.activation_order else original_IR
        self.times = segments[-1].rows.stop // original_IR.shape[1]  # rules; the original rows are stored only once
        self.already_pruned_IR = _gone_IR(segments, order_I)
        self.pruning = self.already_pruned_IR is not None or any(s.rule.sparsity for s in segments)
        self.patterns = patterns(segments)
        inputs, rows = len(order_I), segments[-1].rows.stop
        self.panel_columns = panel_columns(original_IR.device.type, original_IR.dtype)
        self.change_IR = original_IR.new_empty(inputs, rows)
        self.weights = [torch.empty_like(s.layer.target_OI) for s in segments]
        self.counts = [block_counts(segment, order_I) for segment in segments]
        self.keep = [torch.empty_like(weight_OI, dtype=torch.bool) for weight_OI in self.weights if self.pruning]
        if self.rule.bits is not None:
            self._prepare_grid(original_IR)

    def _prepare_grid(self, original_IR: Tensor) -> None:
        inputs, rows = self.change_IR.shape
        outputs = torch.tensor([len(s.layer.target_OI) for s in self.segments])
        bits = torch.tensor([float(s.rule.bits or 0) for s in self.segments])
        self.bits_R = bits.repeat_interleave(outputs).to(original_IR)
        self.columns = self.rule.group_size or inputs
        self.stored_dtype = self.segments[0].layer.stored_dtype
        self.scale_GR = original_IR.new_ones(inputs // self.columns, rows)
        self.ints = [torch.empty_like(weight_OI, dtype=torch.int8) for weight_OI in self.weights]
        self.group_I = self.order_I // self.columns  # by position in the loop order
        if self.rule.activation_order:
            for group, part_CR in enumerate(original_IR.split(self.columns)):
                self._fit_group(group, part_CR.repeat(1, self.times))

    def _fit_group(self, group: int, weight_CR: Tensor) -> None:
        own = slice(group * self.columns, (group + 1) * self.columns)
        if self.already_pruned_IR is not None:
            weight_CR = weight_CR * (1 - self.already_pruned_IR[self._places(own)])
        if not self.rule.scale_search:
            self.scale_GR[group] = fit_scale_R(weight_CR.mT, self.bits_R, self.stored_dtype)
            return
        self.scale_GR[group] = search_scale_R(weight_CR.mT, self.bits_R, self.stored_dtype, self.square_I[own])

    def _places(self, own: slice) -> Tensor | slice:
        """Positions of columns in the loop order."""
        return self.order_I.argsort()[own] if self.rule.activation_order else own

    def _original_CR(self, first: int, last: int) -> Tensor:
        return self.original_IR[first:last].repeat(1, self.times)

    def _standing_CR(self, first: int, last: int) -> Tensor:
        """Current values of columns, with the errors of all columns before `first` compensated."""
        standing_CR = self._original_CR(first, last)
        if first:
            answer_IC = self.root_II[:first, first:last] @ self._upper_CC(first, last)
            standing_CR.addmm_(answer_IC.mT, self.change_IR[:first])
        return standing_CR

    def _upper_CC(self, first: int, last: int) -> Tensor:
        """Inverse of a diagonal block of R; multiplying by it is faster than solving with the block."""
        identity_CC = torch.eye(last - first, dtype=self.root_II.dtype, device=self.root_II.device)
        return torch.linalg.solve_triangular(self.root_II[first:last, first:last], identity_CC, upper=True)

    def solve_block(self, start: int, stop: int) -> None:
        work_BR, upper_BB = self._standing_CR(start, stop), self._upper_CC(start, stop)
        drop_BR = self._drops(start, stop, work_BR) if self.pruning else None
        for first, last in itertools.pairwise(self._edges(start, stop)):
            own, later = slice(first - start, last - start), slice(last - start, None)
            if self.rule.bits is not None:
                self._meet_group(first, stop, work_BR[own.start :])
            fixed = fix_panel(
                Panel(
                    work_BR[own],
                    upper_BB[own, own],
                    self.root_I[first:last],
                    self.pivot_I[first:last],
                    None if drop_BR is None else drop_BR[own],
                    self.patterns,
                    self._rounding(first, last),
                )
            )
            work_BR[later].addmm_(upper_BB[own, later].mT, fixed.error_CR, alpha=-1)
            self._keep(first, last, fixed)

    def _drops(self, start: int, stop: int, work_BR: Tensor) -> Tensor:
        counts = [counts_N[start // self.rule.block_columns] for counts_N in self.counts]
        if self.already_pruned_IR is None:
            return block_drops(self.segments, counts, work_BR, self.pivot_I[start:stop])
        gone_BR = self.already_pruned_IR[start:stop]
        left_BR = work_BR.masked_fill(gone_BR > 0, torch.nan)
        drop_BR = block_drops(self.segments, counts, left_BR, self.pivot_I[start:stop])
        return torch.maximum(drop_BR, gone_BR)

    def _edges(self, start: int, stop: int) -> list[int]:
        """Boundaries of panels, among them the starts of groups: a grid is fitted to up-to-date columns."""
        edges = {*range(start, stop, self.panel_columns), stop}
        if self.rule.bits is not None and not self.rule.activation_order:
            edges.update(range(-(-start // self.columns) * self.columns, stop, self.columns))
        return sorted(edges)

    def _meet_group(self, first: int, stop: int, work_CR: Tensor) -> None:
        """At the start of a group, fit its grid to the current weights, earlier errors included."""
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
            if fixed.drop_CR is not None:
                self.keep[index][:, columns] = fixed.drop_CR[:, segment.rows].mT == 0
            if fixed.ints_CR is not None:
                self.ints[index][:, columns] = fixed.ints_CR[:, segment.rows].mT
        change_CR = self.change_IR[first:last]
        every_CtO = [part_CR.unflatten(1, (self.times, -1)) for part_CR in (fixed.weight_CR, change_CR)]
        torch.sub(self.original_IR[first:last, None], every_CtO[0], out=every_CtO[1])

    def layers(self) -> list[Layer]:
        return [self._layer(index, segment) for index, segment in enumerate(self.segments)]

    def _layer(self, index: int, segment: Segment) -> Layer:
        layer, rule = segment.layer, segment.rule
        if rule.bits is None:
            base = Dense(self.weights[index])
        else:
            scale_OG = self.scale_GR[:, segment.rows].mT.contiguous()
            base = Grid(self.ints[index], scale_OG, rule.bits, rule.group_size, layer.stored_dtype)
        keep_OI = self.keep[index] if rule.sparsity else layer.keep_OI
        return layer.changed(base, keep_OI=keep_OI, damping=self.shared.damping)


def _gone_IR(segments: Sequence[Segment], order_I: Tensor) -> Tensor | None:
    """1 where an earlier step pruned, in loop order; None if none did."""
    if all(segment.layer.keep_OI is None for segment in segments):
        return None
    parts = []
    for layer in (segment.layer for segment in segments):
        gone_OI = torch.zeros_like(layer.target_OI) if layer.keep_OI is None else (~layer.keep_OI).to(layer.target_OI)
        parts.append(gone_OI.mT)
    return torch.cat(parts, dim=1)[order_I]
