"""Damage of stored artifacts is found and set aside on request; quick verification reads everything within a month."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from crosscal.errors import CorruptArtifact, StoreError
from crosscal.store import Store, digest_of
from crosscal.store.artifacts import FORMAT
from crosscal.store.local_home import LocalHome
from crosscal.store.verification import SAMPLED_DAYS
from tests.helpers.artifacts import DAY, FILES, KEY, folder_of, put


@pytest.mark.parametrize("name", ["a.bin", "b.json", "manifest.json"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_found_set_aside_and_made_anew(store: Store, name: str, where: str) -> None:
    put(store)
    put(store, key=digest_of("sound"))
    file = folder_of(store) / name
    content = bytearray(file.read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 1
    file.write_bytes(content)

    fresh = Store(store.location)
    with pytest.raises(CorruptArtifact, match="verify --quarantine"):
        fresh.path(fresh.get("moments", KEY), name)
    assert {(key, problem is None) for _, key, problem in fresh.verify()} == {(KEY, False), (digest_of("sound"), True)}
    assert folder_of(store).is_dir()
    assert sum(problem is not None for *_, problem in fresh.verify(quarantine=True)) == 1
    assert [problem for *_, problem in fresh.verify()] == [None]
    assert (next((Path(store.location) / "quarantine").iterdir()) / name).read_bytes() == content
    artifact = put(fresh)
    assert {each: fresh.read_bytes(artifact, each) for each in FILES} == FILES


def test_a_file_that_is_gone_or_cut_is_found(store: Store) -> None:
    artifact = put(store)
    file = folder_of(store) / "a.bin"
    file.write_bytes(FILES["a.bin"][:-1])
    assert [problem for *_, problem in store.verify()] == ["a.bin does not match its digest"]
    file.unlink()
    assert [problem for *_, problem in store.verify()] == ["a.bin is gone"]
    with pytest.raises(CorruptArtifact, match="gone"):
        store.path(artifact, "a.bin")


def test_an_artifact_moved_to_another_key_is_not_taken_for_it(store: Store) -> None:
    put(store)
    folder_of(store).rename(folder_of(store, key=digest_of("another")))
    with pytest.raises(CorruptArtifact):
        store.get("moments", digest_of("another"))


def test_another_format_is_neither_read_nor_set_aside(store: Store) -> None:
    put(store)
    file = folder_of(store) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest.pop("digest")
    manifest["format"] = FORMAT + 1
    file.write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    with pytest.raises(StoreError, match="another version"):
        store.find("moments", KEY)
    assert list(store.list()) == []
    assert [problem is None for *_, problem in store.verify(quarantine=True)] == [False]
    assert folder_of(store).is_dir()


def rot(file: Path) -> None:
    """Flip a bit as silent disk corruption does: size and modification time stay."""
    then = file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(then, then))


def test_a_quick_verification_reads_what_is_new_or_changed_and_all_the_rest_within_a_month(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [digest_of(n) for n in range(40)]
    for key in keys:
        put(store, key=key)
    read: list[str] = []
    digest = LocalHome.digest

    def noted(self: LocalHome, place: str, name: str, sha256: str) -> str | None:
        read.append(place.rpartition("/")[2])
        return digest(self, place, name, sha256)

    def quick(day: int) -> set[str]:
        read.clear()
        monkeypatch.setattr("time.time", lambda: (1000 + day) * DAY)
        return {key for _, key, problem in Store(store.location).verify(quick=True) if problem}

    monkeypatch.setattr(LocalHome, "digest", noted)
    assert quick(0) == set()
    assert set(read) == set(keys), "what is new is read whole"
    seen = []
    for day in range(SAMPLED_DAYS):
        assert quick(day) == set()
        seen += set(read)
    assert sorted(seen) == sorted(keys), "each once a month"
    rot(folder_of(store, key=keys[0]) / "a.bin")
    (folder_of(store, key=keys[1]) / "a.bin").write_bytes(FILES["a.bin"][:-1] + b"!")
    (folder_of(store, key=keys[2]) / "b.json").unlink()
    os.utime(folder_of(store, key=keys[3]) / "manifest.json", (1, 1))
    found = [quick(day) for day in range(SAMPLED_DAYS)]
    assert all({keys[1], keys[2]} <= damaged <= set(keys[:3]) for damaged in found)
    assert sum(keys[0] in damaged for damaged in found) == 1, "found on its day"
    assert {key for _, key, problem in store.verify() if problem} == set(keys[:3]), "and whenever all is read"
