"""Ingest: versions depend only on content, documents are never lost, and concurrent ingests leave a complete corpus."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from crosscal.corpora import documents, ingest, load_corpus
from crosscal.errors import CorpusError, StoreConflict
from crosscal.store import Store
from crosscal.store.refs import Refs
from tests.helpers.numbered_documents import SPLITS, content, everything, texts, write


def test_what_goes_in_comes_out_once(store, tmp_path):
    path = write(tmp_path / "a.jsonl", [*texts(0, 100), *texts(50, 60), "  " + texts(0, 1)[0] + "\n"])
    report = ingest(store, "general", [path])
    assert everything(content(store, report.corpus)) == sorted(texts(0, 100))
    assert (report.added_documents, report.duplicates, report.rejected, report.rejects_key) == (100, 11, {}, None)
    assert report.changed
    assert load_corpus(store, "general") == report.corpus
    shard = report.corpus.shards[0]
    assert shard.documents == {"train": 90, "validation": 5, "test": 5}
    assert sum(shard.characters.values()) == sum(map(len, texts(0, 100)))


def test_the_same_again_changes_nothing(store, tmp_path):
    path = write(tmp_path / "a.jsonl", texts(0, 20))
    first = ingest(store, "general", [path])
    again = ingest(store, "general", [path])
    assert again.corpus == first.corpus
    assert (again.changed, again.added_documents, again.duplicates) == (False, 0, 20)


def test_the_key_ignores_order_names_times_and_formats(tmp_path):
    rows = texts(0, 50)
    path = write(tmp_path / "one" / "a.jsonl", rows)
    expected = ingest(Store(tmp_path / "first"), "a", [path]).corpus
    random.Random(0).shuffle(rows)
    write(tmp_path / "two" / "deep" / "x.jsonl", rows[:20])
    os.utime(tmp_path / "two" / "deep" / "x.jsonl", (1, 1))
    for index, row in enumerate(rows[20:]):
        (tmp_path / "two" / f"{index}.txt").write_text(row, encoding="utf-8")
    other_store = Store(tmp_path / "second")
    other = ingest(other_store, "b", [str(tmp_path / "two")]).corpus
    assert other.shards == expected.shards
    assert other.digest == expected.digest
    # also in the same order, so that windows drawn by position are equal
    for split in SPLITS:
        assert list(documents(other_store, other.shards[0], split)) == list(
            documents(Store(tmp_path / "first"), expected.shards[0], split)
        )


def test_new_documents_become_a_shard_and_a_version(store, tmp_path):
    first = ingest(store, "general", [write(tmp_path / "a.jsonl", texts(0, 40))]).corpus
    report = ingest(store, "general", [write(tmp_path / "b.jsonl", texts(20, 80))])
    assert report.corpus.version == first.version + 1
    assert report.corpus.shards[0] == first.shards[0]
    assert len(report.corpus.shards) == 2
    assert (report.added_documents, report.duplicates) == (40, 20)
    assert everything(content(store, report.corpus)) == sorted(texts(0, 80))
    assert (
        report.corpus.documents("train") + report.corpus.documents("validation") + report.corpus.documents("test") == 80
    )


def test_replace_means_exactly_these(store, tmp_path):
    ingest(store, "general", [write(tmp_path / "a.jsonl", texts(0, 40))])
    grown = ingest(store, "general", [write(tmp_path / "b.jsonl", texts(0, 60))], replace=True)
    assert len(grown.corpus.shards) == 2  # contains all earlier documents: a shard is added
    shrunk = ingest(store, "general", [write(tmp_path / "c.jsonl", texts(30, 70))], replace=True)
    assert (shrunk.corpus.version, len(shrunk.corpus.shards), shrunk.added_documents) == (3, 1, 10)
    assert everything(content(store, shrunk.corpus)) == sorted(texts(30, 70))
    again = ingest(store, "general", [str(tmp_path / "c.jsonl")], replace=True)
    assert (again.changed, again.corpus) == (False, shrunk.corpus)


def test_sources_are_stored_without_their_place(store, tmp_path):
    write(tmp_path / "data" / "inner" / "a.jsonl", texts(0, 5))
    for source in (str(tmp_path / "data"), str(tmp_path / "d*" / "**" / "*.jsonl")):
        shard = ingest(store, "general", [source]).corpus.shards[0]
    path = store.path(store.get("corpora", shard.key), "train.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert {*table.column("source").to_pylist()} == {"inner/a.jsonl"}
    assert table.column_names == ["text", "source", "digest"]
    assert str(tmp_path).encode() not in path.read_bytes()


def test_relative_globs_and_folders_work(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", texts(0, 5))
    write(tmp_path / "b" / "c.jsonl", texts(5, 9))
    assert ingest(store, "one", ["*.jsonl"]).added_documents == 5
    assert ingest(store, "two", ["./b/../*/*.jsonl", "a.jsonl"]).added_documents == 9
    assert ingest(store, "three", ["b"]).added_documents == 4


def test_another_column_can_be_the_text(store, tmp_path):
    (tmp_path / "a.csv").write_text(f"title,body\nx,{texts(0, 1)[0]}\n", encoding="utf-8")
    corpus = ingest(store, "general", [str(tmp_path / "a.csv")], text="body").corpus
    assert content(store, corpus)["train"] == texts(0, 1)


def test_two_at_once_lose_nothing(tmp_path):
    paths = [write(tmp_path / f"{index}.jsonl", texts(index * 20, index * 20 + 30)) for index in range(4)]
    reports, failures = [], []

    def land(path: str) -> None:
        try:
            reports.append(ingest(Store(tmp_path / "home"), "general", [path]))
        except CorpusError as error:
            failures.append(error)

    threads = [threading.Thread(target=land, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store = Store(tmp_path / "home")
    corpus = load_corpus(store, "general")
    assert everything(content(store, corpus)) == sorted(texts(0, 90))
    assert corpus.version == len(corpus.shards) == 4
    assert sum(report.added_documents for report in reports) == 90


class Overtaken:
    """Refs with which another ingest is appended just before ours, `times` times."""

    def __init__(self, refs: Refs, overtake: Callable[[], object], times: int) -> None:
        self.read, self._refs, self._overtake, self._times = refs.read, refs, overtake, times

    def append(self, name: str, expected_version: int, value: dict) -> int:
        if self._times:
            self._times -= 1
            self._overtake()
        return self._refs.append(name, expected_version, value)


def test_an_overtaken_ingest_reads_the_corpus_again(store, tmp_path):
    ours, theirs = write(tmp_path / "a.jsonl", texts(0, 30)), write(tmp_path / "b.jsonl", texts(10, 40))
    overtaken = Store(tmp_path / "home")
    overtaken.refs = Overtaken(store.refs, lambda: ingest(store, "general", [theirs]), times=1)
    report = ingest(overtaken, "general", [ours])
    assert (report.corpus.version, report.added_documents, report.duplicates) == (2, 10, 20)
    assert everything(content(store, report.corpus)) == sorted(texts(0, 40))


def test_a_corpus_that_never_stays_still_is_a_conflict(store, tmp_path):
    rest = [write(tmp_path / f"{index}.jsonl", texts(10 * index, 10 * index + 10)) for index in range(20)]
    overtaken = Store(tmp_path / "home")
    overtaken.refs = Overtaken(store.refs, lambda: ingest(store, "general", [rest.pop()]), times=20)
    with pytest.raises(StoreConflict):
        ingest(overtaken, "general", [write(tmp_path / "a.jsonl", texts(300, 310))])
    assert len(rest) == 10


def test_documents_can_be_picked_by_position(store, tmp_path):
    shard = ingest(store, "general", [write(tmp_path / "train.jsonl", texts(0, 300))], split="train").corpus.shards[0]
    stored = list(documents(store, shard, "train"))
    order = random.Random(0).sample(range(300), 40)
    assert list(documents(store, shard, "train", order)) == [stored[position] for position in order]
    assert list(documents(store, shard, "test")) == []


def test_progress_is_reported(store, tmp_path):
    seen = []
    path = write(tmp_path / "a.jsonl", texts(0, 2500))
    ingest(store, "general", [path], progress=lambda *step: seen.append(step))
    assert seen == [("a.jsonl", 1000, None), ("a.jsonl", 2000, None), ("read", 2500, 2500)]


def test_a_shard_set_aside_as_damaged_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": f"document number {i} of the corpus"}) + "\n" for i in range(20)))
    first = ingest(store, "corpus", [str(source)], replace=True).corpus
    damaged = tmp_path / "home" / "objects" / "corpora" / first.shards[0].key / "train.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [problem for _, _, problem in Store(tmp_path / "home").verify(quarantine=True) if problem]
    again = ingest(Store(tmp_path / "home"), "corpus", [str(source)], replace=True).corpus
    assert again.shards == first.shards
    assert list(documents(store, again.shards[0], "train"))
