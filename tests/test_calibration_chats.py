"""Conversations in windows: each whole and once if it fits, else cut between turns; one begin token per window."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from crosscal.calibration import WindowRequest
from crosscal.calibration.tokens import EncodedDocuments, chat_begin_token
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.evaluation import windows_of
from crosscal.store import Store
from tests.helpers.chat_windows import CHATS, LENGTH, Landing, accepted, by_transformers, drawn, land, rows_of
from tests.helpers.tiny_chats import TEMPLATES, chat_tokenizer
from tests.helpers.tiny_text import SENTENCES


@pytest.fixture
def landed(store: Store, tmp_path: Path) -> Landing:
    return functools.partial(land, store, tmp_path)


def units_in(window: list[int], units: list[list[int]], begin: int | None) -> tuple[list[int], list[int]]:
    """Return the indices of the units that a window contains whole, and the tokens after them."""
    found: list[int] = []
    if begin is not None and window[0] == begin and not any(unit[0] == begin for unit in units):
        window = window[1:]
    while window:
        fits = [place for place, unit in enumerate(units) if window[: len(unit)] == unit]
        if not fits:
            break
        found.append(fits[0])
        window = window[len(units[fits[0]]) :]
    return found, window


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_windows_hold_whole_conversations_once_and_begin_once(
    name: str, begin: bool, store: Store, landed: Landing
) -> None:
    tokenizer, corpus = chat_tokenizer(name, begin=begin), landed(rows_of(CHATS))
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    units = [by_transformers(tokenizer, accepted(name, chat)) for chat in CHATS]
    assert max(map(len, units)) < LENGTH
    first = chat_begin_token(tokenizer)
    assert (first is not None) == (begin or name in ("begin-once", "no-system", "generation"))
    seen: Counter[int] = Counter()
    repeated = 0
    for window in tokens_SL.tolist():
        whole, behind = units_in(window, units, first)
        seen.update(whole)
        assert not behind or any(unit[: len(behind)] == behind and len(unit) > len(behind) for unit in units)
        repeated += len(behind)
        if first is not None:
            assert window[0] == first != window[1]
            own = sum(unit.count(first) for unit in (*(units[place] for place in whole), behind))
            assert window.count(first) == own or window.count(first) == own + 1 == 1
    for left in pool.chat_rest:
        seen[units.index(list(left))] += 1
    assert seen == Counter(range(len(units)))
    assert repeated == pool.tokens_repeated
    assert pool.tokens_used == sum(map(len, units)) - pool.left.tokens
    pool, tokens_SL = drawn(store, corpus, tokenizer, WindowRequest(10_000, 4 * LENGTH))
    assert pool.tokens_repeated < 0.02 * tokens_SL.numel(), "with some to choose from windows are filled exactly"


def test_the_plan_decides_about_the_beginning_where_it_says_so(store: Store, landed: Landing) -> None:
    corpus, once, bare = landed(rows_of(CHATS)), chat_tokenizer("begin-once"), chat_tokenizer("turns", begin=False)
    without = drawn(store, corpus, once, WindowRequest(9, LENGTH, begin_token=False))[1]
    assert all(window[0] == 0 for window in without.tolist()), "what the template writes stays"
    assert chat_begin_token(bare) is None
    forced = drawn(store, corpus, bare, WindowRequest(9, LENGTH, begin_token=True))[1]
    assert all(window.count(0) == 1 and window[0] == 0 for window in forced.tolist())


def test_a_long_conversation_is_cut_between_turns_and_only_a_long_turn_in_itself(store: Store, landed: Landing) -> None:
    long = [{"role": role, "content": " ".join(SENTENCES[:count])} for count in (1, 2, 1) for role in ("user", "gpt")]
    huge = [{"role": "user", "content": " ".join(SENTENCES * 3)}, {"role": "assistant", "content": "So it is."}]
    corpus = landed(rows_of([long, huge]))
    tokenizer = chat_tokenizer("begin-once")
    for shard_chat in readings(store, corpus.shards[0], "train", TEMPLATE):
        (chat,) = EncodedDocuments(tokenizer, [shard_chat], 1)
        assert not isinstance(chat, list)
        turns = chat.by_turn()
        assert list(chain(*turns)) == chat.ids
        texts = [str(tokenizer.decode(turn)).removeprefix("<s>") for turn in turns]
        assert texts == [f"<pad>{turn['role']}\n{turn['content']}</s>\n" for turn in chat.turns]
    _, tokens_SL = drawn(store, corpus, tokenizer, WindowRequest(100, 64))
    opened = [str(tokenizer.decode(window[1:4])) for window in tokens_SL]
    assert sum(text.startswith("<pad>") for text in opened) >= len(opened) - 3  # some continue the long turn
    assert all(window[0] == 0 != window[1] for window in tokens_SL.tolist())


def test_what_landings_leave_is_pooled(store: Store, landed: Landing) -> None:
    """Conversations of several shards: each is in a window or among the conversations left over."""
    tokenizer = chat_tokenizer("begin-once")
    texts = [{"text": f"{number} {' '.join(SENTENCES[:3])}"} for number in range(10)]
    for batch in (CHATS[:30], CHATS[30:31], CHATS[31:33], CHATS[33:90]):
        corpus = landed([*rows_of(batch), *texts[: len(batch) % 7]])
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    assert drawn(store, corpus, tokenizer)[0] == pool
    found = [*tokens_SL.flatten().tolist(), *chain(pool.rest, *pool.chat_rest)]
    units = [by_transformers(tokenizer, chat) for chat in CHATS[:90]]
    assert all(f"user\n{number} " in tokenizer.decode(found) for number in range(90) if number % 3)
    assert found.count(2) >= sum(unit.count(2) for unit in units)


def test_keys_follow_what_changes_tokens(store: Store, landed: Landing) -> None:
    chat, text = landed(rows_of(CHATS)), landed([{"text": sentence} for sentence in SENTENCES * 3], "texts")
    cases = [(name, "template") for name in ("turns", "begin-once")] + [("turns", "text"), ("begin-once", "text")]
    keys = {
        (name, how, corpus.name): drawn(store, corpus, chat_tokenizer(name), WindowRequest(2, 32, chat=how))[0].key
        for name, how in cases
        for corpus in (chat, text)
    }
    assert len({keys[name, how, "chats"] for name, how in cases}) == 3, "as text no template matters"
    assert len({keys[name, how, "texts"] for name, how in cases}) == 1


def test_windows_without_what_only_the_template_writes_have_a_key_of_their_own(store: Store, landed: Landing) -> None:
    corpus, each = landed(rows_of(CHATS)), chat_tokenizer("begin-once", begin=False)
    usual, without = (drawn(store, corpus, each, WindowRequest(4, 32, begin_token=asked)) for asked in (None, False))
    assert (usual[1][:, 0] == 0).all()
    assert not (without[1][:, 0] == 0).all()
    assert usual[0].key != without[0].key
    bare = chat_tokenizer("turns", begin=False)
    alike = {drawn(store, corpus, bare, WindowRequest(4, 32, begin_token=asked))[0].key for asked in (None, False)}
    assert len(alike) == 1, "equal windows have one key"


def test_test_windows_are_made_the_same_way() -> None:
    tokenizer, found = chat_tokenizer("begin-once"), [Conversation(tuple(chat)) for chat in CHATS]
    tokens_SL = windows_of(found, tokenizer, LENGTH, 8)
    units = [by_transformers(tokenizer, chat) for chat in CHATS]
    assert tokens_SL.shape == (8, LENGTH)
    assert all(units_in(window, units, 0)[0] for window in tokens_SL.tolist())
