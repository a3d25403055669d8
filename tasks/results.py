"""Measure every model of a run, and write what people read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from prefect import task

from crosscal.corpora import load_corpus
from crosscal.evaluation import Measurement
from crosscal.report import ResultRow, write_report, write_rows
from crosscal.report.files import write_whole
from crosscal.stages.compress import discard_model, layer_rows
from crosscal.stages.describe import readable_samples, sample_quality
from crosscal.stages.evaluate import Examination, examination, measure
from crosscal.tasks.artifacts import show_run
from crosscal.tasks.options import PLAIN
from crosscal.tasks.ticket import Ticket, task_report
from crosscal.variants import Variant

DENSE = "dense"


@task(name="evaluate", task_run_name="evaluate models", **PLAIN)
def evaluate_models(ticket: Ticket, stored: dict[str, str]) -> int:
    """Measure the dense model and every variant, and write `results.jsonl` and `layers.jsonl`; returns the rows.

    `stored` gives the store's name of every corpus of documents.
    """
    variants, run_dir = ticket.variants(), Path(ticket.run_dir)
    exam = examination_of(ticket, stored)
    rows = [result_row(ticket, None, found) for found in measure(exam, ticket.source().path)]
    shop = ticket.workshop()
    with task_report() as report:
        for done, variant in enumerate(variants):
            report("measuring models", done, len(variants))
            rows += [result_row(ticket, variant, found) for found in measure(exam, run_dir / "models" / variant.name)]
            if not ticket.parsed.execution.keep_models:
                discard_model(shop, variant)
        report("measuring models", len(variants), len(variants))
    write_rows(run_dir / "results.jsonl", rows)
    write_rows(run_dir / "layers.jsonl", layer_rows(shop, variants))
    return len(rows)


def examination_of(ticket: Ticket, stored: dict[str, str]) -> Examination:
    """The plan's test windows and tasks."""
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
        length=plan.evaluate.length or plan.calibration.length,
        windows=plan.evaluate.windows,
        tasks=plan.evaluate.tasks,
        limit=plan.evaluate.limit,
        batch_tokens=plan.evaluate.batch_tokens,
        device=ticket.device,
        dtype=getattr(torch, ticket.dtype),
    )


def result_row(ticket: Ticket, variant: Variant | None, found: Measurement) -> ResultRow:
    """A measurement with its circumstances; no variant is the dense model."""
    return ResultRow(
        variant=variant.name if variant else DENSE,
        method=variant.method if variant else DENSE,
        setting=variant.setting if variant else {},
        upstream=variant.upstream if variant else DENSE,
        mixture=variant.mixture.as_dict() if variant and variant.mixture else {},
        seed=variant.seed if variant else ticket.parsed.seeds[0],
        model=Path(ticket.parsed.model).name,
        device=ticket.device,
        **dataclasses.asdict(found),
    )


@task(name="describe", task_run_name="describe calibration", **PLAIN)
def describe_samples(ticket: Ticket) -> dict[str, Any]:
    """Write `samples.json`, some of each corpus's calibration text; returns the quality of all of it in numbers."""
    samples = ticket.sampled
    shown = readable_samples(ticket.store, ticket.source(), samples, per_corpus=2)
    write_whole(Path(ticket.run_dir) / "samples.json", json.dumps(shown, ensure_ascii=False, indent=1))
    return sample_quality(ticket.store, ticket.source(), samples)


@task(name="report", task_run_name="write report", **PLAIN)
def make_report(run_dir: str) -> str:
    """Write `report.html`, and show on the run's page what fits there; returns the report's path."""
    path = write_report(Path(run_dir))
    show_run(Path(run_dir))
    return str(path)
