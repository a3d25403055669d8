"""Measure every model of a run, and write what people read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from prefect import task

from crosscal.corpora import load_corpus
from crosscal.evaluation import Measurement
from crosscal.report import ResultRow, write_report, write_rows
from crosscal.stages.compress import layer_rows
from crosscal.stages.evaluate import Examination, examination, measure
from crosscal.variants import Variant
from tasks.ticket import Ticket, task_report

DENSE = "dense"


@task(name="evaluate")
def evaluate_models(ticket: Ticket, stored: dict[str, str]) -> int:
    """Measure the dense model and every variant, and write `results.jsonl` and `layers.jsonl`; returns the rows.

    `stored` gives the store's name of every corpus of documents.
    """
    variants, run_dir = ticket.variants(), Path(ticket.run_dir)
    exam = _examination(ticket, stored)
    rows = [_row(ticket, None, found) for found in measure(exam, ticket.source().path)]
    with task_report() as report:
        for done, variant in enumerate(variants):
            report("measuring models", done, len(variants))
            rows += [_row(ticket, variant, found) for found in measure(exam, run_dir / "models" / variant.name)]
    write_rows(run_dir / "results.jsonl", rows)
    write_rows(run_dir / "layers.jsonl", layer_rows(ticket.workshop(), variants))
    return len(rows)


def _examination(ticket: Ticket, stored: dict[str, str]) -> Examination:
    plan = ticket.parsed
    corpora = [
        dataclasses.replace(load_corpus(ticket.store, stored[name]), name=name) for name in plan.perplexity_corpora
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


def _row(ticket: Ticket, variant: Variant | None, found: Measurement) -> ResultRow:
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


@task(name="report")
def make_report(run_dir: str) -> str:
    """Write `report.html`; returns its path."""
    return str(write_report(Path(run_dir)))


@task(name="tidy")
def discard_models(run_dir: str) -> None:
    """Remove the models of a run that keeps only the numbers."""
    shutil.rmtree(Path(run_dir) / "models", ignore_errors=True)
