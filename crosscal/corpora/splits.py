"""Which document is for training, which for validation, which for test: by document, decided once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

SPLITS = ("train", "validation", "test")
PRECEDENCE = (None, "train", "validation", "test")
"""A document that stands under several names goes to the last of these: evaluation stays clean."""

HELD_OUT_FRACTION = 0.05
MIN_DOCUMENTS_TO_CARVE = 3


def preferred(one: str | None, other: str | None) -> str | None:
    """The split of a document that was found in both."""
    return max(one, other, key=PRECEDENCE.index)


def assign(named: Mapping[bytes, str | None]) -> dict[bytes, str]:
    """digest → split for the documents of one shard, from digest → the split its file named (or None).

    Named splits are kept. A validation or test split that nothing names is carved out of the other documents: 5 %
    of them (at least one each, from three documents on), the first in the order of SHA-256("split" + digest). The
    outcome depends on the set of documents alone.
    """
    pool = sorted(
        (digest for digest, split in named.items() if split in (None, "train")),
        key=lambda digest: hashlib.sha256(b"split" + digest).digest(),
    )
    share = max(1, round(HELD_OUT_FRACTION * len(pool))) if len(pool) >= MIN_DOCUMENTS_TO_CARVE else 0
    splits = {digest: split or "train" for digest, split in named.items()}
    for split in ("test", "validation"):
        if split not in named.values():
            splits.update(dict.fromkeys(pool[:share], split))
            pool = pool[share:]
    return splits
