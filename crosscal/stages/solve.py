"""Solving one block for every variant of a sweep, from the cache: block outer, variants inner, sites side by side.

Per site, the Hessians of each mixture are mixed and factored once per damping, and shared by all linears, sparsities
and bit widths (`solve_site`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crosscal.lanes import side_by_side
from crosscal.models.export import can_pack, packed_tensors
from crosscal.models.sites import Site, replaced_parameters
from crosscal.report.rows import LayerRow
from crosscal.stages.block_problem import BlockProblem, Group, grouped
from crosscal.stages.energies import Energies
from crosscal.stages.sample import over_sums
from crosscal.stages.solve_site import Layer, SiteMoments, solve_site
from crosscal.variants import Variant


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """One variant's answer for one block; tensors by their names inside the block."""

    changed: dict[str, Tensor]
    """What the checkpoint stores instead: dense weights, or the packed tensors of quantized ones."""
    dense: dict[str, Tensor]
    """The changed parameters as the next block's inputs depend on them."""
    rows: list[LayerRow]


def solve_block(problem: BlockProblem, variants: Sequence[Variant]) -> dict[str, BlockSolution]:
    """Solve every matrix of a block for every variant, by name; sites side by side, those that take longest first.

    Raises `StatisticsError` naming the layer.
    """
    groups = grouped(problem, variants)
    energies = {group.undamped: _energies(problem, group.undamped) for group in groups}
    solved: dict[tuple[Site, Group], list[tuple[Variant, Layer]]] = {}

    def solve(site: Site, group: Group, read: SiteMoments) -> None:
        layers = solve_site(problem, site, read, group, groups[group], energies[group.undamped])
        solved[site, group] = list(layers)
        read.group_is_done()

    longest_first = sorted(problem.sites, key=lambda site: site.inputs, reverse=True)
    readers = [(site, SiteMoments(problem, site, len(groups))) for site in longest_first]
    jobs = [functools.partial(solve, site, group, read) for site, read in readers for group in groups]
    side_by_side(jobs, problem.device)
    for of_group in energies.values():
        of_group.keep(sum(len(site.matrices) for site in problem.sites))
    layers: dict[str, list[Layer]] = {variant.name: [] for variant in variants}
    for site, group in itertools.product(problem.sites, groups):
        for variant, layer in solved[site, group]:
            layers[variant.name].append(layer)
    return {name: _assembled(problem, found) for name, found in layers.items()}


def _assembled(problem: BlockProblem, layers: Sequence[Layer]) -> BlockSolution:
    dense = replaced_parameters(problem.parameters, {layer.matrix: layer.solution.weight_OI.cpu() for layer in layers})
    changed = dict(dense)
    for layer in layers:
        grid = layer.solution.grid
        if grid is not None and can_pack(layer.matrix):
            del changed[layer.matrix.parameter]
            scale_OG = grid.scale_OG.to(problem.stored_dtype(layer.matrix))
            changed.update(packed_tensors(layer.matrix.name, grid.ints_OI, scale_OG, grid.bits))
    return BlockSolution(changed, dense, [layer.row for layer in layers])


def _energies(problem: BlockProblem, group: Group) -> Energies:
    samples = {corpus: problem.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    sets = [over_sums(group.mixture, samples, held_out=held_out).weights for held_out in (False, True)]
    return Energies(problem.cached, problem.block, [sets, group.trace_normalised])
