"""Refused files are listed with reason and remedy; a refusal ends once its cause is removed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from crosscal.corpora import load_corpus
from crosscal.errors import TooLittleText
from crosscal.flows.news import News
from crosscal.landing import LandingResult, Ledger, take_in
from crosscal.landing.refused import RefusedFile, refused
from crosscal.store import Store
from tests.helpers.tiny_place import crosscal, write_documents

LONG_AGO = time.time() - 1000


def write(landing: Path, name: str, column: str = "text", count: int = 5) -> Path:
    file = landing / "legal" / name
    write_documents(file, seed=name, count=count)
    file.write_text(file.read_text().replace('"text"', json.dumps(column)))
    return file


def look(store: Store, landing: Path, **text: str) -> dict[str, LandingResult]:
    return {each.name: each for each in take_in(store, str(landing), 0.0, text=text)}


def standing(store: Store) -> dict[str, RefusedFile]:
    return {each.name: each for each in refused(Ledger(store).look())}


def test_every_refusal_says_what_to_do(store: Store, landing: Path) -> None:
    write(landing, "column.jsonl", column="abstract")
    (landing / "legal" / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    write(landing, "promised.jsonl").with_name("promised.jsonl.done").write_text('{"bytes": 1}')
    (landing / "legal" / "folder").mkdir()
    (landing / "beside.jsonl").write_text("x")
    (landing / "legal" / "gone.jsonl").symlink_to("nothing")
    done = look(store, landing)
    assert set(done) == {"column.jsonl", "cut.jsonl.gz", "promised.jsonl", "folder", "beside.jsonl", "gone.jsonl"}
    found = standing(store)
    assert set(found) == set(done)
    for name, each in done.items():
        assert each.state == "refused"
        assert each.do
        assert (found[name].domain, found[name].reason, found[name].do) == (each.domain, each.reason, each.do)
    assert "text: {legal: COLUMN}" in found["column.jsonl"].do
    assert "'text' (abstract)" in found["column.jsonl"].reason
    assert look(store, landing) == {}
    assert standing(store) == found


def test_a_file_is_read_again_once_its_column_is_named(store: Store, landing: Path) -> None:
    write(landing, "a.jsonl", column="abstract")
    write(landing, "b.jsonl", column="title")
    assert {each.state for each in look(store, landing).values()} == {"refused"}
    assert look(store, landing, medical="abstract") == {}, "another domain's column changes nothing"
    done = look(store, landing, legal="abstract")
    assert {name: each.state for name, each in done.items()} == {"a.jsonl": "ingested", "b.jsonl": "refused"}
    assert set(standing(store)) == {"b.jsonl"}
    assert "'abstract'" in standing(store)["b.jsonl"].reason
    assert look(store, landing, legal="abstract") == {}
    assert load_corpus(store, "legal").version == 1
    (entry,) = [each for each in Ledger(store).entries("legal") if "a.jsonl" in each.names]
    assert [line["state"] for line in entry.states] == ["landed", "refused", "ingested"]


def test_a_sound_file_in_its_place_ends_a_refusal(store: Store, landing: Path) -> None:
    file = write(landing, "a.jsonl")
    file.write_text("")
    marker = write(landing, "b.jsonl").with_name("b.jsonl.done")
    marker.write_text('{"bytes": 1}')
    look(store, landing)
    assert set(standing(store)) == {"a.jsonl", "b.jsonl"}
    write(landing, "a.jsonl")
    marker.write_text("")
    os.utime(landing / "legal" / "a.jsonl", (LONG_AGO, LONG_AGO))
    assert {each.state for each in look(store, landing).values()} == {"ingested"}
    assert standing(store) == {}


def test_the_split_that_a_name_stands_for_is_said(store: Store, landing: Path, tmp_path: Path) -> None:
    """All documents are in the test split and none is for training, so more such files would not help."""
    write(landing, "test-01.jsonl", count=30)
    assert look(store, landing)["test-01.jsonl"].split == "test"
    done = crosscal("ledger", "legal", "--home", str(tmp_path / "home"))
    assert "30 documents; all of the test split, for that is the file's name" in done.out
    news = News(Ledger(store), "legal")
    little = TooLittleText("too little", where="legal", got="0 windows", do="Add documents.")
    assert "test-01.jsonl belong to the split that their file is named for" in str(news.explained(little))
    assert "Add documents" not in str(news.explained(little))


def test_the_ledger_prints_reasons_and_remedies(store: Store, landing: Path, tmp_path: Path) -> None:
    write(landing, "a.jsonl", column="abstract")
    good = write(landing, "b.jsonl")
    good.write_text(good.read_text() + "not json\n")
    look(store, landing)
    for arguments in (("ledger",), ("ledger", "legal")):
        done = crosscal(*arguments, "--home", str(tmp_path / "home"))
        assert "refused: legal/a.jsonl, 20" in done.out
        assert "no column 'text' (abstract). Name it in the service file" in done.out
    assert "ingested (5 documents; 1 not: " in done.out
    (row,) = json.loads(crosscal("ledger", "--home", str(tmp_path / "home"), "--json").out)["refused"]
    assert row["do"].startswith("Name it")


def test_one_column_for_all_by_hand(store: Store, landing: Path, tmp_path: Path) -> None:
    write(landing, "a.jsonl", column="abstract")
    arguments = ("--landing", str(landing), "--settle", "0", "--home", str(tmp_path / "home"), "--json")
    done = crosscal("ingest", *arguments, "--text", "abstract")
    assert [row["state"] for row in json.loads(done.out)] == ["ingested"]
    assert crosscal("ingest", *arguments, "--split", "train").code == 2
