"""The compiled selection of the lowest scores equals a stable sort, also for ties."""

from __future__ import annotations

import pytest
import torch

from crosscal.compressors.selection import lowest, mark_lowest


def sorted_out(score_BO: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest by a stable sort in row-major order."""
    drop = torch.zeros(score_BO.numel())
    drop[score_BO.reshape(-1).sort(stable=True).indices[:count]] = 1
    return drop.view_as(score_BO)


SCORES = {
    "spread over many magnitudes": lambda: torch.randn(16, 90) * torch.randn(16, 90).mul(8).exp(),
    "few different ones": lambda: torch.randint(-2, 3, (16, 90)).float(),
    "all equal": lambda: torch.full((16, 90), 0.5),
    "zeros of both signs": lambda: torch.zeros(16, 90) * torch.randn(16, 90),
    "too small and too large to square": lambda: torch.randn(16, 90) * 1e30 ** torch.randint(-1, 2, (16, 90)),
    "one column": lambda: torch.randn(1, 7),
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.97, 1.0])
def test_marks_what_a_sort_would(case: str, share: float) -> None:
    torch.manual_seed(0)
    work_BR, score_B = SCORES[case](), torch.rand(16)[: len(SCORES[case]())]
    score_B[0] = 0.0
    wide_BR = torch.cat([work_BR, torch.randn(len(work_BR), 5)], 1)  # views, as for a layer in a stack
    work_BO, drop_BO = wide_BR[:, : work_BR.shape[1]], torch.full_like(wide_BR, 7.0)[:, : work_BR.shape[1]]
    count = round(share * work_BO.numel())
    mark_lowest(drop_BO, work_BO, score_B, count)
    assert torch.equal(drop_BO, sorted_out((work_BO * score_B[:, None]).square(), count))


@pytest.mark.parametrize("count", [1, 100, 700])
@pytest.mark.parametrize("outputs", [90, 4000])
def test_nan_is_left_out(count: int, outputs: int) -> None:
    """Up to as many as there are numbers."""
    torch.manual_seed(0)
    work_BO, score_B = torch.full((16, outputs), torch.nan), torch.rand(16)
    work_BO.view(-1)[torch.randperm(work_BO.numel())[:700]] = torch.randn(700)
    score_B[0] = 0.0
    score_BO, drop_BO = (work_BO * score_B[:, None]).square(), torch.zeros_like(work_BO)
    mark_lowest(drop_BO, work_BO, score_B, count)
    assert torch.equal(drop_BO, sorted_out(score_BO, count))
    assert torch.equal(drop_BO, lowest(score_BO, count).float())
    assert not work_BO[drop_BO > 0].isnan().any()
