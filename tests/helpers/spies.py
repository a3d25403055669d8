"""Recipes whose steps record the statistics they receive, and samples to compute these from."""

from __future__ import annotations

from crosscal.stages.sample import Sample
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_run import sample, windows

MIXED, OWN = Mixture.of({"general": 0.75, "legal": 0.25}), Mixture.of({"legal": 1.0})


def samples(store: Store) -> list[Sample]:
    """`legal` has two shards of different weights; the first contains only 17 different tokens."""
    return [sample(store, "general", windows(6, seed=0)), sample(store, "legal", windows(4, 1, 3, 20), windows(7, 2))]


def spied(name: str, method: str = "spy", **more: object) -> Variant:
    """Two steps: one with the recipe's mixture, one with its own."""
    recipe = (RecipeStep(method, (("name", name),)), RecipeStep("spy", (("name", f"{name}-own"),), OWN))
    return Variant(name, recipe, MIXED, str(more.get("upstream", "dense")), 0, bool(more.get("normalised", False)))
