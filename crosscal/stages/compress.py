"""Make the models of a run: solve blocks from cached moments, write one shard per block and variant, then the index.

In the run folder:   models/<variant>/block-00003.safetensors     the shard; complete if it exists
                     layers/<variant>/block-00003.jsonl           its layer rows, written before the shard
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.compressors import SparsitiesOf
from crosscal.errors import MissingArtifact
from crosscal.lanes import each_side_by_side, side_by_side
from crosscal.models.checkpoint import VariantWriter
from crosscal.models.export import quantization_config
from crosscal.models.source import ModelSource
from crosscal.models.walk import BlockMoments, walk
from crosscal.progress import Report, silent
from crosscal.report.rows import LayerRow, read_rows, write_rows
from crosscal.stages import preflight
from crosscal.stages.block_problem import BlockProblem, statistics_needed
from crosscal.stages.folding import unfolded
from crosscal.stages.gradients import Gradients
from crosscal.stages.memory import free_bytes
from crosscal.stages.moments import DENSE, CachedMoments, InMemoryMoments, MomentsReport
from crosscal.stages.sample import Sample, over_sums
from crosscal.stages.solve import BlockSolution, solve_block
from crosscal.stages.spill import spill_folder
from crosscal.statistics import Mixture, streams_of
from crosscal.store import digest_of
from crosscal.variants import Variant

WRITERS = 4  # threads writing to one disk, each with a block in memory
FORMAT = 2  # of sequential solutions; bump when solvers compute something else


@dataclass(frozen=True, eq=False)
class RunContext:
    """What every step of a run shares: its folder, the model, its cached moments, the samples and the device."""

    folder: Path
    """The run directory."""
    source: ModelSource
    cached: CachedMoments
    samples: Mapping[tuple[str, int], Sample]
    reference: Mixture
    device: str
    sparsities: Mapping[str, SparsitiesOf] = field(default_factory=dict)
    """Variant name -> allotted sparsities; variants with an allocator only (see `crosscal.stages.allocate`)."""
    gradients: Gradients | None = None
    """Those of the dense model, also for a variant with sequential inputs; None if no step needs them."""
    measured_on: tuple[str, ...] = ()
    """Corpora on whose own held-out text every solution with dense inputs is measured."""

    def writer(self, variant: Variant) -> VariantWriter:
        return VariantWriter(self.folder / "models" / variant.name, self.source)

    def rows_file(self, variant: Variant, block: int) -> Path:
        return self.folder / "layers" / variant.name / f"block-{block:05d}.jsonl"

    def write_rows(self, variant: Variant, block: int, rows: Sequence[LayerRow]) -> None:
        """Write the layer rows. Call before writing the shard: an existing shard implies existing rows."""
        file = self.rows_file(variant, block)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, rows)

    def problem(self, block: int, cached: CachedMoments) -> BlockProblem:
        """Return a block as a problem to solve. Raises `MissingArtifact` if it has not been calibrated."""
        matrices = cached.matrices(block)
        if matrices is None:
            raise MissingArtifact("the block has not been calibrated", where=self.source.block_name(block))
        return BlockProblem(
            name=self.source.block_name(block),
            block=block,
            sites=matrices.sites,
            left_dense=matrices.left_dense,
            parameters=self.source.load_block(block),
            cached=cached,
            samples=self.samples,
            reference=self.reference,
            device=self.device,
            sparsities=self.sparsities,
            gradients=self.gradients,
            measured_on=self.measured_on if cached.upstream == DENSE else (),
            why_dense=lambda parameter: self.source.packing.why_dense(parameter),
        )


def compress_block(context: RunContext, block: int, variants: Sequence[Variant]) -> int:
    """Solve one block for all variants with dense inputs that lack its shard; return how many were solved."""
    missing = [variant for variant in variants if not context.writer(variant).has_block(block)]
    if missing:
        problem = context.problem(block, context.cached)
        solutions = solve_block(problem, missing)
        writes = [partial(_write, context, variant, problem, solutions[variant.name]) for variant in missing]
        side_by_side(writes, most=WRITERS)
    return len(missing)


def blocks_at_once(context: RunContext, variants: Sequence[Variant]) -> int:
    """Return how many blocks to solve in parallel (see `preflight.blocks_at_once`)."""
    shapes = preflight.block_shapes(context.source, context.cached)
    return preflight.blocks_at_once(
        shapes,
        variants,
        threads=torch.get_num_threads(),
        free_bytes=free_bytes(context.device),
        statistics=context.cached.wanted,
    )


def compress_sequential(context: RunContext, variant: Variant, *, batch_tokens: int, report: Report) -> MomentsReport:
    """Solve a variant block by block; each block's inputs pass through the compressed blocks before it.

    This is the loop of the published SparseGPT and GPTQ code. The moments belong to this variant on these windows
    alone. They are stored, so that solving it again needs no calibration pass.
    """
    mixtures = variant.mixtures(context.reference)
    samples = {
        corpus: unfolded(context.cached.store, context.samples[corpus, variant.seed])
        for mixture in mixtures
        for corpus in mixture.corpora
    }
    context = dataclasses.replace(context, samples={(corpus, variant.seed): each for corpus, each in samples.items()})
    sets = [key for sample in samples.values() for key in sample.sets]
    over = [over_sums(mixture, samples) for mixture in mixtures]
    wanted = context.cached.wanted | statistics_needed([variant])
    cached = dataclasses.replace(context.cached, upstream=_sequential(variant, over), wanted=wanted)
    writer, blocks = context.writer(variant), range(context.source.blocks)
    unwritten = [block for block in blocks if not writer.has_block(block)]
    if all(cached.has(key, block) for key in sets for block in unwritten):
        for block in unwritten:
            _solve_alone(context, cached, variant, block)
        return MomentsReport(0, sum(len(cached.sites(block) or ()) for block in unwritten) * len(sets), 0, 0.0)
    misses = 0

    def solve_next(seen: BlockMoments) -> Mapping[str, Tensor]:
        nonlocal misses
        if not seen.moments:
            return writer.read_block(seen.block, bits=variant.grid[0] if variant.grid else None)
        misses += cached.publish(seen)
        return _solve_alone(context, InMemoryMoments.of(cached, seen), variant, seen.block).dense

    slices, dtype = {key: windows_by_key(cached.store, key) for key in sets}, getattr(torch, cached.dtype)
    streams = streams_of(cached.wanted)
    done = walk(
        context.source,
        slices,
        on_block=solve_next,
        upstream="sequential",
        device=context.device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        spill_to=spill_folder(context.source, slices.values(), dtype=dtype, device=context.device, streams=streams),
        wanted=lambda block: block in unwritten,
        statistics=cached.wanted,
        progress=report,
    )
    return MomentsReport(done.tokens, 0, misses, done.seconds)


def publish_variants(context: RunContext, variants: Sequence[Variant], report: Report = silent) -> list[Path]:
    """Complete the models of variants whose blocks are all written; return their folders."""
    folders: list[Path] = []
    report("writing models", 0, len(variants))
    jobs = [partial(publish_variant, context, variant) for variant in variants]
    for folder in each_side_by_side(jobs, most=WRITERS):
        folders.append(folder)
        report("writing models", len(folders), len(variants))
    return folders


def publish_variant(context: RunContext, variant: Variant) -> Path:
    """Write the tensors outside the blocks, then the index, which makes the folder a model."""
    writer = context.writer(variant)
    writer.finish(quantization_config(*variant.grid, []) if variant.grid else None)
    return writer.folder


def layer_rows(context: RunContext, variants: Sequence[Variant]) -> list[LayerRow]:
    """Return the rows of every layer of every variant, in the plan's order."""
    files = [context.rows_file(variant, block) for variant in variants for block in range(context.source.blocks)]
    return [row for file in files for row in read_rows(file, LayerRow)]


def discard_model(context: RunContext, variant: Variant) -> None:
    """Remove a model of which only the measurements are wanted."""
    shutil.rmtree(context.folder / "models" / variant.name, ignore_errors=True)


def _sequential(variant: Variant, over: Sequence[Mixture]) -> str:
    """Identify a variant's compressed blocks: by the windows of its corpora, not by their names."""
    return f"sequential-{digest_of([FORMAT, variant.key, [sets.weights for sets in over]])}"


def _solve_alone(context: RunContext, cached: CachedMoments, variant: Variant, block: int) -> BlockSolution:
    problem = context.problem(block, cached)
    solution = solve_block(problem, [variant])[variant.name]
    _write(context, variant, problem, solution)
    return solution


def _write(context: RunContext, variant: Variant, problem: BlockProblem, solution: BlockSolution) -> None:
    context.write_rows(variant, problem.block, solution.rows)
    writer = context.writer(variant)
    writer.write_block(problem.block, solution.changed, packed=solution.packed, dense=problem.parameters)
