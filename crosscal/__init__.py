"""Public API of crosscal: calibrate once, then prune and quantize from cached layer Hessians.

Names are imported on first use, so that `import crosscal` loads no heavy dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosscal.calibration import CalibrationSet
    from crosscal.compressors import COMPRESSORS, Compressor, LayerProblem, LayerSolution, Sparsity
    from crosscal.corpora import Corpus
    from crosscal.errors import CrosscalError
    from crosscal.models import ModelSource
    from crosscal.plan import CompressionPlan, load_plan
    from crosscal.report import LayerRow, ResultRow
    from crosscal.statistics import InputMoments, InverseFactor, Mixture, factor
    from crosscal.store import Store
    from crosscal.variants import Variant

__version__ = "0.1.0"

_HOME = {
    "COMPRESSORS": "compressors",
    "CalibrationSet": "calibration",
    "CompressionPlan": "plan",
    "Compressor": "compressors",
    "Corpus": "corpora",
    "CrosscalError": "errors",
    "InputMoments": "statistics",
    "InverseFactor": "statistics",
    "LayerProblem": "compressors",
    "LayerRow": "report",
    "LayerSolution": "compressors",
    "Mixture": "statistics",
    "ModelSource": "models",
    "ResultRow": "report",
    "Sparsity": "compressors",
    "Store": "store",
    "Variant": "variants",
    "factor": "statistics",
    "load_plan": "plan",
}

__all__ = [
    "COMPRESSORS",
    "CalibrationSet",
    "CompressionPlan",
    "Compressor",
    "Corpus",
    "CrosscalError",
    "InputMoments",
    "InverseFactor",
    "LayerProblem",
    "LayerRow",
    "LayerSolution",
    "Mixture",
    "ModelSource",
    "ResultRow",
    "Sparsity",
    "Store",
    "Variant",
    "factor",
    "load_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crosscal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"crosscal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
