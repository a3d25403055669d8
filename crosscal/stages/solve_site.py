"""Solving the matrices of one site for the variants that share a Hessian: read, mix, factor, solve, measure.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from crosscal.compressors import LayerProblem, LayerSolution, quadratic_loss, solve_many
from crosscal.errors import EmptyStatistics, StatisticsError
from crosscal.models.sites import MatrixRef, Site
from crosscal.report.rows import LayerRow
from crosscal.stages.block_problem import BlockProblem, Group
from crosscal.stages.energies import Energies
from crosscal.stages.sample import over_sets
from crosscal.statistics import InputMoments, factor
from crosscal.variants import KEEP_DENSE, Variant


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix solved for one variant."""

    matrix: MatrixRef
    solution: LayerSolution
    row: LayerRow


class SiteMoments:
    """Moments of one site: each set is read once for all groups, whichever lane asks first, and let go after the last
    group."""

    def __init__(self, problem: BlockProblem, site: Site, groups: int) -> None:
        self._read = functools.partial(problem.cached.read, block=problem.block, site=site)
        self._held: dict[str, InputMoments] = {}
        self._groups, self._lock = groups, threading.Lock()

    def __call__(self, calibration: str) -> InputMoments:
        with self._lock:
            if calibration not in self._held:
                self._held[calibration] = self._read(calibration)
            return self._held[calibration]

    def group_is_done(self) -> None:
        """To be called once by each group; after the last nothing is held."""
        with self._lock:
            self._groups -= 1
            if not self._groups:
                self._held.clear()


def solve_site(
    problem: BlockProblem, site: Site, read: SiteMoments, group: Group, members: Sequence[Variant], energies: Energies
) -> Iterator[tuple[Variant, Layer]]:
    """Every matrix of a site for every variant of a group, with its losses on both sets of windows.

    Raises `StatisticsError` naming the site or layer, unless all of the group's variants name `keep-dense` as their
    fallback: then its matrices stay as they are, and their rows say why.
    """
    started = time.monotonic()
    where = f"{problem.name}.{site.name}"
    try:
        hessian_II, tokens = _read_mixture(problem, read, group, where)
        problems = _layer_problems(problem, site, hessian_II, group, energies, where)
        answers = solve_many(problems, [variant.compressor for variant in members])
    except StatisticsError as error:
        if any(variant.fallback != KEEP_DENSE for variant in members):
            raise
        yield from _kept_dense(problem, site, members, str(error))
        return
    seconds = (time.monotonic() - started) / (len(members) * len(problems))
    held_out_II = _held_out(problem, read, group, where)
    for matrix, layer, solutions in zip(site.matrices, problems, zip(*answers, strict=True), strict=True):
        known = energies.get(matrix.name)
        held_out_energy = known[1] if known else _energy(layer, held_out_II)
        energies.add(matrix.name, layer.energy, held_out_energy)
        for variant, solution in zip(members, solutions, strict=True):
            held_out_loss = _relative_loss(layer, solution, held_out_II, held_out_energy)
            row = _row(problem, site, variant, layer, solution, held_out_loss, tokens, seconds)
            yield variant, Layer(matrix, solution, row)


def _held_out(problem: BlockProblem, read: SiteMoments, group: Group, where: str) -> Tensor | None:
    """The Hessian of the held-out windows; None where none of their tokens came by (an expert of few tokens)."""
    try:
        return _read_mixture(problem, read, group, where, held_out=True)[0]
    except EmptyStatistics:
        return None


def _read_mixture(
    problem: BlockProblem, read: SiteMoments, group: Group, where: str, *, held_out: bool = False
) -> tuple[Tensor, int]:
    """The Hessian of a group, on the device, and the tokens behind it."""
    samples = {corpus: problem.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    moments = {key: read(key) for key in over_sets(group.mixture, samples, held_out=held_out).corpora}
    seen = {key: part.mass for key, part in moments.items()}
    mixture = over_sets(group.mixture, samples, held_out=held_out, seen=seen)
    hessian_II = mixture.hessian_II(moments, trace_normalised=group.trace_normalised, name=where)
    return hessian_II.to(problem.device), sum(part.tokens for part in moments.values())


def _energy(layer: LayerProblem, hessian_II: Tensor | None) -> float | None:
    return None if hessian_II is None else quadratic_loss(layer.weight_OI, hessian_II)


def _layer_problems(
    problem: BlockProblem, site: Site, hessian_II: Tensor, group: Group, energies: Energies, where: str
) -> list[LayerProblem]:
    shared = factor(hessian_II, group.damping, name=where) if group.damping is not None else None
    known = {matrix.name: energies.get(matrix.name) for matrix in site.matrices}
    return [
        LayerProblem(
            name=f"{problem.name}.{matrix.name}",
            weight_OI=matrix.weight_OI(problem.parameters).to(problem.device, hessian_II.dtype),
            hessian_II=hessian_II,
            shared_factor=shared,
            stored_dtype=problem.stored_dtype(matrix),
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
    tokens: int,
    seconds: float,
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
        bits=solution.grid.bits if solution.grid else None,
        damping=solution.damping,
        dead_inputs=layer.dead_inputs,
        tokens=tokens,
        seconds=seconds,
    )


def _relative_loss(
    layer: LayerProblem, solution: LayerSolution, hessian_II: Tensor | None, energy: float | None
) -> float | None:
    if hessian_II is None or energy is None:
        return None
    return quadratic_loss(layer.weight_OI - solution.weight_OI, hessian_II) / energy if energy > 0 else 0.0


def _kept_dense(
    problem: BlockProblem, site: Site, members: Sequence[Variant], why: str
) -> Iterator[tuple[Variant, Layer]]:
    """The plan named this fallback: the matrices stay as they are, and every one of them is listed with the reason."""
    for variant in members:
        for matrix in site.matrices:
            weight_OI = matrix.weight_OI(problem.parameters)
            solution = LayerSolution(weight_OI, 0.0, 0.0)
            row = LayerRow(
                variant=variant.name,
                layer=f"{problem.name}.{matrix.name}",
                block=problem.block,
                site=site.name,
                method=variant.method,
                setting=variant.setting,
                loss=0.0,
                relative_loss=0.0,
                heldout_relative_loss=None,
                sparsity=solution.sparsity,
                bits=None,
                damping=None,
                dead_inputs=0,
                tokens=0,
                seconds=0.0,
                fallback=f"{KEEP_DENSE}: {why}",
            )
            yield variant, Layer(matrix, solution, row)
