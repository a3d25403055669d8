"""Look up which documents a corpus already contains, without reading every earlier shard.

Let lowbit(n) be the largest power of two that divides n. For every n with lowbit(n) > 1, an artifact of kind `digests`
holds the sorted digests of the shards n - lowbit(n) + 1 … n. A lookup in a corpus of n shards reads at most log2(n) + 1
indexes. Missing artifacts are built from the shards, so they can be deleted safely.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from crosscal.corpora.corpus import Shard, digests
from crosscal.corpora.splits import SPLITS
from crosscal.store import Store, digest_of

FORMAT = 1
KIND = "digests"
_FILE = "digests.arrow"
_SCHEMA = pa.schema([("digest", pa.binary(32)), ("split", pa.int8())])
_WIDTH = "S32"  # exact comparison: numpy drops trailing zero bytes, and pads with zeros to compare

Index = tuple[np.ndarray, np.ndarray]
"""digest_N (sorted), split_N (indices into `SPLITS`)."""


def known_splits(store: Store, shards: Sequence[Shard], asked: Collection[bytes]) -> dict[bytes, str]:
    """Return digest → split for those of the `asked` digests that are in one of the shards."""
    asked_D = np.array(sorted(asked), _WIDTH)
    found: dict[bytes, str] = {}
    for first, last in _parts(0, len(shards)):
        digest_N, split_N = _index(store, shards[first:last])
        at_D = np.searchsorted(digest_N, asked_D)
        at_D = np.minimum(at_D, len(digest_N) - 1)
        hits = np.flatnonzero(digest_N[at_D] == asked_D) if len(digest_N) else ()
        found |= {bytes(asked_D[hit]).ljust(32, b"\0"): SPLITS[split_N[at_D[hit]]] for hit in hits}
    return found


def _parts(first: int, last: int) -> list[tuple[int, int]]:
    """Cut the range [first, last) at last, last - lowbit(last), … down to `first`; return (begin, end) pairs."""
    parts = []
    while last > first:
        before = last & (last - 1)
        parts.append((before, last))
        last = before
    return parts


def _index(store: Store, shards: Sequence[Shard]) -> Index:
    """Return the index of `shards`, which are the shards n - lowbit(n) + 1 … n of a corpus."""
    if len(shards) == 1:
        return _of_shard(store, shards[0])
    key = digest_of([FORMAT, [shard.key for shard in shards]])
    artifact = store.find(KIND, key)
    if artifact is None:
        # The last shard alone; the shards before it in the parts of a corpus that ended with them.
        cuts = [*_parts(0, len(shards) - 1), (len(shards) - 1, len(shards))]
        parts = [_index(store, shards[before:after]) for before, after in cuts]
        with store.publish(KIND, key, {"shards": len(shards)}) as folder:
            _write(folder / _FILE, _merged(parts))
        artifact = store.get(KIND, key)
    return _read(store.path(artifact, _FILE))


def _of_shard(store: Store, shard: Shard) -> Index:
    splits = digests(store, shard)
    digest_N = np.array(list(splits), _WIDTH)
    split_N = np.array([SPLITS.index(split) for split in splits.values()], np.int8)
    return _merged([(digest_N, split_N)])


def _merged(parts: Sequence[Index]) -> Index:
    digest_N, split_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    order_N = np.argsort(digest_N, kind="stable")
    return digest_N[order_N], split_N[order_N]


def _write(path: Path, index: Index) -> None:
    digest_N, split_N = index
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(digest_N), [None, pa.py_buffer(digest_N.tobytes())]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([column, pa.array(split_N)], schema=_SCHEMA))


def _read(path: Path) -> Index:
    """Memory-map the index: a lookup touches few of its pages."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    digest_N = np.frombuffer(batch.column(0).buffers()[1], _WIDTH, len(batch))
    return digest_N, batch.column(1).to_numpy()
