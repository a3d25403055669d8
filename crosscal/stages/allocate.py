"""Allocation, a barrier before the solves: summarise every layer of the model, then set each layer's sparsity.

One artifact per (model, allocator, calibration sets of its mixture, block) holds a number and a size for every layer;
one more merges all blocks. They take kilobytes and come from the dense model's moments, also for a variant with
sequential inputs. A missing artifact is computed on demand. The allocation is a pure function of the summaries.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from crosscal.compressors import Dense, Layer, SparsitiesOf, summarised
from crosscal.compressors import Site as State
from crosscal.errors import StatisticsError
from crosscal.lanes import side_by_side
from crosscal.models.sites import Site, is_left
from crosscal.stages.block_problem import BlockProblem, HessianGroup, SiteStatistics
from crosscal.stages.compress import RunContext
from crosscal.stages.sample import over_sums
from crosscal.statistics import Statistic
from crosscal.statistics.finite import all_finite
from crosscal.store import digest_of
from crosscal.variants import Variant

FORMAT = 1  # bump when other quantities are summarised; the allocator's version covers how
KIND = "summaries"
FILE = "summary.json"

Summary = Mapping[str, tuple[float, int]]
"""Layer → (the allocator's number for it, its number of weights)."""


def allocated(context: RunContext, variants: Sequence[Variant]) -> RunContext:
    """Return the context with the sparsities that these variants' allocators set, for `RunContext.problem`."""
    summaries: dict[str, Summary] = {}
    sparsities: dict[str, SparsitiesOf] = {}
    for variant in variants:
        if variant.allocator is not None:
            key = _key(context, variant)
            if key not in summaries:
                summaries[key] = _of_all_blocks(context, variant)
            summary = {k: v for k, v in summaries[key].items() if not is_left(k, variant.leave_dense)}
            sparsities[variant.name] = _sparsities_of(variant.allocator.step, summary)
    return dataclasses.replace(context, sparsities=sparsities)


def unsummarised(context: RunContext, variants: Sequence[Variant]) -> list[int]:
    """Return the blocks whose summary for some variant's allocator is missing."""
    by_key = {_key(context, variant): variant for variant in variants if variant.allocator is not None}
    wanted = [variant for key, variant in by_key.items() if _read(context, key) is None]
    blocks = range(context.source.blocks)
    return [b for b in blocks if any(context.cached.store.find(KIND, _key(context, v, b)) is None for v in wanted)]


def summarise_block(context: RunContext, block: int, variants: Sequence[Variant]) -> int:
    """Compute and store the missing summaries of a block for these variants' allocators; return how many."""
    store = context.cached.store
    by_key = {_key(context, variant, block): variant for variant in variants if variant.allocator is not None}
    missing = {key: variant for key, variant in by_key.items() if store.find(KIND, key) is None}
    if missing:
        problem = context.problem(block, context.cached)
        states = _states(problem, missing.values())
        for key, variant in missing.items():
            assert variant.allocator is not None
            found = states[_group(context, variant)]
            weights = {layer.name: layer.target_OI.numel() for site in found for layer in site.layers}
            numbers = summarised(variant.allocator.step, found)
            _publish(context, key, variant, {name: (number, weights[name]) for name, number in numbers.items()})
    return len(missing)


def _states(problem: BlockProblem, variants: Collection[Variant]) -> dict[HessianGroup, list[State]]:
    """Return each group's sites with the statistics that its allocators need; every set of a site is read once.

    Sites without usable statistics (an expert without tokens) or with weights that are not finite are left out: their
    solve raises the same error, unless the plan names a fallback.
    """
    needs: dict[HessianGroup, frozenset[Statistic]] = {}
    for variant in variants:
        assert variant.allocator is not None
        group = _group(problem, variant)
        needs[group] = needs.get(group, frozenset()) | variant.allocator.step.needs

    def of_site(site: Site) -> dict[HessianGroup, State]:
        statistics, found = SiteStatistics(problem, site, needs, users=1), {}
        weights = {matrix.name: matrix.weight_OI(problem.parameters) for matrix in site.matrices}
        for group in needs if all(map(all_finite, weights.values())) else ():
            try:
                own, _ = statistics(group)
            except StatisticsError:
                continue
            like = own[next(iter(needs[group]))]
            targets = {f"{problem.name}.{name}": weight_OI.to(like) for name, weight_OI in weights.items()}
            layers = tuple(Layer(name, weight_OI, Dense(weight_OI)) for name, weight_OI in targets.items())
            found[group] = State(f"{problem.name}.{site.name}", layers, own)
        return found

    of_sites = side_by_side([functools.partial(of_site, site) for site in problem.sites], problem.device)
    return {group: [found[group] for found in of_sites if group in found] for group in needs}


def _group(known: RunContext | BlockProblem, variant: Variant) -> HessianGroup:
    """Return the group whose Hessian the variant's allocator uses."""
    assert variant.allocator is not None
    mixture = variant.allocator.mixture or variant.mixture or known.reference
    return HessianGroup(mixture, variant.seed, variant.trace_normalised)


def _key(context: RunContext, variant: Variant, block: int | None = None) -> str:
    """Digest of everything that an allocator's summary of one block, or of all blocks, depends on."""
    assert variant.allocator is not None
    group = _group(context, variant)
    samples = {corpus: context.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    sets = over_sums(group.mixture, samples).weights
    allocator = variant.allocator.key[:-1]  # without its mixture, which `sets` identifies
    normalised = group.trace_normalised and "corpora"
    return digest_of([FORMAT, context.cached.model, context.cached.dtype, allocator, sets, normalised, block])


def _of_all_blocks(context: RunContext, variant: Variant) -> Summary:
    key = _key(context, variant)
    found = _read(context, key)
    if found is None:
        found = {}
        for block in range(context.source.blocks):
            summarise_block(context, block, [variant])
            found.update(_read(context, _key(context, variant, block)) or {})
        _publish(context, key, variant, found)
    return found


def _sparsities_of(allocator: Any, summary: Summary) -> SparsitiesOf:
    numbers = {layer: number for layer, (number, _) in summary.items()}
    weights = {layer: weight for layer, (_, weight) in summary.items()}
    return functools.cache(lambda target: allocator.allocate(numbers, target, weights))


def _read(context: RunContext, key: str) -> dict[str, tuple[float, int]] | None:
    artifact = context.cached.store.find(KIND, key)
    if artifact is None:
        return None
    stored = json.loads(context.cached.store.read_bytes(artifact, FILE))
    return {layer: (number, weights) for layer, (number, weights) in stored.items()}


def _publish(context: RunContext, key: str, variant: Variant, summary: Summary) -> None:
    assert variant.allocator is not None
    provenance = {"model": context.cached.model, "allocator": variant.allocator.method}
    with context.cached.store.publish(KIND, key, provenance) as folder:
        (folder / FILE).write_text(json.dumps(summary))
