"""CPU panel kernel, compiled by Numba: a tile of rows stays in the caches while the loop runs over the columns.

Equivalent to `panel.fix_panel_torch`, with the same decisions by the same float32 arithmetic: division to nearest,
halves to even, ties to the earlier column. Products and sums may be fused, so roundoff differs. In plain torch a column
takes half a dozen calls, each with an overhead as large as its arithmetic.

Rows are independent, so a tall panel is divided among torch's threads by whole tiles, with bit-identical results.

Shapes: C columns of the panel, R stacked rows, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from crosscal.compiled import compiled, run_loops
from crosscal.compressors.panel import FixedPanel, Panel, drops_to_complete, row_ranges

CACHE_LINE = 16  # float32 numbers
TILE = 128
"""Rows of a tile: with 128 columns its weights take 64 KiB and stay in the L2 cache; lines of 512 bytes."""
LEAST_TILES = 8
"""Minimum per thread: half a millisecond of work, ten times the cost of starting a thread."""
FOUR = 4
"""Number of columns whose errors are fed forward together to the columns after them."""
STORED = {None: 0, torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
ZERO, ONE = np.float32(0.0), np.float32(1.0)
NOTHING = np.zeros((1, 1), np.float32)
LARGEST_HALF = np.float32(65520.0)  # float16 overflows to infinity from here on
LEAST_NORMAL_HALF = np.float32(2.0**-14)
STEP_OF_SMALL_HALVES = np.float32(0.75)  # adding and subtracting it rounds to multiples of 2⁻²⁴


def fix_panel_numba(panel: Panel) -> FixedPanel:
    """Same as `fix_panel_torch`, for float32 on a CPU."""
    rounding = panel.rounding
    weight_CR = panel.weight_CR.numpy()
    columns, rows = weight_CR.shape
    # It is transposed later, down the columns: one extra cache line per row avoids cache-set conflicts.
    fixed_CR = np.empty((columns, rows + CACHE_LINE), np.float32)[:, :rows]
    error_CR = np.empty((columns, rows), np.float32)
    ints_CR = np.empty(weight_CR.shape if rounding else (1, 1), np.int8)
    drop = drops_to_complete(panel)
    prunes = drop is not None
    upper_CC, root_C, pivot_C = [part.contiguous().numpy() for part in (panel.upper_CC, panel.root_C, panel.pivot_C)]
    loops = []
    for first, last, kept, group in _parts(panel, torch.get_num_threads()):
        own = slice(first, last)
        loop = partial(
            _walk,
            weight_CR[:, own],
            upper_CC,
            root_C,
            pivot_C,
            drop.numpy()[:, own] if drop is not None else NOTHING,
            rounding.scale_CR.numpy()[:, own] if rounding else NOTHING,
            rounding.bits_R.numpy()[own] if rounding else NOTHING[0],
            fixed_CR[:, own],
            error_CR[:, own],
            ints_CR[:, own] if rounding else ints_CR,
            prunes,
            rounding is not None,
            STORED[rounding.stored_dtype] if rounding else 0,
            kept,
            group,
        )
        loops.append(loop)
    run_loops(loops, torch.get_num_threads())
    ints = torch.from_numpy(ints_CR) if rounding else None
    return FixedPanel(torch.from_numpy(fixed_CR), torch.from_numpy(error_CR), ints, drop)


def _parts(panel: Panel, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """Split each band into at most `threads` parts of whole tiles, of at least `LEAST_TILES` each."""
    for first, last, kept, group in row_ranges(panel):
        tiles = max(-(-(last - first) // (threads * TILE)), LEAST_TILES)
        for start in range(first, last, tiles * TILE):
            yield start, min(start + tiles * TILE, last), kept, group


@compiled
def _walk(
    weight_CR,
    upper_CC,
    root_C,
    pivot_C,
    drop_CR,
    scale_CR,
    bits_R,
    fixed_CR,
    error_CR,
    ints_CR,
    prunes,
    rounds,
    stored_as,
    kept,
    group,
):
    columns, rows = weight_CR.shape
    work_CT, drop_CT = np.empty((columns, TILE), np.float32), np.zeros((columns, TILE), np.float32)
    error_FT = np.empty((FOUR, TILE), np.float32)
    highest_T, value_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for first in range(0, rows, TILE):
        tile = min(TILE, rows - first)
        last = first + tile
        for j in range(columns):
            work_CT[j, :tile] = weight_CR[j, first:last]
            if prunes:
                drop_CT[j, :tile] = drop_CR[j, first:last]
        if rounds:
            for t in range(tile):
                highest_T[t] = ONE * 2 ** (bits_R[first + t] - ONE)
        for start in range(0, columns, FOUR):
            stop = min(start + FOUR, columns)
            for j in range(start, stop):
                work_T, error_T = work_CT[j], error_FT[j - start]
                if group and j % group == 0:
                    _draw(work_CT, pivot_C, drop_CT, j, kept, group, tile)
                _prune(work_T, drop_CT[j], value_T, tile)
                if rounds:
                    _round(value_T, scale_CR[j, first:last], highest_T, stored_as, ints_CR[j, first:last], tile)
                for t in range(tile):
                    error_T[t] = (work_T[t] - value_T[t]) * root_C[j]
                fixed_CR[j, first:last] = value_T[:tile]
                error_CR[j, first:last] = error_T[:tile]
                _feed_forward(work_CT, upper_CC, error_T, j, stop, tile)
            _feed_four_forward(work_CT, upper_CC, error_FT, start, tile)
        if prunes and group:
            drop_CR[:, first:last] = drop_CT[:, :tile]


@compiled
def _feed_forward(work_CT, upper_CC, error_T, j, stop, tile):
    """Feed column j's error forward to the columns after it and before `stop`."""
    for k in range(j + 1, stop):
        upper = upper_CC[j, k]
        for t in range(tile):
            work_CT[k, t] -= upper * error_T[t]


