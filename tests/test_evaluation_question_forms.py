"""Formats of question files: equal questions in any format, or in one that the plan describes, are read alike."""

from __future__ import annotations

import csv
import io
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosscal.evaluation.question_files import Fields, Question, read_question_file
from tests.helpers.json_lines import jsonl

SENTENCE = 'The river runs past "the mill", and a doctor gave the person at home an answer to each é question in rain.'
WORDS = SENTENCE.split()


def some_questions(seed: int, *, choices: int | None = None, context: bool = False) -> list[Question]:
    """Each position is the right answer at least once, so numbering from 0 and from 1 are distinguishable."""
    draw = random.Random(seed)
    found = []
    for number in range(12):
        count = choices or draw.randint(3, 5)
        texts = [f"{' '.join(draw.sample(WORDS, draw.randint(1, 4)))} {letter * 2}" for letter in "pqrstuv"[:count]]
        paragraphs = "\n".join(" ".join(draw.sample(WORDS, 6)) for _ in range(3)) if context else None
        answer = number % count if number < count else draw.randrange(count)
        found.append(Question(f"{' '.join(draw.sample(WORDS, 7))} {number}?", tuple(texts), answer, paragraphs))
    return found


def letters(question: Question) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, question.choices, strict=False))


def letter(question: Question) -> str:
    return string.ascii_uppercase[question.answer]


def right(question: Question) -> str:
    return question.choices[question.answer]


Render = Callable[[Question], dict[str, Any]]
VARYING: dict[str, Render] = {  # any number of choices
    "native": lambda q: {"question": q.question, "choices": list(q.choices), "answer": q.answer},
    "letter": lambda q: {"question": q.question, "options": list(q.choices), "answer": letter(q)},
    "letter in brackets": lambda q: {"query": q.question, "options": list(q.choices), "gold": f"({letter(q).lower()})"},
    "text": lambda q: {"question": q.question, "choices": list(q.choices), "answer": right(q)},
    "options by letter": lambda q: {
        "question": q.question, "answer": right(q), "options": letters(q), "meta": "x", "answer_idx": letter(q),
    },
    "options by letter, in words": lambda q: {"Question": q.question, "options": letters(q), "answer": right(q)},
    "options by letter, those missing null": lambda q: {
        "question": q.question, "options": {**dict.fromkeys("ABCDE"), **letters(q)}, "answer": letter(q),
    },
    "choices with labels": lambda q: {
        "id": "q1", "question": q.question, "answerKey": letter(q),
        "choices": {"text": list(q.choices), "label": list(letters(q))},
    },
    "choices with numbers as labels": lambda q: {
        "question": q.question, "answerKey": str(q.answer + 1),
        "choices": {"text": list(q.choices), "label": [str(i + 1) for i in range(len(q.choices))]},
    },
    "choices as objects": lambda q: {
        "question": {"stem": q.question, "choices": [{"text": t, "label": k} for k, t in letters(q).items()]},
        "answerKey": letter(q),
    },
    "numbers from 1": lambda q: {"goal": q.question, "endings": list(q.choices), "label": q.answer + 1},
    "numbers as text": lambda q: {"ctx": q.question, "endings": list(q.choices), "label": str(q.answer)},
}  # fmt: skip
FIXED: dict[str, Render] = {  # four choices
    "columns from a": lambda q: {
        "question": q.question, **{f"op{k.lower()}": t for k, t in letters(q).items()}, "cop": q.answer,
    },
    "columns from a, counted from 1": lambda q: {
        "question": q.question, **{f"op{k.lower()}": t for k, t in letters(q).items()}, "cop": q.answer + 1,
    },
    "columns of one letter": lambda q: {"question": q.question, **letters(q), "answer": letter(q)},
    "columns with numbers": lambda q: {
        "goal": q.question, **{f"ending_{i}": t for i, t in enumerate(q.choices)}, "label": q.answer,
    },
    "columns from 1, counted from 1": lambda q: {
        "prompt": q.question, **{f"option{i + 1}": t for i, t in enumerate(q.choices)}, "answer": str(q.answer + 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*VARYING, *FIXED])
def test_the_same_questions_in_any_form(tmp_path: Path, name: str, seed: int) -> None:
    asked = some_questions(seed, choices=4 if name in FIXED else None)
    rows = [(VARYING | FIXED)[name](question) for question in asked]
    array, by_id = tmp_path / "array.json", tmp_path / "by_id.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    by_id.write_text(json.dumps({f"{number}": row for number, row in enumerate(rows)}), encoding="utf-8")
    for path in (jsonl(tmp_path / "lines.jsonl", rows), array, by_id):
        assert list(read_question_file(path).questions) == asked


@pytest.mark.parametrize("name", [*VARYING, *FIXED])
def test_the_same_questions_in_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    asked = some_questions(7, choices=4)
    rows = [(VARYING | FIXED)[name](question) for question in asked]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "asked.parquet")
    assert list(read_question_file(tmp_path / "asked.parquet").questions) == asked


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("answer", [letter, right, lambda q: q.answer, lambda q: q.answer + 1])
def test_the_same_questions_in_a_table(
    tmp_path: Path, suffix: str, delimiter: str, header: bool, answer: Callable[[Question], Any]
) -> None:
    asked = some_questions(3, choices=4)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    if header:
        writer.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
    for number, question in enumerate(asked):
        writer.writerow([*[number] * header, question.question, *question.choices, answer(question)])
    path = tmp_path / f"asked{suffix}"
    path.write_text(text.getvalue(), encoding="utf-8")
    assert list(read_question_file(path).questions) == asked
    moved = tmp_path / f"moved{suffix}"  # columns in another order, given by `Fields`
    rows = list(csv.reader(io.StringIO(text.getvalue()), delimiter=delimiter))
    with moved.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter=delimiter).writerows(row[::-1] for row in rows[header:])
    columns = {"answer": "column 1", "choices": tuple(f"column {n}" for n in (5, 4, 3, 2)), "question": "column 6"}
    assert list(read_question_file(moved, Fields(**columns)).questions) == asked


