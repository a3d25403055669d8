"""The store: folders named by what determines their content, complete from the moment they exist.

<home>/objects/<kind>/<key>/manifest.json + files      written aside, hashed, synced, then renamed into place
<home>/refs/<name>/<version>.json                      small records that change, with their history
<home>/staging/  <home>/users/                         work in progress, and since when which process is at work
<home>/conditional-writes                              behind a URL: what no process must be able to write again
<home>/quarantine/                                     artifacts that failed verification, never deleted by itself
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

from crosscal.errors import CorruptArtifact, MissingArtifact, StoreError
from crosscal.store.home import MANIFEST, Home, disk_errors
from crosscal.store.keys import digest_file, digest_of
from crosscal.store.local_home import LocalHome
from crosscal.store.refs import Refs
from crosscal.store.remote_home import RemoteHome
from crosscal.store.verification import Verified

FORMAT = 1
KEPT_KINDS = ("corpora",)
"""Documents may not be had again; everything else can be computed again."""
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_KEY = re.compile(r"[0-9a-f]{64}")
_DAMAGED = "Run `crosscal store verify --quarantine`, then the same command again: what is missing is made anew."


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
        """Whether anything was ever written here."""
        return any(self.home.names(place) for place in ("objects", "refs"))

    @contextmanager
    def publish(self, kind: str, key: str, provenance: Mapping[str, Any]) -> Iterator[Path]:
        """Give a folder to write files into; leaving the block without an exception publishes it.

        When the key exists already, or another process publishes it first, this copy is discarded: equal keys mean
        equal content. Raises `StoreFull` when the disk is full, and leaves nothing behind then.
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
        """The artifact, or None; `CorruptArtifact` when its manifest is damaged."""
        artifact = self._look(kind, key)
        if artifact:
            self.home.use(_place(kind, key))
        return artifact

    def get(self, kind: str, key: str) -> Artifact:
        """The artifact. Raises `MissingArtifact`, `CorruptArtifact`."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise MissingArtifact(
                "not in the store", where=f"{kind}/{key[:12]}", do=f"Is {self.location} the right CROSSCAL_HOME?"
            )
        return artifact

    def discard(self, kind: str, key: str) -> None:
        """Remove an artifact that nobody needs any more; it may be gone already."""
        self.home.remove(_place(kind, key))

    def is_kept(self, kind: str, key: str) -> bool:
        """Whether there is an artifact of this name; asking is no use of it."""
        return self.home.read(f"{_place(kind, key)}/{MANIFEST}") is not None

    def discard_unused(self, kind: str, key: str) -> bool:
        """Remove an artifact unless it was used since the first of the other processes now at work began; whether it
        was removed. An object store does not know: there it is removed."""
        place = _place(kind, key)
        is_dated = self.home.keeps_times and self.is_kept(kind, key)
        if is_dated and self.home.unused_since(place) >= self.home.in_use_since():
            return False
        self.home.remove(place)
        return True

    def path(self, artifact: Artifact, name: str) -> Path:
        """A local path to one file, its digest checked once per store object. Raises `CorruptArtifact`."""
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
        """Every readable artifact; damaged manifests are for `verify`."""
        for found_kind, key in self.keys(kind):
            try:
                artifact = self._look(found_kind, key)
            except StoreError:
                continue
            if artifact:
                yield artifact

    def keys(self, kind: str | None = None) -> Iterator[tuple[str, str]]:
        """(kind, key) of everything that is there, readable or not."""
        for found_kind in [kind] if kind else self.home.names("objects"):
            for key in self.home.names(f"objects/{found_kind}"):
                if _KIND.fullmatch(found_kind) and _KEY.fullmatch(key):
                    yield found_kind, key

    def verify(self, *, quarantine: bool = False, quick: bool = False) -> Iterator[tuple[str, str, str | None]]:
        """Read every byte of every artifact: yields (kind, key, problem or None). Damaged ones may be set aside.

        `quick`: not those that were read earlier and have not changed since, as far as the home can tell (see
        `verification`). A folder without a manifest is not an artifact: it may be on its way up to an object store.
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
        """Remove abandoned work in progress and, on request, artifacts unused for so long: yields (place, reason).

        Whatever has been used since the first of the processes now at work began stays, however few the days; so do
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
