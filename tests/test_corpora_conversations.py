"""Conversations and texts in one corpus: which column is read, what is kept of a turn, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest

from crosscal.corpora import documents, ingest
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.errors import CorpusError
from crosscal.selection.chosen import _publish_shard, _rows
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store
from tests.helpers.chat_files import CHATS, Rows, parquet, stored, turns_of, write_lines


def test_texts_and_conversations_may_stand_in_one_file(store: Store, tmp_path: Path) -> None:
    """In JSON lines, and in a table, where each row leaves one of the two columns empty."""
    rows: Rows = [{"text": f"Text {number} that is long enough."} for number in range(20)]
    rows += [{"messages": chat} for chat in CHATS[:20]]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.parquet").write_bytes(parquet([{"text": None, "messages": None, **row} for row in rows]))
    one, two = (
        ingest(store, name, [given]).corpus for name, given in (("a", path), ("b", str(tmp_path / "b.parquet")))
    )
    assert one.digest == two.digest
    found = stored(store, one)
    assert {each for each in found if isinstance(each, str)} == {row["text"] for row in rows[:20]}
    assert (sum(isinstance(each, Conversation) for each in found), one.conversations) == (20, 20)


def test_a_text_that_spells_a_conversation_is_another_document(store: Store, tmp_path: Path) -> None:
    chat = ingest(store, "x", [write_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])], split="train").corpus
    (document,) = stored(store, chat)
    assert isinstance(document, Conversation)
    more = ingest(store, "x", [write_lines(tmp_path / "b.jsonl", [{"text": document.stored()}])], split="train")
    assert more.added_documents == 1
    assert {type(each) for each in stored(store, more.corpus)} == {str, Conversation}
    assert stored(store, more.corpus)[1] == document.stored()


def test_text_stands_before_other_forms_and_named_columns_hold_what_they_hold(store: Store, tmp_path: Path) -> None:
    row = {"text": "rendered already, long enough", "messages": CHATS[0], "prompt": "only this is wanted of it"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    for column, expected in (("text", row["text"]), ("prompt", row["prompt"])):
        assert stored(store, ingest(store, column, [path], text=column).corpus) == [expected]
    assert turns_of(store, ingest(store, "m", [path], text="messages").corpus) == [CHATS[0]]
    with pytest.raises(CorpusError, match="no column 'body'"):
        ingest(store, "b", [path], text="body")


def test_what_templates_read_of_a_turn_is_kept_and_nothing_else(store: Store, tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"b": 2, "a": 1}}
    said: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "human", "content": "What is one and two?", "id": 7},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {**call, "arguments": None}}]},
        {"role": "function", "name": "add", "content": "3"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "I add.", "tool_calls": None, "weight": 1},
    ]
    said[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(call["arguments"])
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": None, "type": "object"}}}]
    rows = [{"messages": said, "tools": json.dumps(tools)}]
    (found,) = stored(store, ingest(store, "x", [write_lines(tmp_path / "a.jsonl", rows)]).corpus)
    assert isinstance(found, Conversation)
    assert list(found.turns) == [
        {"role": "user", "content": "What is one and two?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": call}]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "I add."},
    ]
    assert list(found.turns[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert found.tools == ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)


def test_a_corpus_of_texts_is_what_it_was(store: Store, tmp_path: Path) -> None:
    """Key, file and record equal those of versions without conversations."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document number {n} is long enough"} for n in range(40)])
    shard = ingest(store, "x", [path]).corpus.shards[0]
    assert shard.key == "0b0fd44dee9028283d49735497e627845bc3fd62356022c92f1cc049c3928f7f"
    file = store.path(store.get("corpora", shard.key), "train.arrow")
    assert pa.ipc.open_file(file).schema.names == ["text", "source", "digest"]
    _, record = store.refs.read("corpora/x")
    assert record is not None
    assert set(record["shards"][0]) == {"key", "documents", "characters"}


def test_conversations_that_are_chosen_stay_conversations(store: Store, tmp_path: Path) -> None:
    """Choosing all documents of a shard gives the same shard; comparisons use the text of the turns."""
    rows: Rows = [{"messages": chat} for chat in CHATS] + [{"text": f"Text {n} that is long enough."} for n in range(9)]
    corpus = ingest(store, "x", [write_lines(tmp_path / "a.jsonl", rows)], split="train").corpus
    texts = DocumentTexts(store, parts_of([corpus], "train"))
    assert list(texts) == [texts.text(at) for at in range(69)]
    assert sorted(texts) == sorted(documents(store, corpus.shards[0], "train"))
    other = Store(tmp_path / "other")
    assert _publish_shard(other, {"train": _rows(texts, range(69))}) == corpus.shards[0]
    assert list(readings(other, corpus.shards[0], "train", TEMPLATE)) == stored(store, corpus)
