"""Moments are sums over tokens, independent of batching and order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, StatisticsError
from crosscal.statistics import EVERY, VECTORS, InputMoments, MomentsAccumulator, Statistic
from crosscal.statistics.blas import BLAS
from crosscal.statistics.half_product import INPUTS_A_STRIP, LEAST_PANEL_ROWS, add_half_product, add_panels, strips
from crosscal.statistics.moments import CACHED_ROWS
from tests.helpers.problems import correlated_inputs_TI

ROUNDOFF_F64 = 1e-12
ROUNDOFF_F32 = 2e-6  # relative to the diagonal: a few units in the last place for the few hundred tokens summed here


def accumulated(*batches: Tensor, dtype: torch.dtype = torch.float64) -> InputMoments:
    accumulator = MomentsAccumulator(batches[0].shape[-1], dtype=dtype)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.moments()


def assert_same(a: InputMoments, b: InputMoments, tolerance: float = ROUNDOFF_F64) -> None:
    assert a.tokens == b.tokens
    size_II = b.gram_II.double().diagonal().sqrt().outer(b.gram_II.double().diagonal().sqrt())
    assert ((a.gram_II.double() - b.gram_II.double()).abs() <= tolerance * size_II).all()
    for mine_I, theirs_I in ((a.abs_sum_I, b.abs_sum_I), (a.sum_I, b.sum_I)):
        assert ((mine_I.double() - theirs_I.double()).abs() <= tolerance * b.abs_sum_I.double()).all()
    torch.testing.assert_close(
        a[Statistic.SQUARE_SUM].double(), b[Statistic.SQUARE_SUM].double(), rtol=tolerance, atol=0
    )


def reference(input_TI: Tensor) -> InputMoments:
    """Return the moments, summed token by token in float64."""
    rows_TI = input_TI.double()
    gram_II = torch.zeros(rows_TI.shape[1], rows_TI.shape[1], dtype=torch.float64)
    for row_I in rows_TI:
        gram_II += torch.outer(row_I, row_I)
    sums = {
        Statistic.GRAM: gram_II,
        Statistic.SQUARE_SUM: gram_II.diagonal(),
        Statistic.ABS_SUM: rows_TI.abs().sum(0),
        Statistic.SUM: rows_TI.sum(0),
    }
    return InputMoments(sums, len(rows_TI))


@pytest.mark.parametrize("inputs", [1, 2, LEAST_PANEL_ROWS - 1, LEAST_PANEL_ROWS, LEAST_PANEL_ROWS + 1, 1100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ROUNDOFF_F64), (torch.float32, ROUNDOFF_F32)])
def test_equals_the_sum_over_tokens(inputs: int, dtype: torch.dtype, tolerance: float) -> None:
    input_TI = correlated_inputs_TI(40, inputs, seed=1).to(dtype)
    moments = accumulated(input_TI, dtype=dtype)
    assert moments.gram_II.dtype == moments.abs_sum_I.dtype == moments.sum_I.dtype == dtype
    assert_same(moments, reference(input_TI), tolerance)
    assert torch.equal(moments.gram_II, moments.gram_II.mT)


@pytest.mark.parametrize("inputs", [1, LEAST_PANEL_ROWS, 2 * LEAST_PANEL_ROWS + 5, 2 * INPUTS_A_STRIP + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ROUNDOFF_F64), (torch.float32, ROUNDOFF_F32)])
@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_panels_and_blas_make_the_same_triangle(inputs: int, tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    input_TI = correlated_inputs_TI(tokens + 1, inputs, seed=9).to(dtype)[:tokens]
    start_II = torch.full((inputs, inputs), 2.0, dtype=dtype)
    expected_II = (start_II.double() + input_TI.double().mT @ input_TI.double()).triu()
    for add in (add_half_product, add_panels):
        upper_II = start_II.clone()
        for strip in strips(inputs):
            add(upper_II, input_TI, strip)
        size_II = expected_II.diagonal().sqrt().outer(expected_II.diagonal().sqrt())
        assert ((upper_II.triu().double() - expected_II).abs() <= tolerance * size_II).all(), add.__name__


@pytest.mark.parametrize("inputs", [1, 17, INPUTS_A_STRIP, 2 * INPUTS_A_STRIP, 3000, 4096, 14336])
def test_strips_are_all_rows_once_and_share_the_triangle_out(inputs: int) -> None:
    cut = strips(inputs)
    assert [row for strip in cut for row in range(inputs)[strip]] == list(range(inputs))
    areas = [sum(inputs - row for row in range(inputs)[strip]) for strip in cut]
    assert max(areas) <= 1.05 * sum(areas) / len(areas)


@pytest.mark.parametrize("inputs", [33, 768, 2 * INPUTS_A_STRIP])
def test_threads_change_no_bit_of_a_sum_nor_what_others_have(inputs: int) -> None:
    input_TI = correlated_inputs_TI(600, inputs, seed=12).float()
    before, blas_before = torch.get_num_threads(), blas_threads()

    def alone(_: object) -> InputMoments:
        with BLAS.one_thread():
            return accumulated(input_TI, dtype=torch.float32)

    expected = alone(None)
    try:
        with BLAS.one_thread():
            for threads in (2, 8, 16):
                torch.set_num_threads(threads)
                assert equal(accumulated(input_TI, dtype=torch.float32), expected), threads
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    with threadpool_limits(3, user_api="blas"):
        asked = blas_threads()
        with BLAS.one_thread(), ThreadPoolExecutor(4) as pool:
            assert all(equal(one, expected) for one in pool.map(alone, range(12)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(alone, range(12)))
        assert blas_threads() == asked
    assert blas_threads() == blas_before


def equal(one: InputMoments, other: InputMoments) -> bool:
    assert one.sums.keys() == other.sums.keys()
    return all(torch.equal(sum_, other[which]) for which, sum_ in one.sums.items())


def blas_threads() -> dict[str, int]:
    return {
        library["filepath"]: library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [1, 17, 2 * INPUTS_A_STRIP])
def test_the_small_sums_are_the_same_without_a_gram_matrix(inputs: int, dtype: torch.dtype) -> None:
    """Bit for bit, so that a solve does not depend on what else a run needs."""
    input_TI = correlated_inputs_TI(130, inputs, seed=4).to(dtype)
    small, every = (MomentsAccumulator(inputs, dtype=dtype, wanted=wanted) for wanted in (VECTORS, EVERY))
    for accumulator in (small, every):
        accumulator.add(input_TI)
    found, whole = small.finish(), every.finish()
    assert equal(found, whole.only(VECTORS))
    assert set(whole.sums) == EVERY
    with pytest.raises(StatisticsError, match="was not summed"):
        found[Statistic.GRAM]
    with pytest.raises(StatisticsError, match="different sums"):
        found + whole


def test_rows_beyond_what_is_summed_at_once() -> None:
    input_TI = correlated_inputs_TI(2 * CACHED_ROWS + 3, 5, seed=10)
    assert_same(accumulated(input_TI), reference(input_TI))
    strided_TI = correlated_inputs_TI(40, 10, seed=10)[:, ::2]
    assert_same(accumulated(strided_TI), reference(strided_TI))
    assert_same(accumulated(strided_TI.mT), reference(strided_TI.mT))


@pytest.mark.parametrize("sizes", [(300,), (1,) * 20 + (280,), (7, 200, 93), (150, 0, 150)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ROUNDOFF_F64), (torch.float32, ROUNDOFF_F32)])
def test_any_batch_size_and_order(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    input_TI = correlated_inputs_TI(300, 33, seed=2).to(dtype)
    expected = reference(input_TI)
    shuffled_TI = input_TI[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    assert_same(accumulated(*shuffled_TI.split(list(sizes)), dtype=dtype), expected, tolerance)


def test_sums_of_sets_are_moments_of_their_union() -> None:
    input_TI = correlated_inputs_TI(90, 20, seed=4)
    a, b, c = (accumulated(part) for part in input_TI.split([10, 30, 50]))
    assert_same(a + b + c, accumulated(input_TI))
    assert_same((a + b) + c, a + (b + c))
    assert equal(a + b, b + a)
    assert ((a + b).tokens, (a + b).weighted_tokens) == ((b + a).tokens, (b + a).weighted_tokens)


def test_zero_is_neutral_bit_for_bit() -> None:
    a = accumulated(correlated_inputs_TI(9, 5, seed=5))
    total = a + InputMoments.zero(5, torch.float64)
    assert total.tokens == a.tokens
    assert torch.equal(total.gram_II, a.gram_II)
    assert torch.equal(total.abs_sum_I, a.abs_sum_I)
    assert torch.equal(total.sum_I, a.sum_I)


def test_leading_shapes_are_tokens() -> None:
    input_TI = correlated_inputs_TI(24, 6, seed=6)
    flat = accumulated(input_TI)
    for shape in ((2, 12, 6), (2, 3, 4, 6), (24, 1, 6)):
        assert torch.equal(accumulated(input_TI.reshape(shape)).gram_II, flat.gram_II)
    one = accumulated(input_TI[0])
    assert one.tokens == 1
    assert torch.equal(one.gram_II, torch.outer(input_TI[0], input_TI[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_the_wide_dtype(dtype: torch.dtype) -> None:
    input_TI = correlated_inputs_TI(400, 16, seed=7).to(dtype)
    assert_same(accumulated(input_TI, dtype=torch.float32), reference(input_TI), ROUNDOFF_F32)
    assert_same(InputMoments.of(input_TI), reference(input_TI), ROUNDOFF_F32)
    assert InputMoments.of(input_TI).gram_II.dtype == torch.float32


def test_inputs_that_need_gradients_leave_no_graph() -> None:
    input_TI = correlated_inputs_TI(4, 3, seed=8).requires_grad_()
    assert not accumulated(input_TI).gram_II.requires_grad


def test_moments_are_a_snapshot() -> None:
    accumulator = MomentsAccumulator(3, dtype=torch.float64)
    accumulator.add(torch.ones(2, 3, dtype=torch.float64))
    before = accumulator.moments()
    accumulator.add(torch.ones(2, 3, dtype=torch.float64))
    assert before.tokens == 2
    assert torch.equal(before.gram_II, torch.full((3, 3), 2.0, dtype=torch.float64))
    assert torch.equal(before.sum_I, torch.full((3,), 2.0, dtype=torch.float64))
    assert accumulator.moments().tokens == 4


def test_nothing_added_is_zero_and_has_no_hessian() -> None:
    for moments in (accumulated(torch.zeros(0, 4)), accumulated(torch.zeros(2, 0, 4)), InputMoments.zero(4)):
        assert moments.tokens == 0
        assert not moments.gram_II.any()
        assert not moments.mean_abs_I.any()
        with pytest.raises(EmptyStatistics, match=r"blocks\.1\.experts\.7"):
            moments.hessian_II("blocks.1.experts.7")


def test_hessian_and_means_are_per_token() -> None:
    input_TI = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64)
    moments = InputMoments.of(input_TI)
    assert torch.equal(moments.hessian_II(), torch.tensor([[5.0, -1.0], [-1.0, 2.0]], dtype=torch.float64))
    assert torch.equal(moments.mean_abs_I, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert torch.equal(moments.sum_I, torch.tensor([4.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_or_overflow_are_named(bad: float) -> None:
    input_TI = torch.ones(4, 3)
    input_TI[2, 1] = bad
    with pytest.raises(NotFinite, match="the site"):
        accumulated(input_TI, dtype=torch.float32).hessian_II("the site")


def test_widths_must_agree() -> None:
    with pytest.raises(StatisticsError, match="3 and 4"):
        InputMoments.zero(3) + InputMoments.zero(4)
    for inputs, width in ((4, 3), (1, 5), (512, 600)):
        with pytest.raises(StatisticsError, match=f"{width} instead of {inputs}"):
            MomentsAccumulator(inputs).add(torch.ones(2, width))
