"""SpQR against a plain float64 version of the published loop, and the properties of its stored form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crosscal.compressors import COMPRESSORS, GPTQ, GridOutliers, LayerProblem, SparseGPT, Sparsity, SpQR, run
from crosscal.compressors.amount import grid_of, is_written_dense
from crosscal.compressors.recipe import site_of
from crosscal.errors import UsageError
from tests.helpers.problems import correlated_inputs_TI, layer


def outlying(outputs: int = 40, inputs: int = 96, seed: int = 0, **more) -> LayerProblem:
    """A layer with a few outlier weights."""
    problem = layer(outputs, inputs, seed=seed, **more)
    chance = torch.Generator().manual_seed(seed)
    far_OI = torch.rand(outputs, inputs, generator=chance) < 0.01
    weight_OI = torch.where(far_OI, 8 * problem.weight_OI, problem.weight_OI)
    if problem.stored_dtype is not None:
        weight_OI = weight_OI.to(problem.stored_dtype).to(weight_OI.dtype)
    return LayerProblem(problem.name, weight_OI, problem.hessian_II, stored_dtype=problem.stored_dtype)


class Slow:
    """Reference: weight by weight, with the whole inverse of the Hessian, in the order of the authors' engine."""

    def __init__(self, step: SpQR, problem: LayerProblem) -> None:
        self.step, self.highest = step, 2**step.bits - 1
        hessian_II = problem.hessian_II.double()
        damped_II = hessian_II + step.damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II)).double()
        inverse_II = torch.linalg.inv(damped_II)
        self.upper_II = torch.linalg.cholesky(inverse_II, upper=True)
        self.weight_OI = problem.weight_OI.double().clone()
        per_input = [
            float(self.weight_OI[:, j].var(correction=min(1, len(self.weight_OI) - 1)))
            / float(self.upper_II[j, j]) ** 2
            for j in range(self.weight_OI.shape[1])
        ]
        self.most = step.threshold * sum(per_input) / len(per_input)

    def grid(self, row: list[float]) -> tuple[float, int]:
        least, most = min(*row, 0.0), max(*row, 0.0)
        scale = (most - least) / self.highest
        return scale, round(-least / scale)

    def rounded(self, value: float, scale: float, zero: int) -> float:
        return (min(max(round(value / scale) + zero, 0), self.highest) - zero) * scale

    def error(self, row: list[float], units: list[float]) -> float:
        scale, zero = self.grid(row)
        pairs = zip(row, units, strict=True)
        return sum(((value - self.rounded(value, scale, zero)) / unit) ** 2 for value, unit in pairs)

    def fitted(self, row: list[float], units: list[float]) -> tuple[float, int]:
        whole = self.error(row, units)
        without = [self.error(row[:i] + row[i + 1 :], units[:i] + units[i + 1 :]) for i in range(len(row))]
        likely = [whole - one > self.most for one in without]
        others = [value for value, is_likely in zip(row, likely, strict=True) if not is_likely]
        mean = sum(others) / max(len(others), 1)
        return self.grid([mean if is_likely else value for value, is_likely in zip(row, likely, strict=True)])

    def two_levels(self, scales: list[float]) -> list[float]:
        found = []
        for start in range(0, len(scales), 16):
            block = scales[start : start + 16]
            step = (max(block) - min(block)) / (2**self.step.scale_bits - 1)
            found += [min(block) + (round((one - min(block)) / step) * step if step else 0.0) for one in block]
        return found

    def solve(self) -> tuple[Tensor, Tensor]:
        weight_OI, (outputs, inputs) = self.weight_OI, self.weight_OI.shape
        is_outlier_OI = torch.zeros(outputs, inputs, dtype=torch.bool)
        scales, zeros = [0.0] * outputs, [0] * outputs
        for j in range(inputs):
            size = self.step.group_size or inputs
            if j % size == 0:
                own = slice(j, j + size)
                units = self.upper_II.diagonal()[own].tolist()
                grids = [self.fitted(row, units) for row in weight_OI[:, own].tolist()]
                scales, zeros = self.two_levels([scale for scale, _ in grids]), [zero for _, zero in grids]
            unit = float(self.upper_II[j, j])
            for o in range(outputs):
                value = float(weight_OI[o, j])
                answer = self.rounded(value, scales[o], zeros[o])
                if ((value - answer) / unit) ** 2 > self.most:
                    is_outlier_OI[o, j], answer = True, value
                weight_OI[o, j + 1 :] -= (value - answer) / unit * self.upper_II[j, j + 1 :]
                weight_OI[o, j] = answer
        return weight_OI, is_outlier_OI


