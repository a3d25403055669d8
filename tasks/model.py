"""Tasks on the model: calibration passes, block solves, and writing the compressed models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task

from crosscal.errors import CrosscalError
from crosscal.models.source import ModelSource
from crosscal.stages.allocate import allocated, unsummarised
from crosscal.stages.allocate import summarise_block as summarise
from crosscal.stages.compress import blocks_at_once, compress_block, compress_sequential, publish_variants
from crosscal.stages.folding import fold, sets_to_read
from crosscal.stages.gradients import CachedGradients, collect_gradients
from crosscal.stages.left_dense import left_dense
from crosscal.stages.made_variants import take_blocks
from crosscal.stages.moments import MomentsReport, collect_moments
from crosscal.stages.parts import WindowSpan, add_parts, loads, read_parts
from crosscal.stages.preflight import block_shapes
from crosscal.stages.sample import Sample
from crosscal.stages.solved_blocks import collect_block, publish_block
from crosscal.tasks.options import PLAIN, RETRIED
from crosscal.tasks.refusals import check_request
from crosscal.tasks.run_spec import RunSpec, resolve_device, task_report


def identify(spec: RunSpec) -> dict[str, Any]:
    """Return the model's digest and blocks, and device and dtype: every key of the run depends on them."""
    device = resolve_device(spec.parsed.execution.device)
    source = spec.source()
    total_bytes = sum(file.stat().st_size for file in set(source.weights.stored_in.values()))
    with task_report() as report:
        report(f"hashing {total_bytes / 1e9:.1f} GB of the model's files", 0, None)
        digest = source.digest
    dtype = "float32" if device == "cpu" else str(source.dtype).removeprefix("torch.")
    return {"model": digest, "device": device, "dtype": dtype, "blocks": source.blocks}


@task(name="identify", task_run_name="identify model", **RETRIED)
def identify_model(spec: RunSpec) -> dict[str, Any]:
    """Identify the model, as `identify`, and raise now what would otherwise fail hours later."""
    known = identify(spec)
    source = spec.source()
    cached = dataclasses.replace(spec.cached, model=known["model"])
    check_request(spec.parsed, source, block_shapes(source, cached))
    left_dense(source, cached, spec.parsed.leave_dense)  # raises if the model cannot be calibrated
    copied = [f"{part}: not calibrated, copied as it is" for part in source.uncalibrated]
    return {**known, "notes": [*decoded(source), *copied]}


def decoded(source: ModelSource) -> list[str]:
    """Return a run's note on a checkpoint whose weights are decoded while they are read; else nothing."""
    dtype = str(source.dtype).removeprefix("torch.")
    read = f"the checkpoint is stored in {source.encoding}: read, and written unless packed, as {dtype}"
    return [read] if source.encoding else []


def parts_to_read(spec: RunSpec) -> list[list[dict[str, Any]]]:
    """Return the parts of calibration sets that workers have to read, one load per task; empty without workers."""
    if not spec.has_workers:
        return []
    cached, blocks = spec.cached, spec.source().blocks
    sets = [key for sample in spec.sampled for key in sets_to_read(cached, blocks, sample)]
    found = loads(cached, blocks, sets, spec.parsed.execution.part_tokens)
    return [[dataclasses.asdict(part) for part in load] for load in found]


