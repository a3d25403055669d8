"""The store: folders named by what determines their content, complete from the moment they exist.

<home>/objects/<kind>/<key>/manifest.json + files      written aside, hashed, synced, then renamed into place
<home>/refs/<name>/<version>.json                      small records that change, with their history
<home>/staging/                                        work in progress; swept by `gc`
<home>/quarantine/                                     artifacts that failed verification, never deleted by itself
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.errors import CorruptArtifact, MissingArtifact, StoreError
from crosscal.store.home import MANIFEST, LocalHome, disk_errors, open_home
from crosscal.store.keys import canonical_json, digest_file, digest_of
from crosscal.store.refs import Refs

FORMAT = 1
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_KEY = re.compile(r"[0-9a-f]{64}")
_DAMAGED = "Run `crosscal store verify --quarantine`, then the same command again: what is missing is made anew."


@dataclass(frozen=True)
class Artifact:
    """A complete, immutable folder of files. `files` maps a name to its `sha256` and `bytes`."""

    kind: str
    key: str
    provenance: dict[str, Any]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    created: str

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


class Store:
    """Artifacts and refs under one home (a path or an fsspec URL)."""

    def __init__(self, home: str | Path) -> None:
        self.location = str(home)
        self.home = open_home(self.location)
        self.refs = Refs(self.home)
        self._verified: set[tuple[str, str]] = set()  # files already hashed by this object

    @contextmanager
    def publish(self, kind: str, key: str, provenance: Mapping[str, Any]) -> Iterator[Path]:
        """Give a folder to write files into; leaving the block without an exception publishes it.

        When the key exists already, or another process publishes it first, this copy is discarded: equal keys mean
        equal content. Raises `StoreFull` when the disk is full, and leaves nothing behind then.
        """
        place = _place(kind, key)
        staged = self.home.staging()
        try:
            with disk_errors(self.location):
                yield staged
                _write_manifest(staged, kind, key, dict(provenance))
            self.home.publish(staged, place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None; `CorruptArtifact` when its manifest is damaged."""
        place = f"{_place(kind, key)}/{MANIFEST}"
        content = self.home.read(place)
        if content is None:
            return None
        self.home.touch(place)
        return _parse_manifest(content, kind, key)

    def get(self, kind: str, key: str) -> Artifact:
        artifact = self.find(kind, key)
        if artifact is None:
            raise MissingArtifact(
                "not in the store", where=f"{kind}/{key[:12]}", do=f"Is {self.location} the right CROSSCAL_HOME?"
            )
        return artifact

    def path(self, artifact: Artifact, name: str) -> Path:
        """A local path to one file, its digest checked (once per file and store object)."""
        place, entry = f"{_place(artifact.kind, artifact.key)}/{name}", artifact.files[name]
        path = self.home.local(place, entry["sha256"])
        if path is None:
            raise CorruptArtifact("a stored file is gone", where=place, do=_DAMAGED)
        if (place, entry["sha256"]) not in self._verified:
            if digest_file(path) != entry["sha256"]:
                if not isinstance(self.home, LocalHome):
                    path.unlink()  # a damaged download is not kept
                raise CorruptArtifact("a stored file does not match its digest", where=place, do=_DAMAGED)
            self._verified.add((place, entry["sha256"]))
        return path

    def read_bytes(self, artifact: Artifact, name: str) -> bytes:
        return self.path(artifact, name).read_bytes()

    def list(self, kind: str | None = None) -> Iterator[Artifact]:
        """Every readable artifact; damaged manifests are for `verify`."""
        for found_kind, key in self.keys(kind):
            try:
                artifact = self.find(found_kind, key)
            except CorruptArtifact:
                continue
            if artifact:
                yield artifact

    def keys(self, kind: str | None = None) -> Iterator[tuple[str, str]]:
        for found_kind in [kind] if kind else self.home.names("objects"):
            for key in self.home.names(f"objects/{found_kind}"):
                if _KEY.fullmatch(key):
                    yield found_kind, key

    def verify(self, *, quarantine: bool = False) -> Iterator[tuple[str, str, str | None]]:
        """Read every byte of every artifact: yields (kind, key, problem or None). Damaged ones may be set aside."""
        for kind, key in self.keys():
            problem = self._problem(kind, key)
            if problem and quarantine:
                self.home.move(_place(kind, key), f"quarantine/{kind}-{key}-{time.time_ns()}")
            yield kind, key, problem

    def _problem(self, kind: str, key: str) -> str | None:
        self._verified.clear()
        try:
            artifact = self.find(kind, key)
            if artifact is None:
                return "no manifest"
            for name in artifact.files:
                self.path(artifact, name)
        except CorruptArtifact as error:
            return error.what
        return None

    def sweep(self, *, unused_days: float | None = None, dry_run: bool = False) -> Iterator[tuple[str, str]]:
        """Remove abandoned work in progress and, on request, artifacts unused for so long: yields (place, reason).

        Corpora stay whatever their age: documents may not be had again, everything else can be computed again.
        """
        now = time.time()
        for name in self.home.names("staging"):
            if not _alive(int(name.split("-")[0])):
                if not dry_run:
                    self.home.remove(f"staging/{name}")
                yield f"staging/{name}", "abandoned"
        for kind, key in list(self.keys()) if unused_days is not None else []:
            place = _place(kind, key)
            if kind != "corpora" and self.home.age_seconds(f"{place}/{MANIFEST}", now) > (unused_days or 0) * 86400:
                if not dry_run:
                    self.home.remove(place)
                yield place, f"unused for {unused_days:g} days"


def _place(kind: str, key: str) -> str:
    if not _KIND.fullmatch(kind) or not _KEY.fullmatch(key):
        raise StoreError("not a valid artifact name", got=f"{kind}/{key}")
    return f"objects/{kind}/{key}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_manifest(staged: Path, kind: str, key: str, provenance: dict[str, Any]) -> None:
    files = {f.name: {"sha256": digest_file(f), "bytes": f.stat().st_size} for f in sorted(staged.iterdir())}
    body = {
        "format": FORMAT,
        "kind": kind,
        "key": key,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": provenance,
        "files": files,
        "versions": {name: importlib.metadata.version(name) for name in ("crosscal", "torch", "pyarrow")},
    }
    manifest = {**body, "digest": digest_of(body)}
    (staged / MANIFEST).write_bytes(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode())


def _parse_manifest(content: bytes, kind: str, key: str) -> Artifact:
    where = f"{kind}/{key[:12]}/{MANIFEST}"
    try:
        manifest = json.loads(content)
        digest = manifest.pop("digest")
        if digest_of(manifest) != digest or (manifest["kind"], manifest["key"]) != (kind, key):
            raise ValueError("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact("a stored manifest is damaged", where=where, do=_DAMAGED) from error
    if manifest["format"] != FORMAT:
        raise StoreError("written by another version of crosscal", where=where, got=f"format {manifest['format']}")
    fields = ("kind", "key", "provenance", "files", "versions", "created")
    return Artifact(**{field: manifest[field] for field in fields})


__all__ = ["Artifact", "Store", "canonical_json"]