def test_tables_of_digits_and_equal_cells_keep_all_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("2+2?,4,column 2,5,4,B\n\n1+1?,1,2,3,4,B\n", encoding="utf-8")
    found = read_question_file(path).questions
    assert [question.choices for question in found] == [("4", "column 2", "5", "4"), ("1", "2", "3", "4")]


CONTEXTS: dict[str, Render] = {
    "text": lambda q: {"passage": q.context},
    "list": lambda q: {"CONTEXTS": str(q.context).split("\n")},
    "with headings": lambda q: {"context": {"contexts": str(q.context).split("\n"), "labels": ["A", "B", "C"]}},
}
YES_NO = [Question(f"Is it so {i}?", ("yes", "no"), i % 2, f"first {i}\nsecond\nthird") for i in range(6)]
MAYBE = [Question(f"Is it so {i}?", ("yes", "no", "maybe"), i % 3, f"first {i}\nsecond\nthird") for i in range(6)]


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (YES_NO, lambda q: {"answer": q.answer == 0}),
        (YES_NO, lambda q: {"answer": right(q).capitalize()}),
        (MAYBE, lambda q: {"LONG_ANSWER": "because", "final_decision": right(q)}),
    ],
    ids=["boolean", "words", "maybe"],
)
def test_yes_no_maybe_and_contexts(tmp_path: Path, context: Render, asked: list[Question], answer: Render) -> None:
    path = jsonl(tmp_path / "asked.jsonl", [{"question": q.question, **context(q), **answer(q)} for q in asked])
    found = read_question_file(path)
    assert list(found.questions) == asked
    assert f"choices are the words {', '.join(asked[0].choices)}" in found.read_as
    assert [one.closed_book for one in found.questions] == [Question(q.question, q.choices, q.answer) for q in asked]
    joined = [Question(f"{q.context}\n\n{q.question}", q.choices, q.answer) for q in asked]
    assert [one.in_context for one in found.questions] == joined


@pytest.mark.parametrize("seed", range(3))
def test_any_other_form_by_what_the_plan_says(tmp_path: Path, seed: int) -> None:
    asked = some_questions(seed, choices=4, context=True)
    rows = [
        {"what": {"head": q.question[:9], "rest": q.question[9:]}, "key": q.answer + 1, "background": q.context,
         "one": q.choices[0], "two": q.choices[1], "three": q.choices[2], "w": {"no": ["x"], "yes": q.choices[3]}}
        for q in asked
    ]  # fmt: skip
    path = jsonl(tmp_path / "asked.jsonl", rows)
    fields = Fields("{what.head}{what.rest}", ("one", "two", "three", "w.yes"), "key", "background", "number_from_1")
    found = read_question_file(path, fields)
    assert list(found.questions) == asked
    assert found.read_as == (
        "question from {what.head}{what.rest}, choices from one, two, three, w.yes, context from background, "
        "answer from key by its number from 1"
    )


def test_templates_with_braces_and_literal_choices(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "asked.jsonl", [{"q": "Which?", "x": "oak", "y": "elm", "key": "B"}])
    fields = Fields("{q} {{x}}\nA. {x}\nB. {y}\nAnswer:", ("A", "B"), "key")
    assert read_question_file(path, fields).questions == (
        Question("Which? {{x}}\nA. oak\nB. elm\nAnswer:".replace("{{", "{").replace("}}", "}"), ("A", "B"), 1),
    )
