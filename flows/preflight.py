"""Report what a run will do and need, before it starts: `crosscal plan check`.

Nothing is drawn, generated or stored here. What cannot be known yet is reported as unknown.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosscal.calibration import WindowRequest
from crosscal.calibration.chats import check_template
from crosscal.compressors.amount import is_written_dense
from crosscal.corpora import load_corpus
from crosscal.corpora.corpus import TEMPLATE
from crosscal.corpora.usable import holds_conversations
from crosscal.errors import CorpusError, CrosscalError
from crosscal.flows.sources_check import unusable_sources
from crosscal.flows.study import check_study
from crosscal.flows.study_parts import parts_of
from crosscal.flows.text_check import check_text
from crosscal.flows.unread import reading, reading_again
from crosscal.models.source import ModelSource
from crosscal.plan import CompressionPlan, Documents
from crosscal.stages.block_problem import statistics_needed
from crosscal.stages.gradients import CachedGradients, gradient_dtype
from crosscal.stages.left_dense import left_dense
from crosscal.stages.memory import free_bytes
from crosscal.stages.packed_size import stored
from crosscal.stages.preflight import (
    BlockShape,
    block_shapes,
    blocks_at_once,
    existing_parent,
    gradients_bytes,
    matrices_of,
    moments_bytes,
    reading_bytes,
    solving_bytes,
    walking_back_bytes,
)
from crosscal.statistics import Gradient, Statistic
from crosscal.tasks.corpora import stored_name
from crosscal.tasks.evaluating_memory import evaluating_memory
from crosscal.tasks.model import decoded, identify
from crosscal.tasks.questions import looked_at
from crosscal.tasks.refusals import refusals, undecidable
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import samples_needed, variants


def check_plan(plan: CompressionPlan, home: str) -> dict[str, Any]:
    """Return the findings as JSON: `variants`, `reading`, `memory`, `disk`, and `problems`, each with its remedy."""
    asked = variants(plan)
    findings: dict[str, Any] = {"variants": [variant.name for variant in asked]}
    if searches := {variant.name: variant.search.cost for variant in asked if variant.search}:
        findings["mixtures_to_find"] = searches
    if unpacked := [variant.name for variant in asked if is_written_dense([p.step for p in variant.steps])]:
        findings["written_dense"] = {
            "variants": unpacked,
            "why": "no format that inference engines load supports outliers",
        }
    if questions := looked_at(plan):
        findings["questions"] = questions
    spec = RunSpec(plan.model_dump(mode="json"), home)
    problems = [str(error) for error in (*unusable_sources(plan, spec.store), *undecidable(plan, spec.store))]
    if plan.study is not None:
        findings["study"], spec = _study(plan, spec)
    try:
        known = identify(spec)
        source = spec.source()
        spec = dataclasses.replace(spec, model=known["model"], device=known["device"], dtype=known["dtype"])
        shapes = block_shapes(source, spec.cached)
        kept: dict[str, Any] = {"left_dense": left_dense(source, spec.cached, plan.leave_dense)}
        limited = WindowRequest(plan.calibration.windows, plan.calibration.length).within(source.max_positions)[1]
        kept |= {"not_calibrated": source.uncalibrated, "notes": [*decoded(source), *limited]}
        problems += [str(error) for error in (*refusals(plan, source, shapes), *_unrendered(spec, source))]
    except CrosscalError as error:
        return {**findings, "problems": [*problems, str(error)]}
    readings = [reading(spec, source, name, seed, spec.cached) for name, seed in samples_needed(plan)]
    again = [reading_again(variant, readings) for variant in asked if variant.upstream == "sequential"]
    gradients = [
        {**reading(spec, source, *place, CachedGradients(spec.cached), held_out=False), "of": Gradient.SQUARE}
        for place in sorted(dataclasses.replace(spec, only=None).over_gradients)
    ]
    memory = _memory(spec, source, shapes, readings + again, gradients)
    disk = _disk(spec, source, shapes, readings + again, gradients)
    told = [*readings, *again, *gradients]
    of_text, leaks = check_text(spec, source, shapes)
    findings |= {
        "model": {"path": str(source.path), "blocks": len(shapes), "device": spec.device, "dtype": spec.dtype} | kept,
        "stored": stored(source, asked, lambda: matrices_of(source, spec.cached)),
        "reading": [{name: value for name, value in each.items() if name != "sets"} for each in told],
        "sums": sorted([*statistics_needed(asked), *([Gradient.SQUARE] if gradients else [])]),
        "calibration_tokens_to_read": sum(each["tokens_to_read"] for each in told),
        "memory": memory,
        "disk": disk,
        **of_text,
    }
    return {**findings, "problems": [*dict.fromkeys([*problems, *leaks, *_shortages(memory, disk)])]}


def _study(plan: CompressionPlan, spec: RunSpec) -> tuple[dict[str, Any], RunSpec]:
    """Return a study's size and evaluation cost, and the spec of its largest part: no other needs more at a time."""
    check_study(plan)
    parts = parts_of(plan, Path(), [])
    models, length = sum(len(part.variants) for part in parts), plan.evaluate.length or plan.calibration.length
    windows = plan.evaluate.windows + plan.evaluate.validation_windows
    tokens = models * windows * length * len(plan.perplexity_corpora)
    found = {"draws": len(plan.seeds), "parts": len(parts), "models": models, "evaluation_tokens_at_most": tokens}
    largest = max(parts, key=lambda part: len(part.variants), default=None)
    return found, dataclasses.replace(spec, only=list(largest.variants) if largest else [])


