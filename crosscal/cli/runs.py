"""Carry out plans, and what belongs to that: ingest, evaluate, report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from crosscal.cli.options import HOME, Home, Json, Set
from crosscal.cli.printing import print_rows, print_value
from crosscal.errors import UsageError

DEMO = "plans/demo.yaml"


def run(
    plan: Annotated[Path | None, typer.Argument(help="The plan; left out, the embedded demo.")] = None,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/<model>-<digest>.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Carry out a plan: ingest, sample, read the model, solve, evaluate, report. Run again to resume."""
    plan = plan or _demo_plan()
    logging.getLogger("crosscal").info("%s", plan)  # the imports below take seconds
    from flows.drive import drive

    record = drive(plan, overrides or [], home, str(out) if out else None)
    if as_json:
        print(json.dumps(record))
    else:
        _show_run(record)


def ingest(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs or hub dataset ids.")],
    corpus: Annotated[str, typer.Option(help="Name of the corpus to add to.")],
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str | None, typer.Option(help="Put all documents into this split.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Add documents to a corpus in the store; what is already there is not added again."""
    from crosscal.corpora import ingest as ingest_documents
    from crosscal.progress import reporting
    from crosscal.store import Store

    with reporting() as report:
        done = ingest_documents(
            Store(home),
            corpus,
            paths,
            text=text,
            split=split,
            revision=revision,
            progress=lambda s, n, t: report(s, n, t),
        )
    summary = {
        "corpus": done.corpus.name,
        "version": done.corpus.version,
        "changed": done.changed,
        "added_documents": done.added_documents,
        "duplicates": done.duplicates,
        "rejected": dict(done.rejected),
    }
    print_value(summary, as_json)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model directory, dense or compressed.")],
    plan: Annotated[Path, typer.Option(help="The plan that names corpora and tasks.")],
    overrides: Set = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Measure one model on a plan's test windows and tasks."""
    from crosscal.plan import load_plan
    from flows.evaluate import evaluate_model

    rows = evaluate_model(model, load_plan(plan, tuple(overrides or ())), home)
    if not as_json:
        shown = ("variant", "corpus_or_task", "metric", "value", "stderr", "tokens", "skipped")
        rows = [{name: row[name] for name in shown if row[name] is not None} for row in rows]
    print_rows(rows, as_json)


def report(run_dir: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again from its files."""
    from crosscal.report import write_report

    if not (run_dir / "results.jsonl").is_file():
        raise UsageError("this is not a run directory", where=str(run_dir), got="no results.jsonl")
    print(write_report(run_dir))


def _demo_plan() -> Path:
    plan = Path(__file__).resolve().parents[2] / DEMO
    if not plan.is_file():
        raise UsageError(
            "the demo comes with the source tree", got=f"no {plan}", do="Give a plan, or run in a checkout."
        )
    return plan


def _show_run(record: dict[str, Any]) -> None:
    from rich.console import Console

    from flows.drive import summary

    console = Console(soft_wrap=True)
    for line in summary(record):
        console.print(line, markup=False, highlight=False)
