"""Commands `run`, `ingest`, `evaluate` and `report`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from crosscal.cli.options import HOME, Domain, Home, Json, Set
from crosscal.cli.printing import print_rows, print_value
from crosscal.errors import CrosscalError, UsageError
from crosscal.resources import DEMO_PLAN

OUT = "Run directory, by default <model>-<digest> in $CROSSCAL_RUNS (runs); with --domain, a folder of run directories."


def run(
    plan: Annotated[Path | None, typer.Argument(help="The plan; left out, the embedded demo.")] = None,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help=OUT)] = None,
    domain: Domain = None,
    again: Annotated[bool, typer.Option("--again", help="Even if nothing is pending for the domain.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Carry out a plan: ingest, sample, calibrate, solve, evaluate, report. Run the command again to resume.

    With --domain the ledger decides if there is anything to do, and the best model is published by the plan's rule.
    """
    plan = plan or DEMO_PLAN
    logging.getLogger("crosscal").info("%s", plan)  # the imports below take seconds
    from crosscal.flows.drive import drive

    record = drive(plan, overrides or [], home, str(out) if out else None, domain, again=again)
    if as_json:
        print(json.dumps(record))
    else:
        _show_run(record)
    if record.get("failed"):
        names = ", ".join(record["failed"])
        raise CrosscalError(
            "these variants could not be written as loadable models; all others were",
            got=names,
            do="The notes say why.",
        )


def ingest(
    paths: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs or hub dataset ids.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Name of the corpus to add to.")] = None,
    landing: Annotated[
        str | None, typer.Option(help="Ingest the files in <landing>/<domain>/ instead of PATHS.")
    ] = None,
    settle: Annotated[
        float, typer.Option(help="Seconds without a change after which a landed file counts as complete.")
    ] = 10.0,
    announce: Annotated[
        bool,
        typer.Option("--announce", help="Record it in the ledger and send an event, which triggers recompression."),
    ] = False,
    text: Annotated[str, typer.Option(help="Column of texts or chats; by default it is detected.")] = "text",
    split: Annotated[str | None, typer.Option(help="Put all documents into this split.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Add documents to a corpus in the store; documents that it already contains are not added again."""
    if landing is not None and (paths or corpus):
        raise UsageError("--landing takes neither paths nor --corpus: the folders name the domains", got=landing)
    if landing is not None:
        if split or revision:
            raise UsageError("--landing takes neither --split nor --revision: files' names say their splits")
        _take_in(landing, settle, announce, text, home, as_json)
    elif paths and corpus:
        _ingest(paths, corpus, announce, text, split, revision, home, as_json)
    else:
        raise UsageError("nothing to ingest", do="Give PATH… and --corpus NAME, or --landing DIR.")


def _take_in(landing: str, settle: float, announce: bool, text: str, home: str, as_json: bool) -> None:
    from crosscal.landing import take_in
    from crosscal.store import Store

    rows = [asdict(one) for one in take_in(Store(home), landing, settle, text=None if text == "text" else text)]
    print_rows([{name: value for name, value in row.items() if value not in (None, 0)} for row in rows], as_json)
    if announce:
        from crosscal.flows.waking import announce_pending, check_sent

        check_sent(announce_pending(home))


def _ingest(
    paths: list[str],
    corpus: str,
    announce: bool,
    text: str,
    split: str | None,
    revision: str | None,
    home: str,
    as_json: bool,
) -> None:
    from crosscal.corpora import ingest as ingest_documents
    from crosscal.landing.by_hand import record_ingest
    from crosscal.progress import reporting
    from crosscal.store import Store

    store = Store(home)
    with reporting() as report:
        done = ingest_documents(
            store,
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
        "forms": done.forms,
    }
    if announce:
        from crosscal.flows.waking import announce_pending, check_sent

        record_ingest(store, paths, done, revision)
        summary["announced"] = announce_pending(home, [corpus])
    print_value(summary, as_json)
    if announce:
        check_sent(summary["announced"])


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model directory, dense or compressed.")],
    plan: Annotated[Path, typer.Option(help="The plan that names corpora and tasks.")],
    overrides: Set = None,
    domain: Domain = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Measure one model on a plan's test and validation windows, and on its tasks."""
    from crosscal.flows.evaluate import evaluate_model
    from crosscal.plan import load_plan

    rows = evaluate_model(model, load_plan(plan, tuple(overrides or ()), domain), home)
    if not as_json:
        shown = ("variant", "corpus_or_task", "split", "metric", "value", "stderr", "tokens", "skipped")
        rows = [{name: row[name] for name in shown if row[name] is not None} for row in rows]
    print_rows(rows, as_json)


def report(run_dir: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Regenerate a run's report.html from its files."""
    from crosscal.report import write_report

    if not (run_dir / "results.jsonl").is_file():
        raise UsageError("this is not a run directory", where=str(run_dir), got="no results.jsonl")
    print(write_report(run_dir))


def _show_run(record: dict[str, Any]) -> None:
    """Print the summary of a run, or of each run of a domain, and the closing message."""
    from rich.console import Console

    from crosscal.flows.drive import summary

    console = Console(soft_wrap=True)
    records = [record] if "runs" not in record else [run["record"] for run in record["runs"] if "record" in run]
    for one in records:  # a run that found nothing new has no record
        for line in summary(one):
            console.print(line, markup=False, highlight=False)
    if "message" in record:
        console.print(record["message"], markup=False, highlight=False)
