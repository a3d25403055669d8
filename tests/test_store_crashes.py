"""The store with killed writers, concurrent writers and full disks: real processes, real disks."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch

from crosscal.calibration.sets import stored_windows
from crosscal.corpora.shards import write_split
from crosscal.errors import StoreConflict, StoreFull
from crosscal.statistics import InputMoments
from crosscal.store import Store, digest_of
from crosscal.store.arrays import arrow_file
from crosscal.store.moments import write_moments
from tests.helpers.processes import PROCESSES

KEY = digest_of("one")

PUBLISH_AT = """
import sys, time
from crosscal.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
start = float(sys.stdin.readline())
for n in range(30):
    key = f"{n:064x}"
    with store.publish("moments", key, {}) as folder:
        (folder / "a").write_bytes(sys.argv[2].encode() * 1000)
        (folder / "b").write_bytes(sys.argv[2].encode() * 10)
        while time.time() < start + n * 0.01:
            pass
    artifact = store.get("moments", key)
    assert store.read_bytes(artifact, "a")[:10] == store.read_bytes(artifact, "b")
"""


def publish_forever(home: Path, writer: int) -> None:
    store, n = Store(home), 0
    while True:
        with store.publish("moments", digest_of([writer, n]), {"n": n}) as folder:
            for name in ("a", "b", "c"):
                (folder / name).write_bytes(bytes([n % 256]) * 20000)
        version, _ = store.refs.read("corpora/x")
        store.refs.append("corpora/x", version, {"n": n})
        n += 1


def test_a_writer_killed_at_any_moment_leaves_only_whole_artifacts(tmp_path: Path) -> None:
    store, chance = Store(tmp_path), random.Random(0)
    attempt = 0
    while attempt < 20 or len(list(store.keys())) <= 5:  # a busy disk may outlast the writer
        attempt += 1
        writer = PROCESSES.Process(target=publish_forever, args=(tmp_path, attempt))
        writer.start()
        while not list(store.home.names("staging")):
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(0.06 * chance.random())
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        list(store.sweep())
    checked = list(store.verify())
    assert len(checked) > 5
    assert [problem for *_, problem in checked if problem] == []
    version, value = store.refs.read("corpora/x")
    assert store.refs.versions("corpora/x") == list(range(1, version + 1))
    assert value is not None
    assert list((tmp_path / "staging").iterdir()) == []


def test_two_processes_publishing_the_same_keys_both_end_well(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", PUBLISH_AT, str(tmp_path)]
    with subprocess.Popen([*command, "x"], **pipes) as one, subprocess.Popen([*command, "y"], **pipes) as other:
        assert [writer.stdout.readline() for writer in (one, other)] == ["ready\n"] * 2
        start = time.time() + 0.05
        for writer in (one, other):
            writer.stdin.write(f"{start}\n")
            writer.stdin.flush()
    assert (one.returncode, other.returncode) == (0, 0)
    store = Store(tmp_path)
    assert [problem for *_, problem in store.verify()] == [None] * 30
    assert list((tmp_path / "staging").iterdir()) == []


def test_of_many_writers_of_a_version_one_succeeds(tmp_path: Path) -> None:
    stores = [Store(tmp_path) for _ in range(8)]

    def append(index: int) -> int:
        try:
            return stores[index].refs.append("a", 0, {"writer": index})
        except StoreConflict:
            return 0

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(append, range(8)))
    assert sorted(won) == [0] * 7 + [1]
    assert stores[0].refs.read("a") == (1, {"writer": won.index(1)})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def write_plain(path: Path) -> None:
    path.write_bytes(os.urandom(1 << 21))


def write_arrow(path: Path) -> None:
    table = pa.table({"x": pa.array(memoryview(os.urandom(1 << 21)).cast("q"))})
    with arrow_file(path, table.schema) as writer:
        writer.write_table(table)


def write_gram(path: Path) -> None:
    path.mkdir()
    write_moments(path, InputMoments.of(torch.rand(4, 512, dtype=torch.float64)))


def write_windows(path: Path) -> None:
    tokens_SL = torch.randint(1 << 30, (1 << 10, 1 << 9), generator=torch.Generator().manual_seed(0))
    stored_windows(Store(path), {"seed": 0}, lambda: tokens_SL)


def write_documents(path: Path) -> None:
    write_split(path, ((os.urandom(1 << 12).hex(), "source", bytes(32)) for _ in range(1 << 9)))


@pytest.mark.parametrize("write", [write_plain, write_arrow])
def test_a_full_disk_is_told_and_costs_nothing(small_disk: Path, write: object) -> None:
    store = Store(small_disk)
    (small_disk / "other").write_bytes(bytes(1 << 19))
    with pytest.raises(StoreFull, match="the disk is full"), store.publish("moments", KEY, {}) as folder:
        write(folder / "a")  # type: ignore[operator]
    assert store.find("moments", KEY) is None
    assert list((small_disk / "staging").iterdir()) == []
    with pytest.raises(StoreFull):
        store.refs.append("a", 0, {"much": "x" * (1 << 20)})
    assert store.refs.read("a") == (0, None)
    (small_disk / "other").unlink()
    with store.publish("moments", KEY, {}) as folder:
        (folder / "a").write_bytes(bytes(1 << 19))
    assert [problem for *_, problem in store.verify()] == [None]


def test_a_read_only_disk_can_be_read(small_disk: Path) -> None:
    store = Store(small_disk)
    with store.publish("moments", KEY, {}) as folder:
        (folder / "a").write_bytes(b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.read_bytes(Store(small_disk).get("moments", KEY), "a") == b"x"
    with pytest.raises(Exception, match="cannot be written"), store.publish("moments", digest_of(2), {}):
        pass


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can be larger than 64 KiB."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [write_plain, write_arrow, write_gram, write_windows, write_documents])
def test_no_file_stays_open_after_an_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Even while the exception, and with it every frame of its traceback, is still referenced."""
    with small_files(), pytest.raises((OSError, StoreFull)) as held:
        write(tmp_path / "a")
    assert held.value
    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []


def test_a_file_larger_than_allowed_is_told_like_a_full_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with small_files(), pytest.raises(StoreFull), store.publish("moments", KEY, {}) as folder:
        write_plain(folder / "a")
    assert store.find("moments", KEY) is None
    assert list((tmp_path / "staging").iterdir()) == []
