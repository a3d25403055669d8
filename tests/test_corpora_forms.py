"""Formats of conversations: any format gives the same corpus; what fits none is rejected with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosscal.corpora import DocumentLimits, ingest, load_corpus
from crosscal.corpora.conversation import MOST_TURNS
from crosscal.errors import CorpusError
from crosscal.store import Store
from tests.helpers.chat_files import CHATS, Rows, lines, parquet, turns_of, write_lines
from tests.helpers.tiny_chats import chats

EXCHANGES = [[turn for turn in chat if turn["role"] != "system"][:2] for chat in chats(60, seed=1)]


def by_text(chat: list[dict[str, Any]]) -> str:
    return json.dumps(chat)


def spelled(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    other = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": other[turn["role"]], "value": turn["content"]} for turn in chat]


def in_parts(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]


def columns(chat: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The turns as older versions of `datasets` store a sequence: one list per field."""
    return {"from": [turn["role"] for turn in chat], "value": [turn["content"] for turn in chat]}


def separated(rows: Rows) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + written.getvalue().encode()  # with a byte-order mark, as spreadsheets write it


FILES: dict[str, tuple[str, Callable[[Rows], bytes], Callable[[list[dict[str, Any]]], Any], str]] = {
    # name: (file, writer of rows, value of a conversation in its column, column)
    "jsonl": ("a.jsonl", lines, list, "messages"),
    "from and value": ("a.jsonl", lines, spelled, "conversations"),
    "json": ("a.json", lambda rows: json.dumps(rows, indent=4).encode("utf-16"), list, "messages"),
    "compressed": ("a.jsonl.gz", lambda rows: gzip.compress(lines(rows)), list, "conversation"),
    "JSON in JSON": ("a.jsonl", lines, by_text, "messages"),
    "turn by turn": ("a.jsonl", lines, lambda chat: [json.dumps(turn) for turn in chat], "messages"),
    "parts": ("a.jsonl", lines, in_parts, "messages"),
    "two lists": ("a.jsonl", lines, columns, "conversations"),
    "csv": ("a.csv", separated, by_text, "messages"),
    "parquet": ("a.parquet", parquet, list, "messages"),
    "parquet, two lists": ("a.parquet", parquet, columns, "conversations"),
    "parquet, parts": ("a.parquet", parquet, in_parts, "messages"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Key of the shard with these conversations."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "a.jsonl").write_bytes(lines([{"messages": chat} for chat in CHATS]))
    return ingest(Store(folder / "home"), "chats", [str(folder / "a.jsonl")]).corpus.shards[0].key


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_named", [True, False])
def test_the_same_conversations_are_the_same_corpus(
    name: str, is_named: bool, reference: str, store: Store, tmp_path: Path
) -> None:
    file, write, written, column = FILES[name]
    (tmp_path / file).write_bytes(write([{"id": n, column: written(chat)} for n, chat in enumerate(CHATS)]))
    report = ingest(store, "chats", [str(tmp_path / file)], text=column if is_named else "text")
    assert report.corpus.shards[0].key == reference
    assert sorted(turns_of(store, report.corpus), key=str) == sorted(CHATS, key=str)
    assert (report.forms, report.rejected) == ({column: 60}, {})
    shard = report.corpus.shards[0]
    assert shard.conversations == shard.documents == {"train": 54, "validation": 3, "test": 3}
    plain = ["\n\n".join(turn["content"] for turn in chat) for chat in CHATS]
    assert sum(shard.characters.values()) == sum(map(len, plain))
    assert load_corpus(Store(tmp_path / "home"), "chats") == report.corpus


@pytest.mark.parametrize(
    ("names", "beside"),
    [
        (("instruction", "output"), {"input": ""}),
        (("instruction", "response"), {"category": "open"}),
        (("prompt", "response"), {}),
        (("prompt", "completion"), {"source": "x"}),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_a_record_is_a_question_and_its_answer(
    names: tuple[str, str], beside: dict[str, str], form: str, store: Store, tmp_path: Path
) -> None:
    rows = [{**beside, names[0]: question["content"], names[1]: answer["content"]} for question, answer in EXCHANGES]
    file, write, _, _ = FILES[form]
    (tmp_path / file).write_bytes(write(rows))
    report = ingest(store, "chats", [str(tmp_path / file)])
    assert sorted(turns_of(store, report.corpus), key=str) == sorted(EXCHANGES, key=str)
    both = ingest(store, "chats", [write_lines(tmp_path / "b.jsonl", [{"messages": one} for one in EXCHANGES])])
    assert (both.added_documents, both.duplicates, both.changed) == (0, 60, False)


def test_what_is_asked_is_instruction_input_and_context(store: Store, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add these.", "input": "1 and 2", "output": "That is three.", "system": "You count."},
        {"instruction": "Who was it?", "context": "It was the doctor.", "response": "The doctor, it says."},
        {"prompt": [{"role": "user", "content": "one question"}], "completion": [{"role": "gpt", "content": "so"}]},
    ]
    report = ingest(store, "x", [write_lines(tmp_path / "a.jsonl", rows)], limits=DocumentLimits(min_characters=5))
    found = [[(turn["role"], turn["content"]) for turn in chat] for chat in turns_of(store, report.corpus)]
    assert sorted(found) == [
        [("system", "You count."), ("user", "Add these.\n\n1 and 2"), ("assistant", "That is three.")],
        [("user", "Who was it?\n\nIt was the doctor."), ("assistant", "The doctor, it says.")],
        [("user", "one question"), ("assistant", "so")],
    ]
    assert report.forms == {
        "instruction, input, output": 1,
        "instruction, context, response": 1,
        "prompt, completion": 1,
    }


USER, LONG = {"role": "user", "content": "hello"}, "long enough to be taken"
REJECTS: dict[str, tuple[dict[str, Any], str]] = {
    "no form": ({"body": LONG}, "no column 'text'"),
    "a question alone": ({"instruction": LONG}, "no column 'text'"),
    "not a list": ({"messages": 3}, "turns are not a list of objects"),
    "no JSON": ({"messages": "[not json"}, "turns are not a list of objects"),
    "strings": ({"messages": [LONG, LONG]}, "turns are not a list of objects"),
    "nothing": ({"messages": []}, "no turn of a user or an assistant"),
    "system alone": ({"messages": [{"role": "system", "content": LONG}]}, "no turn of a user or an assistant"),
    "no role": ({"messages": [{"content": LONG}]}, "a turn has no role"),
    "strange role": ({"messages": [{"role": "narrator", "content": LONG}]}, "a turn has an unknown role"),
    "empty turn": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "a turn is empty"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "a turn is empty"),
    "no answer": ({"instruction": LONG, "output": ""}, "a turn is empty"),
    "a number": ({"messages": [{"role": "user", "content": 7}]}, "a turn has content other than text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}, {"type": "image", "url": "x"}]}]},
        "a turn has content other than text",
    ),
    "an answer that is no text": ({"prompt": LONG, "response": 7}, "text is not a string"),
    "too many": ({"messages": [USER] * (MOST_TURNS + 1)}, f"more than {MOST_TURNS} turns"),
    "short": ({"messages": [USER]}, "too short"),
    "long": ({"messages": [{"role": "user", "content": "x" * 5000}]}, "too long"),
    "half a pair": ({"messages": [{"role": "user", "content": LONG + "\ud800"}]}, "lone surrogate"),
    "tools": ({"messages": [{"role": "user", "content": LONG}], "tools": "hammer"}, "tools are not a list of objects"),
    "deep": ({"messages": [{"role": "user", "content": LONG, "tool_calls": "[" * 900 + "]" * 900}]}, "tool calls"),
}


@pytest.mark.parametrize("name", REJECTS)
def test_what_fits_no_form_is_rejected_with_the_reason(name: str, store: Store, tmp_path: Path) -> None:
    row, reason = REJECTS[name]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a text that is long enough"}, row])
    report = ingest(store, "x", [path], limits=DocumentLimits(max_characters=4000))
    ((found, count),) = report.rejected.items()
    assert found.startswith(reason)
    assert (count, report.added_documents) == (1, 1)
    if "messages" in row and name not in ("tools", "short", "long", "half a pair"):
        with pytest.raises(CorpusError, match="no usable document"):
            ingest(store, "y", [write_lines(tmp_path / "b.jsonl", [row])])
