"""Which corpora of a plan a run could not use: what `crosscal plan check` reports before anything is ingested."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from crosscal.corpora import load_corpus
from crosscal.corpora.sources import HubDataset, SourceFile, resolve
from crosscal.corpora.splits import SPLITS
from crosscal.corpora.usable import look_at
from crosscal.errors import CorpusError, CrosscalError, PlanError
from crosscal.plan import CompressionPlan, Documents, SelfGenerated
from crosscal.store import Store
from crosscal.tasks.corpora import ingested_name
from crosscal.variants import samples_needed

TRAIN, VALIDATION, TEST = SPLITS


def unusable_sources(plan: CompressionPlan, store: Store) -> Iterator[CrosscalError]:
    """Yield an error for each source that is missing or whose first records are no documents, e.g. lack the text, for
    each corpus that the store should have and does not, and for each without the text that a calibration needs."""
    for name, documents in plan.document_corpora.items():
        if documents.path is None:
            try:
                load_corpus(store, ingested_name(name, documents))
            except CorpusError as error:  # no flow but `ingest` and landing fills it
                yield error
        yield from _unreadable(plan, documents)
    yield from _uncalibratable(plan, store)


def _unreadable(plan: CompressionPlan, documents: Documents) -> Iterator[CorpusError]:
    asked = [(path, documents.text) for path in _paths(documents)]
    if documents.select and documents.select.towards and documents.select.towards not in plan.corpora:
        asked.append((documents.select.towards, "text"))
    for path, text in asked:
        try:
            problem = look_at(path, text, revision=documents.revision)
        except CorpusError as error:
            problem = error
        if problem:
            yield problem


def _uncalibratable(plan: CompressionPlan, store: Store) -> Iterator[PlanError]:
    """Yield an error for each corpus that windows are drawn from and that is known to lack training text, or validation
    text for the held-out windows."""
    origins = [(name, plan.corpora[name]) for name, _ in samples_needed(plan)]
    drawn = {origin.seeds if isinstance(origin, SelfGenerated) else name for name, origin in origins}
    for name, documents in plan.document_corpora.items():
        known = _known_splits(name, documents, store) if name in drawn else None
        if known is None:
            continue
        # The held-out windows of documents chosen towards a sample are the sample's.
        is_of_sample = documents.select is not None and documents.select.towards is not None
        needed = {TRAIN: "training", **({} if is_of_sample else {VALIDATION: "validation"})}
        splits, got, do = known
        if missing := [text for split, text in needed.items() if split not in splits]:
            what = f"a variant is calibrated on this corpus, and it has no {' and no '.join(missing)} text"
            yield PlanError(what, where=f"corpora.{name}", got=got, do=do)


def _known_splits(name: str, documents: Documents, store: Store) -> tuple[Collection[str], str, str] | None:
    """Return the splits that the documents are in, how that is known, and how to change it; None if it is not known
    before the documents are ingested."""
    if documents.split is not None:
        got = f"split: {documents.split}, which puts every document there"
        return {documents.split}, got, "Leave `split` out: documents are then divided."
    if documents.path is None:
        try:
            corpus = load_corpus(store, ingested_name(name, documents))
        except CorpusError:  # reported by `unusable_sources`
            return None
        counts = {split: corpus.documents(split) for split in SPLITS}
        got = ", ".join(f"{count:,} {split} documents" for split, count in counts.items())
        return [split for split, count in counts.items() if count], got, "Ingest more: three or more are divided."
    try:
        files = resolve(_paths(documents), documents.revision)
    except CorpusError:  # reported by `unusable_sources`
        return None
    named = {file.split for file in files if isinstance(file, SourceFile) and file.format}
    if any(isinstance(file, HubDataset) for file in files) or not named <= {VALIDATION, TEST}:
        return None  # validation text that no file is named after is taken from training text
    splits = sorted(filter(None, named))
    got = f"only files or folders named {' and '.join(splits)}"
    return splits, got, "Add files of other names, or rename them: their documents are then divided."


def _paths(documents: Documents) -> list[str]:
    return [documents.path] if isinstance(documents.path, str) else documents.path or []