def _unrendered(spec: RunSpec, source: ModelSource) -> Iterator[CrosscalError]:
    """Yield an error for each corpus known to contain conversations, if the model has no chat template."""
    for name, documents in spec.parsed.document_corpora.items():
        if documents.chat == TEMPLATE and _has_conversations(spec, name, documents):
            try:
                check_template(source.tokenizer(), name)
            except CrosscalError as error:
                yield error


def _has_conversations(spec: RunSpec, name: str, documents: Documents) -> bool:
    """Judge by the first records of the sources, or by what `crosscal ingest` stored if there are none."""
    try:
        if documents.path is None:
            return load_corpus(spec.store, stored_name(name, documents)).conversations > 0
        paths = [documents.path] if isinstance(documents.path, str) else documents.path
        return any(holds_conversations(path, documents.text, documents.revision) for path in paths)
    except CorpusError:  # not ingested yet, or reported by `unusable_sources`
        return False


def _sums(spec: RunSpec, reading: dict[str, Any]) -> frozenset[Statistic]:
    """Return the statistics that a calibration pass sums: the common ones, and those of a sequential variant."""
    every = dataclasses.replace(spec, only=None).variants("sequential")
    mine = [variant for variant in every if variant.name == reading.get("variant")]
    return spec.cached.wanted | (statistics_needed(mine) if mine else frozenset())


