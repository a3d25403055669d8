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


def assign(named: Mapping[bytes, str | None], earlier: Mapping[str, int] | None = None) -> dict[bytes, str]:
    """digest → split for the documents of one shard, from digest → the split its file named (or None).

    Named splits are kept. A validation or test split that nothing here names is carved out of the other documents,
    the first in the order of SHA-256("split" + digest), until the corpus has 5 % of its documents in it (at least one,
    from three documents on). `earlier`: how many documents of each split the corpus has already, so that as many are
    carved whether they land one by one or together; which ones depends on the documents that landed together alone.
    """
    earlier = earlier or {}
    pool = sorted(
        (digest for digest, split in named.items() if split in (None, "train")),
        key=lambda digest: hashlib.sha256(b"split" + digest).digest(),
    )
    documents = sum(earlier.values()) + len(pool)
    wanted = max(1, round(HELD_OUT_FRACTION * documents)) if documents >= MIN_DOCUMENTS_TO_CARVE else 0
    splits = {digest: split or "train" for digest, split in named.items()}
    for split in ("test", "validation"):
        if split not in named.values():
            missing = max(0, wanted - earlier.get(split, 0))
            splits.update(dict.fromkeys(pool[:missing], split))
            pool = pool[missing:]
    return splits
