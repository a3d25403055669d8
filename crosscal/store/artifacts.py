"""The artifact store: folders named by a digest of what determines their content, complete as soon as they exist.

<home>/objects/<kind>/<key>/manifest.json + files      written to staging, hashed, synced, then renamed into place
<home>/refs/<name>/<version>.json                      small mutable records, with their history
<home>/staging/  <home>/users/                         work in progress; start time and heartbeat of each process
<home>/conditional-writes                              behind a URL: probe file that no process may overwrite
<home>/quarantine/                                     artifacts that failed verification; never deleted automatically
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.errors import CorruptArtifact, MissingArtifact, StoreError, UsageError
from crosscal.store.home import MANIFEST, Home, disk_errors
from crosscal.store.keys import digest_file, digest_of
from crosscal.store.local_home import LocalHome
from crosscal.store.refs import Refs
from crosscal.store.remote_home import RemoteHome
from crosscal.store.verification import Verified

FORMAT = 1
KEPT_KINDS = ("corpora",)
"""Source documents may no longer be available; everything else can be recomputed."""
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_KEY = re.compile(r"[0-9a-f]{64}")
_DAMAGED = "Run `crosscal store verify --quarantine`, then the same command again: missing artifacts are recomputed."


@dataclass(frozen=True)
class Artifact:
    """A complete, immutable folder of files. `files` maps a name (`x`, `folder/x`) to its `sha256` and `bytes`."""

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
        self.home: Home = _open_home(self.location)
        self.refs = Refs(self.home)
        self._verified: set[tuple[str, str, str]] = set()  # files whose digest this object has checked

    @property
    def exists(self) -> bool:
        """Whether the store contains any artifact or ref."""
        return any(self.home.names(place) for place in ("objects", "refs"))

    @contextmanager
    def publish(self, kind: str, key: str, provenance: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a folder to write files into, and store it as an artifact if the block ends without an exception.

        If the key exists already, or another process stores it first, this copy is discarded: equal keys mean equal
        content. Raises `StoreFull` if the disk is full, and then leaves nothing behind.
        """
        place = _place(kind, key)
        staged = self.home.staging()
        try:
            with disk_errors(str(staged.parent)):
                yield staged
                _write_manifest(staged, kind, key, dict(provenance))
            self.home.publish(staged, place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact and record its use, or None. Raises `CorruptArtifact` if its manifest is damaged."""
        artifact = self._look(kind, key)
        if artifact:
            self.home.use(_place(kind, key))
        return artifact

    def get(self, kind: str, key: str) -> Artifact:
        """Return the artifact and record its use. Raises `MissingArtifact`, `CorruptArtifact`."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise MissingArtifact(
                "not in the store", where=f"{kind}/{key[:12]}", do=f"Is {self.location} the right CROSSCAL_HOME?"
            )
        return artifact

    def discard(self, kind: str, key: str) -> None:
        """Remove an artifact that is no longer needed; no error if it is already gone."""
        self.home.remove(_place(kind, key))

    def is_kept(self, kind: str, key: str) -> bool:
        """Return whether the artifact exists, without recording a use."""
        return self.home.read(f"{_place(kind, key)}/{MANIFEST}") is not None

    def discard_unused(self, kind: str, key: str) -> bool:
        """Remove an artifact unless it was used since the first of the other active processes started. Return whether
        it was removed. An object store keeps no times of use: there it is always removed."""
        place = _place(kind, key)
        is_dated = self.home.keeps_times and self.is_kept(kind, key)
        if is_dated and self.home.unused_since(place) >= self.home.in_use_since():
            return False
        self.home.remove(place)
        return True

    def path(self, artifact: Artifact, name: str) -> Path:
        """Return a local path to one file. Its digest is checked once per `Store` object. Raises `CorruptArtifact`."""
        place, sha256 = _place(artifact.kind, artifact.key), artifact.files[name]["sha256"]
        for _ in range(2):  # a damaged local copy of a remote file is fetched once more
            path = self.home.local(place, name, sha256)
            if path is None:
                raise CorruptArtifact("a stored file is gone", where=f"{place}/{name}", do=_DAMAGED)
            if (place, name, sha256) in self._verified or digest_file(path) == sha256:
                self._verified.add((place, name, sha256))
                return path
            if not self.home.forget(path):
                break
        raise CorruptArtifact("a stored file does not match its digest", where=f"{place}/{name}", do=_DAMAGED)

    def read_bytes(self, artifact: Artifact, name: str) -> bytes:
        return self.path(artifact, name).read_bytes()

    def list(self, kind: str | None = None) -> Iterator[Artifact]:
        """Yield every readable artifact; `verify` reports damaged manifests."""
        for found_kind, key in self.keys(kind):
            try:
                artifact = self._look(found_kind, key)
            except StoreError:
                continue
            if artifact:
                yield artifact

    def keys(self, kind: str | None = None) -> Iterator[tuple[str, str]]:
        """Yield (kind, key) of every artifact folder, readable or not."""
        for found_kind in [kind] if kind else self.home.names("objects"):
            for key in self.home.names(f"objects/{found_kind}"):
                if _KIND.fullmatch(found_kind) and _KEY.fullmatch(key):
                    yield found_kind, key

    def verify(self, *, quarantine: bool = False, quick: bool = False) -> Iterator[tuple[str, str, str | None]]:
        """Read every byte of every artifact and yield (kind, key, problem or None). `quarantine` moves damaged ones.

        `quick` skips those that were verified earlier and have not changed since, as far as the home can tell (see
        `verification`). A folder without a manifest is not an artifact: its upload to an object store may be underway.
        """
        verified = Verified(self.home, self.refs)
        for kind, key in self.keys():
            if quick and verified.holds(kind, key):
                yield kind, key, None
                continue
            try:
                artifact = self._look(kind, key)
                if artifact is None:
                    continue
                self._check_files(artifact)
            except CorruptArtifact as error:
                if quarantine:
                    self.home.move(_place(kind, key), f"quarantine/{kind}-{key}-{time.time_ns()}")
                yield kind, key, error.what
            except (StoreError, OSError) as error:
                yield kind, key, str(error)
            else:
                verified.note(kind, key)
                yield kind, key, None
        verified.keep()

    def sweep(self, *, unused_days: float | None = None, dry_run: bool = False) -> Iterator[tuple[str, str]]:
        """Remove abandoned work in progress and artifacts unused for `unused_days`, if given: yields (place, reason).

        Artifacts used since the first of the other active processes started are kept, however few the days. So are
        corpora, and models that are or were published: a pointer may be rolled back to them.
        """
        doomed = [(place, "abandoned") for place in self.home.leftovers()]
        if unused_days is not None:
            before = min(time.time() - unused_days * 86400, self.home.in_use_since())
            kept = {("models", key) for key in self.refs.published_models()}
            unused = (_place(*name) for name in self.keys() if name[0] not in KEPT_KINDS and name not in kept)
            doomed += [
                (place, f"unused for {unused_days:g} days")
                for place in unused
                if self.home.read(f"{place}/{MANIFEST}") is not None and self.home.unused_since(place) < before
            ]
        for place, reason in doomed:
            if not dry_run:
                self.home.remove(place)
            yield place, reason

    def _look(self, kind: str, key: str) -> Artifact | None:
        content = self.home.read(f"{_place(kind, key)}/{MANIFEST}")
        return None if content is None else _parse_manifest(content, kind, key)

    def _check_files(self, artifact: Artifact) -> None:
        place = _place(artifact.kind, artifact.key)
        for name, file in artifact.files.items():
            found = self.home.digest(place, name, file["sha256"])
            if found != file["sha256"]:
                problem = "does not match its digest" if found else "is gone"
                raise CorruptArtifact(f"{name} {problem}", where=place, do=_DAMAGED)


def _open_home(location: str) -> Home:
    if not location:
        do = "Leave it out for .crosscal in the current folder, or name a folder or URL."
        raise UsageError("an empty name for the store", where="--home or CROSSCAL_HOME", do=do)
    scheme, separator, path = location.partition("://")
    if separator and scheme not in ("file", "local"):
        return RemoteHome(location)
    return LocalHome(Path(path if separator else location).expanduser())


def _place(kind: str, key: str) -> str:
    if not _KIND.fullmatch(kind) or not _KEY.fullmatch(key):
        raise StoreError("not a valid artifact name", got=f"{kind}/{key}")
    return f"objects/{kind}/{key}"


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("crosscal", "torch", "pyarrow")}


def _write_manifest(staged: Path, kind: str, key: str, provenance: dict[str, Any]) -> None:
    found = sorted(file for file in staged.rglob("*") if file.is_file())
    names = {file.relative_to(staged).as_posix(): file for file in found}
    files = {name: {"sha256": digest_file(f), "bytes": f.stat().st_size} for name, f in names.items()}
    body = {
        "format": FORMAT,
        "kind": kind,
        "key": key,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": provenance,
        "files": files,
        "versions": _versions(),
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
