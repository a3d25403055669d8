"""Windows drawn from a growing corpus: shard by shard as it landed, what one leaves pooled into the next.

The stream of a shard is what the shards before it left, then its own documents, shuffled by the seed, each closed by
end-of-text. It is cut into windows, and into no more than

    max(windows of the plan - windows drawn so far, round(windows of the plan · characters_k / characters_1..k), 1)

so that every token enters until the plan's windows are drawn, and after that every landing by its share, one window at
least. A rest that fills no window is left for the next shard. Where the limit cuts a stream off, the text beyond it
has had its chance: it is not kept, and the windows stand for it with a weight, tokens of the stream / tokens drawn.
Everywhere else the weight is 1: every window of a corpus counts alike.

What a shard gave depends on the shards before it, in their order, and on the settings alone. It is kept under a key
that is known without drawing, so that a landing costs its own tokens.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
import dataclasses
import itertools
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.sets import WindowRequest, stored_windows
from crosscal.calibration.tokens import tokenize
from crosscal.corpora import Shard, documents
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "draws"
RULE = 2
RECENT = 32
"""Parts that a pool names: more than are ever kept apart."""
BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Part:
    """A calibration set, or the weighted sum of several: under which key its moments are kept."""

    key: str
    tokens: int
    """That the model reads for it."""
    weight: float = 1.0
    """Of every token in the sum over a corpus; the weights inside a sum are in the sum."""

    @property
    def mass(self) -> float:
        return self.weight * self.tokens

    def plus(self, other: Part) -> Part:
        """The sum of both, named after what it is the sum of."""
        pair = [[self.key, self.weight], [other.key, other.weight]]
        return Part(digest_of(["sum", *pair]), self.tokens + other.tokens)


@dataclass(frozen=True)
class Pool:
    """Where the draws from one split of a corpus stand after one of its shards."""

    key: str
    previous: str | None
    """The pool before this shard; None before the first."""
    parts: tuple[Part, ...] = ()
    """The newest sets, oldest first."""
    sums: tuple[Part, ...] = ()
    """For each of them, the sum of all sets up to it."""
    rest: tuple[int, ...] = ()
    """Tokens that fill no window yet."""
    windows: int = 0
    """Drawn so far, as all that follows."""
    characters: int = 0
    tokens_used: int = 0
    tokens_beyond: int = 0
    """Beyond the plan's windows; estimated from the characters of the documents that were not tokenized."""


def draw_pool(
    store: Store,
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
) -> Pool:
    """Draw from every shard that has not been drawn from; the pool after the last. Its `parts` may be empty.

    Raises `CalibrationError` when the tokenizer has no end-of-text token.
    """
    shards, keys = _chain(shards, tokenizer_digest, request)
    done = next((place for place in range(len(shards), 0, -1) if store.find(KIND, keys[place]) is not None), 0)
    pool = read_pool(store, keys[done]) if done else Pool(keys[0], None)
    for shard, key in zip(shards[done:], keys[done + 1 :], strict=True):
        pool = _after(store, pool, shard, tokenizer, tokenizer_digest, request, key)
        with store.publish(KIND, key, {"shard": shard.key, "split": request.split}) as folder:
            (folder / "pool.json").write_text(json.dumps(dataclasses.asdict(pool)))
    return pool


def find_pool(
    store: Store, shards: Sequence[Shard], tokenizer_digest: str, request: WindowRequest
) -> tuple[Pool | None, Sequence[Shard]]:
    """The newest pool of these shards that is kept, and the shards that have not been drawn from. Draws nothing."""
    shards, keys = _chain(shards, tokenizer_digest, request)
    done = next((place for place in range(len(shards), 0, -1) if store.find(KIND, keys[place]) is not None), 0)
    return (read_pool(store, keys[done]) if done else None), shards[done:]


def read_pool(store: Store, key: str) -> Pool:
    """Raises `MissingArtifact`."""
    value = json.loads(store.read_bytes(store.get(KIND, key), "pool.json"))
    parts, sums = (tuple(Part(**part) for part in value[name]) for name in ("parts", "sums"))
    return Pool(**{**value, "parts": parts, "sums": sums, "rest": tuple(value["rest"])})


def all_parts(store: Store, pool: Pool) -> list[Part]:
    """Every set that was ever drawn for a pool, oldest first: read back along its history."""
    found = {part.key: part for part in reversed(pool.parts)}
    while len(pool.parts) == RECENT and pool.previous is not None:
        pool = read_pool(store, pool.previous)
        found |= {part.key: part for part in reversed(pool.parts) if part.key not in found}
    return list(found.values())[::-1]


