"""Windows drawn from a growing corpus: shard by shard as it landed, what one leaves pooled into the next.

The stream of a shard is what the shards before it left, then its own documents, shuffled by the seed, each closed by
end-of-text. It is cut into windows that begin as the tokenizer's texts do (see `calibration.cutting`); conversations
are rendered and share windows of their own (see `calibration.packing`). There are no more than

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
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.chats import template_settings
from crosscal.calibration.packing import Rest, Window, fill
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
"""Parts that a pool names: more than are ever kept apart."""


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
    spelling: int = 0
    """Documents whose text spells a special token that was read as one."""
    chat_rest: tuple[tuple[int, ...], ...] = ()
    """Conversations that fill no window yet."""
    tokens_repeated: int = 0
    """At the ends of windows of conversations, that come again (see `calibration.packing`)."""
    said: dict[str, int] = dataclasses.field(default_factory=dict)
    """Sentence about some conversations → of how many it is true."""

    @property
    def left(self) -> Rest:
        return Rest(self.rest, self.chat_rest)


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
    """The newest pool of these shards that is kept, and the shards that have not been drawn from. Draws nothing."""
    shards, keys = _chain(shards, tokenizer, tokenizer_digest, request)
    done = next((place for place in range(len(shards), 0, -1) if store.find(KIND, keys[place]) is not None), 0)
    return (read_pool(store, keys[done]) if done else None), shards[done:]


def read_pool(store: Store, key: str) -> Pool:
    """Raises `MissingArtifact`."""
    value = json.loads(store.read_bytes(store.get(KIND, key), "pool.json"))
    parts, sums = (tuple(Part(**part) for part in value[name]) for name in ("parts", "sums"))
    chats = tuple(map(tuple, value.get("chat_rest", ())))
    return Pool(**{**value, "parts": parts, "sums": sums, "rest": tuple(value["rest"]), "chat_rest": chats})


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


def _chain(
    shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase, tokenizer_digest: str, request: WindowRequest
) -> tuple[list[Shard], list[str]]:
    """Shards that have documents of the split, and the keys of the pools before the first and after each of them."""
    shards = [shard for shard in shards if shard.documents.get(request.split)]
    begin = begin_token(tokenizer, request.begin_token)
    settings = digest_of([RULE, tokenizer_digest, request.provenance(begin)])
    chats = {"chat": _chat_settings(tokenizer, request)}
    own = (digest_of([shard.key, chats]) if _has_chats(shard, request) else shard.key for shard in shards)
    keys = itertools.accumulate(own, lambda before, key: digest_of([before, key]), initial=settings)
    return shards, list(keys)


def _has_chats(shard: Shard, request: WindowRequest) -> bool:
    return bool(shard.conversations.get(request.split))


def _chat_settings(tokenizer: PreTrainedTokenizerBase, request: WindowRequest) -> str:
    return PLAIN if request.chat == PLAIN else template_settings(tokenizer)


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
        **({"chat": _chat_settings(tokenizer, request)} if has_chats else {}),
        **({"chat_rest": digest_of(before.chat_rest)} if before.chat_rest else {}),
    }
    tokens = (window.tokens_L for window in windows)
    tokens_SL = stored_windows(store, provenance, lambda: torch.from_numpy(np.stack(list(tokens))).long())
    part = Part(digest_of(provenance), tokens_SL.numel(), 1.0 if rest is not None else total / used)
    whole = before.sums[-1].plus(part) if before.sums else part
    return dataclasses.replace(pool, parts=(*before.parts, part)[-RECENT:], sums=(*before.sums, whole)[-RECENT:])


def _take(filling: Generator[Window, None, Rest], most: int) -> tuple[list[Window], Rest | None]:
    """At most so many windows, and what is left of the stream; None where it would have filled one window more."""
    windows: list[Window] = []
    while True:
        try:
            window = next(filling)
        except StopIteration as end:
            return windows, end.value
        if len(windows) == most:
            return windows, None
        windows.append(window)
