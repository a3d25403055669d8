"""Splits: each document is assigned once to train, validation or test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

SPLITS = ("train", "validation", "test")
PRECEDENCE = (None, "train", "validation", "test")
"""A document found under several splits goes to the last of them, so that evaluation splits stay clean."""

HELD_OUT_FRACTION = 0.05
MIN_DOCUMENTS_TO_CARVE = 3


def preferred(one: str | None, other: str | None) -> str | None:
    """Return the split of a document that was found in both."""
    return max(one, other, key=PRECEDENCE.index)


def assign(named: Mapping[bytes, str | None], earlier: Mapping[str, int] | None = None) -> dict[bytes, str]:
    """Return digest → split for the documents of one shard, from digest → the split its file named (or None).

    Named validation and test splits are kept. If no document here names one of them, it is carved out of the other
    documents (train or unnamed), the first in the order of SHA-256("split" + digest), until it has 5 % of the corpus's
    documents (at least one, from three documents on). `earlier` is the number of documents of each split already in the
    corpus, so that the number carved is the same whether documents land one by one or together. Which documents are
    carved depends only on those that landed together.
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
