"""The cost of a look at the landing place does not grow with what landed; a ledger of an earlier version is read."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crosscal.flows.watch import waiting_domains
from crosscal.landing import Ledger, local_place, take_in
from crosscal.landing.items import LandedFile
from crosscal.landing.records import state
from crosscal.store import Store, digest_of
from tests.helpers.counting_home import counting_store
from tests.helpers.tiny_place import write_documents

MOST_ASKED = 50
LONG_AGO = time.time() - 1000


def land(landing: Path, domain: str, number: int, marker: str | None) -> Path:
    file = landing / domain / f"{number}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_documents(file, seed=f"{domain} {number}", count=3)
    os.utime(file, (LONG_AGO, LONG_AGO))
    if marker is not None:
        file.with_name(f"{file.name}.done").write_text(marker)
    return file


def fill(home: Path, landing: Path, files: int, domains: int) -> None:
    """Record `files` files as landed and ingested, and the newest version of each domain as recompressed."""
    ledger = Ledger(Store(home))
    for number in range(files):
        domain = f"d{number % domains}"
        file = land(landing, domain, number, "")
        found, sha256 = file.stat(), hashlib.sha256(file.read_bytes()).hexdigest()
        seen = LandedFile(domain, file.name, found.st_size, found.st_mtime)
        ledger.record(seen, sha256, state("landed"))
        ledger.record(seen, sha256, state("ingested", version=number + 1))
    for number in range(domains):
        ledger.request(f"d{number}", files)
        run = ledger.claim(f"d{number}", "run")
        assert run is not None
        ledger.mark(run, "published")


def asked_by_a_watch(home: Path, landing: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], list[str]]:
    """Return the store calls of a sweep and a look for waiting domains, and the landing files that they open."""
    opened: list[str] = []

    def noted(path: Path, open_file: Any = local_place._opened) -> Any:
        opened.append(path.name)
        return open_file(path)

    store, asked = counting_store(home)
    with monkeypatch.context() as patch:
        patch.setattr(local_place, "_opened", noted)
        assert take_in(store, str(landing)) == []
        assert waiting_domains(Ledger(store)) == {}
    return asked, opened


@pytest.mark.parametrize(("files", "domains"), [(4, 1), (300, 1), (300, 30)])
def test_a_watch_that_finds_nothing_new_asks_little_and_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, domains: int
) -> None:
    fill(tmp_path / "home", tmp_path / "landing", files, domains)
    asked, opened = asked_by_a_watch(tmp_path / "home", tmp_path / "landing", monkeypatch)
    assert opened == []
    assert asked.keys() <= {"names", "read"}, "nothing is written"
    assert asked["names"] == 4
    assert asked["read"] <= 2 * (2 * files + 3 * domains).bit_length()
    assert asked.total() <= MOST_ASKED


@pytest.mark.parametrize("marker", ["", '{"bytes": %d}'])
def test_a_marker_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    file = land(tmp_path / "landing", "legal", 0, None)
    file.with_name(f"{file.name}.done").write_text(marker % file.stat().st_size if marker else "")
    (done,) = take_in(Store(tmp_path / "home"), str(tmp_path / "landing"))
    assert done.state == "ingested"
    run = Ledger(Store(tmp_path / "home")).claim("legal", "run")
    assert run is not None
    Ledger(Store(tmp_path / "home")).mark(run, "kept")
    assert asked_by_a_watch(tmp_path / "home", tmp_path / "landing", monkeypatch)[1] == []


def test_what_was_refused_costs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landing = tmp_path / "landing"
    for number, marker in enumerate(('{"bytes": 1}', '{"sha256": "%s"}' % ("0" * 64), "nonsense", "[]")):
        land(landing, "legal", number, marker)
    (landing / "legal" / "folder").mkdir()
    land(landing, "Not A Domain", 0, None)
    assert {one.state for one in take_in(Store(tmp_path / "home"), str(landing))} == {"refused"}
    asked, opened = asked_by_a_watch(tmp_path / "home", landing, monkeypatch)
    assert opened == []
    assert asked.total() <= 10


def earlier_home(home: Path, landing: Path) -> dict[str, str]:
    """Write a store as versions before the journal did, with a ref for each file, refusal, request and run."""
    refs, landed = Store(home).refs, {}
    for number in range(5):
        file = land(landing, "legal", number, "" if number % 2 else None)
        sha256, found = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat()
        signature = digest_of([found.st_size, found.st_mtime, None, None])[:16]
        value = {"sha256": sha256, "bytes": found.st_size, "names": {file.name: signature}, "states": [state("landed")]}
        refs.append(f"ledger/legal/{sha256[:16]}", 0, value)
        value["states"] = [*value["states"], state("ingested", version=number + 1)]
        refs.append(f"ledger/legal/{sha256[:16]}", 1, value)
        landed[file.name] = sha256
    for number, last in enumerate(("failed", "published"), start=1):
        process = {"host": "here", "pid": 7, "process": "here.1-7", "process_started": 1.0}
        value = {"version": 5, "run_id": f"run {number}", **process, "states": [state("claimed")]}
        refs.append(f"recompressions/legal/{number:08d}", 0, value)
        refs.append(f"recompressions/legal/{number:08d}", 1, {**value, "states": [*value["states"], state(last)]})
    refs.append("requests/legal", 0, {"version": 5, "after_run": 0, "at": "2026-11-01T00:00:00.000Z"})
    refused = {"domain": "", "name": "UPPER", "reason": "why", "signature": ""}
    refs.append(f"refusals/{digest_of(refused)[:16]}", 0, {**refused, "at": "2026-11-01T00:00:00.000Z"})
    return landed


def files_below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_ledger_of_an_earlier_version_is_read_and_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, landing = tmp_path / "home", tmp_path / "landing"
    landed, before = earlier_home(home, landing), files_below(home)

    def check() -> None:
        view = Ledger(Store(home)).look()
        assert view.domains() == ["legal"]
        assert {name: entry.sha256 for entry in view.entries("legal") for name in entry.names} == landed
        assert {entry.state for entry in view.entries("legal")} == {"published"}
        assert [(run.number, run.state, run.run_id) for run in view.runs("legal")] == [
            (1, "failed", "run 1"),
            (2, "published", "run 2"),
        ]
        assert (view.requested("legal"), view.pending("legal")) == (5, None)
        assert [each["name"] for each in view.refusals()] == ["UPPER"]

    check()
    assert files_below(home) == before, "to look at it writes nothing"
    assert take_in(Store(home), str(landing)) == [], "nothing is read anew"
    check()
    assert before.items() <= files_below(home).items(), "nothing that was written is lost"
    asked, _ = asked_by_a_watch(home, landing, monkeypatch)
    assert asked.total() <= 10
    land(landing, "legal", 9, "")
    (done,) = take_in(Store(home), str(landing))
    assert done.state == "ingested"
    assert len(Ledger(Store(home)).entries("legal")) == 6
