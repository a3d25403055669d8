"""Disk usage of the store: bytes by kind, by corpus version and by run, and what could be removed.

Artifacts made from documents (windows, moments, …) count to the corpus version that added these documents, if their
provenance leads back to exactly one version. Artifacts of no corpus (solved blocks, models, measurements) are only in
the kinds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crosscal.errors import StoreError
from crosscal.publication import Published
from crosscal.publication.run_folders import bytes_of, is_run_folder
from crosscal.store import Artifact, Store

Row = dict[str, Any]


def usage(store: Store, runs: Path | None = None, unused_days: float | None = None) -> dict[str, Any]:
    """Return `kinds`, `corpora`, `runs` (of that folder), `gc` (what `crosscal store gc` with these days would free),
    and `bytes` of all artifacts."""
    artifacts = list(store.list())
    kinds = Counter[str]()
    for artifact in artifacts:
        kinds[artifact.kind] += artifact.bytes
    counts = Counter(artifact.kind for artifact in artifacts)
    return {
        "bytes": kinds.total(),
        "kinds": [{"kind": kind, "artifacts": counts[kind], "bytes": size} for kind, size in kinds.most_common()],
        "corpora": _corpora(store, artifacts),
        "runs": [] if runs is None else _runs(store, runs),
        "gc": _freed(store, {f"objects/{each.kind}/{each.key}": each.bytes for each in artifacts}, unused_days),
    }


def _corpora(store: Store, artifacts: Iterable[Artifact]) -> list[Row]:
    """One row per version: bytes of its new documents, and of everything made from them."""
    came_with = _first_versions(store)
    made, documents = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    sources = _sources(store, artifacts)
    for artifact in artifacts:
        places = {came_with[shard] for shard in sources.get(artifact.key, ()) if shard in came_with}
        if artifact.kind == "corpora" and artifact.key in came_with:
            documents[came_with[artifact.key]] += artifact.bytes
        elif len(places) == 1:
            made[places.pop()] += artifact.bytes
    return [
        {"corpus": name, "version": version, "bytes": documents[name, version], "made_bytes": made[name, version]}
        for name, version in sorted(set(came_with.values()))
    ]


def _first_versions(store: Store) -> dict[str, tuple[str, int]]:
    """Map the key of each shard to the corpus and the first version that contains it."""
    found: dict[str, tuple[str, int]] = {}
    for ref in store.refs.names("corpora"):
        for version in store.refs.versions(ref):
            value = store.refs.read(ref, version)[1] or {}
            for shard in value.get("shards", ()):
                found.setdefault(shard["key"], (ref.removeprefix("corpora/"), version))
    return found


def _sources(store: Store, artifacts: Iterable[Artifact]) -> dict[str, list[str]]:
    """Map the key of each artifact to the shards whose documents it was made from."""
    found: dict[str, list[str]] = {}
    for artifact in artifacts:
        shards = [artifact.provenance["shard"]] if "shard" in artifact.provenance else artifact.provenance.get("shards")
        if isinstance(shards, list):
            found[artifact.key] = shards
            for key in _summed(store, artifact):
                found.setdefault(key, shards)
    for artifact in artifacts:
        if (windows := artifact.provenance.get("calibration")) in found:
            found.setdefault(artifact.key, found[windows])
    return found


def _summed(store: Store, artifact: Artifact) -> list[str]:
    """Return the keys of sums over several calibration sets: moments are stored under these keys, too."""
    if "pool.json" not in artifact.files:
        return []
    try:
        pool = json.loads(store.read_bytes(artifact, "pool.json"))
    except StoreError:
        return []
    return [part["key"] for part in pool.get("sums", ())]


def _runs(store: Store, runs: Path) -> list[Row]:
    """One row per run directory, largest first, with the domains whose published model comes from it."""
    published = Published(store)
    now = {domain: published.current(domain) for domain in published.domains()}
    found = [folder for folder in (runs.iterdir() if runs.is_dir() else ()) if is_run_folder(folder)]
    rows = [
        {
            "run": str(folder),
            "bytes": bytes_of(folder),
            "published": sorted(domain for domain, at in now.items() if at and _is_of(at.facts, folder)),
        }
        for folder in found
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _is_of(facts: Mapping[str, Any], folder: Path) -> bool:
    return Path(str(facts.get("run_dir"))).resolve() == folder.resolve()


def _freed(store: Store, sizes: Mapping[str, int], unused_days: float | None) -> list[Row]:
    """One row per reason for removal, with the number of places and bytes."""
    rows: dict[str, Row] = {}
    for place, reason in store.sweep(unused_days=unused_days, dry_run=True):
        row = rows.setdefault(reason, {"reason": reason, "places": 0, "bytes": 0})
        row["places"] += 1
        row["bytes"] += sizes[place] if place in sizes else _bytes_below(store, place)
    return list(rows.values())


def _bytes_below(store: Store, place: str) -> int:
    """Sum the sizes of the files below a place; a stamp ends with the file's size."""
    return sum(int(stamp.rpartition(" ")[2]) for stamp in store.home.stamps(place).values())
