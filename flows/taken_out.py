"""Find what the store still holds of documents that were taken out of their corpora: text, tokens, sums over tokens.

The store's own records suffice: the newest version of a corpus lists the replaced shards, and every artifact made from
a shard names that shard or the corpus digest. A pool of windows passes leftover text on to the next pool. So every pool
after a replaced shard counts, and every calibration set that begins with leftover text, unless a pool without these
documents contains it too. An artifact that is needed again is recomputed.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from crosscal.calibration.pool import KIND as POOLS
from crosscal.calibration.pool import Pool, read_pool
from crosscal.calibration.sets import KIND as SETS
from crosscal.corpora import Corpus
from crosscal.corpora.corpus import corpus_of
from crosscal.corpora.splits import SPLITS
from crosscal.selection.choosing import KIND as SELECTIONS
from crosscal.stages.continuation import question_key
from crosscal.store import Artifact, Store, digest_of

SUMS = ("moments", "gradients", "likelihoods")


def taken_out(store: Store) -> Iterator[tuple[str, str]]:
    """Yield (kind, key) of every artifact that was made from a replaced shard, including these shards."""
    newest = {name.partition("/")[2]: store.refs.read(name) for name in store.refs.names("corpora")}
    replaced = {key for _, record in newest.values() if record for key in record.get("replaced", ())}
    if not replaced:
        return
    corpora = [corpus_of(name, version, record) for name, (version, record) in newest.items() if record]
    chosen = {artifact.key: _shard_of(store, artifact) for artifact in store.list(SELECTIONS)}
    current = {s.key for corpus in corpora for s in corpus.shards if s.key not in chosen.values()}
    doomed = _Doomed(store, replaced - current)
    yield from (("corpora", key) for key in doomed.shards)
    for kind, is_made_of in doomed.rules.items():
        for artifact in store.list(kind):
            if is_made_of(artifact):
                yield kind, artifact.key
                if kind == SELECTIONS and chosen[artifact.key] not in current:
                    yield "corpora", chosen[artifact.key]


def discard_taken_out(store: Store, *, dry_run: bool = False) -> Iterator[tuple[str, str]]:
    """Remove these artifacts; yield (place, reason). Those another running process may use stay until the next call."""
    for kind, key in list(taken_out(store)):
        if store.is_kept(kind, key) and (dry_run or store.discard_unused(kind, key)):
            yield f"objects/{kind}/{key}", "made of documents that were taken out"


class _Doomed:
    """Everything in the store that depends on the replaced shards."""

    def __init__(self, store: Store, shards: set[str]) -> None:
        self.store, self.shards = store, shards
        self.rules = {
            POOLS: lambda artifact: artifact.key in self.pools,
            SETS: lambda artifact: artifact.key in self.sets,
            "generations": self._continues,
            "questions": self._asks,
            "overlaps": lambda artifact: bool(self.digests & set(artifact.provenance["corpora"].values())),
            SELECTIONS: self._chose,
            **dict.fromkeys(SUMS, lambda artifact: artifact.provenance.get("calibration") in self.summed),
        }

    @functools.cached_property
    def versions(self) -> list[Corpus]:
        """Corpus versions that contain a replaced shard."""
        refs, found = self.store.refs, []
        for name in refs.names("corpora"):
            for version in refs.versions(name) if (refs.read(name)[1] or {}).get("replaced") else ():
                record = refs.read(name, version)[1]
                if record and any(shard["key"] in self.shards for shard in record["shards"]):
                    found.append(corpus_of(name.partition("/")[2], version, record))
        return found

    @functools.cached_property
    def digests(self) -> set[str]:
        return {corpus.digest for corpus in self.versions}

    @functools.cached_property
    def seeds(self) -> set[str]:
        """Digests by which provenances name the documents of a split that a model continued."""
        pairs = itertools.product(self.versions, SPLITS)
        return {digest_of([s.key for s in corpus.shards if s.documents.get(split)]) for corpus, split in pairs}

    @functools.cached_property
    def _all_pools(self) -> dict[str, tuple[Artifact, Pool]]:
        return {artifact.key: (artifact, read_pool(self.store, artifact.key)) for artifact in self.store.list(POOLS)}

    @functools.cached_property
    def pools(self) -> set[str]:
        """Pools of a replaced shard and all after them, and pools whose predecessor is no longer known."""
        is_doomed: dict[str, bool] = {}
        for key in self._all_pools:
            way = []
            while key is not None and key not in is_doomed:
                artifact, pool = self._all_pools.get(key, (None, None))
                if artifact is None or pool is None or artifact.provenance["shard"] in self.shards:
                    is_doomed[key] = True
                    break
                way.append(key)
                key = pool.previous
            is_doomed |= dict.fromkeys(way, key is not None and is_doomed[key])
        return {key for key, doomed in is_doomed.items() if doomed}

    def _named(self, what: str, *, by_doomed: bool) -> set[str]:
        pools = (pool for key, (_, pool) in self._all_pools.items() if (key in self.pools) == by_doomed)
        return {part.key for pool in pools for part in getattr(pool, what)}

    @functools.cached_property
    def sets(self) -> set[str]:
        """Calibration sets with their text, and sets joined from others that are not all known to be clean."""
        said = {artifact.key: artifact.provenance for artifact in self.store.list(SETS)}
        clean = self._named("parts", by_doomed=False)
        found = {key for key in said if key not in clean and self._is_text_of_them(said[key])}
        kept = (said.keys() - found) | clean
        return found | {key for key in said if not kept >= set(said[key].get("sets", ()))}

    @functools.cached_property
    def summed(self) -> set[str]:
        """Keys of calibration sets, and of sums of several, under which moments are stored."""
        return self.sets | (self._named("sums", by_doomed=True) - self._named("sums", by_doomed=False))

    def _is_text_of_them(self, said: dict[str, Any]) -> bool:
        if said["source"] == "documents":
            return said["shard"] in self.shards or "rest" in said or "chat_rest" in said
        return bool(self.shards & set(said.get("shards", ()))) or said.get("seeds") in self.seeds

    def _continues(self, artifact: Artifact) -> bool:
        return artifact.provenance.get("seeds") in self.seeds

    def _asks(self, artifact: Artifact) -> bool:
        said = {name: value for name, value in artifact.provenance.items() if name not in ("corpus", "version")}
        split = said.pop("split")
        return artifact.key in {question_key(digest, split, said) for digest in self.digests}

    def _chose(self, artifact: Artifact) -> bool:
        said = artifact.provenance
        return {said["pool"], said["sample"]} & self.digests != set() or bool(self.shards & set(said["held_out"]))


def _shard_of(store: Store, selection: Artifact) -> str:
    return json.loads(store.read_bytes(selection, "selection.json"))["shard"]["key"]
