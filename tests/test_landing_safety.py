"""Anything may land: no file outside the landing place is read, sizes are bounded, and the sweep continues."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from crosscal.corpora import DocumentLimits
from crosscal.landing import LandedFile, Ledger, complete_files, local_place, take_in
from crosscal.landing.place import open_place
from crosscal.store import Store
from tests.helpers.tiny_place import write_documents

LONG_AGO = time.time() - 1000
TEXT = json.dumps({"text": "A document that is long enough to be taken, and the only one."}).encode() + b"\n"


def settle(*files: Path) -> None:
    for file in files:
        os.utime(file, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def reasons(store: Store) -> dict[str, str]:
    return {f"{each['domain']}/{each['name']}".strip("/"): each["reason"] for each in Ledger(store).refusals()}


def test_odd_names_links_and_devices_are_refused_once_and_the_rest_is_taken(
    store: Store, landing: Path, tmp_path: Path
) -> None:
    write_documents(tmp_path / "secret.jsonl", seed="secret", count=3)
    legal = landing / "legal"
    write_documents(legal / "good.jsonl", seed="good", count=3)
    write_documents(legal / "[glob]*~.jsonl", seed="glob", count=3)
    write_documents(legal / "line\nbreak.jsonl", seed="break", count=3)
    Path(os.fsdecode(os.fsencode(legal) + b"/\xff.jsonl")).write_bytes(TEXT)
    (landing / "UPPER case").mkdir()
    (landing / ("x" * 65)).mkdir()
    (landing / "loose.jsonl").write_bytes(TEXT)
    (legal / "folder").mkdir()
    (legal / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (legal / "nothing.jsonl").symlink_to(tmp_path / "nowhere")
    (legal / "circle.jsonl").symlink_to(legal / "circle.jsonl")
    (landing / "medical").symlink_to(tmp_path)
    (legal / "inside.jsonl").symlink_to(legal / "good.jsonl")
    os.mkfifo(legal / "pipe.jsonl")
    settle(*(file for file in legal.iterdir()))
    done = take_in(store, str(landing))
    assert sorted((one.name, one.state) for one in done if one.state != "refused") == [
        ("[glob]*~.jsonl", "ingested"),
        ("good.jsonl", "ingested"),
        ("inside.jsonl", "known"),
    ]
    found = reasons(store)
    assert found["legal/out.jsonl"] == found["medical"] == "a link that leads out of the landing place"
    assert found["legal/nothing.jsonl"] == "a link to nothing"
    assert found["legal/pipe.jsonl"] == "neither a file nor a folder"
    assert found["loose.jsonl"] == "not in a folder that names its domain"
    assert found["legal/line\\nbreak.jsonl"] == found["legal/\\udcff.jsonl"] == "an unprintable name"
    assert {"legal/circle.jsonl", "legal/folder", "UPPER case", "x" * 65} < found.keys()
    assert len(found) == len([one for one in done if one.state == "refused"]) == 11
    assert take_in(store, str(landing)) == []
    assert Ledger(store).domains() == ["legal"]


def test_a_file_that_becomes_a_link_after_it_was_seen_is_not_followed(landing: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(TEXT)
    file = landing / "legal" / "a.jsonl"
    file.write_bytes(TEXT)
    settle(file)
    (seen,) = complete_files(str(landing), 0)
    assert isinstance(seen, LandedFile)
    file.unlink()
    file.symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(OSError, match="leads out"):
        open_place(str(landing)).fetch(seen, tmp_path / "copy")
    with pytest.raises(OSError, match="symbolic"):
        local_place._opened(file)  # replaced between listing and opening


@pytest.mark.parametrize(("legal", "name"), [("legal", "../../secret.jsonl"), ("..", "secret.jsonl")])
def test_a_path_that_leads_out_is_not_fetched(landing: Path, tmp_path: Path, legal: str, name: str) -> None:
    (tmp_path / "secret.jsonl").write_bytes(TEXT)
    with pytest.raises(OSError, match="leads out"):
        open_place(str(landing)).fetch(LandedFile(legal, name, len(TEXT), None), tmp_path / "copy")


def test_a_file_written_while_it_is_read_waits(landing: Path, tmp_path: Path, store: Store) -> None:
    file = landing / "legal" / "a.jsonl"
    file.write_bytes(TEXT)
    settle(file)
    (seen,) = complete_files(str(landing), 0)
    assert isinstance(seen, LandedFile)
    for change in (TEXT + TEXT, TEXT[:-5], TEXT):  # the last has the old length but a new time
        file.write_bytes(change)
        assert open_place(str(landing)).fetch(seen, tmp_path / "copy") is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_read_only_so_far(store: Store, landing: Path, suffix: str) -> None:
    """2 GiB in 65 KiB (Zstandard) or 2 MiB (gzip): reading ends at 64 MiB, or at 200 times the file's size."""
    bomb, zeros = landing / "legal" / f"bomb.jsonl{suffix}", bytes(2**24)
    if suffix == ".zst":
        with bomb.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
            stream.write(TEXT)
            for _ in range(128):
                stream.write(zeros)
    else:
        frame = gzip.compress(zeros, 9)
        bomb.write_bytes(gzip.compress(TEXT) + frame * 128)
    settle(bomb)
    started = time.monotonic()
    (done,) = take_in(store, str(landing))
    assert time.monotonic() - started < 5
    assert (done.state, done.added_documents) == ("ingested", 1), "what stands before the bomb is a document"
    line = Ledger(store).entries("legal")[0].states[-1]
    (reason,) = line["rejected"]
    assert "rest not read" in reason


