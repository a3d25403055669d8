"""Documents that land in an S3 bucket over a connection that fails, truncates bodies and loses responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

from crosscal.corpora import load_corpus
from crosscal.errors import CrosscalError
from crosscal.landing import Ledger, take_in
from crosscal.store import Store
from tests.helpers.object_store import BUCKET, BadLine, at, object_store

FILES = 8
FAULTS = {"unavailable": 0.08, "lost": 0.08, "truncated": 0.08}


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadLine]:
    with object_store() as (address, line):
        for name, value in at(address).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs would hide most of the faults by its own retries
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
        S3FileSystem.clear_instance_cache()
        yield line
        S3FileSystem.clear_instance_cache()


def test_every_file_is_taken_once_however_bad_the_line(line: BadLine, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for number in range(FILES):
        text = f"Document {number} of the bucket, long enough to be taken. " * 2000
        fs.pipe_file(f"{BUCKET}/landing/legal/{number}.jsonl", json.dumps({"text": text}).encode())
        fs.pipe_file(f"{BUCKET}/landing/legal/{number}.jsonl.done", b"")
    fs.pipe_file(f"{BUCKET}/landing/Legal Texts/x.jsonl", b"{}")
    store = Store(tmp_path)
    for name, chance in FAULTS.items():
        setattr(line, name, chance)
    ingested, sweeps = 0, 0
    while ingested < FILES:
        sweeps += 1
        assert sweeps < 100
        try:
            ingested += [one.state for one in take_in(store, f"s3://{BUCKET}/landing")].count("ingested")
        except CrosscalError as error:  # the listing failed: the next watch lists again
            assert "does not answer" in str(error)  # noqa: PT017
    assert line.seen["unavailable"] + line.seen["lost"] + line.seen["truncated"] > 0
    for name in FAULTS:
        setattr(line, name, 0.0)
    assert take_in(store, f"s3://{BUCKET}/landing") == []
    corpus = load_corpus(store, "legal")
    assert (corpus.version, sum(sum(shard.documents.values()) for shard in corpus.shards)) == (FILES, FILES)
    ledger = Ledger(store)
    assert [[line["state"] for line in entry.states] for entry in ledger.entries("legal")] == [
        ["landed", "ingested"]
    ] * FILES
    assert [each["name"] for each in ledger.refusals()] == ["Legal Texts"], "a bad line is no fault of a file"
