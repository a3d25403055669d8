"""Compression methods, one file each: a frozen dataclass of settings that maps the state of a site to the next state.

To add a method, write such a class in `compressors/<name>.py` (`crosscal.compressors.recipe` lists what it must define)
and register it in `COMPRESSORS`. Its fields are the plan's fields.
"""

from __future__ import annotations

from crosscal.compressors.allocation import ALLOCATE, SparsitiesOf, summarised
from crosscal.compressors.alps import ALPS
from crosscal.compressors.amount import Amount, amounts_of, grid_of
from crosscal.compressors.awq import AWQ
from crosscal.compressors.bias import Bias
from crosscal.compressors.descent import Descent
from crosscal.compressors.dlp import DLP
from crosscal.compressors.eora import EoRA
from crosscal.compressors.gblm import GBLM
from crosscal.compressors.gptq import GPTQ
from crosscal.compressors.magnitude import Magnitude
from crosscal.compressors.owl import OWL
from crosscal.compressors.problem import Compressor, LayerProblem, LayerSolution, quadratic_loss
from crosscal.compressors.qep import QEP
from crosscal.compressors.recipe import Placed, Recipe, Step, allotted, run, solve, solve_many, takes_two_streams
from crosscal.compressors.refit import Refit
from crosscal.compressors.rtn import RoundToNearest
from crosscal.compressors.scales import Scales
from crosscal.compressors.sparse_low_rank import SparseLowRank
from crosscal.compressors.sparsegpt import SparseGPT
from crosscal.compressors.sparsegpt_gptq import SparseGPTQ
from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.spqr import GridOutliers, SpQR
from crosscal.compressors.state import Dense, Grid, Layer, LowRank, Need, Site, Statistic, Statistics
from crosscal.compressors.swaps import Swaps
from crosscal.compressors.wanda import Wanda

COMPRESSORS: dict[str, type] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "gblm": GBLM,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "swaps": Swaps,
    "refit": Refit,
    "qep": QEP,
    "awq": AWQ,
    "rtn": RoundToNearest,
    "gptq": GPTQ,
    "sparsegpt-gptq": SparseGPTQ,
    "spqr": SpQR,
    "scales": Scales,
    "descent": Descent,
    "bias": Bias,
    "eora": EoRA,
    "3basil": SparseLowRank,
    "owl": OWL,
    "dlp": DLP,
}

DATA_FREE = frozenset(name for name, method in COMPRESSORS.items() if not method.needs)
"""Methods without statistics: their weights do not depend on the data, so a sweep over mixtures solves them once."""

__all__ = [
    "ALLOCATE",
    "ALPS",
    "AWQ",
    "COMPRESSORS",
    "DATA_FREE",
    "DLP",
    "GBLM",
    "GPTQ",
    "OWL",
    "QEP",
    "Amount",
    "Bias",
    "Compressor",
    "Dense",
    "Descent",
    "EoRA",
    "Grid",
    "GridOutliers",
    "Layer",
    "LayerProblem",
    "LayerSolution",
    "LowRank",
    "Magnitude",
    "Need",
    "Placed",
    "Recipe",
    "Refit",
    "RoundToNearest",
    "Scales",
    "Site",
    "SpQR",
    "SparseGPT",
    "SparseGPTQ",
    "SparseLowRank",
    "SparsitiesOf",
    "Sparsity",
    "Statistic",
    "Statistics",
    "Step",
    "Swaps",
    "Wanda",
    "allotted",
    "amounts_of",
    "grid_of",
    "quadratic_loss",
    "run",
    "solve",
    "solve_many",
    "summarised",
    "takes_two_streams",
]
