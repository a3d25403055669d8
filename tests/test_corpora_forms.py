"""Formats of conversations: any format gives the same corpus; what fits none is rejected with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from crosscal.corpora import Corpus, DocumentLimits, documents, ingest, load_corpus
from crosscal.corpora.conversation import MOST_TURNS, Conversation
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.corpora.hub import read_hub
from crosscal.corpora.records import Document
from crosscal.corpora.sources import HubDataset
from crosscal.errors import CorpusError
from crosscal.selection.chosen import _publish_shard, _rows
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store
from tests.helpers.tiny_chats import chats

CHATS = chats(60)
EXCHANGES = [[turn for turn in chat if turn["role"] != "system"][:2] for chat in chats(60, seed=1)]
Rows = list[dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def stored(store: Store, corpus: Corpus) -> list[str | Conversation]:
    return [
        each for shard in corpus.shards for split in shard.documents for each in readings(store, shard, split, TEMPLATE)
    ]


def turns_of(store: Store, corpus: Corpus) -> list[list[dict[str, Any]]]:
    found = stored(store, corpus)
    return [list(each.turns) for each in found if isinstance(each, Conversation)]


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


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: Rows) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + written.getvalue().encode()  # with a byte-order mark, as spreadsheets write it


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


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


def write_lines(path: Path, rows: Rows) -> str:
    path.write_bytes(lines(rows))
    return str(path)


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


def saved(folder: Path) -> Path:
    """Save two splits, the first in two files, and a cache file that belongs to neither."""
    first = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS[:40]])
    second = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS[40:]])
    datasets.DatasetDict({"train": first, "test": second}).save_to_disk(str(folder), num_shards={"train": 2, "test": 1})
    (folder / "train" / "cache-0123.arrow").write_bytes((folder / "test/data-00000-of-00001.arrow").read_bytes())
    return folder


def test_a_folder_that_datasets_saved_is_read_split_by_split(store: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "data" / "saved")
    report = ingest(store, "x", [str(folder)])
    assert report.corpus.shards[0].documents["test"] == 20
    assert (report.added_documents, report.duplicates, report.rejected) == (60, 0, {})
    assert sorted(turns_of(store, report.corpus), key=str) == sorted(CHATS, key=str)
    alone = ingest(store, "y", [str(folder / "test")])
    assert alone.corpus.shards[0].documents["test"] == 20
    above = ingest(store, "z", [str(tmp_path / "data")])  # also found in a subfolder
    assert above.corpus.digest == report.corpus.digest


def test_texts_are_read_from_such_a_folder_as_well(store: Store, tmp_path: Path) -> None:
    texts = [f"document number {n} is long enough" for n in range(30)]
    datasets.Dataset.from_dict({"text": [*texts, None, "short"]}).save_to_disk(str(tmp_path / "saved"))
    report = ingest(store, "x", [str(tmp_path / "saved")])
    assert sorted(map(str, stored(store, report.corpus))) == sorted(texts)
    assert report.rejected == {"text is not a string": 1, "too short": 1}


@pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", "", ".", 7])
def test_a_saved_folder_cannot_name_what_lies_outside(name: object, store: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved") / "test"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(CorpusError, match="names a path outside its folder"):
        ingest(store, "x", [str(tmp_path / "saved")])


def test_a_missing_part_is_an_error(store: Store, tmp_path: Path) -> None:
    (saved(tmp_path / "saved") / "test/data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match="a part of a saved data set is missing"):
        ingest(store, "x", [str(tmp_path / "saved")])


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
def test_a_damaged_file_gives_what_came_before(keep: float, store: Store, tmp_path: Path) -> None:
    folder, rows = tmp_path / "saved", [{"text": f"document number {n} is long enough"} for n in range(4000)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    (file,) = folder.glob("data-*.arrow")
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    (tmp_path / "b.jsonl").write_bytes(lines(rows[:1]))
    report = ingest(store, "x", [str(folder), str(tmp_path / "b.jsonl")])
    assert report.rejected == {"Arrow file is damaged, rest not read": 1}
    assert abs(report.added_documents - keep * 4000) <= 1000 + 1  # `datasets` writes batches of 1000 rows


def test_offsets_that_lead_out_of_a_file_are_damage(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["document that is long enough"]}).save_to_disk(str(folder))
    (file,) = folder.glob("data-*.arrow")
    batch = pa.RecordBatch.from_pydict({"text": ["x" * 30, "y" * 30]})
    with file.open("wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    whole, offsets = file.read_bytes(), struct.pack("<3i", 0, 30, 60)
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, struct.pack("<3i", 0, 30, 2**30)))
    with pytest.raises(CorpusError, match=r"1 Arrow file is damaged, rest not read"):
        ingest(store, "x", [str(folder)])


def cached(folder: Path, commits: dict[str, list[list[dict[str, Any]]]], refs: dict[str, str]) -> Path:
    """Make a data set in the hub's cache layout: snapshots with links to blobs, a README beside the data."""
    home = folder / "datasets--someone--chats"
    (home / "blobs").mkdir(parents=True)
    for commit, rows in commits.items():
        data = home / "snapshots" / commit / "data"
        data.mkdir(parents=True)
        (home / "blobs" / commit).write_bytes(parquet([{"messages": chat} for chat in rows]))
        (data / "train-00000-of-00001.parquet").symlink_to(f"../../../blobs/{commit}")
        (data.parent / "README.md").write_text("This is the card, and not a document of the data set.")
    for name, commit in refs.items():
        (home / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / name).write_text(commit)
    return home


def test_the_hubs_cache_is_read_at_a_revision(store: Store, tmp_path: Path) -> None:
    commits = {"aaa": CHATS[:20], "bbb": CHATS[20:50]}
    home = cached(tmp_path / "hub", commits, {"main": "bbb", "v1": "aaa"})
    numbers: Iterator[int] = iter(range(9))

    def read(path: Path, revision: str | None = None) -> int:
        report = ingest(store, f"x{next(numbers)}", [str(path)], revision=revision)
        assert report.rejected == {}
        return report.added_documents

    assert (read(home), read(home, "v1"), read(home, "aaa"), read(tmp_path / "hub")) == (30, 20, 20, 30)
    assert read(home / "snapshots" / "aaa") == 20
    with pytest.raises(CorpusError, match=r"no snapshot of this revision \(got v2; there are aaa, bbb\)"):
        read(home, "v2")
    (home / "refs" / "main").unlink()
    with pytest.raises(CorpusError, match=r"no snapshot of this revision \(got main"):
        read(home)
    with pytest.raises(CorpusError, match="names a path outside its folder"):
        read(home, "../../x")


def test_a_link_out_of_the_cache_is_an_error(store: Store, tmp_path: Path) -> None:
    home = cached(tmp_path / "hub", {"aaa": CHATS[:20]}, {})
    write_lines(tmp_path / "secret.jsonl", [{"messages": CHATS[30]}])
    (home / "snapshots/aaa/more.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for given in (home, home / "snapshots/aaa", tmp_path / "hub"):
        with pytest.raises(CorpusError, match=r"more\.jsonl: a link leads out of the cached data set"):
            ingest(store, "x", [str(given)])


def test_a_hub_dataset_may_hold_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "hub" / "train.jsonl", [{"prompt_id": "x", "messages": chat} for chat in CHATS])
    rows = list(read_hub(HubDataset(str(tmp_path / "hub"), None), "text", None, DocumentLimits()))
    assert [split for split, _ in rows] == ["train"] * len(CHATS)
    found = [Conversation.of_stored(each.text) for _, each in rows if isinstance(each, Document)]
    assert [list(each.turns) for each in found] == CHATS


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
