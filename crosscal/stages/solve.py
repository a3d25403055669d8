"""Solve one block for every variant of a sweep, from cached moments: block outer, variants inner, sites in parallel.

Per site, the Hessian of each mixture is mixed and factored once, and shared by all linears and recipes (`solve_site`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crosscal.errors import ModelError
from crosscal.lanes import side_by_side
from crosscal.models.adapter import factors, with_low_rank
from crosscal.models.export import Ints
from crosscal.models.sites import Matrices, MatrixRef, Site, replaced_parameters
from crosscal.report.rows import LayerRow
from crosscal.stages.block_problem import BlockProblem, HessianGroup, OutputEnergies, SiteStatistics, grouped, needed
from crosscal.stages.corpus_losses import CorpusLosses, of_corpora
from crosscal.stages.sample import over_sums
from crosscal.stages.solve_site import SolvedMatrix, left_dense_rows, parts_of, solve_site
from crosscal.variants import Variant

OUTLIERS = "no format that inference engines load supports outliers"
IN_PARTS = "another matrix of the same stack of experts is not packed"


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """One variant's solution of one block; tensors by their names inside the block."""

    changed: dict[str, Tensor]
    """Replacements that the checkpoint stores: dense weights, and the factors of low-rank parts."""
    packed: dict[MatrixRef, Ints]
    """Matrices that it stores as integers."""
    dense: dict[str, Tensor]
    """All changed parameters as dense tensors, low-rank parts added, for the inputs of the next block."""
    rows: list[LayerRow]


def solve_block(problem: BlockProblem, variants: Sequence[Variant]) -> dict[str, BlockSolution]:
    """Solve every matrix of a block; return the solutions by variant name. Sites run in parallel, the widest first.

    Raises `StatisticsError` naming the layer, `UnsupportedModel` for a matrix that has no statistics and that a variant
    does not leave dense.
    """
    layers = _solved(problem, variants)
    # Popped one by one to free memory: an assembled solution has tensors of its own.
    return {variant.name: _assembled(problem, variant, layers.pop(variant)) for variant in variants}


def rows_of_block(problem: BlockProblem, variants: Sequence[Variant]) -> dict[str, list[LayerRow]]:
    """As `solve_block`, but return the layer rows only."""
    solved = _solved(problem, variants)
    return {variant.name: [layer.row for layer in solved.pop(variant)] for variant in variants}


def _solved(problem: BlockProblem, variants: Sequence[Variant]) -> dict[Variant, list[SolvedMatrix]]:
    groups = grouped(problem, variants)
    for variant in variants:
        Matrices(problem.sites, problem.left_dense).check(problem.name, variant.leave_dense)
    energies = {group: _energies(problem, group) for group in groups}
    solved: dict[tuple[Site, HessianGroup], list[tuple[Variant, SolvedMatrix]]] = {}

    def solve(site: Site, group: HessianGroup, statistics: SiteStatistics, losses: CorpusLosses) -> None:
        solved[site, group] = []
        on_corpora = losses.of_draw(group.seed) if problem.measured_on else None
        for part, members in parts_of(problem, site, groups[group]).items():
            if part.matrices:
                solved[site, group] += solve_site(
                    problem, part, statistics, group, members, energies[group], on_corpora
                )
        statistics.group_is_done()

    longest_first = sorted(problem.sites, key=lambda site: site.inputs, reverse=True)
    needs = needed(groups, problem.always_mixed)
    needs |= {
        group: needs.get(group, frozenset()) | each for group, each in of_corpora(problem.measured_on, needs).items()
    }
    of_sites = [(site, SiteStatistics(problem, site, needs, users=len(groups))) for site in longest_first]
    jobs = [
        functools.partial(solve, site, group, statistics, losses)
        for site, statistics in of_sites
        for losses in [CorpusLosses(statistics, problem.measured_on)]
        for group in groups
    ]
    side_by_side(jobs, problem.device)
    for of_group in energies.values():
        of_group.keep(sum(len(site.matrices) for site in problem.sites))
    layers: dict[Variant, list[SolvedMatrix]] = {variant: [] for variant in variants}
    for site, group in itertools.product(problem.sites, groups):
        for variant, layer in solved.pop((site, group)):
            layers[variant].append(layer)
    return layers


