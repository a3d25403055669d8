"""Variants with low-rank parts, and the moments that they are solved with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosscal.models import ModelSource
from crosscal.stages.compress import RunContext, compress_block, publish_variant
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_run import collect, run_context, sample, windows

MIXED = Mixture.of({"general": 0.25, "legal": 0.75})
LEGAL = Mixture.of({"legal": 1.0})


def recipe(name: str, *steps: tuple[str, Mapping[str, Any]], upstream: str = "dense", own: Mixture | None = None):
    made = [RecipeStep(method, tuple(settings.items())) for method, settings in steps]
    made[-1] = RecipeStep(made[-1].method, made[-1].settings, own)
    return Variant(name, tuple(made), MIXED, upstream, 0, False)


EORA = ("eora", {"rank": 4})
GPTQ = ("gptq", {"bits": 4, "group_size": 32})
RECIPES = [
    recipe("pruned", ("sparsegpt", {"sparsity": 0.5}), EORA),
    recipe("two-of-four", ("sparsegpt", {"sparsity": "2:4"}), EORA),
    recipe("packed", GPTQ, EORA, own=LEGAL),
    recipe("pruned-and-packed", ("sparsegpt", {"sparsity": "2:4"}), GPTQ, EORA),
    recipe("together", ("3basil", {"sparsity": 0.5, "rank": 3, "iterations": 20})),
    recipe("together-two-of-four", ("3basil", {"sparsity": "2:4", "rank": 3, "iterations": 20})),
    recipe("together-packed", ("3basil", {"sparsity": 0.5, "rank": 3, "iterations": 20}), GPTQ, ("scales", {})),
    recipe("twice", ("3basil", {"sparsity": 0.5, "rank": 20, "iterations": 20}), ("eora", {"rank": 30})),
]
PEFTS_OWN = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"


def context_of(folder: Path, source: ModelSource, store: Store) -> RunContext:
    both = sample(store, "general", windows(10, seed=1)), sample(store, "legal", windows(6, seed=2, high=100))
    context = run_context(folder, store, source, *both)
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    return context


def make(context: RunContext, *variants: Variant) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, variants)
    for each in variants:
        publish_variant(context, each)


def folder_of(context: RunContext, variant: Variant) -> Path:
    return context.folder / "models" / variant.name
