"""Variants of a tiny model by several methods, and the moments that they are solved with."""

from __future__ import annotations

from pathlib import Path

from crosscal.models import ModelSource
from crosscal.stages.compress import RunContext, compress_block, publish_variant
from crosscal.stages.sample import Sample
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.tiny_run import collect, run_context, sample, variant, windows

MIXED = {"general": 0.25, "legal": 0.75}
VARIANTS = [
    variant("sparse", "sparsegpt", MIXED, sparsity=0.5, damping=0.01),
    variant("two-of-four", "sparsegpt", MIXED, sparsity="2:4", damping=0.01),
    variant("general", "wanda", {"general": 1.0}, sparsity=0.5),
    variant("quantized", "gptq", MIXED, bits=4, group_size=32, damping=0.01),
    variant("ordered", "gptq", {"legal": 1.0}, bits=3, group_size=32, activation_order=True, damping=0.05),
    variant("rounded", "rtn", None, bits=4, group_size=32),
    variant("magnitude", "magnitude", None, sparsity=0.5),
    variant("normalised", "sparsegpt", MIXED, sparsity=0.5, damping=0.01, trace_normalised=True),
]


def samples(store: Store) -> tuple[Sample, Sample]:
    general = sample(store, "general", windows(10, seed=1))
    return general, sample(store, "legal", windows(6, seed=2, high=100), windows(4, seed=3, high=50))


def calibrated(folder: Path, store: Store, source: ModelSource) -> RunContext:
    context = run_context(folder, store, source, *samples(store))
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    return context


def compress_all(context: RunContext, variants: list[Variant] = VARIANTS) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, variants)
    for each in variants:
        publish_variant(context, each)
