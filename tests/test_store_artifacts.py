"""Published artifacts: visible only when complete, read back unchanged, also from a store that is read-only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crosscal.errors import MissingArtifact, StoreError
from crosscal.store import Store, digest_of
from tests.helpers.artifacts import FILES, KEY, folder_of, put


def test_what_was_published_is_read_back(store: Store) -> None:
    assert store.find("moments", KEY) is None
    artifact = put(store)
    assert {name: store.read_bytes(artifact, name) for name in FILES} == FILES
    assert artifact.provenance == {"why": "test", "seed": 3}
    assert artifact.bytes == sum(map(len, FILES.values()))
    assert Store(store.location).get("moments", KEY) == artifact
    assert [a.key for a in store.list()] == [a.key for a in store.list("moments")] == [KEY]
    assert list(store.list("corpora")) == []
    with pytest.raises(MissingArtifact, match="CROSSCAL_HOME"):
        store.get("moments", digest_of("another"))


def test_nothing_is_visible_before_the_block_ends(store: Store) -> None:
    with store.publish("moments", KEY, {}) as folder:
        (folder / "a").write_bytes(b"x")
        assert store.find("moments", KEY) is None
        assert list(store.list()) == []
    assert store.find("moments", KEY) is not None


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), PermissionError(13, "no", "/some/source.txt")])
def test_an_exception_leaves_nothing_and_passes(store: Store, error: BaseException) -> None:
    def interrupted() -> None:
        with store.publish("moments", KEY, {}) as folder:
            (folder / "a").write_bytes(b"x")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert store.find("moments", KEY) is None
    assert list((Path(store.location) / "staging").iterdir()) == []


def test_the_first_copy_stays(store: Store) -> None:
    put(store)
    with store.publish("moments", KEY, {}) as folder:
        (folder / "a.bin").write_bytes(b"other")
    assert store.read_bytes(store.get("moments", KEY), "a.bin") == FILES["a.bin"]


def test_a_folder_without_a_manifest_does_not_stand_in_the_way(store: Store) -> None:
    put(store)
    (folder_of(store) / "manifest.json").unlink()
    assert store.find("moments", KEY) is None
    assert list(store.list()) == list(store.verify()) == []
    artifact = put(store)
    assert store.read_bytes(artifact, "b.json") == FILES["b.json"]


@pytest.mark.parametrize(
    ("kind", "key"), [("../x", KEY), ("Moments", KEY), ("moments", "../" + KEY[3:]), ("moments", KEY[:63]), ("", KEY)]
)
def test_bad_names_are_refused(store: Store, kind: str, key: str) -> None:
    with pytest.raises(StoreError, match="not a valid artifact name"):
        store.find(kind, key)
    with pytest.raises(StoreError, match="not a valid artifact name"), store.publish(kind, key, {}):
        pass


def test_other_people_of_a_shared_disk_can_read_what_was_published(store: Store) -> None:
    earlier = os.umask(0o022)
    try:
        put(store)
        store.refs.append("corpora/x", 0, {})
    finally:
        os.umask(earlier)
    assert folder_of(store).stat().st_mode & 0o777 == 0o755
    for file in (*folder_of(store).iterdir(), Path(store.location) / "refs/corpora/x/00000001.json"):
        assert file.stat().st_mode & 0o777 == 0o644


def test_a_store_that_may_only_be_read_can_be_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("utime", "mkdir", "rename", "link"):
        monkeypatch.setattr(os, name, refuse)
    reader = Store(store.location)
    assert reader.read_bytes(reader.get("moments", KEY), "a.bin") == FILES["a.bin"]
    assert [problem for *_, problem in reader.verify()] == [None]


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose another CROSSCAL_HOME"):
        put(Store(tmp_path / "file"))
