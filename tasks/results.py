"""Measure every model of a run, and write what people read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect import task

from crosscal.corpora import load_corpus
from crosscal.errors import MissingArtifact, ModelError
from crosscal.evaluation import PERPLEXITY, TEST, VALIDATION, Measurement
from crosscal.evaluation.mcnemar import change
from crosscal.evaluation.measurement import ITEMS
from crosscal.evaluation.summarise import risk_ratios
from crosscal.files import write_whole
from crosscal.models.tensor_files import INDEX
from crosscal.plan import CompressionPlan
from crosscal.progress import Report, silent
from crosscal.report import ResultRow, WindowRow, write_report, write_rows
from crosscal.report.packed import dense_notes, dense_text
from crosscal.report.rows import DocumentRow, LayerRow, QuestionRow
from crosscal.stages.compress import discard_model, layer_rows
from crosscal.stages.describe import readable_samples, sample_quality
from crosscal.stages.evaluate import Examination, checkpoint_files, examination, measure
from crosscal.stages.heldout_text import Cutting
from crosscal.stages.made_variants import made_before, note_made, unmeasured
from crosscal.tasks.artifacts import show_run
from crosscal.tasks.options import PLAIN
from crosscal.tasks.questions import tasks_of
from crosscal.tasks.ticket import Ticket, task_report
from crosscal.variants import Variant

DENSE = "dense"
AGAIN = "Run the same command again: what was removed meanwhile is made anew."


def models_to_make(ticket: Ticket, stored: dict[str, str]) -> list[str]:
    """Names of the variants whose models are needed: all, or where only numbers are kept those not measured before."""
    variants, shop = ticket.variants(), ticket.workshop()
    if not ticket.parsed.execution.keep_models and any(made_before(shop, variant) for variant in variants):
        variants = unmeasured(shop, variants, examination_of(ticket, stored))
    return [variant.name for variant in variants]


@dataclass(frozen=True)
class _Judged:
    """What is known of a variant in the end: of its model, or of one that was measured and not kept."""

    measured: list[Measurement]
    layers: list[LayerRow]
    size_bytes: int | None = None
    """Of its files; None where this run made none."""
    failed: str | None = None
    """Why it cannot be loaded or measured."""


@task(name="evaluate", task_run_name="evaluate models", **PLAIN)
def evaluate_models(ticket: Ticket, stored: dict[str, str]) -> dict[str, Any]:
    """Measure the dense model and every variant; returns `failed`, variant → why it cannot be loaded or measured, and
    `notes` on what is stored dense.

    Writes `results.jsonl` and `layers.jsonl`; `windows.jsonl` and `questions.jsonl` hold what each perplexity and each
    accuracy is the mean of.

    `stored` gives the store's name of every corpus of documents.
    """
    variants, run_dir = ticket.variants(), Path(ticket.run_dir)
    with task_report() as report:
        exam = examination_of(ticket, stored, report)
        found: dict[Variant | None, list[Measurement]] = {}
        found[None], judged = measure(exam, ticket.source().path, name=DENSE, report=report), dict[str, _Judged]()
        for number, variant in enumerate(variants, start=1):
            report("measuring models", number - 1, len(variants))
            name = f"model {number} of {len(variants)}, {variant.name}"
            judged[variant.name] = one = _judged(ticket, exam, variant, name, report)
            found[variant] = one.measured
        report("measuring models", len(variants), len(variants))
    for variant in variants:
        found[variant] = [*found[variant], *risk_ratios(found[None], found[variant])]
    rows = [
        against_dense(result_row(ticket, variant, one), one, found[None])
        for variant, measured in found.items()
        for one in measured
    ]
    write_rows(run_dir / "windows.jsonl", [row for variant in found for row in _window_rows(variant, found[variant])])
    asked = [row for variant in found for row in _question_rows(variant, found[variant])]
    write_rows(run_dir / "questions.jsonl", asked)
    if scores := [row for variant in found for row in _document_rows(variant, found[variant])]:
        write_rows(run_dir / "summaries.jsonl", scores)
    write_rows(run_dir / "results.jsonl", rows)
    write_rows(run_dir / "layers.jsonl", [row for one in judged.values() for row in one.layers])
    dtype = str(ticket.source().dtype).removeprefix("torch.")
    texts = {name: dense_text(one.layers, dtype) for name, one in judged.items()}
    sizes = {name: one.size_bytes for name, one in judged.items() if one.size_bytes is not None}
    failed = {name: one.failed for name, one in judged.items() if one.failed}
    return {
        "failed": failed,
        "notes": [
            *exam.notes,
            *(f"{n} is no model: {why}" for n, why in failed.items()),
            *dense_notes(texts, sizes),
            *exam.suite.told,
        ],
    }


def _judged(ticket: Ticket, exam: Examination, variant: Variant, name: str, report: Report) -> _Judged:
    """A variant measured. One that cannot be is no model, and loses its index; the others are none the worse for it."""
    shop = ticket.workshop()
    if variant in ticket.variants_to_make():
        folder, layers = Path(ticket.run_dir) / "models" / variant.name, layer_rows(shop, [variant])
        files = checkpoint_files(folder, name, report)
        size_bytes = sum((folder / file).stat().st_size for file in files)
        try:
            judged = _Judged(measure(exam, folder, files=files, name=name, report=report), layers, size_bytes)
            note_made(shop, variant, files, layers)
        except ModelError as error:
            (folder / INDEX).unlink(missing_ok=True)
            why = str(error)
            skipped = [Measurement(t.corpus, t.split, PERPLEXITY, None, None, 0, 0.0, why) for t in exam.texts]
            judged = _Judged(skipped, layers, size_bytes, str(error))
    else:
        made = made_before(shop, variant)
        known = exam.find(made.weights) if made else None
        if made is None or known is None:
            raise MissingArtifact("a variant's numbers are not in the store any more", where=variant.name, do=AGAIN)
        judged = _Judged(known, made.rows)
    if not ticket.parsed.execution.keep_models:
        discard_model(shop, variant)
    return judged


def examination_of(ticket: Ticket, stored: dict[str, str], report: Report = silent) -> Examination:
    """The plan's windows and tasks."""
    plan = ticket.parsed
    chosen = {name: stored[name] for name in plan.perplexity_corpora}
    corpora = [
        dataclasses.replace(load_corpus(ticket.store, key, ticket.versions.get(key)), name=name)
        for name, key in chosen.items()
    ]
    return examination(
        ticket.store,
        corpora,
        ticket.source(),
        cutting_of(plan),
        tasks=tasks_of(ticket, stored),
        limit=plan.evaluate.limit,
        batch_tokens=plan.evaluate.batch_tokens,
        device=ticket.device,
        dtype=getattr(torch, ticket.dtype),
        report=report,
    )


