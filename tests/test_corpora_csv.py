"""CSV is parsed like by Python's csv module, but a stray quote costs only its own line."""

from __future__ import annotations

import csv
import io
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest

from crosscal.corpora.csv_records import Row, records
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.readers import READERS
from crosscal.corpora.records import Document
from crosscal.files import Broken, lines
from crosscal.files.lines import MOST_LINE_BYTES

FILES = 4000
SOUP = ["a", "é", "word ", ",", ",", '"', '"', '""', "\n", "\n", "\r\n", "\r", ' "', '",', ',"', '"\n']
ANY = DocumentLimits(min_characters=1)


def ours(path: Path, delimiter: str = ",", most_bytes: int = MOST_LINE_BYTES) -> list[Row | Broken]:
    return list(records(lines(path, universal=True), delimiter, most_bytes))


@dataclass(frozen=True)
class Reference:
    """Rows by Python's csv. `is_orderly`: rows that span lines are well-formed, and no quote is open at the end."""

    rows: list[list[str]]
    is_orderly: bool


def reference(text: str, delimiter: str = ",") -> Reference:
    physical = list(io.StringIO(text, newline=""))
    reader = csv.reader(physical, delimiter=delimiter)
    rows, is_orderly, begin = [], True, 0
    for row in reader:
        spanned = physical[begin : reader.line_num]
        begin = reader.line_num
        if len(spanned) > 1:
            width = len(rows[0]) if rows else len(row)
            is_orderly &= len(row) == width and well_formed(spanned, delimiter)
        elif spanned:  # a quote may be open at the end of the file
            is_orderly &= closed(spanned[0], delimiter)
        if row:
            rows.append(row)
    return Reference(rows, is_orderly)


def well_formed(spanned: list[str], delimiter: str) -> bool:
    try:
        return len(list(csv.reader(spanned, delimiter=delimiter, strict=True))) == 1
    except csv.Error:
        return False


def closed(line: str, delimiter: str) -> bool:
    reader = csv.reader([line, "x\n"], delimiter=delimiter)
    next(reader)
    return reader.line_num == 1


def soups() -> Iterator[str]:
    chance = random.Random(0)
    for _ in range(FILES):
        yield "".join(chance.choices(SOUP, k=chance.randint(1, 40)))


