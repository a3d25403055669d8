"""Solve the matrices of one site for the variants that share a Hessian: mix, factor, solve, measure.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from crosscal.compressors import Dense, LayerProblem, LayerSolution, Statistic, Statistics, quadratic_loss, solve
from crosscal.compressors.problem import output_loss
from crosscal.compressors.recipe import group_misfit, site_of, solutions
from crosscal.compressors.streams import Streams
from crosscal.errors import EmptyStatistics, StatisticsError
from crosscal.models.sites import MatrixRef, Site
from crosscal.report.rows import LayerRow
from crosscal.stages.block_problem import MEASURED, BlockProblem, HessianGroup, OutputEnergies, SiteStatistics
from crosscal.stages.corpus_losses import Measure
from crosscal.statistics import Mixture
from crosscal.variants import KEEP_DENSE, Variant

ASKED = "named in `leave_dense`"
LEFT_DENSE = "left dense"
MOST_NAMED = 4


@dataclass(frozen=True, eq=False)
class SolvedMatrix:
    """One matrix solved for one variant."""

    matrix: MatrixRef
    solution: LayerSolution
    row: LayerRow


def solve_site(
    problem: BlockProblem,
    site: Site,
    statistics: SiteStatistics,
    group: HessianGroup,
    members: Sequence[Variant],
    energies: OutputEnergies,
    on_corpora: Measure | None = None,
) -> Iterator[tuple[Variant, SolvedMatrix]]:
    """Yield every matrix of a site, solved for every variant of a group, with its losses on calibration and held-out
    windows and, with `on_corpora`, on each corpus.

    Raises `StatisticsError` naming the site or layer, unless the variant's fallback is `keep-dense`: then its matrices
    stay dense, and their rows state why. So do matrices whose inputs a group size of the recipe does not divide.
    """
    misfits = {variant: why for variant in members if (why := group_misfit(variant.steps, site.inputs))}
    for variant, why in misfits.items():
        yield from _kept_dense(problem, site, [variant], f"{LEFT_DENSE}: {why}")
    fitting = [variant for variant in members if variant not in misfits]
    stacks, solutions = [fitting] if fitting else [], []
    while stacks:
        together = stacks.pop(0)
        try:
            solutions.append((together, _solve_together(problem, site, statistics, group, together, energies)))
        except StatisticsError as error:
            if all(variant.fallback != KEEP_DENSE for variant in together):
                raise _explained(error, problem) from error
            if len(together) == 1:
                yield from _kept_dense(problem, site, together, f"{KEEP_DENSE}: {error}")
            else:
                stacks += [[variant] for variant in together]  # one by one, to find those that cannot be solved
    held_out = _held_out(statistics, group) if solutions and problem.cached.measures_losses else None
    for together, done in solutions:
        for variant, layer, solved in _measured(problem, site, together, done, held_out, energies):
            losses = on_corpora(solved, layer.solution) if on_corpora else None
            yield variant, dataclasses.replace(layer, row=dataclasses.replace(layer.row, corpus_losses=losses))


def parts_of(problem: BlockProblem, site: Site, members: Sequence[Variant]) -> dict[Site, list[Variant]]:
    """Return the variants by the part of a site that they solve: some leave matrices of it dense."""
    parts: dict[Site, list[Variant]] = {}
    for variant in members:
        parts.setdefault(site.without(problem.name, variant.leave_dense), []).append(variant)
    return parts


def _explained(error: StatisticsError, problem: BlockProblem) -> StatisticsError:
    """Add remedies to the error for inputs that no token reached. More windows do not help if a matrix is all zeros,
    as the inputs of the next matrix are then zero."""
    if not isinstance(error, EmptyStatistics):
        return error
    matrices = [matrix for site in problem.sites for matrix in site.matrices]
    zero = [matrix.name for matrix in matrices if not matrix.weight_OI(problem.parameters).any()]
    if zero:
        got = f"all zeros in the checkpoint: {', '.join(zero[:MOST_NAMED])}{', …' if len(zero) > MOST_NAMED else ''}"
        do = f"Name `fallback: {KEEP_DENSE}` in the plan to leave the matrices that read their outputs dense."
        return EmptyStatistics(error.what, where=error.where, got=got, do=do)
    do = f"{error.do} `fallback: {KEEP_DENSE}` in the plan leaves such a matrix dense."
    return EmptyStatistics(error.what, where=error.where, got=error.got, do=do)


@dataclass(frozen=True, eq=False)
class _Solved:
    """Solutions [variant][matrix], not yet measured on held-out windows."""

    problems: list[LayerProblem]
    answers: list[list[LayerSolution]]
    tokens: int
    dead_inputs: int
    """Number of inputs that were always zero: H_jj = 0."""
    seconds: float
    """Per matrix and variant."""


def _solve_together(
    problem: BlockProblem,
    site: Site,
    statistics: SiteStatistics,
    group: HessianGroup,
    members: Sequence[Variant],
    energies: OutputEnergies,
) -> _Solved:
    started = time.monotonic()
    own, tokens = statistics(group)
    problems = _layer_problems(problem, site, own, energies)

    def statistics_on(mixture: Mixture) -> Statistics:
        """Return the statistics for a step with its own mixture."""
        return statistics(group.on(mixture))[0]

    storable_I = site.producer and functools.partial(site.producer.storable_I, problem.parameters)
    recipes = [problem.recipe(variant, site) for variant in members]
    states = solve(site_of(problems, own, storable_I), recipes, statistics_on)
    answers = [solutions(problems, state) for state in states]
    seconds = (time.monotonic() - started) / (len(members) * len(problems))
    return _Solved(problems, answers, tokens, int((own.square_I == 0).sum()), seconds)


def _measured(
    problem: BlockProblem,
    site: Site,
    members: Sequence[Variant],
    done: _Solved,
    held_out: Statistics | None,
    energies: OutputEnergies,
) -> Iterator[tuple[Variant, SolvedMatrix, LayerProblem]]:
    held_out_II = held_out.hessian_II if held_out else None
    mean_I = held_out.get(Statistic.SUM) if held_out else None
    streams = Streams.of(held_out.get) if held_out else None
    for matrix, layer, answers in zip(site.matrices, done.problems, zip(*done.answers, strict=True), strict=True):
        known = energies.get(matrix.name)
        held_out_energy = known[1] if known else _energy(layer, held_out_II, streams)
        if layer.energy is not None:
            energies.add(matrix.name, layer.energy, held_out_energy)
        for variant, solution in zip(members, answers, strict=True):
            loss = _relative_loss(layer, solution, held_out_II, held_out_energy, mean_I, streams)
            row = _row(problem, site, variant, layer, solution, loss, done)
            yield variant, SolvedMatrix(matrix, solution, row), layer


def _held_out(statistics: SiteStatistics, group: HessianGroup) -> Statistics | None:
    """Return the statistics of the held-out windows; None if no held-out token reached this site (an expert)."""
    try:
        return statistics(group, held_out=True)[0]
    except EmptyStatistics:
        return None


def _energy(layer: LayerProblem, hessian_II: Tensor | None, streams: Streams | None) -> float | None:
    if hessian_II is None:
        return None
    return quadratic_loss(layer.weight_OI, hessian_II) if streams is None else streams.energy(layer.weight_OI)


def _layer_problems(problem: BlockProblem, site: Site, own: Statistics, energies: OutputEnergies) -> list[LayerProblem]:
    hessian_II = own.get(Statistic.GRAM) if problem.cached.measures_losses else None
    known = {matrix.name: energies.get(matrix.name) for matrix in site.matrices}
    return [
        LayerProblem(
            name=f"{problem.name}.{matrix.name}",
            weight_OI=matrix.weight_OI(problem.parameters).to(problem.device, own.square_I.dtype),
            hessian_II=hessian_II,
            further={which: mean for which in MEASURED - {Statistic.GRAM} if (mean := own.get(which)) is not None},
            stored_dtype=problem.stored_dtype(matrix),
            bias_O=None if (bias_O := matrix.bias_O(problem.parameters)) is None else bias_O.to(own.square_I),
            known_energy=pair[0] if (pair := known[matrix.name]) else None,
        )
        for matrix in site.matrices
    ]


def _row(
    problem: BlockProblem,
    site: Site,
    variant: Variant,
    layer: LayerProblem,
    solution: LayerSolution,
    held_out_loss: float | None,
    done: _Solved,
) -> LayerRow:
    return LayerRow(
        variant=variant.name,
        layer=layer.name,
        block=problem.block,
        site=site.name,
        method=variant.method,
        setting=variant.setting,
        loss=solution.loss,
        relative_loss=solution.relative_loss,
        heldout_relative_loss=held_out_loss,
        sparsity=solution.sparsity,
        bits=getattr(solution.base, "bits", None),
        mean_bits=getattr(solution.base, "mean_bits", None),
        rank=solution.low_rank.left_OK.shape[1] if solution.low_rank else None,
        damping=solution.damping,
        dead_inputs=done.dead_inputs,
        tokens=done.tokens,
        seconds=done.seconds,
        parameters=layer.weight_OI.numel(),
        fold=_fold(site, variant, solution),
    )


def _fold(site: Site, variant: Variant, solution: LayerSolution) -> str | None:
    if solution.scale_I is not None and site.producer is not None:
        return site.producer.name
    scales = any(placed.step.kind == "transform" for placed in variant.steps)
    return f"none: {site.no_producer}" if scales else None


def _relative_loss(
    layer: LayerProblem,
    solution: LayerSolution,
    hessian_II: Tensor | None,
    energy: float | None,
    mean_I: Tensor | None = None,
    streams: Streams | None = None,
) -> float | None:
    """Return the loss over the output energy; None if that is unknown or zero: the ratio is undefined, not 0."""
    if hessian_II is None or energy is None or energy <= 0:
        return None
    difference_OI = layer.weight_OI - solution.weight_OI
    if streams is not None:
        return streams.loss(layer.weight_OI, difference_OI) / energy
    return output_loss(difference_OI, hessian_II, solution.bias_change_O, mean_I) / energy


def _kept_dense(
    problem: BlockProblem, site: Site, members: Sequence[Variant], why: str
) -> Iterator[tuple[Variant, SolvedMatrix]]:
    """Yield every matrix unchanged, with a row that states the reason."""
    for variant in members:
        for matrix in site.matrices:
            weight_OI = matrix.weight_OI(problem.parameters)
            row = _dense_row(problem, variant, matrix.name, site.name, weight_OI, why)
            yield variant, SolvedMatrix(matrix, LayerSolution(weight_OI, 0.0, 0.0, Dense(weight_OI)), row)


def left_dense_rows(problem: BlockProblem, variant: Variant) -> Iterator[LayerRow]:
    """Yield rows for the block's matrices that no method changes, such as routers, and for those that the plan names,
    each with the reason as its `fallback`."""
    for left in problem.left_dense:
        stored = problem.parameters[left.parameter]
        yield _dense_row(problem, variant, left.name, left.name, stored, f"{LEFT_DENSE}: {left.reason}")
    for site in problem.sites:
        kept = site.without(problem.name, variant.leave_dense).matrices
        for matrix in (matrix for matrix in site.matrices if matrix not in kept):
            weight_OI = matrix.weight_OI(problem.parameters)
            yield _dense_row(problem, variant, matrix.name, site.name, weight_OI, f"{LEFT_DENSE}: {ASKED}")


def _dense_row(
    problem: BlockProblem, variant: Variant, name: str, site: str, stored: Tensor, fallback: str
) -> LayerRow:
    return LayerRow(
        variant=variant.name,
        layer=f"{problem.name}.{name}",
        block=problem.block,
        site=site,
        method=variant.method,
        setting=variant.setting,
        loss=0.0,
        relative_loss=0.0,
        heldout_relative_loss=None,
        sparsity=LayerSolution(stored, 0.0, 0.0, Dense(stored)).sparsity,
        bits=None,
        damping=None,
        dead_inputs=0,
        tokens=0,
        seconds=0.0,
        fallback=fallback,
        parameters=stored.numel(),
    )