@compiled
def _feed_four_forward(work_CT, upper_CC, error_FT, j, tile):
    """Feed the errors of four columns from j on forward to all after them, each loaded and stored once for all four."""
    for k in range(j + FOUR, len(work_CT)):
        upper0, upper1, upper2, upper3 = upper_CC[j, k], upper_CC[j + 1, k], upper_CC[j + 2, k], upper_CC[j + 3, k]
        for t in range(tile):
            fed = upper0 * error_FT[0, t] + upper1 * error_FT[1, t] + upper2 * error_FT[2, t] + upper3 * error_FT[3, t]
            work_CT[k, t] -= fed


@compiled
def _prune(work_T, drop_T, value_T, tile):
    """Set dropped weights to exactly 0 instead of subtracting."""
    for t in range(tile):
        value_T[t] = ZERO if drop_T[t] > ZERO else work_T[t]


@compiled
def _draw(work_CT, pivot_C, drop_CT, j, kept, group, tile):
    """Select the mask of the group that starts at column j: a score's rank is the number of scores before it. What an
    earlier step removed scores -1 and stays removed."""
    score_MT, rank_T = np.empty((group, TILE), np.float32), np.empty(TILE, np.float32)
    for member in range(group):
        for t in range(tile):
            score = work_CT[j + member, t] * pivot_C[j + member]
            score_MT[member, t] = -ONE if drop_CT[j + member, t] > ZERO else score * score
    for member in range(group):
        own_T, drop_T = score_MT[member], drop_CT[j + member]
        rank_T[:] = ZERO
        for other in range(group):
            other_T = score_MT[other]
            if other < member:
                for t in range(tile):
                    rank_T[t] += ONE if other_T[t] <= own_T[t] else ZERO
            else:
                for t in range(tile):
                    rank_T[t] += ONE if other_T[t] < own_T[t] else ZERO
        for t in range(tile):
            drop_T[t] = ONE if own_T[t] < ZERO or rank_T[t] < group - kept else ZERO


@compiled
def _round(value_T, scale_T, highest_T, stored_as, ints_T, tile):
    """Round each value to the nearest level, and replace it by that level's value as the checkpoint stores it."""
    for t in range(tile):
        level = np.rint(min(max(value_T[t] / scale_T[t], -highest_T[t]), highest_T[t] - ONE))
        ints_T[t] = np.int8(level)
        value_T[t] = level * scale_T[t]
    bits_T = value_T.view(np.int32)
    if stored_as == 1:  # bfloat16: drop sixteen bits, halves to even
        for t in range(tile):
            bits_T[t] = (bits_T[t] + np.int32(0x7FFF) + ((bits_T[t] >> 16) & 1)) & np.int32(-0x10000)
    if stored_as == 2:  # float16: drop thirteen bits
        for t in range(tile):
            value = value_T[t]
            if abs(value) >= LARGEST_HALF:
                value_T[t] = np.float32(np.inf) * value
            elif abs(value) < LEAST_NORMAL_HALF:
                value_T[t] = (value + STEP_OF_SMALL_HALVES) - STEP_OF_SMALL_HALVES
            else:
                bits_T[t] = (bits_T[t] + np.int32(0xFFF) + ((bits_T[t] >> 13) & 1)) & np.int32(-0x2000)
