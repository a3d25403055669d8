"""Measure the models of a run, one after another; the measurements are kept in the store."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
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
from crosscal.stages.evaluate import Examination, checkpoint_files, examination, measure, weights_digest
from crosscal.stages.heldout_text import Cutting
from crosscal.stages.made_variants import made_before, note_made
from crosscal.stages.preflight import block_shapes
from crosscal.stages.race import Race
from crosscal.stages.screen import screened
from crosscal.tasks.corpora import corpus_of
from crosscal.tasks.evaluating_memory import evaluating_memory
from crosscal.tasks.options import RETRIED
from crosscal.tasks.questions import task_files, tasks_of
from crosscal.tasks.ticket import Ticket
from crosscal.variants import Variant

DENSE = "dense"
AGAIN = "Run the same command again: what was removed meanwhile is made anew."


def models_to_measure(ticket: Ticket) -> list[str]:
    return [DENSE, *(variant.name for variant in ticket.variants())]


@task(name="evaluate", task_run_name="evaluate {name}", **RETRIED)
def evaluate_model(ticket: Ticket, stored: dict[str, str], name: str, report: Report = silent) -> dict[str, Any]:
    """Measure the dense model or a variant, unless the store has its measurements.

    Returns `weights`, the digest under which they are kept; `size_bytes` of the files, None if this run made none; and
    `failed`: why the model cannot be loaded or measured. Such a variant is no model and loses its index; other variants
    are not affected. `stored` maps every corpus of documents to its name in the store.
    """
    told, exam = place_of(ticket, name), examination_of(ticket, stored, report)
    if name == DENSE:
        files = checkpoint_files(ticket.source().path, told, report)
        measure(exam, ticket.source().path, files=files, name=told, report=report)
        return {"weights": weights_digest(files), "size_bytes": None, "failed": None}
    variant = variant_of(ticket, name)
    if variant in ticket.variants_to_make():
        measured = measure_made(ticket, exam, variant, told, report)
    else:
        made = made_before(ticket.workshop(), variant)
        if made is None or exam.find(made.weights) is None:
            raise MissingArtifact("a variant's numbers are not in the store any more", where=name, do=AGAIN)
        measured = {"weights": made.weights, "size_bytes": None, "failed": None}
    if not ticket.parsed.execution.keep_models:
        discard_model(ticket.workshop(), variant)
    return measured


def models_spared(ticket: Ticket) -> dict[str, str]:
    """Return variant → why it needs no evaluation. The variant that the plan publishes is always evaluated."""
    if not ticket.parsed.evaluate.screen:
        return {}
    publish = ticket.parsed.publish
    rows = {variant.name: rows_of(ticket, variant) for variant in ticket.variants()}
    return screened(ticket.variants(), rows, [publish.variant] if publish else ())


def spare_model(ticket: Ticket, name: str, why: str) -> dict[str, Any]:
    """Return what `evaluate_model` would for a variant that needs no evaluation: `spared` states why."""
    if not ticket.parsed.execution.keep_models:
        discard_model(ticket.workshop(), variant_of(ticket, name))
    return {"weights": "", "size_bytes": None, "failed": None, "spared": why}


def variant_of(ticket: Ticket, name: str) -> Variant:
    return next(variant for variant in ticket.variants() if variant.name == name)


def place_of(ticket: Ticket, name: str) -> str:
    """Return a model's place among those that a run measures, e.g. "model 2 of 5, NAME"."""
    names = models_to_measure(ticket)
    return f"model {names.index(name) + 1} of {len(names)}, {name}"


def rows_of(ticket: Ticket, variant: Variant) -> list[LayerRow]:
    """Return the layer rows of a variant, whether this run or an earlier one made it."""
    if variant in ticket.variants_to_make():
        return layer_rows(ticket.workshop(), [variant])
    made = made_before(ticket.workshop(), variant)
    return made.rows if made else []


def measure_made(
    ticket: Ticket, exam: Examination, variant: Variant, name: str, report: Report, look: int | None = None
) -> dict[str, Any]:
    """Measure the model in the run directory, for a look of a race or (`look` None) on everything; windows that a race
    has already measured are not measured again. Returns as `evaluate_model`."""
    shop, race = ticket.workshop(), Race(exam)
    folder = Path(ticket.run_dir) / "models" / variant.name
    files = checkpoint_files(folder, name, report)
    size_bytes = sum((folder / file).stat().st_size for file in files)
    found: dict[str, Any] = {"weights": weights_digest(files), "size_bytes": size_bytes, "failed": None}
    try:
        if (apart := race.missing(found["weights"], look)) is not None:
            measure(apart, folder, files=files, name=name, report=report)
            race.join(found["weights"])
        if look is None:
            measure(exam, folder, files=files, name=name, report=report)
        note_made(shop, variant, files, layer_rows(shop, [variant]))
    except ModelError as error:
        (folder / INDEX).unlink(missing_ok=True)
        return {**found, "failed": str(error)}
    return found


def examination_of(ticket: Ticket, stored: dict[str, str], report: Report = silent) -> Examination:
    """Return the plan's windows and tasks, built once per process as long as question files are unchanged."""
    of_run = [ticket.plan, ticket.home, ticket.model, ticket.device, ticket.dtype, ticket.versions, stored]
    known = _examined(json.dumps(of_run), tuple(_stamps(task_files(ticket.parsed))))
    if not known:
        known.append(_examination(ticket, stored, report))
    return known[0]


@functools.lru_cache(maxsize=1)
def _examined(circumstances: str, stamps: tuple[tuple[str, int, int], ...]) -> list[Examination]:
    """Return the cache slot for an examination with these settings, at first an empty list."""
    return []


def _stamps(tasks: list[str]) -> Iterator[tuple[str, int, int]]:
    for file in (file for file in map(Path, tasks) if file.is_file()):
        yield str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns


def _examination(ticket: Ticket, stored: dict[str, str], report: Report) -> Examination:
    plan = ticket.parsed
    chosen = {name: stored[name] for name in plan.perplexity_corpora}
    corpora = [corpus_of(ticket, name, key) for name, key in chosen.items()]
    source = ticket.source()
    return examination(
        ticket.store,
        corpora,
        source,
        cutting_of(plan),
        tasks=tasks_of(ticket, stored),
        limit=plan.evaluate.limit,
        batch_tokens=plan.evaluate.batch_tokens,
        device=ticket.device,
        dtype=getattr(torch, ticket.dtype),
        by_blocks=evaluating_memory(plan, source, block_shapes(source, ticket.cached)).is_by_blocks,
        report=report,
    )


def cutting_of(plan: CompressionPlan) -> Cutting:
    """Return how the plan cuts held-out text into windows."""
    return Cutting(
        plan.evaluate.length or plan.calibration.length,
        {TEST: plan.evaluate.windows, VALIDATION: plan.evaluate.validation_windows},
        plan.calibration.begin_token,
        plan.calibration.plain_text,
    )
