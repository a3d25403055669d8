"""A journal equals a plain map of everything put into it, with concurrent readers and writers, in log n reads."""

from __future__ import annotations

import json
import math
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from crosscal.errors import CorruptArtifact, StoreConflict
from crosscal.store import Store, journal
from crosscal.store.journal import Journal
from crosscal.store.refs import Refs, again_on_conflict
from tests.helpers.counting_home import CountingHome


def opened(tmp_path: Path) -> tuple[Journal, Counter[str]]:
    home = CountingHome(Store(tmp_path).home)
    return Journal(Refs(home), "notes"), home.asked  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_map_of_what_was_put_into_it(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers write in turns or retry after a conflict; a new reader checks every step, across several folders."""
    monkeypatch.setattr(journal, "PER_FOLDER", 7)
    chance, expected = random.Random(seed), dict[str, dict[str, int]]()
    writers = [opened(tmp_path)[0] for _ in range(2)]
    for step in range(1, 70):
        changes = {chance.choice("abcdefghij"): {"n": step} for _ in range(chance.choice((0, 1, 1, 3)))}
        writer = chance.choice(writers)

        def put(writer: Journal = writer, changes: dict[str, dict[str, int]] = changes) -> None:
            writer.put(changes)

        again_on_conflict(put)
        expected |= changes
        assert writer.items == expected
        fresh, asked = opened(tmp_path)
        assert fresh.items == expected
        assert fresh.number == step
        assert asked["read"] == step.bit_count() <= math.log2(step) + 1
        assert asked["names"] == 2
        fresh.refresh()
        assert (asked["read"], asked["names"]) == (step.bit_count(), 4), "what was read is not read again"


def test_every_change_is_kept_in_few_records(tmp_path: Path) -> None:
    notes, _ = opened(tmp_path)
    for n in range(512):
        notes.put({f"{n}": {"n": n}})
    records = [json.loads(file.read_text())["value"]["items"] for file in (tmp_path / "refs").rglob("*.json")]
    kept = Counter(key for items in records for key in items)
    assert len(records) == 512
    assert max(kept.values()) <= math.log2(512) + 1


def test_of_writers_at_once_none_is_lost(tmp_path: Path) -> None:
    def count_up() -> None:
        notes = opened(tmp_path)[0]
        for _ in range(15):

            def add_one() -> None:
                notes.put({"n": {"n": notes.items.get("n", {"n": 0})["n"] + 1}})

            again_on_conflict(add_one)

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened(tmp_path)[0].items == {"n": {"n": 60}}


def test_conflicting_writer_gets_an_error_and_refreshes(tmp_path: Path) -> None:
    one, other = opened(tmp_path)[0], opened(tmp_path)[0]
    assert one.items == other.items == {}
    one.put({"a": {"n": 1}})
    with pytest.raises(StoreConflict):
        other.put({"a": {"n": 2}})
    assert other.items == {"a": {"n": 1}}


@pytest.mark.parametrize("damaged", range(1, 17))
def test_without_a_damaged_record_everything_else_is_there(tmp_path: Path, damaged: int) -> None:
    notes, _ = opened(tmp_path)
    for n in range(1, 17):
        notes.put({f"{n}": {"n": n}})
    file = tmp_path / "refs/notes/00000" / f"{damaged:08d}.json"
    file.write_bytes(file.read_bytes()[:-9])
    if damaged == 16:
        with pytest.raises(CorruptArtifact, match="Remove that file"):
            _ = opened(tmp_path)[0].items
    file.unlink()
    missing = {"16"} if damaged == 16 else set()  # a later record also contains the others
    assert opened(tmp_path)[0].items.keys() == {f"{n}" for n in range(1, 17)} - missing
    again = opened(tmp_path)[0]
    again.put({"more": {}})
    assert opened(tmp_path)[0].items.keys() == {"more", *again.items}


def test_what_was_before_the_first_record_is_taken_over_by_it(tmp_path: Path) -> None:
    refs = Store(tmp_path).refs
    earlier = {"a": {"n": 1}, "b": {"n": 1}}
    taking = Journal(refs, "notes", lambda: earlier)
    assert taking.items == earlier
    taking.put({"b": {"n": 2}})
    taking.put({"c": {"n": 3}})
    assert Journal(refs, "notes").items == {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