def _assembled(problem: BlockProblem, variant: Variant, layers: Sequence[SolvedMatrix]) -> BlockSolution:
    bases_OI = {layer.matrix: layer.solution.base.weight_OI.cpu() for layer in layers}
    dense = replaced_parameters(problem.parameters, bases_OI)
    scales = {layer.matrix: layer.solution.scale_I for layer in layers}
    for site in problem.sites:
        if site.producer and (scale_I := scales.get(site.matrices[0])) is not None:
            dense |= site.producer.divided(problem.parameters, scale_I.cpu())
    changed, packed = dict(dense), {}
    why_dense = _why_dense(problem, layers)
    for layer in layers:
        grid, low_rank, dtype = layer.solution.grid, layer.solution.low_rank, problem.stored_dtype(layer.matrix)
        if grid is not None and not why_dense[layer.matrix]:
            changed.pop(layer.matrix.parameter, None)
            packed[layer.matrix] = Ints(grid.ints_OI, grid.scale_OG.to(dtype), grid.bits)
        if layer.solution.bias_change_O is not None:
            dense[layer.matrix.bias] = changed[layer.matrix.bias] = _new_bias_O(problem, layer)
        if low_rank is not None:
            left_OK, right_KI = (part.cpu().to(dtype) for part in (low_rank.left_OK, low_rank.right_KI))
            changed.update(factors(layer.matrix, left_OK, right_KI))
            stored, transposed = dense[layer.matrix.parameter], layer.matrix.transposed
            dense[layer.matrix.parameter] = with_low_rank(stored, left_OK, right_KI, transposed=transposed)
    rows = [dataclasses.replace(layer.row, written_dense=why_dense[layer.matrix] or None) for layer in layers]
    return BlockSolution(changed, packed, dense, [*rows, *left_dense_rows(problem, variant)])


def _why_alone(problem: BlockProblem, matrix: MatrixRef) -> str:
    return problem.why_dense(f"{problem.name}.{matrix.parameter}") if matrix.is_called else matrix.NOT_CALLED


def _why_dense(problem: BlockProblem, layers: Sequence[SolvedMatrix]) -> dict[MatrixRef, str]:
    """Return matrix -> why its integers are written as dense numbers; empty if they are packed, or if there are none.
    The experts of a stack are packed all or none, as transformers reads them."""
    why = {layer.matrix: _why_alone(problem, layer.matrix) if layer.solution.grid else "" for layer in layers}
    why |= {layer.matrix: OUTLIERS for layer in layers if layer.row.mean_bits is not None}
    stacks: dict[str, list[SolvedMatrix]] = {}
    for layer in layers:
        if layer.matrix.expert is not None:
            stacks.setdefault(layer.matrix.parameter.rpartition(".")[0], []).append(layer)
    for stack in stacks.values():
        if any(layer.solution.grid is None or why[layer.matrix] for layer in stack):
            whole = {layer.matrix: why[layer.matrix] or IN_PARTS for layer in stack if layer.solution.grid}
            why.update(whole)
    return why


def _new_bias_O(problem: BlockProblem, layer: SolvedMatrix) -> Tensor:
    bias_O, change_O = layer.matrix.bias_O(problem.parameters), layer.solution.bias_change_O
    if bias_O is None or change_O is None:
        raise ModelError("this linear has no bias to correct", where=layer.row.layer, do="Leave out `bias`.")
    return (bias_O.to(change_O) + change_O).cpu().to(bias_O.dtype)


def _energies(problem: BlockProblem, group: HessianGroup) -> OutputEnergies:
    samples = {corpus: problem.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    sets = [over_sums(group.mixture, samples, held_out=held_out).weights for held_out in (False, True)]
    return OutputEnergies(problem.cached, problem.block, [sets, group.trace_normalised and "corpora"])
