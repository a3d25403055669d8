"""GPU panel kernel in Triton: a program holds some rows of all columns in registers and loops over the columns.

Equivalent to `panel.fix_panel_torch`, with the same decisions by the same float32 arithmetic: division to nearest,
halves to even, ties to the earlier column. Products and sums may be fused, so roundoff differs.

Status: the arithmetic is tested through Triton's interpreter on a CPU (`tests/test_compressors_kernels.py`). The kernel
has not been compiled or timed on a GPU yet; the same test does so where a GPU is present. Until then it is used only
with `CROSSCAL_TRITON=1`.

Shapes: C columns of the panel (P: the next power of two), R stacked rows, B rows of a program, M columns of a group.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from crosscal.compressors.panel import FixedPanel, Panel, drops_to_complete, row_ranges

ROWS = 64  # of a program: with 32 columns, 16 numbers per thread and matrix
WARPS = 4
NEAREST = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds a small float32 to an integer
STORED = {None: 0, torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}


def fix_panel_triton(panel: Panel) -> FixedPanel:
    """Same as `fix_panel_torch`, for float32 on a GPU."""
    rounding = panel.rounding
    weight_CR = panel.weight_CR.clone()
    error_CR = torch.empty_like(weight_CR)
    ints_CR = torch.empty_like(weight_CR, dtype=torch.int8 if rounding else torch.float32)
    drop = drops_to_complete(panel)
    drop_CR = weight_CR if drop is None else drop
    scale_CR, bits_R = (rounding.scale_CR, rounding.bits_R) if rounding else (weight_CR, weight_CR)
    columns = len(weight_CR)
    for first, last, kept, group in row_ranges(panel):
        _walk[(triton.cdiv(last - first, ROWS),)](  # pyright: ignore[reportIndexIssue]
            weight_CR,
            panel.upper_CC,
            panel.root_C,
            panel.pivot_C,
            drop_CR,
            scale_CR,
            bits_R,
            error_CR,
            ints_CR,
            first,
            last,
            weight_CR.stride(0),
            panel.upper_CC.stride(0),
            panel.upper_CC.stride(1),
            panel.root_C.stride(0),
            drop_CR.stride(0),
            scale_CR.stride(0),
            columns,
            kept,
            COLUMNS=triton.next_power_of_2(columns),
            GROUP=group,
            PRUNE=drop is not None,
            ROUND=rounding is not None,
            STORED_AS=STORED[rounding.stored_dtype] if rounding else 0,
            ROWS=ROWS,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]  (of the launch, not of the function)
        )
    return FixedPanel(weight_CR, error_CR, ints_CR if rounding else None, drop)


@triton.jit
def _walk(
    weight_ptr,
    upper_ptr,
    root_ptr,
    score_ptr,
    drop_ptr,
    scale_ptr,
    bits_ptr,
    error_ptr,
    ints_ptr,
    first,
    last,
    weight_stride,
    upper_row_stride,
    upper_column_stride,
    root_stride,
    drop_stride,
    scale_stride,
    columns,
    kept,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PRUNE: tl.constexpr,
    ROUND: tl.constexpr,
    STORED_AS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_B = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_P = tl.arange(0, COLUMNS)
    here_B = row_B < last
    here_PB = (column_P[:, None] < columns) & here_B[None, :]
    place_PB = column_P[:, None].to(tl.int64) * weight_stride + row_B[None, :]
    weight_PB = tl.load(weight_ptr + place_PB, mask=here_PB, other=0.0)
    drop_PB = tl.zeros_like(weight_PB)
    if PRUNE:
        drop_place_PB = column_P[:, None].to(tl.int64) * drop_stride + row_B[None, :]
        drop_PB = tl.load(drop_ptr + drop_place_PB, mask=here_PB, other=0.0)
    pivot_P = tl.load(score_ptr + column_P, mask=column_P < columns, other=0.0)
    error_PB = tl.zeros_like(weight_PB)
    ints_PB = tl.zeros_like(weight_PB)
    highest_B = tl.zeros([ROWS], dtype=tl.float32)
    if ROUND:
        highest_B = tl.exp2(tl.load(bits_ptr + row_B, mask=here_B, other=1.0) - 1)
    for j in range(columns):
        own_P1 = (column_P == j)[:, None]
        if GROUP > 0:  # noqa: SIM102  (decided when the kernel is compiled)
            if j % GROUP == 0:
                drop_PB = _drawn(weight_PB * pivot_P[:, None], drop_PB, column_P, j, kept, GROUP)
        weight_B = tl.sum(tl.where(own_P1, weight_PB, 0.0), axis=0)
        fixed_B = weight_B
        if PRUNE:
            fixed_B = tl.where(tl.sum(tl.where(own_P1, drop_PB, 0.0), axis=0) > 0, 0.0, weight_B)
        if ROUND:
            scale_B = tl.load(scale_ptr + j * scale_stride + row_B, mask=here_B, other=1.0)
            level_B = tl.minimum(tl.maximum(tl.div_rn(fixed_B, scale_B), -highest_B), highest_B - 1)
            level_B = (level_B + NEAREST) - NEAREST
            ints_PB = tl.where(own_P1, level_B[None, :], ints_PB)
            fixed_B = level_B * scale_B
            if STORED_AS == 1:
                fixed_B = _to_bfloat16(fixed_B)
            if STORED_AS == 2:
                fixed_B = fixed_B.to(tl.float16).to(tl.float32)
        error_B = (weight_B - fixed_B) * tl.load(root_ptr + j * root_stride)
        later_P = column_P > j
        place_P = j * upper_row_stride + column_P * upper_column_stride
        upper_P = tl.load(upper_ptr + place_P, mask=later_P & (column_P < columns), other=0.0)
        weight_PB = tl.where(own_P1, fixed_B[None, :], weight_PB - upper_P[:, None] * error_B[None, :])
        error_PB = tl.where(own_P1, error_B[None, :], error_PB)
    tl.store(weight_ptr + place_PB, weight_PB, mask=here_PB)
    tl.store(error_ptr + place_PB, error_PB, mask=here_PB)
    if PRUNE and GROUP > 0:
        tl.store(drop_ptr + drop_place_PB, drop_PB, mask=here_PB)
    if ROUND:
        tl.store(ints_ptr + place_PB, ints_PB.to(tl.int8), mask=here_PB)


@triton.jit
def _drawn(root_score_PB, drop_PB, column_P, j, kept, GROUP: tl.constexpr):
    """Return the mask with the group from column j selected: a score's rank is the number of scores before it. What an
    earlier step removed scores -1 and stays removed."""
    score_PB = tl.where(drop_PB > 0, -1.0, root_score_PB * root_score_PB)
    rank_PB = tl.zeros_like(score_PB)
    for member in range(GROUP):
        other_P1 = (column_P == j + member)[:, None]
        other_B = tl.sum(tl.where(other_P1, score_PB, 0.0), axis=0)[None, :]
        earlier_P1 = (column_P > j + member)[:, None]  # the other column is earlier: pruned first among equals
        before_PB = (other_B < score_PB) | (earlier_P1 & (other_B == score_PB))
        rank_PB += tl.where(before_PB & (other_P1 == 0), 1.0, 0.0)
    in_group_P1 = ((column_P >= j) & (column_P < j + GROUP))[:, None]
    return tl.where(in_group_P1 & (rank_PB < GROUP - kept), 1.0, drop_PB)


@triton.jit
def _to_bfloat16(value_B):
    """Round to the nearest bfloat16, halves to even; written out because the interpreter's own cast truncates."""
    bits_B = value_B.to(tl.int32, bitcast=True)
    bits_B = (bits_B + 0x7FFF + ((bits_B >> 16) & 1)) & -65536
    return bits_B.to(tl.float32, bitcast=True)