@task(name="moments-part", task_run_name="read part {number}", **RETRIED)
def read_part(spec: RunSpec, number: int, load: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the calibration pass over some parts of calibration sets, on a worker."""
    with task_report() as report:
        done = read_parts(
            spec.cached,
            spec.source_on_worker(),
            [WindowSpan(**part) for part in load],
            device=spec.device,
            batch_tokens=spec.parsed.calibration.batch_tokens,
            report=lambda what, count, total: report(f"part {number}: reading", count, total),
        )
    return dataclasses.asdict(done)


@task(name="moments", task_run_name="read {sample[corpus]}, seed {sample[seed]}", **RETRIED)
def read_moments(spec: RunSpec, sample: dict[str, Any]) -> dict[str, Any]:
    """Run the calibration pass over one corpus's windows, unless the store has all its moments, or add up the moments
    of workers' parts; then fold the sets that are not kept apart."""
    drawn, source, cached = Sample.from_json(sample), spec.source(), spec.cached
    sets = sets_to_read(cached, source.blocks, drawn)
    if spec.has_workers:
        with task_report() as report:
            report(f"{sample['corpus']}: adding up what workers read", 0, None)
            done = add_parts(cached, source.blocks, sets, spec.parsed.execution.part_tokens)
    else:
        done = _collect(spec, functools.partial(collect_moments, cached, source), sets, sample["corpus"], "reading")
    fold(cached, source.blocks, drawn)
    return dataclasses.asdict(done)


@task(name="gradients", task_run_name="gradients over {sample[corpus]}, seed {sample[seed]}", **RETRIED)
def read_gradients(spec: RunSpec, sample: dict[str, Any]) -> dict[str, Any]:
    """Ensure that the store has the gradients of the loss over one corpus's calibration windows; fold older sets."""
    drawn, cached = Sample.from_json(sample), CachedGradients(spec.cached)
    source = spec.source_on_worker() if spec.has_workers else spec.source()
    sets = sets_to_read(cached, source.blocks, drawn, held_out=False)
    collect = functools.partial(collect_gradients, cached, source)
    done = _collect(spec, collect, sets, sample["corpus"], "gradients")
    fold(cached, source.blocks, drawn, held_out=False)
    return dataclasses.asdict(done)


def _collect(
    spec: RunSpec, collect: Callable[..., MomentsReport], sets: list[str], corpus: str, what: str
) -> MomentsReport:
    """Collect in passes of at most as many sets as a solve reads, which the memory estimate assumes."""
    calibration, done = spec.parsed.calibration, MomentsReport(0, 0, 0, 0.0)
    at_once = 2 * (calibration.parts_kept_apart + 1)
    with task_report() as report:
        for start in range(0, len(sets), at_once):
            with _said_by(dict.fromkeys(sets, corpus)):
                done += collect(
                    sets[start : start + at_once],
                    device=spec.device,
                    batch_tokens=calibration.batch_tokens,
                    report=lambda _, count, total: report(f"{corpus}: {what}", count, total),
                )
    return done


@contextmanager
def _said_by(names: Mapping[str, str]) -> Iterator[None]:
    """Re-raise errors with the names of corpora instead of the digests of their windows."""
    try:
        yield
    except CrosscalError as error:
        raise error.renamed(names) from error


@task(name="reuse", task_run_name="take blocks of earlier runs", **PLAIN)
def reuse_blocks(spec: RunSpec) -> int:
    """Copy into the run directory blocks that an earlier run solved in another one; return their number."""
    with task_report() as report:
        return take_blocks(spec.run_context(), spec.variants_to_make(), report)


def unsolved_blocks(spec: RunSpec) -> list[int]:
    """Return the blocks that the run directory lacks for some variant with dense inputs."""
    context, variants = spec.run_context(), spec.variants_to_make("dense")
    writers = [context.writer(variant) for variant in variants]
    return [block for block in range(context.source.blocks) if not all(writer.has_block(block) for writer in writers)]


def blocks_side_by_side(spec: RunSpec, upstream: str | None = "dense") -> int:
    """Return how many blocks this machine may solve concurrently."""
    on_cpu = spec.device == "cpu"
    return blocks_at_once(spec.run_context(), spec.variants_to_make(upstream)) if on_cpu and not spec.has_workers else 1


def unsummarised_blocks(spec: RunSpec) -> list[int]:
    """Return the blocks without an allocator's summary, for variants that lack a block in the run directory."""
    context = spec.run_context()
    blocks = range(context.source.blocks)
    asked = [variant for variant in spec.variants_to_make() if variant.allocator is not None]
    return unsummarised(context, [v for v in asked if not all(context.writer(v).has_block(block) for block in blocks)])


@task(name="summarise-block", task_run_name="summarise block {block}", **RETRIED)
def summarise_block(spec: RunSpec, block: int) -> int:
    """Store the summaries of a block that the allocators decide from. Returns the block."""
    source = spec.source_on_worker() if spec.has_workers else spec.source()
    summarise(dataclasses.replace(spec.run_context(), source=source), block, spec.variants_to_make())
    return block


@task(name="solve-block", task_run_name="solve block {block}", **RETRIED)
def solve_block(spec: RunSpec, block: int) -> int:
    """Solve one block for every variant with dense inputs, into the run directory or, on a worker, into the store.

    Returns the block.
    """
    variants = spec.variants_to_make("dense")
    if spec.has_workers:
        context = dataclasses.replace(spec.run_context(), source=spec.source_on_worker())
        publish_block(allocated(context, variants), block, variants)
    else:
        compress_block(allocated(spec.run_context(), variants), block, variants)
    return block


def take_block(spec: RunSpec, block: int) -> None:
    """Copy a block that a worker solved into the run directory; without workers it is already there."""
    if spec.has_workers:
        collect_block(spec.run_context(), block, spec.variants_to_make("dense"))


@task(name="solve-sequential", task_run_name="solve {name}", **PLAIN)
def solve_sequential(spec: RunSpec, name: str) -> dict[str, Any]:
    """Solve one variant whose inputs come through its own compressed blocks."""
    variant = next(variant for variant in spec.variants("sequential") if variant.name == name)
    context = allocated(spec.run_context(), [variant])
    corpora = {key: corpus for (corpus, _), sample in context.samples.items() for key in sample.sets}
    with task_report() as report, _said_by(corpora):
        done = compress_sequential(
            context,
            variant,
            batch_tokens=spec.parsed.calibration.batch_tokens,
            report=lambda what, count, total: report(name, count, total),
        )
    return dataclasses.asdict(done)


@task(name="publish", task_run_name="publish models", **PLAIN)
def publish_models(spec: RunSpec) -> int:
    """Write the index of every variant, which makes it a model that can be loaded; return their number."""
    with task_report() as report:
        return len(publish_variants(spec.run_context(), spec.variants_to_make(), report))
