"""Splits of a corpus: from names of files and folders or carved out; a document is in one split and stays there."""

from __future__ import annotations

import pytest

from crosscal.corpora import DocumentLimits, ingest
from crosscal.corpora.corpus import digests
from crosscal.corpora.splits import assign
from crosscal.errors import UsageError
from tests.helpers.numbered_documents import SPLITS, content, texts, write


def test_a_document_keeps_its_split_across_versions(store, tmp_path):
    seen: dict[bytes, str] = {}
    for start, stop, replace in [(0, 30, False), (10, 60, False), (0, 60, True), (25, 90, True), (40, 80, True)]:
        path = write(tmp_path / "a.jsonl", texts(start, stop))
        corpus = ingest(store, "general", [path], replace=replace).corpus
        for shard in corpus.shards:
            for digest, split in digests(store, shard).items():
                assert seen.setdefault(digest, split) == split
    assert {*seen.values()} == {*SPLITS}


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


def test_a_folder_called_like_a_split_names_it(store, tmp_path):
    write(tmp_path / "valid" / "a.jsonl", texts(0, 5))
    write(tmp_path / "valid" / "test" / "b.jsonl", texts(5, 10))
    shard = ingest(store, "general", [str(tmp_path / "valid")]).corpus.shards[0]
    assert shard.documents == {"validation": 5, "test": 5}


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
