"""Ingest a corpus, and draw the windows that stand for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect import task

from crosscal.calibration import TemperatureSchedule
from crosscal.corpora import ingest, load_corpus
from crosscal.plan import Documents, SelfGenerated
from crosscal.stages.sample import Draw, sample_documents, sample_random, sample_self
from crosscal.store.keys import digest_of
from crosscal.tasks.options import RETRIED
from crosscal.tasks.ticket import Ticket, task_report


def stored_name(name: str, documents: Documents) -> str:
    """The store's name of a plan's corpus: its own when `crosscal ingest` filled it, else marked by its source."""
    if documents.path is None:
        return name
    return f"{name[:48]}-{digest_of([documents.path, documents.text, documents.revision, documents.split])[:8]}"


@task(name="ingest", task_run_name="ingest {name}", **RETRIED)
def ingest_corpus(ticket: Ticket, name: str) -> dict[str, Any]:
    """Bring a corpus of the plan up to date; the same documents change nothing."""
    documents = ticket.parsed.document_corpora[name]
    stored = stored_name(name, documents)
    if documents.path is None:
        corpus = load_corpus(ticket.store, stored)
        return _ingested(name, stored, corpus.version)
    with task_report() as report:
        paths = [documents.path] if isinstance(documents.path, str) else documents.path
        done = ingest(
            ticket.store,
            stored,
            paths,
            text=documents.text,
            revision=documents.revision,
            split=documents.split,
            replace=True,
            progress=lambda source, count, total: report(f"{name}: reading", count, total),
        )
    return _ingested(name, stored, done.corpus.version) | {
        "added": done.added_documents,
        "rejected": dict(done.rejected),
        "rejects_key": done.rejects_key,
        "duplicates": done.duplicates,
    }


def _ingested(name: str, stored: str, version: int) -> dict[str, Any]:
    nothing = {"added": 0, "rejected": {}, "rejects_key": None, "duplicates": 0}
    return {"name": name, "stored": stored, "version": version, **nothing}


@task(name="sample", task_run_name="sample {name}, seed {seed}", **RETRIED)
def draw_sample(ticket: Ticket, name: str, stored: str, seed: int) -> dict[str, Any]:
    """Draw (or generate) the calibration and held-out windows of one corpus for one seed."""
    calibration = ticket.parsed.calibration
    draw = Draw(
        calibration.windows,
        calibration.length,
        seed,
        calibration.held_out_windows,
        parts_kept_apart=calibration.parts_kept_apart,
    )
    origin = ticket.parsed.corpora[name]
    source = ticket.source()
    if isinstance(origin, Documents):
        corpus = dataclasses.replace(load_corpus(ticket.store, stored, ticket.versions.get(stored)), name=name)
        sample = sample_documents(ticket.store, corpus, source, draw)
    elif isinstance(origin, SelfGenerated):
        temperature = TemperatureSchedule(origin.t_init, origin.t_final, origin.steps)
        with task_report() as report:
            sample = sample_self(
                ticket.store,
                name,
                source,
                draw,
                temperature=temperature,
                first_tokens=origin.first_tokens,
                device=ticket.device,
                report=report,
            )
    else:
        sample = sample_random(ticket.store, name, source, draw)
    return sample.as_json()
