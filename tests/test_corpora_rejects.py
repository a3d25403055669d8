"""Rejects and unusable sources of an ingest: records are counted and kept as excerpts, errors name the source."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from crosscal.corpora import DocumentLimits, ingest, load_corpus
from crosscal.errors import CorpusError, UsageError
from tests.helpers.numbered_documents import texts, write


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


@pytest.mark.parametrize("name", ["", "General", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_corpus_names_are_checked_first(store, name):
    with pytest.raises(UsageError, match="corpus name"):
        ingest(store, name, ["no/such/file.jsonl"])
