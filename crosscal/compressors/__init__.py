"""Compression methods: one method, one file, each a frozen dataclass of its settings with a pure `compress`.

To add a method: write `compressors/<name>.py` with such a class, and name it in `COMPRESSORS`. Methods made of a
`ColumnRule` are solved together by `solve_many`; every other method is called layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.gptq import GPTQ
from crosscal.compressors.magnitude import Magnitude
from crosscal.compressors.problem import Compressor, Grid, LayerProblem, LayerSolution, quadratic_loss
from crosscal.compressors.rtn import RoundToNearest
from crosscal.compressors.sparsegpt import SparseGPT
from crosscal.compressors.sparsegpt_gptq import SparseGPTQ
from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.wanda import Wanda

COMPRESSORS: dict[str, type] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "rtn": RoundToNearest,
    "gptq": GPTQ,
    "sparsegpt-gptq": SparseGPTQ,
}

DATA_FREE = frozenset({"magnitude", "rtn"})
"""Methods whose weights do not depend on the Hessian: a sweep over mixtures solves them once."""


def solve_many(problems: Sequence[LayerProblem], compressors: Sequence[Compressor]) -> list[list[LayerSolution]]:
    """Solutions [compressor][problem] for layers that share one Hessian; the same as calling `compress` on each.

    Column methods with a common damping, group size and order run as one stacked loop.
    """
    solutions: dict[int, list[LayerSolution]] = {}
    stacks: dict[tuple[object, ...], list[int]] = {}
    for index, compressor in enumerate(compressors):
        rule = getattr(compressor, "rule", None)
        if rule is None:
            solutions[index] = [compressor.compress(problem) for problem in problems]
        else:
            stacks.setdefault(rule.stack_key, []).append(index)
    for indices in stacks.values():
        rules = [compressors[index].rule for index in indices]  # pyright: ignore[reportAttributeAccessIssue]
        solutions.update(zip(indices, solve_columns(problems, rules), strict=True))
    return [solutions[index] for index in range(len(compressors))]


__all__ = [
    "COMPRESSORS",
    "DATA_FREE",
    "GPTQ",
    "Compressor",
    "Grid",
    "LayerProblem",
    "LayerSolution",
    "Magnitude",
    "RoundToNearest",
    "SparseGPT",
    "SparseGPTQ",
    "Sparsity",
    "Wanda",
    "quadratic_loss",
    "solve_many",
]
