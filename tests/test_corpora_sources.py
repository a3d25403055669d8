"""Sources: every record becomes a document, a duplicate or a counted reject; no file name makes an ingest fail."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from crosscal.corpora import DocumentLimits, documents, ingest
from crosscal.corpora.usable import look_at
from crosscal.errors import CorpusError
from crosscal.files import FORMATS
from crosscal.landing import Ledger
from crosscal.landing.by_hand import record_ingest
from crosscal.store import Store
from tests.helpers.tiny_place import crosscal, make_place

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def separated(rows: list[dict[str, str]], delimiter: str) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".ndjson": lambda rows: "\r\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps(rows, indent=2).encode("utf-16"),
    ".csv": lambda rows: separated(rows, ","),
    ".tsv": lambda rows: separated(rows, "\t"),
    ".parquet": parquet,
}


def rows_of_all_kinds(seed: int) -> list[dict[str, str]]:
    """Usable rows, duplicates and unusable rows."""
    chance = random.Random(seed)
    usable = [f'document {index} says "yes, no",\nand\tends {"é" * (index % 5)}' for index in range(200)]
    kinds = [usable, usable[:20], ["", "   ", "short", "x" * 6_000]]
    return [{"id": str(i), "text": chance.choice(chance.choice(kinds))} for i in range(400)]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_documents_duplicates_and_rejects_are_the_records(tmp_path: Path, form: str, suffix: str) -> None:
    rows = rows_of_all_kinds(seed=len(form + suffix))
    path = tmp_path / f"a{form}{suffix if form != '.parquet' else ''}"
    path.write_bytes(COMPRESS[suffix if form != ".parquet" else ""](WRITERS[form](rows)))
    store = Store(tmp_path / "home")
    done = ingest(store, "all", [str(path)], limits=DocumentLimits(max_characters=5000))
    assert done.added_documents + done.duplicates + sum(done.rejected.values()) == len(rows)
    found = {
        text for shard in done.corpus.shards for split in shard.documents for text in documents(store, shard, split)
    }
    assert found == {row["text"].strip() for row in rows if 20 <= len(row["text"].strip()) <= 5000}
    assert done.added_documents == len(found)


def test_every_format_is_tried_here_or_is_plain_text() -> None:
    assert {*WRITERS, ".txt", ".md"} == set(FORMATS)


@pytest.mark.parametrize("form", [*WRITERS, ".txt", ".md", ".png"])
def test_a_name_that_is_not_utf8_ends_no_ingest(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"id": str(i), "text": f"document number {i} is long enough"} for i in range(9)]
    write: dict[str, Callable[[Any], bytes]] = {**WRITERS, ".txt": lambda rows: rows[0]["text"].encode()}
    content = write.get(form, write[".txt"])(rows)
    (folder / "good.jsonl").write_bytes(WRITERS[".jsonl"](rows[:3]))
    with open(os.fsencode(folder) + b"/caf\xe9" + form.encode(), "wb") as file:
        file.write(content)
    store = Store(tmp_path / "home")
    done = ingest(store, "all", [str(folder)])
    assert done.added_documents == (9 if form in WRITERS else 3)
    assert sum(done.rejected.values()) == (form == ".png")
    if form == ".png":
        rejects = store.read_bytes(store.get("rejects", str(done.rejects_key)), "rejects.jsonl").decode()
        assert json.loads(rejects)["source"] == r"caf\xe9.png"


@pytest.mark.parametrize("form", WRITERS)
def test_a_first_look_tells_the_column_that_is_missing(tmp_path: Path, form: str) -> None:
    rows = [{"id": str(i), "text": f"document number {i} is long enough"} for i in range(300)]
    path = tmp_path / f"a{form}"
    path.write_bytes(WRITERS[form](rows))
    assert look_at(str(path), "text") is None
    problem = look_at(str(path), "body")
    assert "no column 'body' (got id, text)" in str(problem)
    with pytest.raises(CorpusError) as error:
        ingest(Store(tmp_path / "home"), "all", [str(path)], text="body")
    assert str(error.value) == str(problem), "what the run would say"


def test_a_first_look_is_short(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.truncate(2**33)  # 8 GiB
        file.write('{"body": "a text under another name"}\n' * 200)
    assert "no column" in str(look_at(str(path), "text"))


def test_a_first_look_condemns_only_what_it_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n" * 100 + '{"text": "a text that is long enough"}\n')
    assert look_at(str(path), "text") is None
    path.write_text("nonsense\n" * 10)
    assert "no usable document (got 10 invalid JSON)" in str(look_at(str(path), "text"))


def test_plan_check_tells_the_missing_column(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (place.folder / "legal.json").write_text(json.dumps([{"title": "t", "body": "b" * 30}] * 3, indent=2))
    place.write_plan(corpora={"general": "general", "legal": "legal.json"})
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    (problem,) = json.loads(done.out)["problems"]
    assert done.code == 1
    assert "legal.json: no column 'text' (got body, title)" in problem


def test_what_is_counted_is_not_printed_as_an_amount(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"text": "a text that is long enough"}\n'
    path.write_text(good + json.dumps({"text": "x" * 40_000_000}) + "\n")
    done = crosscal("ingest", str(path), "--corpus", "all", "--home", str(tmp_path / "home"))
    assert done.code == 0, done.err
    assert "line longer than 33554432 bytes=1\n" in done.out
    listed = crosscal("store", "list", "--home", str(tmp_path / "home"))
    assert "bytes=0.0MB" in listed.out, "amounts stay amounts"


def test_the_ledger_holds_names_that_can_be_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a text that is long enough"}\n')
    store, source = Store(tmp_path / "home"), os.fsdecode(path)
    record_ingest(store, [source], ingest(store, "all", [source]))
    assert [name for entry in Ledger(store).look().files("all") for name in entry.names] == [r"caf\xe9.jsonl"]
