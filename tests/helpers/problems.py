"""Seeded layer problems, and slow float64 references for the solvers.

Shapes: T tokens, I inputs, O outputs, G groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscal.compressors import LayerProblem, LayerSolution, Sparsity, Statistic, run
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import site_of
from crosscal.statistics import Gradient

BLOCK = 128  # columns that share a pruning threshold
HALF, TWO_OF_FOUR, DENSE, NOTHING = (Sparsity.parse(value) for value in (0.5, "2:4", 0.0, 1.0))


def label(value: object) -> str:
    return str(value).replace("torch.", "").replace("Sparsity", "")


def correlated_inputs_TI(tokens: int, inputs: int, *, seed: int, dead: Sequence[int] = ()) -> Tensor:
    """float64 inputs with strong common directions, scales between 1/3 and 3, and some inputs that are always 0."""
    generator = torch.Generator().manual_seed(seed)
    common_TK = torch.randn(tokens, max(1, inputs // 4), generator=generator, dtype=torch.float64)
    mix_KI = torch.randn(common_TK.shape[1], inputs, generator=generator, dtype=torch.float64)
    noise_TI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    scale_I = 3.0 ** (2 * torch.rand(inputs, generator=generator, dtype=torch.float64) - 1)
    input_TI = (common_TK @ mix_KI / common_TK.shape[1] ** 0.5 + 0.5 * noise_TI) * scale_I
    input_TI[:, list(dead)] = 0.0
    return input_TI


def layer(
    outputs: int = 24,
    inputs: int = 160,
    *,
    seed: int = 0,
    dead: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    stored_dtype: torch.dtype | None = None,
    name: str = "blocks.0.linear",
) -> LayerProblem:
    """A problem with more tokens than inputs, so that its Hessian is well conditioned. `CROSS` is that of dense inputs
    which are these inputs times one factor per input."""
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    if stored_dtype is not None:
        weight_OI = weight_OI.to(stored_dtype)
    gram_II, abs_I, mean_I = (mean.to(dtype, copy=True) for mean in _means(inputs, seed, tuple(dead)))
    dense_I = 1 + 0.2 * torch.arange(inputs, dtype=torch.float64).sin().to(dtype)
    # a weight's gradient is the sum of input times output gradient, so it is 0 for dead inputs
    back_O = torch.randn(outputs, generator=torch.Generator().manual_seed(seed + 2000), dtype=torch.float64) ** 2
    grad_square_OI = 1e-3 * torch.outer(back_O, gram_II.diagonal().double() ** 2).to(dtype)
    further = {
        Statistic.ABS_SUM: abs_I,
        Statistic.SUM: mean_I,
        Statistic.CROSS: dense_I[:, None] * gram_II,
        Gradient.SQUARE: grad_square_OI,
    }
    return LayerProblem(name, weight_OI.to(dtype), gram_II, further, stored_dtype=stored_dtype)


@functools.cache
def _means(inputs: int, seed: int, dead: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of x xᵀ, |x| and x."""
    input_TI = correlated_inputs_TI(2 * inputs + 16, inputs, seed=seed, dead=dead)
    return input_TI.mT @ input_TI / len(input_TI), input_TI.abs().mean(0), input_TI.mean(0)


def with_hessian(problem: LayerProblem, hessian_II: Tensor) -> LayerProblem:
    return dataclasses.replace(problem, hessian_II=hessian_II)


def true_loss(problem: LayerProblem, solution: LayerSolution) -> float:
    """tr(D H Dᵀ) in float64."""
    difference_OI = problem.weight_OI.double() - solution.weight_OI.double()
    return float(torch.einsum("oi,ij,oj->", difference_OI, problem.hessian_II.double(), difference_OI))


def loss_after(problem: Any, steps: Sequence[Any]) -> float:
    return true_loss(problem, solved(problem, run(site_of([problem]), steps).layers[0]))


def bounded_hessian_II(inputs: int, condition: float, *, seed: int) -> Tensor:
    """A random symmetric matrix with log-spaced eigenvalues between 1/condition and 1."""
    generator = torch.Generator().manual_seed(seed)
    basis_II = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    eigenvalues_I = condition ** -torch.linspace(0, 1, inputs, dtype=torch.float64)
    hessian_II = (basis_II * eigenvalues_I) @ basis_II.mT
    return (hessian_II + hessian_II.mT) / 2


