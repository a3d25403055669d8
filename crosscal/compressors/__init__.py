"""Compression methods: one method, one file, each a frozen dataclass of its settings with a pure `compress`.

To add a method: write `compressors/<name>.py` with such a class, and name it in `COMPRESSORS`. Methods made of a
`ColumnRule` are solved together by `solve_many`; every other method is called layer by layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from crosscal.compressors.column_loop import solve_columns
from crosscal.compressors.column_rule import ColumnRule
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

    Column methods with a common damping, group size and order run as one stacked loop, one for each stored dtype.
    Raises what `compress` raises.
    """
    layers: dict[torch.dtype | None, list[int]] = {}
    for index, problem in enumerate(problems):
        layers.setdefault(problem.stored_dtype, []).append(index)
    solutions: dict[tuple[int, int], LayerSolution] = {}
    stacks: dict[tuple[object, ...], dict[int, ColumnRule]] = {}
    for setting, compressor in enumerate(compressors):
        rule = getattr(compressor, "rule", None)
        if rule is None:
            solutions.update({(setting, i): compressor.compress(problem) for i, problem in enumerate(problems)})
        else:
            stacks.setdefault(rule.stack_key, {})[setting] = rule
    for rules, members in itertools.product(stacks.values(), layers.values()):
        answers = solve_columns([problems[i] for i in members], list(rules.values()))
        places = itertools.product(rules, members)
        solutions.update(zip(places, itertools.chain.from_iterable(answers), strict=True))
    return [[solutions[setting, i] for i in range(len(problems))] for setting in range(len(compressors))]


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
