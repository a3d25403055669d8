"""The landing place, <landing>/<domain>/<file>, and detection of complete files.

A file is complete once `<file>.done` exists beside it (empty, or {"sha256": …, "bytes": …}, which is checked when the
file is read), or once it has not changed for `settle_seconds`. Names beginning with a dot, and *.part, *.tmp and
*.done, are ignored. Anything else that cannot be ingested becomes a `Refusal` with its reason; the sweep continues.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscal.corpora.corpus import ref_name
from crosscal.errors import UsageError
from crosscal.landing.items import LandedFile, LandingItem, LandingPlace, Refusal
from crosscal.landing.local_place import LocalPlace
from crosscal.landing.remote_place import RemotePlace

MARKER = ".done"
UNFINISHED = (".part", ".tmp", MARKER)
MARKER_BYTES = 4096
NAME_CHARACTERS = 200
MAKE_READABLE = "Put a file there that the worker's account can read."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_place(landing: str) -> LandingPlace:
    """Open a folder or fsspec URL as a landing place. Raises `UsageError` if it cannot be opened."""
    scheme, separator, path = landing.partition("://")
    if separator and scheme not in ("file", "local"):
        return RemotePlace(landing)
    return LocalPlace(Path(path if separator else landing))


def complete_files(landing: str | LandingPlace, settle_seconds: float) -> Iterator[LandedFile | Refusal]:
    """Yield every complete file of every domain, and a `Refusal` for each that cannot be ingested, ordered by name."""
    place = open_place(landing) if isinstance(landing, str) else landing
    for item in place.items():
        if item.name.startswith("."):
            continue
        problem, do = (item.problem, MAKE_READABLE) if item.problem else _domain_problem(item)
        if problem:
            yield refusal("", item.name, problem, do=do)
        else:
            yield from _of_domain(place, item.name, settle_seconds)


def _of_domain(place: LandingPlace, domain: str, settle_seconds: float) -> Iterator[LandedFile | Refusal]:
    items = list(place.items(domain))
    named = {item.name: item for item in items}
    for item in items:
        if item.name.startswith(".") or item.name.endswith(UNFINISHED):
            continue
        problem, do = (item.problem, MAKE_READABLE) if item.problem else _file_problem(item)
        marker = named.get(f"{item.name}{MARKER}")
        if problem:
            yield refusal(domain, item.name, problem, do=do)
        elif marker is not None:
            yield LandedFile(domain, item.name, item.bytes, item.modified, marker.bytes, marker.modified)
        elif item.modified is not None and time.time() - item.modified >= settle_seconds:
            yield LandedFile(domain, item.name, item.bytes, item.modified)


def refusal(domain: str, name: str, reason: str, signature: str = "", do: str = "") -> Refusal:
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return Refusal(domain, shown[:NAME_CHARACTERS], reason, signature, do)


def _domain_problem(item: LandingItem) -> tuple[str, str]:
    """Return (problem, remedy) of an entry that should be a domain's folder; empty strings if it is valid."""
    if not item.is_folder:
        return "not in a folder that names its domain", "Move it into one."
    try:
        ref_name(item.name)
    except UsageError:
        letters = "lower-case letters, digits, '.', '_' and '-', at most 64"
        return f"the folder's name is not a valid name of a corpus: {letters}", "Rename it."
    return "", ""


def _file_problem(item: LandingItem) -> tuple[str, str]:
    if item.is_folder:
        return "a folder within a domain's folder; only files directly in it are taken", "Move its files up."
    return ("", "") if item.name.isprintable() else ("an unprintable name", "Rename it.")


def promise_of(place: LandingPlace, file: LandedFile) -> dict[str, Any]:
    """Return `sha256` and `bytes` if the file's marker has them. Raises `ValueError` for a bad marker, `OSError`."""
    return _promise(place.read(f"{file.domain}/{file.name}{MARKER}", MARKER_BYTES)) if file.marker_bytes else {}


def _promise(content: bytes) -> dict[str, Any]:
    """Parse a marker; an empty one promises nothing. Raises `ValueError`."""
    if not content.strip():
        return {}
    try:
        promised = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(promised, dict) or not promised.keys() <= {"sha256", "bytes"}:
        raise ValueError('not {"sha256": …, "bytes": …}')
    sha256, size = promised.get("sha256"), promised.get("bytes")
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError("sha256 is not 64 hexadecimal digits")
    if size is not None and not (isinstance(size, int) and not isinstance(size, bool) and size >= 0):
        raise ValueError("bytes is not a whole number")
    return promised
