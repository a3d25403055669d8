"""Laws of the landing place: each content is ingested once, when its file is complete and as its marker promises."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from crosscal.corpora import DocumentLimits, load_corpus
from crosscal.landing import LandingResult, Ledger, take_in
from crosscal.store import Store
from tests.helpers.tiny_place import write_documents

LONG_AGO = time.time() - 1000


def land(landing: Path, name: str, *, seed: str = "one", domain: str = "legal", count: int = 5) -> Path:
    """Write a file that settled long ago."""
    file = landing / domain / name
    file.parent.mkdir(exist_ok=True)
    write_documents(file, seed=seed, count=count)
    os.utime(file, (LONG_AGO, LONG_AGO))
    return file


def states(done: list[LandingResult]) -> list[tuple[str, str]]:
    return [(one.name, one.state) for one in done]


def test_a_complete_file_becomes_a_version_of_its_domain(store: Store, landing: Path) -> None:
    land(landing, "a.jsonl")
    assert take_in(store, str(landing)) == [LandingResult("legal", "a.jsonl", "ingested", 1, 5)]
    assert sum(load_corpus(store, "legal").documents(split) for split in ("train", "validation", "test")) == 5
    assert Ledger(store).pending("legal") == 1
    (entry,) = Ledger(store).entries("legal")
    assert [line["state"] for line in entry.states] == ["landed", "ingested"]
    assert take_in(store, str(landing)) == []


def test_one_content_is_ingested_once_under_whatever_name(store: Store, landing: Path) -> None:
    file = land(landing, "a.jsonl")
    land(landing, "b.jsonl")
    assert states(take_in(store, str(landing))) == [("a.jsonl", "ingested"), ("b.jsonl", "known")]
    file.rename(landing / "legal" / "c.jsonl")
    os.utime(landing / "legal" / "b.jsonl", (LONG_AGO + 1, LONG_AGO + 1))  # landed again
    assert states(take_in(store, str(landing))) == [("b.jsonl", "known"), ("c.jsonl", "known")]
    assert take_in(store, str(landing)) == []
    (entry,) = Ledger(store).entries("legal")
    assert sorted(entry.names) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert load_corpus(store, "legal").version == 1


def test_a_file_waits_until_it_settles_or_is_marked(store: Store, landing: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.part", "d.jsonl.tmp", ".e.jsonl"):
        write_documents(landing / "legal" / name, seed=name, count=3)
    assert take_in(store, str(landing), 60) == []
    (landing / "legal" / "b.jsonl.done").touch()
    assert states(take_in(store, str(landing), 60)) == [("b.jsonl", "ingested")]
    assert states(take_in(store, str(landing), 0)) == [("a.jsonl", "ingested")]


@pytest.mark.parametrize("wrong", ["sha256", "bytes", "neither", "nonsense", "list"])
def test_a_marker_that_promises_something_is_held_to_it(store: Store, landing: Path, wrong: str) -> None:
    file = land(landing, "a.jsonl")
    promise = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    spoiled: object = {**promise, **{"sha256": {"sha256": "0" * 64}, "bytes": {"bytes": 1}}.get(wrong, {})}
    spoiled = {"nonsense": {"md5": "x"}, "list": [1]}.get(wrong, spoiled)
    marker = landing / "legal" / "a.jsonl.done"
    marker.write_text(json.dumps(spoiled))
    expected = "ingested" if wrong == "neither" else "refused"
    assert states(take_in(store, str(landing))) == [("a.jsonl", expected)]
    assert take_in(store, str(landing)) == []
    marker.write_text(json.dumps(promise))
    assert states(take_in(store, str(landing))) == ([] if wrong == "neither" else [("a.jsonl", "ingested")])


def test_limits_hold(store: Store, landing: Path) -> None:
    land(landing, "a.jsonl", count=50)
    (refused,) = take_in(store, str(landing), limits=DocumentLimits(max_file_bytes=100))
    assert refused.state == "refused"
    assert "exceed the limit of 100" in str(refused.reason)


def test_a_marker_nested_without_end_is_a_refusal(store: Store, landing: Path) -> None:
    write_documents(landing / "legal" / "a.jsonl", seed="deep", count=3)
    (landing / "legal" / "a.jsonl.done").write_text("[" * 4000)
    (done,) = take_in(store, str(landing))
    assert (done.state, "marker is not understood" in str(done.reason)) == ("refused", True)
