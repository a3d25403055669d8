"""Export of chosen documents to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscal.corpora import Corpus, ingest
from crosscal.corpora.conversation import Conversation
from crosscal.errors import UsageError
from crosscal.files import whole_file
from crosscal.progress import Report, silent
from crosscal.selection.choosing import KIND, Selection, select
from crosscal.selection.chosen import read_chosen
from crosscal.selection.settings import SelectionSettings
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store, digest_of


def choose_to_file(
    store: Store,
    pool: Sequence[str],
    towards: str | None,
    settings: SelectionSettings,
    out: Path,
    *,
    text: str = "text",
    report: Report = silent,
) -> dict[str, Any]:
    """Ingest both sources, choose documents and write them to `out`; return the counts as a JSON object.

    Each row is a document, in order of choice: `text`, or the `messages` of a conversation; `digest` (that of the
    document in a corpus, hex) and `score`, null if nothing is scored. Raises `UsageError` if `out` is not a `.jsonl`
    file, because crosscal would not read it back as JSON lines.
    """
    if out.suffix != ".jsonl":
        raise UsageError("chosen documents are written as JSON lines", where=str(out), do="Name a file .jsonl.")

    def ingested(sources: Sequence[str]) -> Corpus:
        name = f"select-{digest_of([list(sources), text])[:16]}"
        progress = lambda source, count, total: report(f"reading {source}", count, total)  # noqa: E731
        return ingest(store, name, sources, text=text, replace=True, progress=progress).corpus

    corpora = [ingested(sources) for sources in (pool, [towards] if towards else []) if sources]
    name = f"select-{digest_of([corpora[0].name, towards])[:16]}-chosen"
    selection = select(store, name, corpora[0], corpora[1] if towards else None, settings, report=report)
    write_chosen(store, selection, out)
    return {"out": str(out), "selection": selection.key, **selection.counts}


def write_chosen(store: Store, selection: Selection, out: Path) -> None:
    """Write the chosen documents as JSON lines."""
    texts = DocumentTexts(store, parts_of([selection.corpus], "train"))
    position_of = {digest: position for position, digest in enumerate(texts.digests())}
    with whole_file(out) as aside, aside.open("w", encoding="utf-8") as stream:
        for digest, score in read_chosen(store, KIND, selection.key):
            document = texts.document(position_of[digest])
            said = {"text": document} if isinstance(document, str) else _conversation(document)
            row = {**said, "digest": digest.hex(), "score": score}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _conversation(document: Conversation) -> dict[str, Any]:
    return {"messages": document.turns} | ({"tools": document.tools} if document.tools else {})
