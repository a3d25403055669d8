"""The lowest scores of a block, found by one compiled count of their leading bits on a CPU.

The twin of `selection.lowest` for scores w² s² in float32: the same mask, ties included. Numbers of one sign are
ordered as their bits are, so a histogram over the leading bits says in which bin the threshold lies, and only the few
per cent in that bin are sorted. Scores are computed anew each time they are needed, which costs less than keeping them.

Shapes: B columns of the block, O outputs of one layer, N scores in one bin.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crosscal.compiled import compiled

BINS = 2**13
BITS_BELOW_BIN = np.uint32(19)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def mark_lowest(drop_BO: Tensor, work_BO: Tensor, score_B: Tensor, count: int) -> None:
    """Set 1 at the `count` lowest (w s)², 0 elsewhere; among equals the earlier in row-major order goes first."""
    if 0 < count < work_BO.numel():
        _mark(work_BO.numpy(), score_B.contiguous().numpy(), count, drop_BO.numpy())
    else:
        drop_BO.fill_(float(count > 0))


@compiled
def _mark(work_BO, score_B, count, drop_BO):
    bins = np.zeros(BINS, np.int64)
    square_O = np.empty(work_BO.shape[1], np.float32)
    bits_O = square_O.view(np.uint32)
    for b in range(len(work_BO)):
        _squares(work_BO[b], score_B[b], square_O)
        for o in range(len(bits_O)):
            bins[bits_O[o] >> BITS_BELOW_BIN] += 1
    chosen, below = 0, 0
    while below + bins[chosen] < count:
        below += bins[chosen]
        chosen += 1
    inside_N, found = np.empty(bins[chosen], np.float32), 0
    for b in range(len(work_BO)):
        _squares(work_BO[b], score_B[b], square_O)
        for o in range(len(bits_O)):
            if bits_O[o] >> BITS_BELOW_BIN == chosen:
                inside_N[found] = square_O[o]
                found += 1
    inside_N.sort()
    threshold = inside_N[count - below - 1]
    tied_that_go = count - below - np.searchsorted(inside_N, threshold)
    for b in range(len(work_BO)):
        _squares(work_BO[b], score_B[b], square_O)
        drop_O = drop_BO[b]
        for o in range(len(square_O)):
            drop_O[o] = ONE if square_O[o] < threshold else ZERO
        if tied_that_go:
            for o in range(len(square_O)):
                if square_O[o] == threshold and tied_that_go:
                    drop_O[o] = ONE
                    tied_that_go -= 1


@compiled
def _squares(work_O, score, square_O):
    for o in range(len(work_O)):
        root = work_O[o] * score
        square_O[o] = root * root