def _memory(
    spec: RunSpec,
    source: ModelSource,
    shapes: Sequence[BlockShape],
    readings: Sequence[dict[str, Any]],
    gradients: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Estimate the memory needed above what this process already uses. A calibration pass covers one corpus at a time,
    for a sequential variant all of its mixture."""
    unread = [reading for reading in readings if reading["tokens_to_read"]]
    config = source.config.get_text_config()
    parameters = source.parameters
    outside = parameters - sum(shape.parameters for shape in shapes)
    itemsize = getattr(torch, spec.dtype).itemsize
    sizes = {"outside": outside, "hidden": config.hidden_size}
    one_pass = partial(reading_bytes, shapes, **sizes, itemsize=itemsize)
    needed = [
        one_pass(tokens=each["tokens_to_read"], sets=len(each["sets"] or (0, 0)), statistics=_sums(spec, each))
        for each in unread
    ]
    free = free_bytes(spec.device)
    walking_back = walking_back_bytes(
        shapes,
        **sizes,
        **_largest(gradients),
        vocabulary=config.vocab_size,
        length=spec.parsed.calibration.length,
        windows=torch.get_num_threads() if spec.device == "cpu" else 1,
        itemsize=gradient_dtype(spec.dtype).itemsize,
        free_bytes=free,
    )
    evaluating = evaluating_memory(spec.parsed, source, shapes)
    return {
        "device": spec.device,
        "reading_bytes": max(needed, default=0),
        "gradients_bytes": walking_back if _largest(gradients)["tokens"] else 0,
        "solving_bytes": _solving_bytes(spec, shapes, free),
        "evaluating_bytes": evaluating.needed_bytes,
        "evaluating": "block by block" if evaluating.is_by_blocks else "whole models",
        "free_bytes": free,
    }


def _largest(readings: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the largest numbers of tokens and of sets in one pass."""
    unread = [each for each in readings if each["tokens_to_read"]]
    tokens = max((each["tokens_to_read"] for each in unread), default=0)
    return {"tokens": tokens, "sets": max((len(each["sets"] or (0, 0)) for each in unread), default=0)}


def _solving_bytes(spec: RunSpec, shapes: Sequence[BlockShape], free: int) -> int:
    """Memory of the blocks that a run solves concurrently here, or of the largest sequential variant."""
    threads = 1 if spec.device.startswith("cuda") else torch.get_num_threads()
    dense, alone = spec.variants("dense"), spec.variants("sequential")
    sums, blocks = spec.cached.wanted, 1
    if not spec.has_workers:
        blocks = blocks_at_once(shapes, dense, threads=threads, free_bytes=free, statistics=sums)
    sums_of = {variant: sums | statistics_needed([variant]) for variant in alone}
    needed = [solving_bytes(shapes, [variant], lanes=threads, statistics=sums_of[variant]) for variant in alone]
    if dense:
        needed.append(blocks * solving_bytes(shapes, dense, lanes=threads // blocks, statistics=sums))
    return max(needed, default=0)


def _disk(
    spec: RunSpec,
    source: ModelSource,
    shapes: Sequence[BlockShape],
    readings: Sequence[dict[str, Any]],
    gradients: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Estimate the bytes by which the store and the run directory will grow. All models are on disk before they are
    measured, whether they are kept or not. A model whose blocks are already solved is counted again."""
    unread = [reading for reading in readings if reading["state"] != "cached"]
    moments = [moments_bytes(shapes, len(each["sets"] or (0, 0)), _sums(spec, each)) for each in unread]
    squares = sum(len(each["sets"] or (0,)) for each in gradients if each["state"] != "cached")
    checkpoint = sum(file.stat().st_size for file in set(source.weights.stored_in.values()))
    is_remote = "://" in spec.home
    return {
        "store_bytes": sum(moments) + gradients_bytes(shapes, squares),
        "models_bytes": checkpoint * len(spec.variants()),
        "store_free_bytes": None if is_remote else _free(Path(spec.home)),
        "models_free_bytes": _free(Path.cwd()),
        "is_one_disk": not is_remote and _device_of(Path(spec.home)) == _device_of(Path.cwd()),
    }


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing_parent(folder)).free


def _device_of(folder: Path) -> int:
    return existing_parent(folder).stat().st_dev


def _shortages(memory: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    found = []
    for use, remedy in (
        ("reading", "Lower calibration.windows or calibration.length."),
        ("gradients", "Lower calibration.windows or calibration.length."),
        ("solving", "Split `compress` into several plans: all variants of a block are solved at once."),
        (
            "evaluating",
            "Lower evaluate.batch_tokens or evaluate.length; a model, or two of its larger blocks, must fit.",
        ),
    ):
        if memory[f"{use}_bytes"] > memory["free_bytes"]:
            amounts = f"about {_gb(memory[f'{use}_bytes'])} needed, {_gb(memory['free_bytes'])} free"
            found.append(f"too little memory for {use} on {memory['device']} (got {amounts}). {remedy}")
    store, models = disk["store_bytes"], disk["models_bytes"]
    if disk["is_one_disk"]:
        store = models = store + models
    for place, needed, free in (
        ("store", store, disk["store_free_bytes"]),
        ("run directory", models, disk["models_free_bytes"]),
    ):
        if free is not None and needed > free:
            amounts = f"about {_gb(needed)} needed, {_gb(free)} free"
            found.append(
                f"too little disk for the {place} (got {amounts}). Free space, `crosscal store gc`, or move it."
            )
    return found


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
