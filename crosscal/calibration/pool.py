"""Windows drawn from a growing corpus, shard by shard; tokens left over from one shard are passed on to the next.

The stream of a shard is the tokens left over from the shards before it, then its own documents, shuffled by the seed,
each closed by end-of-text. It is cut into windows that begin like the tokenizer's own texts (see
`calibration.cutting`); conversations are rendered and packed into separate windows (see `calibration.packing`). At most

    max(windows of the plan - windows drawn so far, round(windows of the plan · characters_k / characters_1..k), 1)

windows are drawn from shard k: every token is used until the plan's windows are drawn; after that every landing gives
its share, at least one window. Tokens that do not fill a window are left for the next shard. If the limit cuts a stream
off, the text beyond it is discarded, and the drawn windows represent it with a weight, tokens of the stream / tokens
drawn. Everywhere else the weight is 1: every window of a corpus counts equally.

The draw from a shard depends only on the shards before it, in order, and on the settings. It is stored under a key
that is known without drawing, so that a landing costs only its own tokens.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.chats import template_settings
from crosscal.calibration.packing import Remainder, Window, fill
from crosscal.calibration.sets import WindowRequest, stored_windows
from crosscal.calibration.tokens import EncodedDocuments, begin_token, chat_begin_token, end_token
from crosscal.corpora import Shard
from crosscal.corpora.corpus import PLAIN, readings
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "draws"
RULE = 2
RECENT = 32
"""Number of parts listed in a pool: more than ever have their moments stored separately."""


@dataclass(frozen=True)
class PoolPart:
    """A calibration set, or the weighted sum of several, and the key of its moments."""

    key: str
    tokens: int
    """Tokens in its calibration passes."""
    weight: float = 1.0
    """Weight of its tokens in the sum over a corpus. A sum already includes the weights of the sets in it."""

    @property
    def mass(self) -> float:
        return self.weight * self.tokens

    def plus(self, other: PoolPart) -> PoolPart:
        """Return the sum of both; its key is derived from their keys and weights."""
        pair = [[self.key, self.weight], [other.key, other.weight]]
        return PoolPart(digest_of(["sum", *pair]), self.tokens + other.tokens)


@dataclass(frozen=True)
class Pool:
    """State of the draws from one split of a corpus after one of its shards."""

    key: str
    previous: str | None
    """Key of the pool before this shard; None if it is the first shard."""
    parts: tuple[PoolPart, ...] = ()
    """The newest sets, oldest first."""
    sums: tuple[PoolPart, ...] = ()
    """For each of `parts`, the sum of all sets up to it."""
    rest: tuple[int, ...] = ()
    """Tokens of texts that do not fill a window yet."""
    windows: int = 0
    """Windows drawn so far; the counts below are cumulative, too."""
    characters: int = 0
    tokens_used: int = 0
    tokens_beyond: int = 0
    """Tokens beyond the limit, discarded; estimated from characters for documents that were not tokenized."""
    spelling: int = 0
    """Documents whose text spells a special token that was tokenized as one."""
    chat_rest: tuple[tuple[int, ...], ...] = ()
    """Conversations that do not fill a window yet."""
    tokens_repeated: int = 0
    """Tokens at the ends of conversation windows that appear again later (see `calibration.packing`)."""
    said: dict[str, int] = dataclasses.field(default_factory=dict)
    """Statement about some conversations → number of conversations it applies to."""

    @property
    def left(self) -> Remainder:
        return Remainder(self.rest, self.chat_rest)


def draw_pool(
    store: Store,
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
) -> Pool:
    """Draw from every shard that has not been drawn from; return the pool after the last. Its `parts` may be empty.

    Raises `CalibrationError` if the tokenizer has no end-of-text token.
    """
    shards, keys = _chain(shards, tokenizer, tokenizer_digest, request)
    done = next((place for place in range(len(shards), 0, -1) if store.find(KIND, keys[place]) is not None), 0)
    pool = read_pool(store, keys[done]) if done else Pool(keys[0], None)
    for shard, key in zip(shards[done:], keys[done + 1 :], strict=True):
        pool = _after(store, pool, shard, tokenizer, tokenizer_digest, request, key)
        with store.publish(KIND, key, {"shard": shard.key, "split": request.split}) as folder:
            (folder / "pool.json").write_text(json.dumps(dataclasses.asdict(pool)))
    return pool


def find_pool(
    store: Store,
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
) -> tuple[Pool | None, Sequence[Shard]]:
    """Return the newest stored pool of these shards, and the shards not drawn from yet. Draws nothing."""
    shards, keys = _chain(shards, tokenizer, tokenizer_digest, request)
    done = next((place for place in range(len(shards), 0, -1) if store.find(KIND, keys[place]) is not None), 0)
    return (read_pool(store, keys[done]) if done else None), shards[done:]


def read_pool(store: Store, key: str) -> Pool:
    """Read a pool from the store. Raises `MissingArtifact`."""
    value = json.loads(store.read_bytes(store.get(KIND, key), "pool.json"))
    parts, sums = (tuple(PoolPart(**part) for part in value[name]) for name in ("parts", "sums"))
    chats = tuple(map(tuple, value.get("chat_rest", ())))
    return Pool(**{**value, "parts": parts, "sums": sums, "rest": tuple(value["rest"]), "chat_rest": chats})


def all_parts(store: Store, pool: Pool) -> list[PoolPart]:
    """Return every set ever drawn for a pool, oldest first, by following `previous`."""
    found = {part.key: part for part in reversed(pool.parts)}
    while len(pool.parts) == RECENT and pool.previous is not None:
        pool = read_pool(store, pool.previous)
        found |= {part.key: part for part in reversed(pool.parts) if part.key not in found}
    return list(found.values())[::-1]


def most_windows(request: WindowRequest, drawn: int, characters: int, characters_so_far: int) -> int:
    """Return the maximum number of windows drawn from a shard; `characters_so_far` includes its own."""
    share = characters / characters_so_far if characters_so_far else 0.0
    return max(request.windows - drawn, round(request.windows * share), 1)


def _chain(
    shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase, tokenizer_digest: str, request: WindowRequest
) -> tuple[list[Shard], list[str]]:
    """Return the shards with documents of the split, and the keys of the pools before the first and after each one."""
    shards = [shard for shard in shards if shard.documents.get(request.split)]
    begin = begin_token(tokenizer, request.begin_token)
    settings = digest_of([RULE, tokenizer_digest, request.provenance(begin)])
    chats = _chat_entries(tokenizer, request)
    own = (digest_of([shard.key, chats]) if _has_chats(shard, request) else shard.key for shard in shards)
    keys = itertools.accumulate(own, lambda before, key: digest_of([before, key]), initial=settings)
    return shards, list(keys)


def _has_chats(shard: Shard, request: WindowRequest) -> bool:
    return bool(shard.conversations.get(request.split))


def _chat_entries(tokenizer: PreTrainedTokenizerBase, request: WindowRequest) -> dict[str, Any]:
    """Return the entries of a provenance that describe how conversations are read.

    Their begin token follows from that of texts, except where `begin_token: false` leaves out one that only the
    template writes. It is given only then, so that all other windows keep their keys.
    """
    if request.chat == PLAIN:
        return {"chat": PLAIN}
    is_left_out = (
        request.begin_token is False and begin_token(tokenizer) is None and chat_begin_token(tokenizer) is not None
    )
    return {"chat": template_settings(tokenizer)} | ({"chat_begin": None} if is_left_out else {})


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
    order = np.random.Generator(np.random.PCG64(request.seed)).permutation(shard.documents[request.split])
    found = readings(store, shard, request.split, request.chat, order.tolist())
    stream = EncodedDocuments(tokenizer, found, end_token(tokenizer), plain_text=request.plain_text)
    begin, has_chats = begin_token(tokenizer, request.begin_token), _has_chats(shard, request) or before.chat_rest
    chat_begin = chat_begin_token(tokenizer, request.begin_token) if has_chats else None
    windows, rest = _take(fill(stream, request.length, begin, chat_begin, before.left, most), most)
    total = before.left.tokens + round(stream.tokens * mine / max(stream.characters, 1))
    used = sum(window.taken for window in windows) if rest is None else total - rest.tokens
    pool = dataclasses.replace(
        before,
        key=key,
        previous=before.key if before.characters else None,
        rest=() if rest is None else rest.text,
        chat_rest=() if rest is None else rest.chats,
        windows=before.windows + len(windows),
        characters=characters,
        tokens_used=before.tokens_used + used,
        tokens_beyond=before.tokens_beyond + (total - used if rest is None else 0),
        tokens_repeated=before.tokens_repeated + sum(window.repeated for window in windows),
        spelling=before.spelling + stream.spelling,
        said=dict(Counter(before.said) + Counter(stream.said)),
    )
    if not windows:
        return pool
    provenance: dict[str, Any] = {
        "source": "documents",
        "rule": 1,
        "shard": shard.key,
        "tokenizer": tokenizer_digest,
        **dataclasses.replace(request, windows=most).provenance(begin),
        **({"rest": digest_of(before.rest)} if before.rest else {}),
        **(_chat_entries(tokenizer, request) if has_chats else {}),
        **({"chat_rest": digest_of(before.chat_rest)} if before.chat_rest else {}),
    }
    tokens = (window.tokens_L for window in windows)
    tokens_SL = stored_windows(store, provenance, lambda: torch.from_numpy(np.stack(list(tokens))).long())
    part = PoolPart(digest_of(provenance), tokens_SL.numel(), 1.0 if rest is not None else total / used)
    whole = before.sums[-1].plus(part) if before.sums else part
    return dataclasses.replace(pool, parts=(*before.parts, part)[-RECENT:], sums=(*before.sums, whole)[-RECENT:])


def _take(filling: Generator[Window, None, Remainder], most: int) -> tuple[list[Window], Remainder | None]:
    """Return at most `most` windows and the rest of the stream, or None for the rest if another window follows."""
    windows: list[Window] = []
    while True:
        try:
            window = next(filling)
        except StopIteration as end:
            return windows, end.value
        if len(windows) == most:
            return windows, None
        windows.append(window)
