"""A store behind fsspec: in-memory object storage with injected failures and short reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from crosscal.errors import CorruptArtifact, StoreConflict, StoreError
from crosscal.store import Store, digest_of

KEY = digest_of("one")
FILES = {"a.bin": bytes(range(256)) * 4000, "b.json": b'{"x": 1}', "empty": b""}


class Unsteady(MemoryFileSystem):
    """Object storage on a bad line: calls fail with probability `failures`, reads are cut short with `short`."""

    protocol = "unsteady"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    chance = random.Random(0)
    failures, short, calls = 0.0, 0.0, 0

    def _line(self) -> None:
        type(self).calls += 1
        if self.chance.random() < self.failures:
            raise OSError("connection reset")

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._line()
        content: Any = super().cat_file(path, *args, **kwargs)
        return content[: len(content) // 2] if self.chance.random() < self.short else content

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        self._line()
        super().get_file(rpath, lpath, *args, **kwargs)
        if self.chance.random() < self.short:
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:-1])

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        self._line()
        super().put_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> None:
        self._line()
        super().pipe_file(*args, **kwargs)
        self._line()  # the response may be lost after the write

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self._line()
        return super().ls(*args, **kwargs)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    monkeypatch.setattr(Unsteady, "failures", 0.0)
    monkeypatch.setattr(Unsteady, "short", 0.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    yield "unsteady://bucket/prefix"
    Unsteady.store.clear()
    Unsteady.pseudo_dirs[:] = [""]


def put(store: Store, key: str = KEY, files: dict[str, bytes] = FILES) -> None:
    with store.publish("moments", key, {"why": "test"}) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def read(store: Store, key: str = KEY) -> dict[str, bytes]:
    artifact = store.get("moments", key)
    return {name: store.read_bytes(artifact, name) for name in artifact.files}


def objects(part: str) -> list[str]:
    return [path for path in Unsteady.store if part in path]


def drop_cache(tmp_path: Path) -> None:
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            file.unlink()


def test_the_laws_of_a_local_store_hold(home: str) -> None:
    store = Store(home)
    assert store.find("moments", KEY) is None
    assert list(store.list()) == list(store.verify()) == list(store.sweep()) == []
    put(store)
    put(store, files={"a.bin": b"later"})
    assert read(Store(home)) == FILES
    assert [artifact.key for artifact in store.list()] == [KEY]
    assert [store.refs.append("corpora/x", n, {"n": n}) for n in range(3)] == [1, 2, 3]
    with pytest.raises(StoreConflict):
        store.refs.append("corpora/x", 2, {"n": 9})
    assert not store.home.create("refs/corpora/x/00000003.json", b"{}")
    assert store.refs.read("corpora/x") == (3, {"n": 2})
    assert store.refs.names("corpora") == ["corpora/x"]


def test_failures_and_short_reads_on_the_way_change_nothing(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unsteady, "failures", 0.15)
    monkeypatch.setattr(Unsteady, "short", 0.15)
    for n in range(10):
        store = Store(home)
        put(store, key=digest_of(n))
        drop_cache(tmp_path)
        assert read(store, digest_of(n)) == FILES
        assert store.refs.append("corpora/x", n, {"n": n}) == n + 1
    monkeypatch.setattr(Unsteady, "failures", 0.0)
    monkeypatch.setattr(Unsteady, "short", 0.0)
    assert [problem for *_, problem in Store(home).verify()] == [None] * 10


def test_a_store_that_never_answers_is_told_after_five_tries(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unsteady, "failures", 1.0)
    monkeypatch.setattr(Unsteady, "calls", 0)
    with pytest.raises(StoreError, match="does not answer"):
        Store(home).find("moments", KEY)
    assert Unsteady.calls == 5


def test_what_is_not_there_is_asked_for_once(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unsteady, "calls", 0)
    assert Store(home).find("moments", KEY) is None
    assert Unsteady.calls == 1


def test_an_upload_cut_short_is_not_an_artifact(home: str) -> None:
    store = Store(home)
    put(store)
    del Unsteady.store[objects("/manifest.json")[0]]
    assert store.find("moments", KEY) is None
    assert list(store.list()) == list(store.verify(quarantine=True)) == []
    assert len(objects("/objects/")) == len(FILES)  # the upload may still be in progress
    put(store)
    assert read(store) == FILES


def test_two_writers_with_different_bytes_do_not_mix(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = Store(home), Store(home)
    upload = Unsteady.put_file

    def overtaken(self: Unsteady, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(Unsteady, "put_file", upload)
        upload(self, *args, **kwargs)
        put(other, files={"a.bin": b"theirs", "b.json": b"{}", "empty": b""})

    monkeypatch.setattr(Unsteady, "put_file", overtaken)
    put(store)
    assert read(Store(home)) in (FILES, {"a.bin": b"theirs", "b.json": b"{}", "empty": b""})
    assert [problem for *_, problem in store.verify()] == [None]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_in_the_bucket_is_found_past_the_local_cache(home: str, name: str) -> None:
    store = Store(home)
    put(store)
    assert read(store) == FILES
    path = objects(f"-{name}" if name in FILES else name)[0]
    Unsteady().pipe_file(path, b"damaged" + Unsteady.store[path].getvalue()[7:])
    assert [problem is None for *_, problem in store.verify(quarantine=True)] == [False]
    assert store.find("moments", KEY) is None
    assert len(objects("/quarantine/")) == len(FILES) + 1
    put(store)
    assert read(store) == FILES


def test_a_damaged_copy_in_the_local_cache_is_fetched_again(home: str, tmp_path: Path) -> None:
    store = Store(home)
    put(store)
    read(store)
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            file.write_bytes(b"rotten")
    assert read(Store(home)) == FILES
    path = objects("-a.bin")[0]
    Unsteady().pipe_file(path, b"damaged for good")
    drop_cache(tmp_path)
    with pytest.raises(CorruptArtifact, match="does not match"):
        read(Store(home))


def test_an_object_store_is_not_swept_by_age(home: str) -> None:
    store = Store(home)
    put(store)
    with pytest.raises(StoreError, match="lifecycle rule"):
        list(store.sweep(unused_days=1))
    assert read(store) == FILES


def test_an_address_that_cannot_be_opened_is_told() -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("no-such-protocol://bucket")


class Unconditional(Unsteady):
    """Storage, or its client, without conditional writes: it ignores the condition."""

    protocol = "unconditional"
    store: dict[str, Any] = {}  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


@pytest.mark.parametrize("protocol", ["unsteady", "unconditional"])
@pytest.mark.parametrize("failures", [0.0, 0.1])
def test_of_two_writers_one_is_first_or_both_are_refused(
    home: str, monkeypatch: pytest.MonkeyPatch, protocol: str, failures: float
) -> None:
    """Two writers never both succeed; without conditional writes each gets an error and nothing is written."""
    fsspec.register_implementation("unconditional", Unconditional, clobber=True)
    monkeypatch.setattr(Unsteady, "failures", failures)
    Unconditional.store.clear()
    for n in range(10):
        outcomes = []
        for writer in range(2):
            try:
                created = Store(home.replace("unsteady", protocol)).home.create(f"refs/r/{n:08d}.json", bytes([writer]))
                outcomes.append("first" if created else "second")
            except StoreError as error:
                assert "no conditional writes" in str(error)  # noqa: PT017
                assert "Unconditional writes over" in str(error)  # noqa: PT017
                outcomes.append("told")
        assert outcomes == (["first", "second"] if protocol == "unsteady" else ["told", "told"])
    assert not [path for path in Unconditional.store if "/refs/" in path]


def test_a_store_is_probed_once_by_each_that_writes_and_never_by_readers(home: str) -> None:
    assert Store(home).refs.read("a") == (0, None)
    assert objects("conditional-writes") == []
    store = Store(home)
    for n in range(3):
        store.refs.append("a", n, {"n": n})
    (probe,) = objects("conditional-writes")
    content = Unsteady.store[probe].getvalue()
    Store(home).refs.append("a", 3, {"n": 3})
    assert Unsteady.store[probe].getvalue() == content
