"""Ingest: versions depend only on content, and a document is never in two splits."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest

from crosscal.corpora import Corpus, DocumentLimits, documents, ingest, load_corpus
from crosscal.corpora.corpus import digests
from crosscal.corpora.splits import assign
from crosscal.errors import CorpusError, StoreConflict, UsageError
from crosscal.store import Store
from crosscal.store.refs import Refs

SPLITS = ("train", "validation", "test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


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


def test_a_document_keeps_its_split_across_versions(store, tmp_path):
    seen: dict[bytes, str] = {}
    for start, stop, replace in [(0, 30, False), (10, 60, False), (0, 60, True), (25, 90, True), (40, 80, True)]:
        path = write(tmp_path / "a.jsonl", texts(start, stop))
        corpus = ingest(store, "general", [path], replace=replace).corpus
        for shard in corpus.shards:
            for digest, split in digests(store, shard).items():
                assert seen.setdefault(digest, split) == split
    assert {*seen.values()} == {*SPLITS}


def test_replace_means_exactly_these(store, tmp_path):
    ingest(store, "general", [write(tmp_path / "a.jsonl", texts(0, 40))])
    grown = ingest(store, "general", [write(tmp_path / "b.jsonl", texts(0, 60))], replace=True)
    assert len(grown.corpus.shards) == 2  # contains all earlier documents: a shard is added
    shrunk = ingest(store, "general", [write(tmp_path / "c.jsonl", texts(30, 70))], replace=True)
    assert (shrunk.corpus.version, len(shrunk.corpus.shards), shrunk.added_documents) == (3, 1, 10)
    assert everything(content(store, shrunk.corpus)) == sorted(texts(30, 70))
    again = ingest(store, "general", [str(tmp_path / "c.jsonl")], replace=True)
    assert (again.changed, again.corpus) == (False, shrunk.corpus)


def test_named_splits_are_kept(store, tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", texts(0, 30))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", texts(30, 50))
    write(tmp_path / "data" / "dev" / "anything.jsonl", texts(50, 60))
    write(tmp_path / "data" / "TEST.jsonl", texts(60, 70))
    found = content(store, ingest(store, "general", [str(tmp_path / "data")]).corpus)
    assert found == {"train": sorted(texts(0, 50)), "validation": texts(50, 60), "test": texts(60, 70)}


@pytest.mark.parametrize("name", ["testimony.jsonl", "training.jsonl", "devices/a.jsonl", "test_results.jsonl"])
def test_a_name_that_only_begins_like_a_split_is_no_split(store, tmp_path, name):
    write(tmp_path / "data" / name, texts(0, 20))
    assert ingest(store, "general", [str(tmp_path / "data")]).corpus.shards[0].documents == {
        "train": 18, "validation": 1, "test": 1,
    }  # fmt: skip


def test_evaluation_wins_over_training(store, tmp_path):
    write(tmp_path / "data" / "a.jsonl", texts(0, 30))
    write(tmp_path / "data" / "train.jsonl", texts(0, 20))
    write(tmp_path / "data" / "valid.jsonl", texts(5, 15))
    write(tmp_path / "data" / "test.jsonl", texts(10, 12))
    report = ingest(store, "general", [str(tmp_path / "data")])
    found = content(store, report.corpus)
    assert found["test"] == texts(10, 12)
    assert found["validation"] == sorted({*texts(5, 15)} - {*texts(10, 12)})
    assert found["train"] == sorted({*texts(0, 30)} - {*texts(5, 15)})
    assert report.duplicates == 20 + 10 + 2


def test_missing_splits_are_carved_out_of_train(store, tmp_path):
    write(tmp_path / "data" / "train.jsonl", texts(0, 40))
    write(tmp_path / "data" / "test.jsonl", texts(40, 50))
    found = content(store, ingest(store, "general", [str(tmp_path / "data")]).corpus)
    assert found["test"] == texts(40, 50)
    assert len(found["validation"]) == 2
    assert {*found["validation"]} <= {*texts(0, 40)}


def test_a_forced_split_takes_all(store, tmp_path):
    path = write(tmp_path / "test.jsonl", texts(0, 10))
    assert ingest(store, "general", [path], split="validation").corpus.shards[0].documents == {"validation": 10}
    with pytest.raises(UsageError, match="not a split"):
        ingest(store, "general", [path], split="dev")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 29, 31, 1000])
def test_the_carved_share(count):
    splits = [*assign({index.to_bytes(32): None for index in range(count)}).values()]
    held_out = max(1, round(count / 20)) if count >= 3 else 0
    assert splits.count("test") == splits.count("validation") == held_out
    assert splits.count("train") == count - 2 * held_out


def test_rejects_are_counted_kept_and_carry_no_path(store, tmp_path):
    write(tmp_path / "data" / "good.jsonl", texts(0, 5))
    (tmp_path / "data" / "bad.jsonl").write_bytes(b'{"text": "cut\n{"text": "\xff"}\n' + b'{"text": "' + b"x" * 500)
    (tmp_path / "data" / "picture.png").write_bytes(b"\x89PNG")
    report = ingest(store, "general", [str(tmp_path / "data")])
    assert report.rejected == {"invalid JSON": 2, "invalid UTF-8": 1, "unsupported file type": 1}
    rejects = store.read_bytes(store.get("rejects", report.rejects_key), "rejects.jsonl").decode()
    rows = [json.loads(row) for row in rejects.splitlines()]
    assert [(row["source"], row["line"]) for row in rows] == [
        ("bad.jsonl", 1), ("bad.jsonl", 2), ("bad.jsonl", 3), ("picture.png", 0),
    ]  # fmt: skip
    assert all(len(row["excerpt"]) <= 200 for row in rows)
    assert str(tmp_path) not in rejects


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


def test_kept_rejects_are_bounded_counts_are_not(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"broken\n" * 50 + json.dumps({"text": texts(0, 1)[0]}).encode())
    report = ingest(store, "general", [str(tmp_path / "a.jsonl")], limits=DocumentLimits(max_rejects_kept=10))
    assert report.rejected == {"invalid JSON": 50}
    assert store.read_bytes(store.get("rejects", report.rejects_key), "rejects.jsonl").count(b"\n") == 10


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"nonsense\n" * 7])
def test_nothing_usable_is_an_error_that_shows_the_counts(store, tmp_path, raw):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(CorpusError, match=r"no usable document.*(7 invalid JSON|empty files)"):
        ingest(store, "general", [str(tmp_path / "a.jsonl")])
    with pytest.raises(CorpusError, match="no such corpus"):
        load_corpus(store, "general")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_one_error_naming_those_there(store, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text('{"body": "b", "title": "t"}\n' * 3, encoding="utf-8")
    elif suffix == ".csv":
        path.write_text("body,title\nb,t\n", encoding="utf-8")
    else:
        pa.parquet.write_table(pa.table({"body": ["b"], "title": ["t"]}), path)
    with pytest.raises(CorpusError, match=r"no column 'text' \(got body, title\)"):
        ingest(store, "general", [str(path)])


def test_another_column_can_be_the_text(store, tmp_path):
    (tmp_path / "a.csv").write_text(f"title,body\nx,{texts(0, 1)[0]}\n", encoding="utf-8")
    corpus = ingest(store, "general", [str(tmp_path / "a.csv")], text="body").corpus
    assert content(store, corpus)["train"] == texts(0, 1)


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "/no/such/folder", "nothing-*.jsonl", "picture.png", "empty"])
def test_a_source_that_is_nothing_is_an_error_naming_it(store, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=source.replace("*", r"\*")):
        ingest(store, "general", [source])


def test_a_word_that_is_nothing_is_an_error_naming_it(store, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="no-such-folder: neither a path here nor a dataset"):
        ingest(store, "general", ["no-such-folder"])


def test_a_folder_called_like_a_split_names_it(store, tmp_path):
    write(tmp_path / "valid" / "a.jsonl", texts(0, 5))
    write(tmp_path / "valid" / "test" / "b.jsonl", texts(5, 10))
    shard = ingest(store, "general", [str(tmp_path / "valid")]).corpus.shards[0]
    assert shard.documents == {"validation": 5, "test": 5}


@pytest.mark.parametrize("name", ["", "General", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_corpus_names_are_checked_first(store, name):
    with pytest.raises(UsageError, match="corpus name"):
        ingest(store, name, ["no/such/file.jsonl"])


def test_hub_splits_are_kept(store, tmp_path, monkeypatch):
    import datasets

    from crosscal.corpora.hub import read_hub
    from crosscal.corpora.records import Document
    from crosscal.corpora.sources import HubDataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "hub" / "train.jsonl", texts(0, 5))
    write(tmp_path / "hub" / "test.jsonl", texts(5, 7))
    rows = list(read_hub(HubDataset(str(tmp_path / "hub"), None), "text", None, DocumentLimits()))
    assert all(isinstance(candidate, Document) for _, candidate in rows)
    assert [split for split, _ in rows] == ["train"] * 5 + ["test"] * 2
    assert [candidate.text for _, candidate in rows] == texts(0, 7)
    (split, reject), *_ = read_hub(HubDataset(str(tmp_path / "hub"), None), "body", None, DocumentLimits())
    assert (split, reject.reason, reject.columns) == (None, "no column 'body'", ("text",))


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