@pytest.mark.parametrize(
    "step",
    [
        SpQR(3),
        SpQR(2, 32, threshold=0.05),
        SpQR(4, 8, scale_bits=4, damping=0.1),
        SpQR(3, 16, threshold=1e9),
        SpQR(3, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("outputs", [40, 7, 1], ids="{} outputs".format)
def test_it_is_the_published_loop(step: SpQR, outputs: int) -> None:
    if outputs == 1:
        step = SpQR(step.bits, step.group_size, step.scale_bits, 1e9, step.damping)  # the variance of one row is 0
        problem = outlying(2)
        problem = LayerProblem("one", problem.weight_OI[:1], problem.hessian_II)
        slow = Slow(step, problem)
        slow.most = math.inf
    else:
        problem = outlying(outputs)
        slow = Slow(step, problem)
    expected_OI, is_outlier_OI = slow.solve()
    base = step.compress(problem).base
    assert isinstance(base, GridOutliers)
    assert torch.equal(base.is_outlier_OI, is_outlier_OI)
    assert (step.threshold < 1) == bool(is_outlier_OI.any())
    torch.testing.assert_close(base.weight_OI, expected_OI, rtol=1e-9, atol=1e-9)


def test_outliers_reduce_spqr_loss() -> None:
    """On a layer with outliers, 3 bits with outliers lose less than 3 bits without and than GPTQ with more bits per
    weight; `mean_bits` counts everything that is stored."""
    problem = outlying()
    many, none = SpQR(3).compress(problem), SpQR(3, threshold=1e9).compress(problem)
    assert isinstance(many.base, GridOutliers)
    assert isinstance(none.base, GridOutliers)
    assert many.loss < 0.7 * none.loss
    assert many.loss < GPTQ(3, 16).compress(problem).loss
    weights, groups, shared = 40 * 96, 40 * 6, 3 * 6
    assert none.base.mean_bits == pytest.approx(3 + ((3 + 3) * groups + 2 * 16 * shared) / weights)
    assert many.base.mean_bits == pytest.approx(none.base.mean_bits + 32 * int(many.base.is_outlier_OI.sum()) / weights)


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16], ids=str)
def test_integers_stay_in_their_range_and_scales_on_theirs(stored_dtype: torch.dtype | None) -> None:
    base = SpQR(3).compress(outlying(stored_dtype=stored_dtype)).base
    assert isinstance(base, GridOutliers)
    for codes in (base.ints_OI, base.zero_OG, base.scale_codes_OG):
        assert torch.equal(codes, codes.round())
        assert 0 <= int(codes.min()) <= int(codes.max()) <= 7
    assert not base.outlier_OI[~base.is_outlier_OI].any()


@pytest.mark.parametrize("sparsity", ["2:4", 0.7, 1.0])
def test_pruned_weights_stay_exactly_0_and_are_no_outliers(sparsity: str | float) -> None:
    problem = outlying()
    site = run(site_of([problem]), [SparseGPT(Sparsity.parse(sparsity)), SpQR(3)])
    (solved,) = site.layers
    assert isinstance(solved.base, GridOutliers)
    assert solved.keep_OI is not None
    assert not solved.weight_OI[~solved.keep_OI].any()
    assert not (solved.base.is_outlier_OI & ~solved.keep_OI).any()
    (again,) = run(site_of([problem]), [SpQR(3), COMPRESSORS["scales"](), COMPRESSORS["descent"]()]).layers
    assert torch.equal(again.weight_OI, SpQR(3).compress(problem).weight_OI)  # no integers of a plain grid to refine


def test_a_form_that_cannot_be_packed_says_so() -> None:
    assert grid_of([GPTQ(4), SpQR(3)]) is None
    assert is_written_dense([GPTQ(4), SpQR(3)])
    assert grid_of([SpQR(3), GPTQ(4)]) == (4, 128)
    assert not is_written_dense([SpQR(3), GPTQ(4)])


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 3, "threshold": 0}, {"bits": 3, "scale_bits": 9}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        SpQR(**wrong)
    with pytest.raises(UsageError, match="must divide"):
        SpQR(3, 64).compress(LayerProblem("x", torch.ones(2, 96), torch.eye(96)))


def test_correlated_inputs_help() -> None:
    """Later inputs compensate rounding errors: the loss is lower than without the correlations in the Hessian."""
    input_TI = correlated_inputs_TI(400, 96, seed=3)
    problem = outlying()
    free = LayerProblem(problem.name, problem.weight_OI, input_TI.mT @ input_TI / 400)
    alone = LayerProblem(problem.name, problem.weight_OI, torch.diag(free.hessian_II.diagonal()))
    solved_OI = SpQR(3, threshold=1e9).compress(alone).weight_OI
    change_OI = problem.weight_OI - solved_OI
    assert SpQR(3, threshold=1e9).compress(free).loss < float((change_OI @ free.hessian_II * change_OI).sum())