def tables(delimiter: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield (text, rows) of files by csv's writer, in each style of quoting and line ends."""
    chance = random.Random(1)
    cells = [
        "",
        "plain",
        '5" disk',
        '"quoted"',
        "one\ntwo",
        "one\r\ntwo",
        "a, b",
        "tab\there",
        "ünïcödé",
        '"',
        "x" * 300,
    ]
    for number in range(FILES // 4):
        width = chance.randint(1, 4)
        rows = [[f"column {i}" for i in range(width)]]
        rows += [[chance.choice(cells) for _ in range(width)] for _ in range(chance.randint(0, 8))]
        if width == 1:
            rows = [row for row in rows if row != [""]]  # it would be an empty line
        written = io.StringIO(newline="")
        style = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)[number % 3]
        csv.writer(written, delimiter=delimiter, quoting=style, lineterminator=("\n", "\r\n")[number % 2]).writerows(
            rows
        )
        yield written.getvalue(), rows


def test_every_file_that_python_reads_line_by_line_is_read_alike(tmp_path: Path) -> None:
    path, orderly = tmp_path / "a.csv", 0
    for text in soups():
        path.write_bytes(text.encode())
        expected = reference(text)
        if expected.is_orderly:
            orderly += 1
            found = ours(path)
            assert [row.fields for row in found if isinstance(row, Row)] == expected.rows, repr(text)
            assert len(found) == len(expected.rows), repr(text)
    assert orderly > FILES / 4


def test_every_line_is_in_one_row_or_is_a_reject(tmp_path: Path) -> None:
    """Rows and rejects together cover all lines of any file, wherever its quotes are."""
    path, rejects = tmp_path / "a.csv", 0
    for text in soups():
        path.write_bytes(text.encode())
        physical = list(io.StringIO(text, newline=""))
        found = ours(path)
        numbers = [item.number for item in found]
        assert numbers == sorted(set(numbers)), repr(text)
        assert not "".join(physical[: numbers[0] - 1] if numbers else physical).strip("\r\n"), repr(text)
        for item, end in zip(found, [*numbers, len(physical) + 1][1:], strict=True):
            own = physical[item.number - 1 : end - 1]
            if isinstance(item, Row):
                assert [row for row in csv.reader(own) if row] == [item.fields], repr(text)
            else:
                rejects += 1
                assert not "".join(own[1:]).strip("\r\n"), repr(text)
    assert rejects > FILES / 20


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_what_writers_write_is_read_as_csv_and_pandas_read_it(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"a{suffix}"
    for text, rows in tables(delimiter):
        path.write_bytes(text.encode())
        assert (
            [row.fields for row in ours(path, delimiter) if isinstance(row, Row)]
            == rows
            == reference(text, delimiter).rows
        )
        frame = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False, skip_blank_lines=True)
        assert frame.to_numpy().tolist() == rows[1:]
        texts = [row[0].strip() for row in rows[1:]]
        candidates = list(READERS[suffix](path, "name", "column 0", ANY))
        assert [each.text for each in candidates if isinstance(each, Document)] == [text for text in texts if text]
        assert len(candidates) == len(texts)


def test_a_quote_in_the_middle_of_a_field_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,the 5" disk is broken and old\n2,a plain valid document\n3,the 3" disk works again\n')
    assert [row.fields[1] for row in ours(path)[1:]] == [row[1] for row in reference(path.read_text()).rows[1:]]
    assert len(ours(path)) == 4


@pytest.mark.parametrize("text", ['the 5" disk, ', '"an opened quotation ', '"closed" at once '])
def test_stray_quotes_cost_at_most_their_own_rows(tmp_path: Path, text: str) -> None:
    stray = range(500, 20_000, 1000)
    rows = [f"{i},{text.replace(',', ';') if i in stray else 'a plain text '}{i}" for i in range(20_000)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["id,text", *rows]))
    found = list(READERS[".csv"](path, "name", "text", ANY))
    documents = [each.text for each in found if isinstance(each, Document)]
    assert len(found) == 20_000
    assert {f"a plain text {i}" for i in range(20_000) if i not in stray} <= set(documents)
    assert len(documents) == 20_000 - (len(stray) if text.startswith('"an') else 0)


def test_a_quoted_row_survives_between_stray_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"an open quotation\n2,"one line\nand another"\n3,"open again\n4,plain\n')
    found = ours(path)
    assert [row.fields for row in found[1:] if isinstance(row, Row)] == [["2", "one line\nand another"], ["4", "plain"]]
    assert [(each.number, each.reason) for each in found if isinstance(each, Broken)] == [
        (2, "unclosed quote"), (5, "unclosed quote"),
    ]  # fmt: skip


def test_a_file_of_nothing_but_stray_quotes_takes_time_in_proportion(tmp_path: Path) -> None:
    """Linear time although every line closes the quote of the line before and opens another, so that no row ends."""
    calls = []
    for count in (1_000, 4_000):
        path = tmp_path / f"{count}.csv"
        path.write_text("id,text\n" + 'x",y,"z\n' * count)
        made = 0

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            found = ours(path)
        finally:
            sys.setprofile(None)
        calls.append(made)
        assert len(found) == count + 1
    assert calls[1] < 4.5 * calls[0]


def test_a_row_longer_than_the_limit_costs_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"' + "one line\n" * 100 + '"\n2,plain\n')
    found = ours(path, most_bytes=200)
    assert next(row.fields for row in found if isinstance(row, Row)) == ["id", "text"]
    assert [row.fields for row in found if isinstance(row, Row)][-1] == ["2", "plain"]
    assert found[1] == Broken(2, "unclosed quote", '1,"one line')
