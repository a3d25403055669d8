"""The store: visible artifacts are complete, damage is detected, and artifacts in use are not removed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosscal.errors import CorruptArtifact, MissingArtifact, StoreConflict, StoreError
from crosscal.store import Artifact, Store, digest_of
from crosscal.store.artifacts import FORMAT
from crosscal.store.local_home import LocalHome
from crosscal.store.processes import this_process
from crosscal.store.verification import SAMPLED_DAYS

KEY = digest_of("one")
FILES = {"a.bin": bytes(range(256)) * 40, "b.json": b'{"x": 1}', "empty": b""}
DAY = 86400


def put(store: Store, kind: str = "moments", key: str = KEY, files: dict[str, bytes] = FILES) -> Artifact:
    with store.publish(kind, key, {"why": "test", "seed": 3}) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return store.get(kind, key)


def folder_of(store: Store, kind: str = "moments", key: str = KEY) -> Path:
    return Path(store.location) / "objects" / kind / key


def age(store: Store, days: float, kind: str = "moments", key: str = KEY) -> None:
    then = time.time() - days * DAY
    os.utime(folder_of(store, kind, key) / "manifest.json", (then, then))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


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


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_keep_their_history(store: Store) -> None:
    assert store.refs.read("corpora/legal") == (0, None)
    assert [store.refs.append("corpora/legal", n, {"n": n}) for n in range(12)] == list(range(1, 13))
    assert store.refs.read("corpora/legal") == (12, {"n": 11})
    assert store.refs.read("corpora/legal", 3) == (3, {"n": 2})
    assert store.refs.versions("corpora/legal") == list(range(1, 13))
    assert store.refs.names("corpora") == ["corpora/legal"]


@pytest.mark.parametrize("links", [True, False])
def test_only_one_writer_makes_a_version(store: Store, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # a disk without hard links

        def refuse(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    store.refs.append("a", 0, {"writer": 1})
    with pytest.raises(StoreConflict):
        store.refs.append("a", 0, {"writer": 2})
    assert not store.home.create("refs/a/00000001.json", b"later")
    assert store.refs.append("a", 1, {"writer": 3}) == 2
    assert store.refs.read("a", 1) == (1, {"writer": 1})
    assert list((Path(store.location) / "staging").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"value": {"n": 2}, "digest": "0"}', b"\xff"])
def test_a_damaged_record_is_told_and_the_one_before_survives(store: Store, content: bytes) -> None:
    store.refs.append("a", 0, {"n": 1})
    store.refs.append("a", 1, {"n": 2})
    file = Path(store.location) / "refs/a/00000002.json"
    file.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=re.escape("refs/a/00000002.json")):
        store.refs.read("a")
    file.unlink()
    assert store.refs.read("a") == (1, {"n": 1})


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", "a/", "A", "a b"])
def test_bad_record_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="not a valid name"):
        store.refs.read(name)


# --- sweeping --------------------------------------------------------------------------------------------------------


def test_sweep_removes_what_was_long_unused_and_never_documents(store: Store) -> None:
    old, used, corpus = digest_of("old"), digest_of("used"), digest_of("corpus")
    put(store, key=old)
    put(store, key=used)
    put(store, kind="corpora", key=corpus)
    for kind, key in (("moments", old), ("moments", used), ("corpora", corpus)):
        age(store, 40, kind, key)
    store.get("moments", used)
    expected = [(f"objects/moments/{old}", "unused for 30 days")]
    assert list(store.sweep(unused_days=30, dry_run=True)) == expected
    assert folder_of(store, key=old).exists()
    list(store.verify())  # verifying and listing do not count as use
    list(store.list())
    assert list(store.sweep(unused_days=30)) == expected
    assert {a.key for a in store.list()} == {used, corpus}
    assert list((Path(store.location) / "staging").iterdir()) == []
    assert list(store.sweep(unused_days=30)) == []


def test_sweep_keeps_whatever_a_process_at_work_has_used(store: Store) -> None:
    before, used = digest_of("before"), digest_of("used")
    put(store, key=before)
    put(store, key=used)
    age(store, 3, key=before)
    age(store, 3, key=used)
    script = (
        "import sys; from crosscal.store import Store; s = Store(sys.argv[1]); s.get('moments', sys.argv[2]);"
        "print('used', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, store.location, used]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as at_work:
        assert at_work.stdout is not None
        assert at_work.stdout.readline()
        time.sleep(0.02)
        assert [place for place, _ in store.sweep(unused_days=0)] == [f"objects/moments/{before}"]
        at_work.kill()
    swept = [place for place, _ in store.sweep(unused_days=0)]
    assert f"objects/moments/{used}" in swept
    assert any(place.startswith("users/") for place in swept)


def test_sweep_leaves_the_work_of_living_processes_and_of_other_machines(store: Store) -> None:
    staging = Path(store.location) / "staging"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = f"{this_process().partition('-')[0]}-{dead.pid}-1"
    with store.publish("moments", KEY, {}) as mine:
        for name in (f"{gone}-0a", "another.1-77-0b", "another.1-78-0c", "what-is-this"):
            (staging / name).mkdir()
            (staging / name / "file").write_text("x")
        old = time.time() - 8 * DAY
        for path in (staging / "another.1-78-0c" / "file", staging / "another.1-78-0c"):
            os.utime(path, (old, old))
        os.utime(mine, (old, old))
        assert {place for place, _ in store.sweep()} == {f"staging/{gone}-0a", "staging/another.1-78-0c"}
        assert {path.name for path in staging.iterdir()} == {mine.name, "another.1-77-0b", "what-is-this"}
    assert store.find("moments", KEY) is not None
