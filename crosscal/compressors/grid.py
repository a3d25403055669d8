"""Symmetric integer grids: one scale per group, zero always on the grid. Shapes: R rows, C columns of one group."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscal.errors import UsageError

BITS = range(2, 9)
SHRINKS = tuple(round(0.40 + 0.02 * k, 2) for k in range(36))
"""Factors that the scale search tries, .4 to 1.1, relative to the scale fitted to the largest weight."""
TIE_BREAK = 1e-6
"""Relative shrink of scales. Without it, a largest weight that is negative would lie exactly between two levels, and
roundoff would decide; with it, the weight rounds to the outer level."""


def check_settings(bits: int, group_size: int | None) -> None:
    """Check all that does not depend on a layer. Raises `UsageError`."""
    if bits not in BITS:
        raise UsageError("bits must be 2 to 8", got=str(bits))
    if group_size is not None and group_size < 1:
        raise UsageError("group_size must be positive", got=str(group_size), do="null means one scale per row.")


def check_grid(group_size: int | None, inputs: int, name: str) -> None:
    """Raise `UsageError` for a group size that does not divide the inputs."""
    if group_size is not None and inputs % group_size:
        fitting = [size for size in (256, 128, 64, 32, 16) if inputs % size == 0]
        raise UsageError(
            "group_size must divide the layer's inputs",
            where=name,
            got=f"group_size {group_size}, {inputs} inputs",
            do=f"Here {', '.join(map(str, fitting)) or 'none of the usual sizes'} would; null means one scale per row.",
        )


def fit_scale_R(weight_RC: Tensor, bits_R: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
    """Return scale = max|w| / (2^(b-1) - 1/2) per row: a weight of max|w| lies half a step above the highest level.

    This is compressed-tensors' scale for its symmetric range [-2^(b-1), 2^(b-1) - 1]. It is rounded to its stored dtype
    before any weight is rounded, so the solved weights are the saved ones. All-zero rows get scale 1.
    """
    largest_R = weight_RC.abs().amax(1)
    scale_R = largest_R / (2.0 ** (bits_R - 1) - 0.5) * (1 - TIE_BREAK)
    if stored_dtype is not None:
        scale_R = scale_R.to(stored_dtype).to(weight_RC.dtype)
    return torch.where(scale_R > 0, scale_R, torch.ones_like(scale_R))


def search_scale_R(weight_RC: Tensor, bits_R: Tensor, stored_dtype: torch.dtype | None, square_C: Tensor) -> Tensor:
    """Return the scale among 36 with the smallest Σ_c H_cc (w_c - q_c)², per row; the largest among equals.

    A smaller scale clips the largest weights and is finer for all others. `square_C`: H_cc, the inputs' mean squares.
    The unweighted search is GPTQ's `mse` option; the weights are those of GPTQ's objective with H taken as diagonal.
    """
    widest_R = fit_scale_R(weight_RC, bits_R, None)
    best_R, least_R = None, None
    for shrink in reversed(SHRINKS):
        scale_R = shrink * widest_R
        if stored_dtype is not None:
            scale_R = scale_R.to(stored_dtype).to(weight_RC.dtype)
            scale_R = torch.where(scale_R > 0, scale_R, torch.ones_like(scale_R))
        rounded_RC = from_ints(to_ints(weight_RC, scale_R[:, None], bits_R[:, None]), scale_R[:, None], stored_dtype)
        cost_R = rounded_RC.sub_(weight_RC).square_() @ square_C
        if best_R is None or least_R is None:
            best_R, least_R = scale_R, cost_R
        else:
            is_better_R = cost_R < least_R
            best_R, least_R = torch.where(is_better_R, scale_R, best_R), torch.minimum(cost_R, least_R)
    assert best_R is not None
    return torch.where(weight_RC.any(1), best_R, torch.ones_like(best_R))


def to_ints(weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Return the nearest level, halves to even, clamped to [-2^(b-1), 2^(b-1) - 1]; still in floating point."""
    highest = 2.0 ** (bits - 1)
    return torch.minimum(torch.maximum((weight / scale).round(), -highest), highest - 1)


def from_ints(ints: Tensor, scale: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
    """Return ints · scale, rounded as the loader of the checkpoint computes it."""
    value = ints * scale
    return value if stored_dtype is None else value.to(stored_dtype).to(value.dtype)
