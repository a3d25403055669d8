"""Question files that are ambiguous, damaged or in no known format: errors that name the place, not guesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import Fields, read_question_file
from tests.helpers.json_lines import jsonl

FITS_TWO_WAYS = [
    ({"question": "q", "opa": "w", "opb": "x", "opc": "y", "cop": 1}, "number_from_0", 1, "number_from_1", 0),
    ({"question": "q", "choices": ["B", "A"], "answer": "B"}, "letter", 1, "text", 0),
    ({"goal": "q", "options": ["2", "1", "3"], "label": "1"}, "text", 1, "number_from_0", 1),
]


@pytest.mark.parametrize(("row", "one", "index", "other", "other_index"), FITS_TWO_WAYS)
def test_an_answer_that_can_be_read_in_two_ways_is_asked_for(
    tmp_path: Path, row: dict[str, Any], one: str, index: int, other: str, other_index: int
) -> None:
    path = jsonl(tmp_path / "asked.jsonl", [row])
    with pytest.raises(EvaluationError, match=r"asked\.jsonl, line 1: .* can be read in two ways") as error:
        read_question_file(path)
    assert "answer_is" in error.value.do
    for way, wanted in ((one, index), (other, other_index)):
        assert read_question_file(path, Fields(answer_is=way)).questions[0].answer == wanted


def test_our_own_form_counts_from_0_and_says_what_to_do_about_numbers_from_1(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["w", "x"], "answer": number} for number in (1, 2)]
    path = jsonl(tmp_path / "asked.jsonl", rows)
    with pytest.raises(EvaluationError, match="line 2: answer is not an index into the 2 choices") as error:
        read_question_file(path)
    assert "number_from_1" in error.value.do
    fields = Fields(answer_is="number_from_1")
    assert [q.answer for q in read_question_file(path, fields).questions] == [0, 1]
    with pytest.raises(EvaluationError, match="not an index into the 2 choices, counted from 1"):
        read_question_file(jsonl(path, [*rows, rows[0] | {"answer": 0}]), fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "opa": "w", "opb": "x", "cop": 5}, "line 2: cop is not an index into the 2 choices"),
        ({"question": "q", "opa": "w", "opb": "x", "cop": None}, "line 2: cop is not an index into the 2 choices"),
        ({"question": "q", "opa": "w", "opb": "", "cop": 0}, "line 2: opa, opb is not a list of two or more texts"),
        ({"question": "q", "opa": "w", "cop": 0}, "line 2: opa, opb is not a list of two or more texts"),
        ({"question": " ", "opa": "w", "opb": "x", "cop": 0}, "line 2: question is not a text"),
        ({"opa": "w", "opb": "x"}, "line 2: a row without question, cop"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"question": "q", "opa": "w", "opb": "x", "cop": 0}
    with pytest.raises(EvaluationError, match=message):
        read_question_file(jsonl(tmp_path / "asked.jsonl", [good, row]))


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ('{"stem": "q", "o": ["w", "x"], "key": "A"}', Fields(), "line 1: no field that is the answer"),
        ('{"text": "q", "o": ["w", "x"], "key": "A"}', Fields(), "the question or the answer"),
        ('{"question": "q", "o": ["w", "x"], "answer": "A"}', Fields(), "no field that holds the choices"),
        (
            '{"question": "q", "answers": {"text": ["w"], "answer_start": [1]}, "answer": 1}',
            Fields(),
            "the choices",
        ),
        ('{"question": "q", "o": "w", "p": "x", "answer": 0}', Fields(choices=("o", "r")), "no field r"),
        ('{"question": "q", "o": "w", "p": "x", "answer": 0}', Fields("{question} {r}", ("o", "p")), "no field"),
        (
            '{"question": "q", "o": "w", "p": "x", "answer": 0}',
            Fields(choices=("s", "r")),
            "not one of the 2 choices",
        ),
    ],
)
def test_what_no_form_fits_is_told_with_its_fields(tmp_path: Path, content: str, fields: Fields, message: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message) as error:
        read_question_file(path, fields)
    assert "question" in error.value.do


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Q1,w,x,y,z,A\nQ2,w,x,y,A\n", "line 2: a row of another length .got 5 cells, and 6"),
        ("Frage,w,x,y,z,Antwort\nQ2,w,x,y,z,A\n", "line 1: column 6 is not one of the 4 choices"),
        ('Q1,w,x,y,z,A\n"Q2,w,x,y,z,A\n', "line 2: not a row of a table"),
        ("Q1,w\n", "nothing behind the first line"),
        ("\n\n", "no questions in the file"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "asked.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        read_question_file(path)


def test_damaged_parquet_and_latin_tables(tmp_path: Path) -> None:
    (tmp_path / "asked.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(EvaluationError, match=r"asked\.parquet, behind row 0: the questions cannot be read"):
        read_question_file(tmp_path / "asked.parquet")
    (tmp_path / "asked.csv").write_bytes("Qu\xe9?,w,x,y,z,A\n".encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"asked\.csv, line 1: not a line of UTF-8"):
        read_question_file(tmp_path / "asked.csv")
