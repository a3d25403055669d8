"""Artifacts of a few small files, and their folders in a store."""

from __future__ import annotations

from pathlib import Path

from crosscal.store import Artifact, Store, digest_of

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
