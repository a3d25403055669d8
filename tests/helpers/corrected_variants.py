"""Sequential variants that are corrected for the error of the blocks before them, and plain ones."""

from __future__ import annotations

from typing import Any

from crosscal.statistics import Mixture
from crosscal.variants import RecipeStep, Variant

MIXED = Mixture.of({"general": 0.25, "legal": 0.75})


def recipe(name: str, *steps: tuple[str, dict[str, Any]], **more: Any) -> Variant:
    placed = tuple(RecipeStep(method, tuple(settings.items())) for method, settings in steps)
    return Variant(name, placed, MIXED, "sequential", 0, more.get("trace_normalised", False))


GPTQ = ("gptq", {"bits": 3, "group_size": 32})
QEP = ("qep", {"propagation": 0.5, "damping": 1.0})
PLAIN, CORRECTED = recipe("plain", GPTQ), recipe("corrected", QEP, GPTQ)
