"""Solving one block for every variant of a sweep, from the cache: block outer, variants inner.

Per site, the Hessians of each mixture are mixed and factored once per damping, and shared by all linears, sparsities
and bit widths.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.compressors import LayerProblem, LayerSolution, quadratic_loss, solve_many
from crosscal.errors import EmptyStatistics, StatisticsError
from crosscal.models.export import can_pack, packed_tensors
from crosscal.models.sites import MatrixRef, Site, replaced_parameters
from crosscal.report.rows import LayerRow
from crosscal.stages.energies import Energies
from crosscal.stages.moments import Cached
from crosscal.stages.sample import Sample, over_sets
from crosscal.statistics import InputMoments, Mixture, factor
from crosscal.variants import KEEP_DENSE, Variant


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """One block to solve: its weights and where its statistics are."""

    name: str
    block: int
    sites: tuple[Site, ...]
    parameters: Mapping[str, Tensor]
    """As the checkpoint stores them."""
    cached: Cached
    samples: Mapping[tuple[str, int], Sample]
    """(corpus, seed) -> what stands for it."""
    reference: Mixture
    """Where the loss of methods that need no data is measured."""
    device: str


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """One variant's answer for one block; tensors by their names inside the block."""

    changed: dict[str, Tensor]
    """What the checkpoint stores instead: dense weights, or the packed tensors of quantized ones."""
    dense: dict[str, Tensor]
    """The changed parameters as the next block's inputs depend on them."""
    rows: list[LayerRow]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One matrix solved for one variant."""

    matrix: MatrixRef
    solution: LayerSolution
    row: LayerRow


@dataclass(frozen=True)
class _Group:
    """Variants that share a Hessian and a factor."""

    mixture: Mixture
    seed: int
    trace_normalised: bool
    damping: float | None

    @property
    def undamped(self) -> _Group:
        """The group as far as its Hessian goes."""
        return dataclasses.replace(self, damping=None)


_Read = Callable[[str], InputMoments]
"""Moments of a calibration set at the site being solved."""


def solve_block(problem: BlockProblem, variants: Sequence[Variant]) -> dict[str, BlockSolution]:
    """Solve every matrix of a block for every variant, by name. Raises `StatisticsError` naming the layer."""
    layers: dict[str, list[_Layer]] = {variant.name: [] for variant in variants}
    energies_of = functools.cache(functools.partial(_energies, problem))
    groups = _grouped(problem, variants)
    for site in problem.sites:
        # Groups share their corpora: each set is read once. One site's moments are held, no more.
        read = functools.cache(functools.partial(problem.cached.read, block=problem.block, site=site))
        for group, members in groups.items():
            energies = energies_of(group.undamped)
            for variant, layer in _solve_site(problem, site, read, group, members, energies):
                layers[variant.name].append(layer)
    for group in groups:
        energies_of(group.undamped).keep(sum(len(site.matrices) for site in problem.sites))
    return {name: _assembled(problem, solved) for name, solved in layers.items()}


def _stored_dtype(problem: BlockProblem, matrix: MatrixRef) -> torch.dtype:
    return problem.parameters[matrix.parameter].dtype


def _assembled(problem: BlockProblem, layers: Sequence[_Layer]) -> BlockSolution:
    dense = replaced_parameters(problem.parameters, {layer.matrix: layer.solution.weight_OI.cpu() for layer in layers})
    changed = dict(dense)
    for layer in layers:
        grid = layer.solution.grid
        if grid is not None and can_pack(layer.matrix):
            del changed[layer.matrix.parameter]
            scale_OG = grid.scale_OG.to(_stored_dtype(problem, layer.matrix))
            changed.update(packed_tensors(layer.matrix.name, grid.ints_OI, scale_OG, grid.bits))
    return BlockSolution(changed, dense, [layer.row for layer in layers])


def _grouped(problem: BlockProblem, variants: Iterable[Variant]) -> dict[_Group, list[Variant]]:
    groups: dict[_Group, list[Variant]] = {}
    for variant in variants:
        mixture = variant.mixture or problem.reference
        group = _Group(mixture, variant.seed, variant.trace_normalised, variant.setting.get("damping"))
        groups.setdefault(group, []).append(variant)
    return groups


def _energies(problem: BlockProblem, group: _Group) -> Energies:
    samples = {corpus: problem.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    sets = [over_sets(group.mixture, samples, held_out=held_out).weights for held_out in (False, True)]
    return Energies(problem.cached, problem.block, [sets, group.trace_normalised])


def _solve_site(
    problem: BlockProblem, site: Site, read: _Read, group: _Group, members: Sequence[Variant], energies: Energies
) -> Iterator[tuple[Variant, _Layer]]:
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
            yield variant, _Layer(matrix, solution, row)


def _held_out(problem: BlockProblem, read: _Read, group: _Group, where: str) -> Tensor | None:
    """The Hessian of the held-out windows; None where none of their tokens came by (an expert of few tokens)."""
    try:
        return _read_mixture(problem, read, group, where, held_out=True)[0]
    except EmptyStatistics:
        return None


def _read_mixture(
    problem: BlockProblem, read: _Read, group: _Group, where: str, *, held_out: bool = False
) -> tuple[Tensor, int]:
    """The Hessian of a group, on the device, and the tokens behind it."""
    samples = {corpus: problem.samples[corpus, group.seed] for corpus in group.mixture.corpora}
    mixture = over_sets(group.mixture, samples, held_out=held_out)
    moments = {key: read(key) for key in mixture.corpora}
    empty = [key for key in moments if moments[key].tokens == 0]
    if empty:
        mixture = over_sets(group.mixture, samples, held_out=held_out, empty=empty)
    hessian_II = mixture.hessian_II(moments, trace_normalised=group.trace_normalised, name=where)
    return hessian_II.to(problem.device), sum(part.tokens for part in moments.values())


def _energy(layer: LayerProblem, hessian_II: Tensor | None) -> float | None:
    return None if hessian_II is None else quadratic_loss(layer.weight_OI, hessian_II)


def _layer_problems(
    problem: BlockProblem, site: Site, hessian_II: Tensor, group: _Group, energies: Energies, where: str
) -> list[LayerProblem]:
    shared = factor(hessian_II, group.damping, name=where) if group.damping is not None else None
    known = {matrix.name: energies.get(matrix.name) for matrix in site.matrices}
    return [
        LayerProblem(
            name=f"{problem.name}.{matrix.name}",
            weight_OI=matrix.weight_OI(problem.parameters).to(problem.device, hessian_II.dtype),
            hessian_II=hessian_II,
            shared_factor=shared,
            stored_dtype=_stored_dtype(problem, matrix),
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
) -> Iterator[tuple[Variant, _Layer]]:
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
            yield variant, _Layer(matrix, solution, row)
