"""`MeanSum`: statistics added set by set give the weighted mean over the sets and leave the sets unchanged."""

from __future__ import annotations

import pytest
import torch

from crosscal.errors import EmptyStatistics, NotFinite, StatisticsError
from crosscal.statistics import InputMoments, MeanSum, MomentsAccumulator, Statistic
from tests.helpers.problems import correlated_inputs_TI


def of(input_TI: torch.Tensor) -> InputMoments:
    """Moments with a second input stream, as the dense one of `cross` and `drift`."""
    accumulator = MomentsAccumulator(input_TI.shape[1], dtype=torch.float64, wanted=tuple(Statistic))
    accumulator.add(input_TI, input_TI.roll(1, dims=1))
    return accumulator.finish()


SETS = [of(scale * correlated_inputs_TI(40 + 7 * scale, 12, seed=scale)) for scale in (1, 2, 5)]
EMPTY = InputMoments.zero(12, torch.float64, tuple(Statistic))


def summed(*pairs: tuple[InputMoments, float]) -> MeanSum:
    total = MeanSum(Statistic)
    for moments, weight in pairs:
        total.add(moments, weight)
    total.finish()
    return total


def hessian_II(total: MeanSum) -> torch.Tensor:
    return total.means()[Statistic.GRAM]


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1.0, 1.0, 1.0), (0.9, 0.05, 0.05)])
def test_it_is_the_weighted_mean(weights: tuple[float, ...]) -> None:
    before = [moments.gram_II.clone() for moments in SETS]
    pairs = list(zip(weights, SETS, strict=True))
    expected_II = sum(w * m.gram_II for w, m in pairs) / sum(w * m.tokens for w, m in pairs)
    total = summed(*zip(SETS, weights, strict=True))
    torch.testing.assert_close(hessian_II(total), expected_II, rtol=1e-12, atol=1e-12)
    for which, mean in total.means().items():
        expected = sum(w * m[which] for w, m in pairs) / sum(w * m.tokens for w, m in pairs)
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert set(total.means()) == set(Statistic)
    assert total.tokens == sum(moments.tokens for moments in SETS)
    assert all(torch.equal(moments.gram_II, gram_II) for moments, gram_II in zip(SETS, before, strict=True))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_one_set_is_its_own_hessian_bit_for_bit(weight: float) -> None:
    assert torch.equal(hessian_II(summed((SETS[1], weight))), SETS[1].hessian_II())


def test_a_set_without_tokens_leaves_its_weight_to_the_others() -> None:
    with_empty, without = (summed(*pairs, (SETS[0], 0.2), (SETS[2], 0.3)) for pairs in ([(EMPTY, 0.5)], []))
    assert torch.equal(hessian_II(with_empty), hessian_II(without))


def test_a_weighted_sum_that_was_kept_counts_as_its_sets_do() -> None:
    kept = SETS[0].weighted(3.0) + SETS[1]
    found, expected = summed((kept, 1.0), (SETS[2], 2.0)), summed((SETS[0], 3.0), (SETS[1], 1.0), (SETS[2], 2.0))
    torch.testing.assert_close(hessian_II(found), hessian_II(expected), rtol=1e-12, atol=1e-12)


def test_what_is_no_hessian_is_an_error_that_names_the_place() -> None:
    with pytest.raises(EmptyStatistics, match=r"experts\.3"):
        summed((EMPTY, 1.0)).means("experts.3")
    with pytest.raises(EmptyStatistics):
        summed().means()
    broken = correlated_inputs_TI(20, 12, seed=3)
    broken[2, 3] = float("inf")
    with pytest.raises(NotFinite, match="qkv"):
        summed((SETS[0], 0.5), (of(broken), 0.5)).means("qkv")
    with pytest.raises(StatisticsError, match="12 and 3 inputs"):
        summed((SETS[0], 0.5), (of(torch.ones(4, 3)), 0.5))
