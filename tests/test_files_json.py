"""JSON records in any layout equal those that `json` reads; damage costs only the record that contains it."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import read_questions
from crosscal.files import Broken, JsonRecord, json_records, json_text, streams

LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "array with one a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "array that opens before the first": lambda rows: "[" + ",\n".join(map(json.dumps, rows)) + "]",
    "array with commas in front": lambda rows: "[" + "\n,".join(map(json.dumps, rows)) + "]",
    "pretty": lambda rows: json.dumps(rows, indent=4),
    "pretty by two": lambda rows: json.dumps(rows, indent=2),
    "pretty by tabs": lambda rows: json.dumps(rows, indent="\t"),
    "pretty, one behind the other": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "one line": lambda rows: json.dumps(rows),
    "no spaces": lambda rows: json.dumps(rows, separators=(",", ":")),
    "not escaped": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False),
    "Windows": lambda rows: json.dumps(rows, indent=4).replace("\n", "\r\n"),
}


def value(chance: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "number", "constant", *(["list", "object"] if depth < 3 else [])]
    match chance.choice(kinds):
        case "text":
            return "".join(
                chance.choices(['"', "\\", "{", "}", "[", "]", ",", "},{", "\n", "é", "漢", "\U0001f600", "a "], k=6)
            )
        case "number":
            return chance.choice([0, -1, 10**20, 1.5, -2e-300, 1e300, chance.random()])
        case "constant":
            return chance.choice([None, True, False])
        case "list":
            return [value(chance, depth + 1) for _ in range(chance.randint(0, 3))]
        case _:
            return {f"k{index}": value(chance, depth + 1) for index in range(chance.randint(0, 3))}


def rows(chance: random.Random, count: int) -> list[dict[str, Any]]:
    return [{"id": index, "text": value(chance), "more": value(chance)} for index in range(count)]


def small_window(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk_bytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_are_those_that_json_reads(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    for seed in range(25):
        chance = random.Random(seed)
        expected = rows(chance, chance.randint(0, 8))
        path.write_bytes(LAYOUTS[layout](expected).encode())
        for chunk_bytes in (1, 7, 100, 2**18):
            small_window(monkeypatch, chunk_bytes)
            found = list(json_records(path))
            assert [each.value for each in found if isinstance(each, JsonRecord)] == expected
            assert len(found) == len(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_the_lines(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "a.json"
    text = LAYOUTS[layout]([{"id": f"<{index}>", "text": "x"} for index in range(9)])
    path.write_bytes(text.encode())
    begins = [text.rfind("{", 0, text.index(f"<{index}>")) for index in range(9)]
    assert [each.number for each in json_records(path)] == [text.count("\n", 0, begin) + 1 for begin in begins]


BREAKS = {
    "a value missing": ('"text": "MARK"', '"text": '),
    "no quotes": ('"MARK"', "MARK"),
    "a comma too many": ('"MARK"', '"MARK",,'),
    "no colon": ('"text": "MARK"', '"text" "MARK"'),
    "an escape that is none": ("MARK", r"\q"),
    "not UTF-8": ("MARK", "\udcff"),
    "too deep": ('"MARK"', "[" * 100_000 + "]" * 100_000),
    "digits without end": ('"MARK"', "9" * 5000),
}


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "no spaces"])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_damage_costs_one_record(tmp_path: Path, layout: str, damage: str, place: int) -> None:
    records = [{"id": index, "text": f"text {index}", "inner": {"a": [{"b": 1}, 2]}} for index in range(7)]
    records[place]["text"] = "MARK"
    text = LAYOUTS[layout](records)
    assert BREAKS[damage][0] in text
    path = tmp_path / "a.json"
    path.write_bytes(text.replace(*BREAKS[damage]).encode("utf-8", "surrogateescape"))
    found = list(json_records(path))
    kept = [each.value for each in found if isinstance(each, JsonRecord)]
    assert kept == [record for index, record in enumerate(records) if index != place]
    assert len(found) == 7


def test_what_is_no_record_costs_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('nonsense\n{"a": 1}\nmore nonsense\nyet more\n{"a": 2}\n}\n')
    found = list(json_records(path))
    assert [each.value for each in found if isinstance(each, JsonRecord)] == [{"a": 1}, {"a": 2}]
    assert [each.number for each in found if isinstance(each, Broken)] == [1, 3, 4, 6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_breaks_off_says_so(tmp_path: Path, layout: str) -> None:
    records = rows(random.Random(1), 4)
    text = LAYOUTS[layout](records).rstrip()
    path = tmp_path / "a.json"
    for cut in range(1, len(text)):
        path.write_text(text[:cut], encoding="utf-8")
        found = list(json_records(path))
        kept = [each.value for each in found if isinstance(each, JsonRecord)]
        assert kept == records[: len(kept)]
        between = not text[:cut].lstrip().startswith("[") and len(kept) == len(found)
        assert isinstance(found[-1], Broken) or between, "an array without its end, or with a record cut in two"


def test_a_record_beyond_the_limit_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write('[\n{"id": 1},\n{"text": "')
        for _ in range(60):
            file.write("x" * 1_000_000)
        file.write('"},\n{"id": 2}\n]')
    tracemalloc.start()
    try:
        found = list(json_records(path, most_record_bytes=1_000_000))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [each.value for each in found if isinstance(each, JsonRecord)] == [{"id": 1}, {"id": 2}]
    assert [each.reason for each in found if isinstance(each, Broken)] == ["record longer than 1000000 bytes"]
    assert peak_bytes < 10_000_000


def test_one_line_of_any_length_is_read_record_by_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = json.dumps({"text": "word " * 200})
    with path.open("w") as file:
        file.write("[" + ", ".join([record] * 30_000) + "]")
    tracemalloc.start()
    try:
        assert sum(isinstance(each, JsonRecord) for each in json_records(path)) == 30_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30_000_000
    assert peak_bytes < 10_000_000


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.ndjson", "facts.json", "facts.jsonl.zst"])
@pytest.mark.parametrize("deep", ["[" * 100_000, '{"question": ' + "[" * 3000 + "]" * 3000 + "}"])
def test_deep_nesting_in_a_question_file_is_an_error_like_any_other(tmp_path: Path, name: str, deep: str) -> None:
    import zstandard

    content = f"{deep}\n".encode()
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith(".zst") else content)
    with pytest.raises(EvaluationError, match=r"facts\..*line 1"):
        read_questions(tmp_path / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_in_any_layout(tmp_path: Path, layout: str) -> None:
    asked = [{"question": f"Is it {index}?", "choices": ["yes", "no"], "answer": index % 2} for index in range(9)]
    path = tmp_path / "facts.json"
    path.write_text(LAYOUTS[layout](asked), encoding="utf-16")
    assert [each.question for each in read_questions(path)] == [each["question"] for each in asked]
