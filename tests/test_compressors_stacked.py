"""Layers and settings solved together equal those solved one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from crosscal.compressors import (
    GPTQ,
    Compressor,
    LayerProblem,
    Magnitude,
    RoundToNearest,
    SparseGPT,
    SparseGPTQ,
    Sparsity,
    Wanda,
    solve_many,
)
from tests.helpers.problems import layer

SPARSITIES = [Sparsity.parse(value) for value in (0.0, 0.3, 0.5, "2:4", "1:4", "4:8", 1.0)]
SETTINGS: list[Compressor] = [
    Magnitude(SPARSITIES[2]),
    *(SparseGPT(sparsity) for sparsity in SPARSITIES),
    SparseGPT(SPARSITIES[2], damping=0.1),
    *(GPTQ(bits, 32) for bits in (2, 4)),
    GPTQ(4, None),
    GPTQ(4, 48, activation_order=False),
    *(SparseGPTQ(sparsity, bits, 32) for sparsity in SPARSITIES[1:4:2] for bits in (3, 4)),
    Wanda(SPARSITIES[3]),
    RoundToNearest(4, 32),
]


def layers(stored_dtypes: tuple[torch.dtype | None, ...], dtype: torch.dtype = torch.float64) -> list[LayerProblem]:
    """Several linears with the same inputs."""
    first = layer(1, 192, seed=1, dtype=dtype, dead=[5, 130])
    return [
        dataclasses.replace(
            layer(outputs, 192, seed=seed, dtype=dtype, stored_dtype=stored, name=f"linear{seed}"),
            hessian_II=first.hessian_II,
        )
        for seed, (outputs, stored) in enumerate(zip((24, 8, 17), stored_dtypes, strict=True))
    ]


@pytest.mark.parametrize(
    "stored_dtypes",
    [(None, None, None), (torch.bfloat16,) * 3, (torch.bfloat16, None, torch.bfloat16)],
    ids=["exact", "bfloat16", "mixed"],
)
def test_together_is_one_by_one(stored_dtypes: tuple[torch.dtype | None, ...]) -> None:
    problems = layers(stored_dtypes)
    together = solve_many(problems, SETTINGS)
    assert len(together) == len(SETTINGS)
    for compressor, solutions in zip(SETTINGS, together, strict=True):
        assert len(solutions) == len(problems)
        for problem, solution in zip(problems, solutions, strict=True):
            alone = compressor.compress(problem)
            assert torch.equal(solution.weight_OI == 0, alone.weight_OI == 0)
            torch.testing.assert_close(solution.weight_OI, alone.weight_OI, rtol=1e-10, atol=1e-10)
            assert solution.loss == pytest.approx(alone.loss, rel=1e-9)
            assert solution.damping == alone.damping
            assert (solution.grid is None) == (alone.grid is None)
            if solution.grid is not None and alone.grid is not None:
                assert (solution.grid.bits, solution.grid.group_size) == (alone.grid.bits, alone.grid.group_size)
                assert torch.equal(solution.grid.ints_OI, alone.grid.ints_OI)
                torch.testing.assert_close(solution.grid.scale_OG, alone.grid.scale_OG, rtol=1e-12, atol=0)


def test_float32_together_is_one_by_one() -> None:
    """Matrix products with another number of rows may round differently, which can flip scores at the threshold: nearly
    all weights agree, and all losses."""
    problems = layers((None, None, None), torch.float32)
    settings: list[Compressor] = [SparseGPT(sparsity) for sparsity in SPARSITIES]
    for compressor, solutions in zip(settings, solve_many(problems, settings), strict=True):
        for problem, solution in zip(problems, solutions, strict=True):
            alone = compressor.compress(problem)
            assert solution.sparsity == alone.sparsity
            assert ((solution.weight_OI - alone.weight_OI).abs() < 1e-4).double().mean() > 0.99
            assert solution.loss == pytest.approx(alone.loss, rel=1e-3, abs=1e-6)


def test_solutions_do_not_share_memory() -> None:
    problems = layers((None, None, None))
    solutions = solve_many(problems, [SparseGPT(SPARSITIES[0]), SparseGPT(SPARSITIES[0], damping=0.02)])
    pointers = {s.weight_OI.untyped_storage().data_ptr() for row in solutions for s in row}
    pointers |= {p.weight_OI.untyped_storage().data_ptr() for p in problems}
    assert len(pointers) == 9


def test_nothing_asked_is_nothing_answered() -> None:
    assert solve_many(layers((None, None, None)), []) == []
    assert solve_many([], [SparseGPT(SPARSITIES[2]), Wanda(SPARSITIES[2])]) == [[], []]
