"""Problems and settings that make no sense are refused, and the error names the layer or the setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosscal.compressors import (
    ALPS,
    AWQ,
    GBLM,
    GPTQ,
    QEP,
    Compressor,
    Descent,
    EoRA,
    LayerProblem,
    Magnitude,
    Refit,
    RoundToNearest,
    SparseGPT,
    SparseGPTQ,
    SparseLowRank,
    Swaps,
    Wanda,
    run,
)
from crosscal.compressors.recipe import check_inputs, site_of
from crosscal.errors import NotFinite, NotPositiveDefinite, StatisticsError, UsageError
from tests.helpers.problems import HALF, label, layer, loss_after, with_hessian


def test_problems_that_make_no_sense_name_the_layer() -> None:
    good = layer(4, 8)
    weight_OI, hessian_II = good.weight_OI, good.hessian_II
    bad_weight_OI, bad_hessian_II, negative_II = weight_OI.clone(), hessian_II.clone(), hessian_II.clone()
    bad_weight_OI[1, 2], bad_hessian_II[3, 4], negative_II[5, 5] = float("nan"), float("inf"), -1.0
    wrong = [
        (weight_OI, hessian_II[:7, :7], StatisticsError, "do not match"),
        (weight_OI, hessian_II.float(), StatisticsError, "one dtype"),
        (bad_weight_OI, hessian_II, NotFinite, "weight"),
        (weight_OI, bad_hessian_II, NotFinite, "Hessian"),
        (weight_OI, negative_II, NotPositiveDefinite, "negative"),
    ]
    for weight, hessian, error, why in wrong:
        with pytest.raises(error, match=why) as caught:
            LayerProblem("blocks.7.out", weight, hessian)
        assert caught.value.where == "blocks.7.out"


@pytest.mark.parametrize(
    "case", [GPTQ(2, 4), RoundToNearest(2, 4), *(method(HALF) for method in (Magnitude, Wanda, SparseGPT))], ids=label
)
def test_an_indefinite_hessian_is_never_solved(case: Compressor) -> None:
    """H is [[1, -2], [-2, 1]] for every pair of inputs: equal changes of both its weights have a negative loss."""
    hessian_II = torch.block_diag(*[torch.tensor([[1.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)] * 4)
    weight_OI = torch.tensor([[0.3, 0.31, 0.32, 0.33, 1.0, 1.01, 1.02, 1.03]] * 2, dtype=torch.float64)
    with pytest.raises(NotPositiveDefinite) as caught:
        case.compress(LayerProblem("blocks.7.out", weight_OI, hessian_II))
    assert caught.value.where == "blocks.7.out"


def test_silence_everywhere_is_an_error_where_data_is_needed() -> None:
    problem = with_hessian(layer(4, 8), torch.zeros(8, 8, dtype=torch.float64))
    assert Magnitude(HALF).compress(problem).relative_loss == 0.0
    for compressor in (SparseGPT(HALF), GPTQ(4, None, False), GPTQ(4, None, True), SparseGPTQ(HALF, 4, None)):
        with pytest.raises(StatisticsError, match=r"blocks\.0\.linear: every input"):
            compressor.compress(problem)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (GPTQ, {"bits": 1}),
        (GPTQ, {"bits": 9}),
        (GPTQ, {"bits": 4, "group_size": 0}),
        (GPTQ, {"bits": 4, "damping": -0.1}),
        (GPTQ, {"bits": 4, "damping": float("nan")}),
        (RoundToNearest, {"bits": 16}),
        (AWQ, {"bits": 1}),
        (AWQ, {"bits": 4, "points": 0}),
        (RoundToNearest, {"bits": 4, "group_size": -1}),
        (SparseGPT, {"sparsity": 0.5, "damping": float("inf")}),
        (SparseGPT, {"sparsity": "2:12"}),
        (SparseGPT, {"sparsity": 2}),
        (SparseGPTQ, {"sparsity": 0.5, "bits": 1}),
        (SparseGPTQ, {"sparsity": "2:4", "bits": 4, "group_size": 6}),
        (Wanda, {"sparsity": "half"}),
        (Magnitude, {"sparsity": -1}),
        (GBLM, {"sparsity": 0.5, "gradient_weight": -1.0}),
        (GBLM, {"sparsity": 0.5, "gradient_weight": float("nan")}),
    ],
)
def test_bad_settings_are_refused_before_any_layer_is_seen(method: type, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        method(**settings)


@pytest.mark.parametrize("case", [GPTQ(4, 3), RoundToNearest(4, 3), SparseGPTQ(HALF, 4, 3)], ids=label)
def test_groups_must_divide_the_inputs(case: Compressor) -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.linear: .*got group_size 3, 160 inputs.*32, 16"):
        case.compress(layer())


def test_weights_beyond_float16_range_raise() -> None:
    problem = layer(4, 8, stored_dtype=torch.float16)
    huge = LayerProblem("huge", problem.weight_OI * 1e6, problem.hessian_II, stored_dtype=torch.float16)
    with pytest.raises(NotFinite, match="huge"):
        Magnitude(HALF).compress(huge)


def test_a_singular_hessian_has_no_exact_refit_without_damping() -> None:
    input_TI = torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = layer(3, 24)
    problem = type(problem)("thin", problem.weight_OI, input_TI.mT @ input_TI)
    with pytest.raises(NotPositiveDefinite, match=r"thin: .*damping"):
        run(site_of([problem]), [Magnitude(0.2), Refit(None)])
    assert loss_after(problem, [Magnitude(0.2), Refit(None, damping=1e-3)]) < loss_after(problem, [Magnitude(0.2)])


def test_groups_of_swaps_must_divide_the_inputs() -> None:
    site = run(site_of([layer(4, 64)]), [Wanda(0.5)])
    for group in (5, 3, 128):
        with pytest.raises(UsageError, match=rf"blocks\.0\.linear: `group` must divide .*group {group}, 64 inputs"):
            check_inputs(Swaps(group=group), 64, "blocks.0.linear")
        with pytest.raises(UsageError, match="must divide"):
            run(site, [Swaps(group=group)])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Refit, {"iterations": -1}),
        (Swaps, {"candidates": 0}),
        (Swaps, {"rounds": -1}),
        (Swaps, {"group": 0}),
        (Swaps, {"group": -4}),
        (ALPS, {"sparsity": 0.5, "per": "layer"}),
        (ALPS, {"sparsity": 0.5, "iterations": 0}),
        (Descent, {"sweeps": -1}),
        (EoRA, {"rank": -1}),
        (SparseLowRank, {"sparsity": 0.5, "rank": 0}),
        *(
            (method, {**settings, "damping": damping})
            for method, settings in (
                (ALPS, {"sparsity": 0.5}),
                (SparseLowRank, {"sparsity": 0.5}),
                (Refit, {}),
                (QEP, {}),
            )
            for damping in (-0.1, float("nan"), float("inf"))
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(method: type, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        method(**settings)