def reference_grid(
    weight_OC: Tensor, bits: int, stored_dtype: torch.dtype | None = None, square_C: Tensor | None = None
) -> Tensor:
    """Scale of every row: 0.999999 max|w| / (2^(b-1) - 1/2), rounded as stored; 1 for a row of zeros. With mean squares
    `square_C`, the one of 36 multiples of it with the least weighted error, the largest of equals."""
    scale_O = 0.999999 * weight_OC.abs().max(dim=1).values / (2 ** (bits - 1) - 0.5)
    if square_C is not None:
        for row, (weight_C, widest) in enumerate(zip(weight_OC, scale_O.tolist(), strict=True)):
            costs = []
            for k in range(36):
                scale = max(widest, 1e-300) * (1.10 - 0.02 * k)
                level_C = (weight_C / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                costs.append((float(((weight_C - level_C * scale) ** 2 * square_C).sum()), k))
            scale_O[row] = widest * (1.10 - 0.02 * min(costs)[1])
    if stored_dtype is not None:
        scale_O = scale_O.to(stored_dtype).double()
    scale_O[scale_O == 0] = 1.0
    return scale_O


def reference_columns(
    problem: LayerProblem,
    *,
    damping: float = 0.01,
    fraction: float | None = None,
    kept_of: tuple[int, int] | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    activation_order: bool = False,
    scale_search: bool = False,
) -> Tensor:
    """SparseGPT and GPTQ by their derivation: eager updates, and an explicit inverse from which Gaussian elimination
    removes one input after another. No Cholesky, no blocks, no panels; a threshold per 128 columns."""
    weight_OI, hessian_II = problem.weight_OI.double().clone(), problem.hessian_II.double()
    outputs, inputs = weight_OI.shape
    dead_I = hessian_II.diagonal() == 0
    order = list(range(inputs))
    if activation_order:
        order = hessian_II.diagonal().argsort(descending=True, stable=True).tolist()
    rows_II = _eliminated_rows(hessian_II, damping, order)
    unit_I = torch.stack([rows_II[j, j] for j in range(inputs)])  # U_jj²
    score = lambda columns: (weight_OI[:, columns] ** 2 / unit_I[columns]).masked_fill(dead_I[columns], 0.0)  # noqa: E731
    drop_OI = torch.zeros(outputs, inputs, dtype=torch.bool)
    columns_per_group = group_size or inputs
    square_I = hessian_II.diagonal()
    grid = lambda columns: reference_grid(  # noqa: E731
        weight_OI[:, columns], bits or 8, square_C=square_I[columns] if scale_search else None
    )
    groups = [slice(first, first + columns_per_group) for first in range(0, inputs, columns_per_group)]
    scale_OG = torch.stack([grid(columns) for columns in groups], 1)
    for position, j in enumerate(order):
        if fraction is not None and position % BLOCK == 0:
            stop = min(position + BLOCK, inputs)
            count = round(fraction * stop * outputs) - round(fraction * position * outputs)
            cheapest = score(slice(position, stop)).mT.reshape(-1).argsort(stable=True)[:count]
            drop_OI[cheapest % outputs, position + cheapest // outputs] = True
        if kept_of is not None and position % kept_of[1] == 0:
            cheapest_OC = score(slice(j, j + kept_of[1])).argsort(dim=1, stable=True)[:, : kept_of[1] - kept_of[0]]
            drop_OI[:, j : j + kept_of[1]].scatter_(1, cheapest_OC, True)
        if bits is not None and not activation_order and j % columns_per_group == 0:
            scale_OG[:, j // columns_per_group] = grid(slice(j, j + columns_per_group))
        fixed_O = weight_OI[:, j].masked_fill(drop_OI[:, j], 0.0)
        if bits is not None:
            scale_O = scale_OG[:, j // columns_per_group]
            fixed_O = (fixed_O / scale_O).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale_O
        later = order[position + 1 :]
        weight_OI[:, later] -= torch.outer((weight_OI[:, j] - fixed_O) / rows_II[j, j], rows_II[j, later])
        weight_OI[:, j] = fixed_O
    return weight_OI


def _eliminated_rows(hessian_II: Tensor, damping: float, order: Sequence[int]) -> Tensor:
    """Row j: row j of the inverse of the damped Hessian restricted to j and the inputs after it in the order."""
    damped_II = hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II), dtype=torch.float64)
    inverse_II = torch.linalg.inv(damped_II)
    rows_II = torch.zeros_like(inverse_II)
    for j in order:
        rows_II[j] = inverse_II[j]
        inverse_II = inverse_II - torch.outer(inverse_II[:, j], inverse_II[j]) / inverse_II[j, j]
    return rows_II