def test_nothing_usable_is_refused_until_the_content_changes(store: Store, landing: Path) -> None:
    file = landing / "legal" / "a.jsonl"
    for content, expected in ((b"{}\n" * 3, "refused"), (b"\0" * 100, "refused"), (b"", "refused"), (TEXT, "ingested")):
        file.write_bytes(content)
        assert [one.state for one in take_in(store, str(landing), 0)] == [expected]
        assert take_in(store, str(landing), 0) == []
        settle(file)
        assert [one.state for one in take_in(store, str(landing), 0)] == ["known"], "touched, not changed"
    assert Ledger(store).pending("legal") == 1
    (landing / "legal" / "picture.png").write_bytes(b"\x89PNG")
    assert [one.state for one in take_in(store, str(landing), 0)] == ["refused"]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """A landing place in fsspec's in-memory object storage, given by a prefix."""
    name = f"memory://{tmp_path.name}"
    yield f"{name}/landing"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def put(bucket: str, name: str, content: bytes, *, age_seconds: float = 1000.0) -> None:
    fs: MemoryFileSystem = fsspec.filesystem("memory")
    path = f"{bucket.removeprefix('memory:/')}/{name}"
    fs.pipe_file(path, content)
    fs.store[path].modified = fs.store[path].created = datetime.now(UTC) - timedelta(seconds=age_seconds)


def test_documents_land_in_object_storage(store: Store, bucket: str) -> None:
    put(bucket, "legal/a.jsonl", TEXT)
    put(bucket, "legal/same.jsonl", TEXT)
    put(bucket, "legal/young.jsonl", TEXT.replace(b"only", b"second"), age_seconds=0)
    put(bucket, "legal/marked.jsonl", TEXT.replace(b"only", b"third"), age_seconds=0)
    put(bucket, "legal/marked.jsonl.done", b"")
    put(bucket, "legal/big.jsonl", TEXT * 100)
    put(bucket, "Legal Texts/a.jsonl", TEXT)
    put(bucket, "legal/nested/a.jsonl", TEXT)
    done = take_in(store, bucket, limits=DocumentLimits(max_file_bytes=1000))
    states = {one.name: one.state for one in done}
    assert states == {
        "a.jsonl": "ingested",
        "same.jsonl": "known",
        "marked.jsonl": "ingested",
        "big.jsonl": "refused",
        "Legal Texts": "refused",
        "nested": "refused",
    }
    assert take_in(store, bucket, limits=DocumentLimits(max_file_bytes=1000)) == []
    assert [one.name for one in take_in(store, bucket, 0)] == ["big.jsonl", "young.jsonl"]


def test_an_object_written_anew_while_it_is_fetched_waits(bucket: str, tmp_path: Path) -> None:
    put(bucket, "legal/a.jsonl", TEXT)
    (seen,) = complete_files(bucket, 0)
    assert isinstance(seen, LandedFile)
    assert open_place(bucket).fetch(seen, tmp_path / "copy") is not None
    for content in (TEXT + TEXT, TEXT[:-3], TEXT):
        put(bucket, "legal/a.jsonl", content, age_seconds=1)
        assert open_place(bucket).fetch(seen, tmp_path / "copy") is None


def test_an_empty_bucket_is_an_empty_landing_place(bucket: str) -> None:
    put(bucket, "legal/a.jsonl", TEXT)
    assert list(complete_files(f"{bucket}/not-there-yet", 0)) == []
