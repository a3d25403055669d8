"""Ingest a corpus, select among its documents, and draw its calibration windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from prefect import task

from crosscal.calibration import Seeds, TemperatureSchedule
from crosscal.corpora import Corpus, ingest, load_corpus
from crosscal.plan import Documents, SelfGenerated
from crosscal.selection import SelectionSettings, select
from crosscal.stages.sample import Draw, sample_documents, sample_random, sample_self
from crosscal.store.keys import digest_of
from crosscal.tasks.options import RETRIED
from crosscal.tasks.run_spec import RunSpec, task_report


def stored_name(name: str, documents: Documents) -> str:
    """Return the store's name of what a plan draws from: the ingested corpus, or the selection from it."""
    if documents.select is None:
        return ingested_name(name, documents)
    said = [ingested_name(name, documents), documents.select.model_dump(mode="json")]
    return f"{name[:40]}-chosen-{digest_of(said)[:8]}"


def ingested_name(name: str, documents: Documents) -> str:
    """Return the store's name of a plan's documents: the plan's name if `crosscal ingest` filled the corpus, else the
    name with a digest of the source."""
    if documents.path is None:
        return name
    return f"{name[:48]}-{digest_of([documents.path, documents.text, documents.revision, documents.split])[:8]}"


def bring_in(spec: RunSpec, run: Callable[..., Any], wanted: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Ingest the plan's document corpora, or those wanted, and select from them; return them by name. `run` runs tasks.

    A selection needs all corpora ingested, since it excludes documents that are held out in any of them.
    """
    documents = spec.parsed.document_corpora
    names = list(documents) if wanted is None else wanted
    choices = [name for name in names if documents[name].select]
    ingested = {name: run(ingest_corpus, spec, name) for name in (documents if choices else names)}
    return ingested | {name: run(select_corpus, spec, name, ingested) for name in choices}


def corpus_of(spec: RunSpec, name: str, stored: str) -> Corpus:
    """Load a corpus of the plan in the run's version, under the plan's name for it."""
    corpus = load_corpus(spec.store, stored, spec.versions.get(stored))
    return dataclasses.replace(corpus, name=name, chat=spec.parsed.document_corpora[name].chat)


@task(name="ingest", task_run_name="ingest {name}", **RETRIED)
def ingest_corpus(spec: RunSpec, name: str) -> dict[str, Any]:
    """Ingest a corpus of the plan; the same documents change nothing."""
    documents = spec.parsed.document_corpora[name]
    stored = ingested_name(name, documents)
    if documents.path is None:
        corpus = load_corpus(spec.store, stored)
        return _ingested(name, stored, corpus.version)
    with task_report() as report:
        paths = [documents.path] if isinstance(documents.path, str) else documents.path
        done = ingest(
            spec.store,
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
        "forms": done.forms,
    }


def _ingested(name: str, stored: str, version: int) -> dict[str, Any]:
    nothing = {"added": 0, "rejected": {}, "rejects_key": None, "duplicates": 0, "forms": {}}
    return {"name": name, "stored": stored, "version": version, "landed": version, **nothing}


@task(name="select", task_run_name="select {name}", **RETRIED)
def select_corpus(spec: RunSpec, name: str, ingested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Select among the documents of a corpus of the plan; the same corpora and settings select the same."""
    documents, store = spec.parsed.document_corpora[name], spec.store
    assert documents.select is not None
    asked = documents.select
    corpora = {other: load_corpus(store, one["stored"], one["version"]) for other, one in ingested.items()}
    with task_report() as report:
        sample = corpora.get(asked.towards or "")
        if sample is None and asked.towards is not None:
            sample = ingest(store, f"{name[:40]}-sample-{digest_of(asked.towards)[:8]}", [asked.towards], replace=True)
            sample = sample.corpus
        selection = select(
            store,
            stored_name(name, documents),
            corpora[name],
            sample,
            SelectionSettings(**asked.model_dump(exclude={"towards"})),
            held_out=list(corpora.values()),
            report=lambda what, done, total: report(f"{name}: {what}", done, total),
        )
    found = {"stored": selection.corpus.name, "version": selection.corpus.version}
    return ingested[name] | found | {"selection": {"key": selection.key, **selection.counts}}


@task(name="sample", task_run_name="sample {name}, seed {seed}", **RETRIED)
def draw_sample(spec: RunSpec, name: str, stored: str, seed: int) -> dict[str, Any]:
    """Draw (or generate) the calibration and held-out windows of one corpus for one seed."""
    calibration = spec.parsed.calibration
    draw = Draw(
        calibration.windows,
        calibration.length,
        seed,
        calibration.held_out_windows,
        parts_kept_apart=calibration.parts_kept_apart,
        begin_token=calibration.begin_token,
        plain_text=calibration.plain_text,
    )
    origin = spec.parsed.corpora[name]
    source = spec.source()
    if isinstance(origin, Documents):
        corpus = corpus_of(spec, name, stored)
        with task_report() as report:
            report(f"{name}: drawing windows", 0, None)
            sample = sample_documents(spec.store, corpus, source, draw)
    elif isinstance(origin, SelfGenerated):
        with task_report() as report:
            sample = sample_self(
                spec.store,
                name,
                source,
                draw,
                temperature=temperature_of(origin),
                first_tokens=origin.first_tokens,
                device=spec.device,
                dtype=getattr(torch, spec.dtype),
                report=report,
                seeds=seeds_of(spec, origin),
            )
    else:
        sample = sample_random(spec.store, name, source, draw)
    return sample.as_json()


def temperature_of(origin: SelfGenerated) -> TemperatureSchedule:
    return TemperatureSchedule(origin.t_init, origin.t_final, origin.steps)


def seeds_of(spec: RunSpec, origin: SelfGenerated) -> Seeds | None:
    """Return the documents that a self-generated corpus continues. Raises `CorpusError` before they are ingested."""
    if origin.seeds is None:
        return None
    stored = stored_name(origin.seeds, spec.parsed.document_corpora[origin.seeds])
    corpus = load_corpus(spec.store, stored, spec.versions.get(stored))
    chat = spec.parsed.document_corpora[origin.seeds].chat
    return Seeds(origin.seeds, corpus.shards, origin.prefix_tokens, origin.drop, chat)
