"""Which rows of the stack belong to which layer under which rule, and which of their weights are to go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crosscal.compiled import run_loops
from crosscal.compressors.column_rule import ColumnRule
from crosscal.compressors.panel import Pattern
from crosscal.compressors.selection import lowest, mark_lowest
from crosscal.compressors.state import Layer


@dataclass(frozen=True)
class Segment:
    """The rows of the stack that belong to one layer under one rule."""

    layer: Layer
    rule: ColumnRule
    rows: slice


def segments_of(layers: Sequence[Layer], rules: Sequence[ColumnRule]) -> list[Segment]:
    """Rule by rule, layer by layer. Raises `UsageError` for settings that do not fit a layer."""
    segments, first = [], 0
    for rule, layer in itertools.product(rules, layers):
        outputs, inputs = layer.target_OI.shape
        rule.check(inputs, layer.name)
        segments.append(Segment(layer, rule, slice(first, first + outputs)))
        first += outputs
    return segments


def patterns(segments: Sequence[Segment]) -> list[Pattern]:
    """The rows with n:m masks; neighbours of one pattern are drawn together."""
    found: list[Pattern] = []
    for sparsity, same in itertools.groupby(segments, lambda segment: segment.rule.sparsity):
        if sparsity and sparsity.group:
            rows = [segment.rows for segment in same]
            found.append(Pattern(slice(rows[0].start, rows[-1].stop), sparsity.kept or 0, sparsity.group))
    return found


def block_drops(segments: Sequence[Segment], work_BR: Tensor, start: int, score_B: Tensor) -> Tensor:
    """1 where a block's weights go, for the fractional sparsities: every layer's lowest w² / U_jj² (2301.00774,
    eq. 5), drawn once for the block that begins at `start`."""
    stop = start + len(work_BR)
    drop_BR = torch.zeros_like(work_BR)
    draws = []
    for segment in segments:
        sparsity = segment.rule.sparsity
        if sparsity and not sparsity.group:
            outputs = len(segment.layer.target_OI)
            count = sparsity.removed(stop * outputs) - sparsity.removed(start * outputs)
            own_BO = work_BR[:, segment.rows]
            if work_BR.is_cpu and work_BR.dtype == torch.float32:
                draws.append(partial(mark_lowest, drop_BR[:, segment.rows], own_BO, score_B, count))
            else:
                drop_BR[:, segment.rows] = lowest((own_BO * score_B[:, None]).square_(), count)
    run_loops(draws, torch.get_num_threads())
    return drop_BR
