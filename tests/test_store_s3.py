"""The store over S3: s3fs and a local server, on a line that fails, truncates bodies and loses responses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from crosscal.errors import StoreConflict, StoreError
from crosscal.store import Store, digest_of
from tests.helpers.object_store import BUCKET, BadLine, at, object_store
from tests.helpers.tiny_place import Place, crosscal, make_place, values

KEY = digest_of("one")
FILES = {"a.bin": bytes(range(256)) * 4000, "b.json": b'{"x": 1}', "empty": b""}
FAULTS = {"unavailable": 0.04, "lost": 0.04, "truncated": 0.04, "slow": 0.01}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, BadLine]]:
    with object_store() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in at(served[0]).items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs would hide most faults by its own retries
        S3FileSystem.clear_instance_cache()
        yield served
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def line(server: tuple[str, BadLine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadLine]:
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    line = server[1]
    line.seen.clear()
    yield line
    for name in FAULTS:
        setattr(line, name, 0.0)


@pytest.fixture
def home(line: BadLine, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{digest_of(request.node.name)[:12]}"


def fail(line: BadLine) -> None:
    for name, chance in FAULTS.items():
        setattr(line, name, chance)


def put(store: Store, key: str = KEY, files: dict[str, bytes] = FILES) -> None:
    with store.publish("moments", key, {"why": "test"}) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def read(store: Store, key: str = KEY) -> dict[str, bytes]:
    artifact = store.get("moments", key)
    return {name: store.read_bytes(artifact, name) for name in artifact.files}


def test_the_laws_of_a_local_store_hold(home: str) -> None:
    store = Store(home)
    assert store.find("moments", KEY) is None
    assert list(store.list()) == list(store.verify()) == list(store.sweep()) == []
    put(store)
    put(store, files={"a.bin": b"later"})
    assert read(Store(home)) == FILES
    assert [artifact.key for artifact in store.list()] == [KEY]
    assert [problem for *_, problem in store.verify()] == [None]
    assert [store.refs.append("corpora/x", n, {"n": n}) for n in range(3)] == [1, 2, 3]
    with pytest.raises(StoreConflict):
        store.refs.append("corpora/x", 2, {"n": 9})
    assert store.refs.read("corpora/x") == (3, {"n": 2})
    assert store.refs.names("corpora") == ["corpora/x"]
    store.discard("moments", KEY)
    store.discard("moments", KEY)
    assert store.find("moments", KEY) is None


def test_a_bad_line_changes_nothing(home: str, line: BadLine) -> None:
    fail(line)
    for n in range(8):
        store = Store(home)
        put(store, digest_of(n), {"a.bin": bytes([n]) * 300_000})
        assert read(store, digest_of(n)) == {"a.bin": bytes([n]) * 300_000}
        assert store.refs.append("corpora/x", n, {"n": n}) == n + 1
    assert [problem for *_, problem in Store(home).verify()] == [None] * 8
    assert min(line.seen[fault] for fault in FAULTS) > 0, "every fault happened"


def test_damage_in_the_bucket_is_found_set_aside_and_made_again(home: str) -> None:
    store = Store(home)
    put(store)
    bucket = S3FileSystem()
    place = f"{home.removeprefix('s3://')}/objects/moments/{KEY}"
    damaged = next(path for path in bucket.ls(place) if path.endswith("-a.bin"))
    bucket.pipe_file(damaged, FILES["a.bin"][:-1] + b"!")
    assert [problem is None for *_, problem in store.verify(quarantine=True)] == [False]
    assert Store(home).find("moments", KEY) is None
    put(store)
    assert read(Store(home)) == FILES


def test_of_writers_at_once_one_wins_each_version(home: str, line: BadLine) -> None:
    """Writers of a version write equal values, and some responses to successful writes are lost."""
    line.lost, line.unavailable = 0.05, 0.05
    won: list[int] = []

    def count_up(times: int) -> None:
        store = Store(home)
        while times:
            version, value = store.refs.read("counter/x")
            try:
                store.refs.append("counter/x", version, {"n": (value or {"n": 0})["n"] + 1})
            except StoreConflict:
                continue
            won.append(version + 1)
            times -= 1

    writers = [threading.Thread(target=count_up, args=(4,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(won) == list(range(1, 13))
    assert Store(home).refs.read("counter/x") == (12, {"n": 12})


def test_a_bucket_that_is_not_there_is_told(line: BadLine) -> None:
    store = Store("s3://no-such-bucket/home")
    assert store.find("moments", KEY) is None
    with pytest.raises(StoreError, match="Does the bucket exist"):
        put(store)
    with pytest.raises(StoreError, match="Does the bucket exist"):
        store.refs.append("corpora/x", 0, {})


def test_a_server_that_is_down_is_told(line: BadLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match="does not answer"):
            Store(f"s3://{BUCKET}/home").find("moments", KEY)
    finally:
        S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_whole_run_on_a_bad_line_is_the_local_run(tmp_path: Path, home: str, line: BadLine) -> None:
    place = make_place(tmp_path)
    local = place.run()
    fail(line)
    remote = run_at(place, home)
    assert (remote["cache"], remote["calibration_tokens_read"]) == (local["cache"], local["calibration_tokens_read"])
    assert values(tmp_path / "remote" / "results.jsonl") == values(place.run_dir / "results.jsonl")
    for shard in (place.run_dir / "models").rglob("*.safetensors"):
        assert (tmp_path / "remote" / shard.relative_to(place.run_dir)).read_bytes() == shard.read_bytes()
    for name in FAULTS:
        setattr(line, name, 0.0)
    assert {problem for *_, problem in Store(home).verify()} == {None}
    assert run_at(place, home)["calibration_tokens_read"] == 0
    assert sum(line.seen[fault] for fault in FAULTS) > 20, line.seen


def run_at(place: Place, home: str) -> dict[str, Any]:
    done = crosscal("run", str(place.plan), "--home", home, "--json", "--out", str(place.folder / "remote"))
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_nightly_verification_fetches_what_is_new_and_nothing_again(home: str, line: BadLine, tmp_path: Path) -> None:
    """By the bucket's checksums: every changed object is detected, and no unchanged one is read again."""
    for n in range(6):
        put(Store(home), digest_of(n), {"a.bin": bytes([n]) * 3000, "b.bin": bytes([n]) * 30})

    def nightly(**how: bool) -> tuple[list[str | None], int]:
        line.seen.clear()
        problems = [problem for *_, problem in Store(home).verify(quick=True, **how)]
        return problems, line.seen["requests"]

    assert nightly()[0] == [None] * 6
    sound, requests = nightly()
    assert sound == [None] * 6
    assert requests <= 8, "lists, and what was noted"
    put(Store(home), digest_of(9), {"a.bin": b"new"})
    more, later_requests = nightly()
    assert more == [None] * 7
    assert later_requests > requests
    bucket = S3FileSystem()
    for n, name in ((0, "-a.bin"), (1, "-b.bin"), (2, "manifest.json")):
        place = f"{home.removeprefix('s3://')}/objects/moments/{digest_of(n)}"
        damaged = next(path for path in bucket.ls(place) if path.endswith(name))
        content: Any = bucket.cat_file(damaged)
        bucket.pipe_file(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    assert sum(problem is not None for problem in nightly(quarantine=True)[0]) == 3
    assert nightly()[0] == [None] * 4
