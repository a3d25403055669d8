"""Compile every Numba loop in advance: `python -m crosscal.warm_up`, which `make setup` calls.

The machine code is cached (see `crosscal.compiled`), so this is needed once per installation.
"""

from __future__ import annotations

import torch

from crosscal.compressors import GPTQ, LayerProblem, SparseGPT
from crosscal.statistics import MomentsAccumulator
from crosscal.store.triangle import pack_triangle, unpack_triangle

INPUTS = 64


def warm_up() -> None:
    """Accumulate, pack and solve a small problem in every way that has a compiled loop."""
    accumulator = MomentsAccumulator(INPUTS)
    accumulator.add(torch.randn(4 * INPUTS, INPUTS))
    moments = accumulator.finish()
    unpack_triangle(*pack_triangle(moments.gram_II.numpy()), INPUTS)
    problem = LayerProblem("warm-up", torch.randn(INPUTS, INPUTS), moments.hessian_II())
    for step in (SparseGPT(0.5), SparseGPT("2:4"), GPTQ(4, INPUTS)):  # pyright: ignore[reportArgumentType]
        step.compress(problem)


if __name__ == "__main__":
    warm_up()
