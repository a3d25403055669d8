"""Data sets that `datasets` saved or the hub cached: read by split and revision; damage and links out are errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pytest

from crosscal.corpora import DocumentLimits, ingest
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.hub import read_hub
from crosscal.corpora.records import Document
from crosscal.corpora.sources import HubDataset
from crosscal.errors import CorpusError
from crosscal.store import Store
from tests.helpers.chat_files import CHATS, lines, parquet, stored, turns_of, write_lines


def saved(folder: Path) -> Path:
    """Save two splits, the first in two files, and a cache file that belongs to neither."""
    first = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS[:40]])
    second = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS[40:]])
    datasets.DatasetDict({"train": first, "test": second}).save_to_disk(str(folder), num_shards={"train": 2, "test": 1})
    (folder / "train" / "cache-0123.arrow").write_bytes((folder / "test/data-00000-of-00001.arrow").read_bytes())
    return folder


def test_a_folder_that_datasets_saved_is_read_split_by_split(store: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "data" / "saved")
    report = ingest(store, "x", [str(folder)])
    assert report.corpus.shards[0].documents["test"] == 20
    assert (report.added_documents, report.duplicates, report.rejected) == (60, 0, {})
    assert sorted(turns_of(store, report.corpus), key=str) == sorted(CHATS, key=str)
    alone = ingest(store, "y", [str(folder / "test")])
    assert alone.corpus.shards[0].documents["test"] == 20
    above = ingest(store, "z", [str(tmp_path / "data")])  # also found in a subfolder
    assert above.corpus.digest == report.corpus.digest


def test_texts_are_read_from_such_a_folder_as_well(store: Store, tmp_path: Path) -> None:
    texts = [f"document number {n} is long enough" for n in range(30)]
    datasets.Dataset.from_dict({"text": [*texts, None, "short"]}).save_to_disk(str(tmp_path / "saved"))
    report = ingest(store, "x", [str(tmp_path / "saved")])
    assert sorted(map(str, stored(store, report.corpus))) == sorted(texts)
    assert report.rejected == {"text is not a string": 1, "too short": 1}


@pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", "", ".", 7])
def test_a_saved_folder_cannot_name_what_lies_outside(name: object, store: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved") / "test"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(CorpusError, match="names a path outside its folder"):
        ingest(store, "x", [str(tmp_path / "saved")])


def test_a_missing_part_is_an_error(store: Store, tmp_path: Path) -> None:
    (saved(tmp_path / "saved") / "test/data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match="a part of a saved data set is missing"):
        ingest(store, "x", [str(tmp_path / "saved")])


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
def test_a_damaged_file_gives_what_came_before(keep: float, store: Store, tmp_path: Path) -> None:
    folder, rows = tmp_path / "saved", [{"text": f"document number {n} is long enough"} for n in range(4000)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    (file,) = folder.glob("data-*.arrow")
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    (tmp_path / "b.jsonl").write_bytes(lines(rows[:1]))
    report = ingest(store, "x", [str(folder), str(tmp_path / "b.jsonl")])
    assert report.rejected == {"Arrow file is damaged, rest not read": 1}
    assert abs(report.added_documents - keep * 4000) <= 1000 + 1  # `datasets` writes batches of 1000 rows


def test_offsets_that_lead_out_of_a_file_are_damage(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["document that is long enough"]}).save_to_disk(str(folder))
    (file,) = folder.glob("data-*.arrow")
    batch = pa.RecordBatch.from_pydict({"text": ["x" * 30, "y" * 30]})
    with file.open("wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    whole, offsets = file.read_bytes(), struct.pack("<3i", 0, 30, 60)
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, struct.pack("<3i", 0, 30, 2**30)))
    with pytest.raises(CorpusError, match=r"1 Arrow file is damaged, rest not read"):
        ingest(store, "x", [str(folder)])


def cached(folder: Path, commits: dict[str, list[list[dict[str, Any]]]], refs: dict[str, str]) -> Path:
    """Make a data set in the hub's cache layout: snapshots with links to blobs, a README beside the data."""
    home = folder / "datasets--someone--chats"
    (home / "blobs").mkdir(parents=True)
    for commit, rows in commits.items():
        data = home / "snapshots" / commit / "data"
        data.mkdir(parents=True)
        (home / "blobs" / commit).write_bytes(parquet([{"messages": chat} for chat in rows]))
        (data / "train-00000-of-00001.parquet").symlink_to(f"../../../blobs/{commit}")
        (data.parent / "README.md").write_text("This is the card, and not a document of the data set.")
    for name, commit in refs.items():
        (home / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / name).write_text(commit)
    return home


def test_the_hubs_cache_is_read_at_a_revision(store: Store, tmp_path: Path) -> None:
    commits = {"aaa": CHATS[:20], "bbb": CHATS[20:50]}
    home = cached(tmp_path / "hub", commits, {"main": "bbb", "v1": "aaa"})
    numbers: Iterator[int] = iter(range(9))

    def read(path: Path, revision: str | None = None) -> int:
        report = ingest(store, f"x{next(numbers)}", [str(path)], revision=revision)
        assert report.rejected == {}
        return report.added_documents

    assert (read(home), read(home, "v1"), read(home, "aaa"), read(tmp_path / "hub")) == (30, 20, 20, 30)
    assert read(home / "snapshots" / "aaa") == 20
    with pytest.raises(CorpusError, match=r"no snapshot of this revision \(got v2; there are aaa, bbb\)"):
        read(home, "v2")
    (home / "refs" / "main").unlink()
    with pytest.raises(CorpusError, match=r"no snapshot of this revision \(got main"):
        read(home)
    with pytest.raises(CorpusError, match="names a path outside its folder"):
        read(home, "../../x")


def test_a_link_out_of_the_cache_is_an_error(store: Store, tmp_path: Path) -> None:
    home = cached(tmp_path / "hub", {"aaa": CHATS[:20]}, {})
    write_lines(tmp_path / "secret.jsonl", [{"messages": CHATS[30]}])
    (home / "snapshots/aaa/more.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for given in (home, home / "snapshots/aaa", tmp_path / "hub"):
        with pytest.raises(CorpusError, match=r"more\.jsonl: a link leads out of the cached data set"):
            ingest(store, "x", [str(given)])


def test_a_hub_dataset_may_hold_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "hub" / "train.jsonl", [{"prompt_id": "x", "messages": chat} for chat in CHATS])
    rows = list(read_hub(HubDataset(str(tmp_path / "hub"), None), "text", None, DocumentLimits()))
    assert [split for split, _ in rows] == ["train"] * len(CHATS)
    found = [Conversation.of_stored(each.text) for _, each in rows if isinstance(each, Document)]
    assert [list(each.turns) for each in found] == CHATS
