"""Measure the models of a run, one after another; the measurements are kept in the store."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prefect import task

from crosscal.errors import MissingArtifact, ModelError
from crosscal.evaluation import TEST, VALIDATION
from crosscal.models.tensor_files import INDEX
from crosscal.plan import CompressionPlan
from crosscal.progress import Report, silent
from crosscal.report.rows import LayerRow
from crosscal.stages.compress import discard_model, layer_rows
from crosscal.stages.evaluate import EvaluationSet, checkpoint_files, evaluation_set, measure, weights_digest
from crosscal.stages.heldout_text import WindowCutting
from crosscal.stages.made_variants import made_before, note_made
from crosscal.stages.preflight import block_shapes
from crosscal.stages.race import Race
from crosscal.stages.screen import screened
from crosscal.tasks.corpora import corpus_of
from crosscal.tasks.evaluating_memory import evaluating_memory
from crosscal.tasks.options import RETRIED
from crosscal.tasks.questions import task_files, tasks_of
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import Variant

DENSE = "dense"
AGAIN = "Run the same command again: what was removed meanwhile is made anew."


def models_to_measure(spec: RunSpec) -> list[str]:
    return [DENSE, *(variant.name for variant in spec.variants())]


@task(name="evaluate", task_run_name="evaluate {name}", **RETRIED)
def evaluate_model(spec: RunSpec, stored: dict[str, str], name: str, report: Report = silent) -> dict[str, Any]:
    """Measure the dense model or a variant, unless the store has its measurements.

    Returns `weights`, the digest under which they are kept; `size_bytes` of the files, None if this run made none; and
    `failed`: why the model cannot be loaded or measured. Such a variant is no model and loses its index; other variants
    are not affected. `stored` maps every corpus of documents to its name in the store.
    """
    told, eval_set = place_of(spec, name), evaluation_set_of(spec, stored, report)
    if name == DENSE:
        files = checkpoint_files(spec.source().path, told, report)
        measure(eval_set, spec.source().path, files=files, name=told, report=report)
        return {"weights": weights_digest(files), "size_bytes": None, "failed": None}
    variant = variant_of(spec, name)
    if variant in spec.variants_to_make():
        measured = measure_made(spec, eval_set, variant, told, report)
    else:
        made = made_before(spec.run_context(), variant)
        if made is None or eval_set.find(made.weights) is None:
            raise MissingArtifact("a variant's numbers are not in the store any more", where=name, do=AGAIN)
        measured = {"weights": made.weights, "size_bytes": None, "failed": None}
    if not spec.parsed.execution.keep_models:
        discard_model(spec.run_context(), variant)
    return measured


def models_spared(spec: RunSpec, rows: Mapping[str, Sequence[LayerRow]] | None = None) -> dict[str, str]:
    """Return variant → why it needs no evaluation. The variant that the plan publishes is always evaluated.

    `rows`: the layer rows of every variant, if known."""
    if not spec.parsed.evaluate.screen:
        return {}
    publish = spec.parsed.publish
    rows = rows or {variant.name: rows_of(spec, variant) for variant in spec.variants()}
    return screened(spec.variants(), rows, [publish.variant] if publish else ())


def spare_model(spec: RunSpec, name: str, why: str) -> dict[str, Any]:
    """Return what `evaluate_model` would for a variant that needs no evaluation: `spared` states why. The store keeps
    its layer rows, so that a later run spares it without solving it."""
    context, variant = spec.run_context(), variant_of(spec, name)
    if variant in spec.variants_to_make():
        files = checkpoint_files(context.folder / "models" / name, name)
        note_made(context, variant, files, layer_rows(context, [variant]))
    if not spec.parsed.execution.keep_models:
        discard_model(context, variant)
    return {"weights": "", "size_bytes": None, "failed": None, "spared": why}


def variant_of(spec: RunSpec, name: str) -> Variant:
    return next(variant for variant in spec.variants() if variant.name == name)


def place_of(spec: RunSpec, name: str) -> str:
    """Return a model's place among those that a run measures, e.g. "model 2 of 5, NAME"."""
    names = models_to_measure(spec)
    return f"model {names.index(name) + 1} of {len(names)}, {name}"


def rows_of(spec: RunSpec, variant: Variant) -> list[LayerRow]:
    """Return the layer rows of a variant, whether this run or an earlier one made it."""
    if variant in spec.variants_to_make():
        return layer_rows(spec.run_context(), [variant])
    made = made_before(spec.run_context(), variant)
    return made.rows if made else []


def measure_made(
    spec: RunSpec, eval_set: EvaluationSet, variant: Variant, name: str, report: Report, look: int | None = None
) -> dict[str, Any]:
    """Measure the model in the run directory, for a look of a race or (`look` None) on everything; windows that a race
    has already measured are not measured again. Returns as `evaluate_model`."""
    context, race = spec.run_context(), Race(eval_set)
    folder = Path(spec.run_dir) / "models" / variant.name
    files = checkpoint_files(folder, name, report)
    size_bytes = sum((folder / file).stat().st_size for file in files)
    found: dict[str, Any] = {"weights": weights_digest(files), "size_bytes": size_bytes, "failed": None}
    try:
        if (apart := race.missing(found["weights"], look)) is not None:
            measure(apart, folder, files=files, name=name, report=report)
            race.join(found["weights"])
        if look is None:
            measure(eval_set, folder, files=files, name=name, report=report)
        note_made(context, variant, files, layer_rows(context, [variant]))
    except ModelError as error:
        (folder / INDEX).unlink(missing_ok=True)
        return {**found, "failed": str(error)}
    return found


def evaluation_set_of(spec: RunSpec, stored: dict[str, str], report: Report = silent) -> EvaluationSet:
    """Return the plan's windows and tasks, built once per process as long as question files are unchanged."""
    of_run = [spec.plan, spec.home, spec.model, spec.device, spec.dtype, spec.versions, stored]
    known = _examined(json.dumps(of_run), tuple(_stamps(task_files(spec.parsed))))
    if not known:
        known.append(_examination(spec, stored, report))
    return known[0]


@functools.lru_cache(maxsize=1)
def _examined(circumstances: str, stamps: tuple[tuple[str, int, int], ...]) -> list[EvaluationSet]:
    """Return the cache slot for an evaluation set with these settings, at first an empty list."""
    return []


def _stamps(tasks: list[str]) -> Iterator[tuple[str, int, int]]:
    for file in (file for file in map(Path, tasks) if file.is_file()):
        yield str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns


def _examination(spec: RunSpec, stored: dict[str, str], report: Report) -> EvaluationSet:
    plan = spec.parsed
    chosen = {name: stored[name] for name in plan.perplexity_corpora}
    corpora = [corpus_of(spec, name, key) for name, key in chosen.items()]
    source = spec.source()
    return evaluation_set(
        spec.store,
        corpora,
        source,
        cutting_of(plan),
        tasks=tasks_of(spec, stored),
        limit=plan.evaluate.limit,
        batch_tokens=plan.evaluate.batch_tokens,
        device=spec.device,
        dtype=getattr(torch, spec.dtype),
        by_blocks=evaluating_memory(plan, source, block_shapes(source, spec.cached)).is_by_blocks,
        report=report,
    )


def cutting_of(plan: CompressionPlan) -> WindowCutting:
    """Return how the plan cuts held-out text into windows."""
    return WindowCutting(
        plan.evaluate.length or plan.calibration.length,
        {TEST: plan.evaluate.windows, VALIDATION: plan.evaluate.validation_windows},
        plan.calibration.begin_token,
        plan.calibration.plain_text,
    )
