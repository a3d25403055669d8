"""Uᵀ U = (H + λI)⁻¹, or a typed error: nothing in between."""

from __future__ import annotations

import pytest
import torch

from crosscal.errors import EmptyStatistics, NotFinite, NotPositiveDefinite
from crosscal.statistics import factor
from tests.helpers.problems import bounded_hessian_II, correlated_inputs_TI

ROUNDOFF_F64, ROUNDOFF_F32 = 2.0**-52, 2.0**-23


@pytest.mark.parametrize("inputs", [1, 2, 17, 130])
@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.01, 1.0])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, ROUNDOFF_F64), (torch.float32, ROUNDOFF_F32)])
def test_is_the_inverse(inputs: int, condition: float, damping: float, dtype: torch.dtype, unit: float) -> None:
    hessian_II = bounded_hessian_II(inputs, condition, seed=inputs).to(dtype)
    wide_II = hessian_II.double()
    damped_II = wide_II + damping * wide_II.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    upper_II = factor(hessian_II, damping).upper_II
    expected_II = torch.linalg.inv(damped_II)
    assert upper_II.dtype == dtype
    error = torch.linalg.matrix_norm(upper_II.double().mT @ upper_II.double() - expected_II, 2)
    assert error <= 4 * inputs**0.5 * condition * unit * torch.linalg.matrix_norm(expected_II, 2)
    assert torch.equal(upper_II, upper_II.triu())
    assert (upper_II.diagonal() > 0).all()


def test_is_the_cholesky_factor_of_the_explicit_inverse() -> None:
    hessian_II = bounded_hessian_II(40, 100, seed=3)
    inverse_II = torch.linalg.inv(hessian_II + 0.02 * hessian_II.diagonal().mean() * torch.eye(40, dtype=torch.float64))
    expected_II = torch.linalg.cholesky(inverse_II, upper=True)
    torch.testing.assert_close(factor(hessian_II, 0.02).upper_II, expected_II, rtol=1e-10, atol=1e-10)


def test_the_argument_is_left_alone() -> None:
    hessian_II = bounded_hessian_II(20, 10, seed=1)
    before_II = hessian_II.clone()
    assert factor(hessian_II, 0.5).damping == 0.5
    assert torch.equal(hessian_II, before_II)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_stay_uncoupled(damping: float) -> None:
    dead = [0, 5, 6, 19]
    alive = [i for i in range(20) if i not in dead]
    input_TI = correlated_inputs_TI(100, 20, seed=2, dead=dead)
    hessian_II = input_TI.mT @ input_TI / 100
    result = factor(hessian_II, damping)
    assert result.dead_I.nonzero().flatten().tolist() == dead
    mean = hessian_II.diagonal().mean()
    for j in dead:
        unit = 1 / (mean if damping == 0 else damping * mean).sqrt()
        assert result.upper_II[j, j] == pytest.approx(float(unit), rel=1e-12)
        assert result.upper_II[j].count_nonzero() == result.upper_II[:, j].count_nonzero() == 1
    alive_II = hessian_II[alive][:, alive] + damping * mean * torch.eye(16, dtype=torch.float64)
    upper_II = result.upper_II[alive][:, alive]
    torch.testing.assert_close(upper_II.mT @ upper_II, torch.linalg.inv(alive_II), rtol=1e-9, atol=1e-9)


def test_not_positive_definite_says_where_what_and_how_to_help() -> None:
    hessian_II = torch.diag(torch.tensor([4.0, -1.0, 4.0, 4.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefinite) as caught:
        factor(hessian_II, 0.02, name="blocks.3.mlp_mid")
    assert caught.value.where == "blocks.3.mlp_mid"
    assert "damping 0.02" in caught.value.got
    assert "column 1" in caught.value.got
    assert "Raise damping (to 0.2" in caught.value.do


@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [-1.0, -1.0], [1.0, -1.0, 0.0]])
def test_negative_diagonals_are_not_treated_as_dead_inputs(diagonal: list[float]) -> None:
    with pytest.raises(NotPositiveDefinite):
        factor(torch.diag(torch.tensor(diagonal)), 0.01)


def test_fewer_tokens_than_inputs_need_damping() -> None:
    input_TI = correlated_inputs_TI(10, 40, seed=5)
    hessian_II = input_TI.mT @ input_TI / 10
    with pytest.raises(NotPositiveDefinite, match=r"to 0\.01.* more tokens than inputs"):
        factor(hessian_II, 0.0)
    assert torch.isfinite(factor(hessian_II, 0.01).upper_II).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    hessian_II = torch.eye(3)
    hessian_II[0, 2] = bad
    with pytest.raises(NotFinite, match="the layer"):
        factor(hessian_II, name="the layer")


def test_silence_is_empty() -> None:
    with pytest.raises(EmptyStatistics, match="the layer"):
        factor(torch.zeros(3, 3), name="the layer")
