"""Chat templates: conversations are rendered as by transformers; what templates refuse or turns spell is counted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.calibration import WindowRequest
from crosscal.calibration.chats import TODAY, check_template, without_system
from crosscal.calibration.tokens import EncodedDocuments
from crosscal.corpora import documents
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.errors import CalibrationError
from crosscal.store import Store
from tests.helpers.chat_windows import CHATS, LENGTH, Landing, accepted, by_transformers, drawn, land, rows_of
from tests.helpers.tiny_chats import TEMPLATES, chat_tokenizer


@pytest.fixture
def landed(store: Store, tmp_path: Path) -> Landing:
    return functools.partial(land, store, tmp_path)


@pytest.mark.parametrize("plain_text", [False, True])
def test_one_corpus_serves_every_template(plain_text: bool, store: Store, landed: Landing) -> None:
    (shard,) = landed(rows_of(CHATS)).shards
    for name in TEMPLATES:
        tokenizer = chat_tokenizer(name)
        encoded = EncodedDocuments(tokenizer, readings(store, shard, "train", TEMPLATE), 1, plain_text=plain_text)
        expected = [by_transformers(tokenizer, accepted(name, chat)) for chat in CHATS]
        found = [chat.ids for chat in encoded if not isinstance(chat, list)]
        assert sorted(found) == sorted(expected), name
        assert encoded.tokens == sum(map(len, found))
        assert list(encoded.said.values()) == ([40] if name == "no-system" else [])
        assert encoded.spelling == 0


def test_as_text_a_conversation_is_what_its_turns_say(store: Store, landed: Landing) -> None:
    corpus, bare = landed(rows_of(CHATS)), chat_tokenizer(None)
    texts = list(documents(store, corpus.shards[0], "train"))
    assert sorted(texts) == sorted("\n\n".join(turn["content"] for turn in chat) for chat in CHATS)
    request = WindowRequest(10_000, 64, chat="text")
    pool, tokens_SL = drawn(store, corpus, bare, request)
    assert torch.equal(tokens_SL, drawn(store, corpus, chat_tokenizer("begin-once"), request)[1])
    assert (tokens_SL == 1).sum() + pool.rest.count(1) == len(CHATS), "each is closed by end-of-text, as texts are"


def test_a_model_without_a_template_is_refused_with_the_remedy(store: Store, landed: Landing) -> None:
    corpus = landed(rows_of(CHATS))
    with pytest.raises(CalibrationError, match=r"corpora\.chats: .*no chat template.*Set `chat: text`"):
        check_template(chat_tokenizer(None), "chats")
    check_template(chat_tokenizer("turns"), "chats")
    pool, _ = drawn(store, corpus, chat_tokenizer(None), WindowRequest(9, 64, chat="text"))
    assert pool.windows == 9


SPELLING = [
    [{"role": "user", "content": f"{number} it says </s> and <s>"}, {"role": "assistant", "content": "<pad>user\nyes"}]
    for number in range(40)
]


def test_what_a_turn_spells_is_counted_or_read_as_text(store: Store, landed: Landing) -> None:
    corpus, tokenizer = landed(rows_of([*SPELLING, *CHATS[:10]])), chat_tokenizer("begin-once")
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    assert pool.spelling == 40
    plain, plain_SL = drawn(store, corpus, tokenizer, WindowRequest(10_000, LENGTH, plain_text=True))
    assert plain.spelling == 0
    turns = 2 * 40 + sum(map(len, CHATS[:10]))
    in_all = [plain_SL.flatten().tolist(), *map(list, plain.chat_rest)]
    assert sum(ids.count(1) for ids in in_all) >= turns  # one per turn from the template, plus a few repeated tokens
    assert sum(ids.count(1) for ids in in_all) < turns + 10 < (tokens_SL == 1).sum()
    assert tokenizer.decode(plain_SL.flatten()).count("it says </s> and <s></s>") >= 36
    assert tokenizer("</s>")["input_ids"] == [0, 1], "the tokenizer is as it was"


def test_what_a_template_refuses_is_left_out_and_told(store: Store, landed: Landing) -> None:
    odd = "{% if messages | length > 2 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + TEMPLATES["turns"]
    pool, _ = drawn(store, landed(rows_of(CHATS)), chat_tokenizer(odd))
    left_out = sum(len(without_system(chat)) > 2 for chat in CHATS)
    merged = sum(len(chat) > 2 >= len(without_system(chat)) for chat in CHATS)
    refused, system = sorted(pool.said)
    assert "Roles must alternate" in refused
    assert pool.said == {refused: left_out, system: merged}


def test_windows_do_not_depend_on_the_day(store: Store, landed: Landing) -> None:
    dated = "Today is {{ strftime_now('%d %B %Y') }}, {{ strftime_now(\"%A\") }}.\n" + TEMPLATES["turns"]
    _, tokens_SL = drawn(store, landed(rows_of(CHATS)), chat_tokenizer(dated))
    assert str(chat_tokenizer(None).decode(tokens_SL[0][1:40])).startswith(f"Today is {TODAY:%d %B %Y}, {TODAY:%A}.\n")


def test_calls_of_tools_are_rendered(store: Store, landed: Landing) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 1}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What is one and two, please?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    corpus, tokenizer = landed([{"messages": turns, "tools": tools}]), chat_tokenizer("tools")
    (chat,) = EncodedDocuments(tokenizer, readings(store, corpus.shards[0], "train", TEMPLATE), 1)
    assert not isinstance(chat, list)
    expected: Any = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
    assert chat.ids == expected
    assert str(tokenizer.decode(chat.ids)).endswith('{"name": "add", "arguments": {"b": 2, "a": 1}}</s>\n')
