"""Records of a store: every version is kept, only one writer makes each, and damage is an error."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from crosscal.errors import CorruptArtifact, StoreConflict, StoreError
from crosscal.store import Store


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