def most_windows(request: WindowRequest, drawn: int, characters: int, characters_so_far: int) -> int:
    """How many windows a shard may give; `characters_so_far` counts its own."""
    share = characters / characters_so_far if characters_so_far else 0.0
    return max(request.windows - drawn, round(request.windows * share), 1)


def _chain(shards: Sequence[Shard], tokenizer_digest: str, request: WindowRequest) -> tuple[list[Shard], list[str]]:
    """Shards that have documents of the split, and the keys of the pools before the first and after each of them."""
    shards = [shard for shard in shards if shard.documents.get(request.split)]
    settings = digest_of([RULE, tokenizer_digest, dataclasses.asdict(request)])
    own = (shard.key for shard in shards)
    keys = itertools.accumulate(own, lambda before, key: digest_of([before, key]), initial=settings)
    return shards, list(keys)


def _after(
    store: Store,
    before: Pool,
    shard: Shard,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    key: str,
) -> Pool:
    mine = shard.characters[request.split]
    characters = before.characters + mine
    most = most_windows(request, before.windows, mine, characters)
    stream = _Stream(store, shard, tokenizer, request)
    windows, rest = _take(itertools.chain([before.rest], stream), request.length, most)
    total = len(before.rest) + round(stream.tokens * mine / max(stream.characters, 1))
    used = len(windows) * request.length if rest is None else total - len(rest)
    pool = dataclasses.replace(
        before,
        key=key,
        previous=before.key if before.characters else None,
        rest=() if rest is None else tuple(rest),
        windows=before.windows + len(windows),
        characters=characters,
        tokens_used=before.tokens_used + used,
        tokens_beyond=before.tokens_beyond + (total - used if rest is None else 0),
    )
    if not windows:
        return pool
    provenance: dict[str, Any] = {
        "source": "documents",
        "rule": 1,
        "shard": shard.key,
        "split": request.split,
        "tokenizer": tokenizer_digest,
        "windows": most,
        "length": request.length,
        "seed": request.seed,
        **({"rest": digest_of(before.rest)} if before.rest else {}),
    }
    tokens_SL = stored_windows(store, provenance, lambda: torch.from_numpy(np.stack(windows)))
    part = Part(digest_of(provenance), tokens_SL.numel(), 1.0 if rest is not None else total / used)
    whole = before.sums[-1].plus(part) if before.sums else part
    return dataclasses.replace(pool, parts=(*before.parts, part)[-RECENT:], sums=(*before.sums, whole)[-RECENT:])


class _Stream:
    """The tokens of a shard's documents in the seed's order, and how much has been asked for."""

    def __init__(self, store: Store, shard: Shard, tokenizer: PreTrainedTokenizerBase, request: WindowRequest) -> None:
        order = np.random.Generator(np.random.PCG64(request.seed)).permutation(shard.documents[request.split])
        self._texts, self._tokenizer = documents(store, shard, request.split, order.tolist()), tokenizer
        self.tokens = self.characters = 0

    def __iter__(self) -> Iterator[list[int]]:
        while batch := list(itertools.islice(self._texts, BATCH_DOCUMENTS)):
            for text, ids in zip(batch, tokenize(self._tokenizer, batch), strict=True):
                self.tokens += len(ids)
                self.characters += len(text)
                yield ids


def _take(stream: Iterable[Sequence[int]], length: int, most: int) -> tuple[list[np.ndarray], list[int] | None]:
    """At most so many windows, and what is left of the stream; None where it would have filled one window more."""
    windows: list[np.ndarray] = []
    cutting = cut(stream, length)
    while True:
        try:
            window = next(cutting)
        except StopIteration as end:
            return windows, end.value.tolist()
        if len(windows) == most:
            return windows, None
        windows.append(window)


def cut(stream: Iterable[Sequence[int]], length: int) -> Generator[np.ndarray, None, np.ndarray]:
    """Windows of `length` tokens out of joined documents, as far as they fill one; returns the rest."""
    rest = np.empty(0, dtype=np.int64)
    for ids in stream:
        rest = np.concatenate([rest, np.array(ids, dtype=np.int64)])
        whole = len(rest) // length
        yield from rest[: whole * length].reshape(whole, length)
        rest = rest[whole * length :]
    return rest
