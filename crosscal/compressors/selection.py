"""Select exactly `count` of the lowest scores; among equal scores the earlier.

Shapes: R rows, C columns, M members of a group, P pairs of them; of a block that is pruned: B columns, O outputs of one
layer, N scores in one bin.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from crosscal.compiled import compiled

SAMPLED = 64
"""Stride of the sample that brackets the threshold."""
WORTH_SAMPLING = 2**14
"""Number of scores from which sampling first is faster than direct selection."""
BINS = 2**13
BITS_BELOW_BIN = np.uint32(19)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def lowest_per_row(score_RC: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest scores of every row; among equal scores the earlier."""
    if count <= 0 or count >= score_RC.shape[1]:
        return torch.full_like(score_RC, count > 0, dtype=torch.bool)
    threshold_R1 = _kth_lowest_R1(score_RC, count)
    chosen_RC = score_RC <= threshold_R1
    if count_true(chosen_RC) == count * len(score_RC):
        return chosen_RC  # no row has ties at its threshold that exceed `count`
    below_RC, tied_RC = score_RC < threshold_R1, score_RC == threshold_R1
    room_R1 = count - below_RC.sum(1, keepdim=True)
    return below_RC | (tied_RC & (tied_RC.cumsum(1) <= room_R1))


def lowest(score: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest scores of a tensor; among equal scores the earlier in row-major order."""
    return lowest_per_row(score.reshape(1, -1), count).reshape(score.shape)


def kth_lowest(score_N: Tensor, k: int) -> float:
    """Return the k-th lowest score, counted from 1."""
    return float(_kth_lowest_R1(score_N[None], k))


def lowest_of_group(score_MR: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest of the M scores of every column; among equal scores the earlier.

    A score's rank is the number of scores before it; for b < a, b comes before a if s_b <= s_a. For small groups,
    comparing all pairs is faster than sorting.
    """
    later_P, earlier_P, vote_MP, behind_M1 = _pairs(len(score_MR), score_MR.dtype, score_MR.device)
    votes_PR = (score_MR[earlier_P] <= score_MR[later_P]).to(score_MR.dtype)
    return torch.addmm(behind_M1, vote_MP, votes_PR) < count


def count_true(mask: Tensor) -> int:
    """Return the number of True entries; on a CPU numpy counts several times as fast as torch."""
    return int(np.count_nonzero(mask.numpy())) if mask.is_cpu else int(mask.count_nonzero())


@functools.cache
def _pairs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs b < a of group members, the change of the ranks if `s_b <= s_a` (a up, b down), and the initial ranks, with
    every later member first."""
    later_P, earlier_P = torch.tril_indices(size, size, offset=-1, device=device)
    vote_MP = torch.zeros(size, len(later_P), dtype=dtype, device=device)
    pairs = torch.arange(len(later_P), device=device)
    vote_MP[later_P, pairs], vote_MP[earlier_P, pairs] = 1.0, -1.0
    return later_P, earlier_P, vote_MP, torch.arange(size - 1, -1, -1, dtype=dtype, device=device)[:, None]


def _kth_lowest_R1(score_RC: Tensor, k: int) -> Tensor:
    if not score_RC.is_cpu:
        return score_RC.kthvalue(k, dim=1, keepdim=True).values
    score_rc = score_RC.numpy()  # on a CPU numpy selects more than ten times as fast as torch
    if len(score_rc) == 1 and score_rc.size >= WORTH_SAMPLING:
        return torch.from_numpy(_kth_lowest(score_rc[0], k).reshape(1, 1))
    return torch.from_numpy(np.partition(score_rc, k - 1, axis=1)[:, k - 1 : k])


def _kth_lowest(score_N: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th lowest of many scores: a sorted sample gives two bounds, and only scores between are searched.

    A sample of S has about k S / N scores below the threshold, with a standard deviation of at most √S / 2. Bounds at
    four times that miss once in many thousand samples; then all scores are searched.
    """
    sample_S = np.sort(score_N[::SAMPLED])
    expected, slack = k * len(sample_S) // len(score_N), 2 * int(len(sample_S) ** 0.5) + 1
    least, most = sample_S[max(expected - slack, 0)], sample_S[min(expected + slack, len(sample_S) - 1)]
    below = np.count_nonzero(score_N < least) if expected > slack else 0
    between_N = score_N[(score_N >= least) & (score_N <= most)] if below else score_N[score_N <= most]
    if not below < k <= below + len(between_N):
        return np.partition(score_N, k - 1)[k - 1]
    return np.partition(between_N, k - below - 1)[k - below - 1]


def mark_lowest(drop_BO: Tensor, work_BO: Tensor, score_B: Tensor, count: int) -> None:
    """Set 1 at the `count` lowest (w s)² of a block, 0 elsewhere: compiled equivalent of `lowest`, float32 on a CPU.
    NaN comes after all numbers, as it does there: so weights are left out of the choice.

    Floats of one sign are ordered like their bit patterns, so a histogram over the leading bits gives the threshold's
    bin, and only the few per cent of scores in that bin are sorted. Scores are recomputed each time, which costs less
    than storing them.
    """
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
