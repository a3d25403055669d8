"""Numbered documents in files of JSON lines, and what a corpus holds of them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from crosscal.corpora import Corpus, documents
from crosscal.store import Store

SPLITS = ("train", "validation", "test")


def texts(start: int, stop: int) -> list[str]:
    return [f"document number {index} is long enough" for index in range(start, stop)]


def write(path: Path, rows: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def content(store: Store, corpus: Corpus) -> dict[str, list[str]]:
    return {split: sorted(t for shard in corpus.shards for t in documents(store, shard, split)) for split in SPLITS}


def everything(found: dict[str, list[str]]) -> list[str]:
    return sorted(chain.from_iterable(found.values()))
