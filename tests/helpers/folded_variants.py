"""Variants whose scales are absorbed by norms, and models of several families to make them of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crosscal.models import ModelSource
from crosscal.models.sites import Site
from crosscal.stages.compress import RunContext, compress_block, publish_variant
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_models import save_model, windows
from tests.helpers.tiny_run import collect, run_context, sample

AWQ = ("awq", {"bits": 3, "group_size": 4})


def recipe(name: str, *steps: tuple[str, dict[str, Any]], **more: Any) -> Variant:
    made = tuple(RecipeStep(method, tuple(settings.items())) for method, settings in steps)
    return Variant(name, made, Mixture.of({"general": 1.0}), more.pop("upstream", "dense"), 0, False, **more)


FOLDED = recipe("folded", AWQ)
ROUNDED = recipe("rounded", AWQ, ("rtn", {"bits": 3, "group_size": 4}))
SOLVED = recipe("solved", AWQ, ("gptq", {"bits": 3, "group_size": 8, "damping": 0.01}))
PRUNED = recipe("pruned", AWQ, ("sparsegpt", {"sparsity": 0.5, "damping": 0.01}), ("refit", {}))
PLAIN = recipe("plain", ("rtn", {"bits": 3, "group_size": 4}))
EVERY = [FOLDED, ROUNDED, SOLVED, PRUNED, PLAIN]


def context_of(folder: Path, family: str, dtype: torch.dtype = torch.float32, count: int = 40) -> RunContext:
    """A model of a family, with a few large norm gains, and its moments. Every expert receives tokens."""
    weights = save_model(family, folder / "model", dtype=dtype) / "model.safetensors"
    tensors = load_file(weights)
    for tensor in (tensor for name, tensor in tensors.items() if tensor.ndim == 1 and name.endswith("weight")):
        tensor[::7] += 6
    save_file(tensors, weights, metadata={"format": "pt"})
    source = ModelSource.open(folder / "model")
    store = Store(folder / "home")
    context = run_context(folder / "run", store, source, sample(store, "general", windows(count, seed=1)))
    collect(context.cached, source, [key for each in context.samples.values() for key in each.sets])
    return context


def make(context: RunContext, wanted: list[Variant]) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, wanted)
    for each in wanted:
        publish_variant(context, each)


def sites_of(context: RunContext) -> list[tuple[int, Site]]:
    return [(block, site) for block in range(context.source.blocks) for site in context.cached.sites(block) or ()]