def cutting_of(plan: CompressionPlan) -> Cutting:
    """How the plan has held-out text cut."""
    return Cutting(
        plan.evaluate.length or plan.calibration.length,
        {TEST: plan.evaluate.windows, VALIDATION: plan.evaluate.validation_windows},
        plan.calibration.begin_token,
        plan.calibration.plain_text,
    )


def _window_rows(variant: Variant | None, measured: Sequence[Measurement]) -> Iterator[WindowRow]:
    for one in measured:
        if one.window_nll is not None:
            yield WindowRow(variant.name if variant else DENSE, one.corpus_or_task, one.split, list(one.window_nll))


def _question_rows(variant: Variant | None, measured: Sequence[Measurement]) -> Iterator[QuestionRow]:
    name = variant.name if variant else DENSE
    for one in measured:
        if one.question_correct is not None:
            correct = list(one.question_correct)
            yield QuestionRow(name, one.corpus_or_task, one.split, one.metric, correct)


def result_row(ticket: Ticket, variant: Variant | None, found: Measurement) -> ResultRow:
    """A measurement with its circumstances; no variant is the dense model."""
    return ResultRow(
        variant=variant.name if variant else DENSE,
        method=variant.method if variant else DENSE,
        setting=variant.setting if variant else {},
        amounts=[amount.as_row() for amount in variant.amounts] if variant else [],
        upstream=variant.upstream if variant else DENSE,
        mixture=variant.mixture.as_dict() if variant and variant.mixture else {},
        seed=variant.seed if variant else ticket.parsed.seeds[0],
        model=Path(ticket.parsed.model).name,
        device=ticket.device,
        **{name: value for name, value in dataclasses.asdict(found).items() if name not in ITEMS},
    )


def _document_rows(variant: Variant | None, measured: Sequence[Measurement]) -> Iterator[DocumentRow]:
    name = variant.name if variant else DENSE
    for one in measured:
        if one.document_score is not None:
            yield DocumentRow(name, one.corpus_or_task, one.split, one.metric, list(one.document_score))


def against_dense(row: ResultRow, one: Measurement, dense: Sequence[Measurement]) -> ResultRow:
    """With what changed of the dense model's answers to the same questions."""
    place = (one.corpus_or_task, one.split, one.metric)
    before = next((d.question_correct for d in dense if (d.corpus_or_task, d.split, d.metric) == place), None)
    if row.variant == DENSE or not before or not one.question_correct:
        return row
    found = change(before, one.question_correct)
    return dataclasses.replace(row, lost=found.lost, won=found.won, p=found.p)


@task(name="describe", task_run_name="describe calibration", **PLAIN)
def describe_samples(ticket: Ticket) -> dict[str, Any]:
    """Write `samples.json`, some of each corpus's calibration text; returns the quality of all of it in numbers."""
    samples = ticket.sampled
    kinds = {name: corpus.source for name, corpus in ticket.parsed.corpora.items()}
    shown = readable_samples(ticket.store, ticket.source(), samples, kinds, per_corpus=2)
    write_whole(Path(ticket.run_dir) / "samples.json", json.dumps(shown, ensure_ascii=False, indent=1))
    return sample_quality(ticket.store, ticket.source(), samples)


@task(name="report", task_run_name="write report", **PLAIN)
def make_report(run_dir: str) -> str:
    """Write `report.html`, and show on the run's page what fits there; returns the report's path."""
    path = write_report(Path(run_dir))
    show_run(Path(run_dir))
    return str(path)
