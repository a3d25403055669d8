"""Local files of multiple-choice questions.

JSON objects, one a line or an array of them, plain or compressed (`.jsonl`, `.ndjson`, `.json`, with `.gz`, `.zst`,
`.bz2` or `.xz`): `{"question": str, "choices": [str, …], "answer": index}`. Other fields are left alone. A damaged
row, and a file that cannot be read to its end, is an error and never skipped: an accuracy over fewer questions would
look the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.files import COMPRESSIONS, JSON_FORMATS, Broken, JsonRecord, excerpt, format_of, json_records, stem_of

FORMS = f"{', '.join(JSON_FORMATS)}, each also with {', '.join(COMPRESSIONS)}"
FORM = 'Each line is {"question": "…", "choices": ["…", "…"], "answer": index of the right choice}.'


@dataclass(frozen=True)
class Question:
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index into `choices`."""


def is_question_file(task: str) -> bool:
    """Whether a task of the plan is a path to a local file of questions rather than an lm-eval name."""
    return format_of(task) in JSON_FORMATS


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file; `EvaluationError` names file, line and what is wrong."""
    if not Path(path).is_file():
        raise EvaluationError("the questions cannot be read", where=str(path), got="no such file", do="Check the path.")
    questions = [_parse(record, f"{path}, line {record.number}") for record in json_records(Path(path))]
    if not questions:
        raise EvaluationError("no questions in the file", where=str(path), do=FORM)
    return questions


def task_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each file: its stem, with the parent folder in front where two files share a stem."""
    stems = [stem_of(path) for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{Path(path).resolve().parent.name}_{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise EvaluationError(
            "two files of questions have the same name",
            where=", ".join(paths),
            got=repeated[0],
            do="Rename one of them.",
        )
    return dict(zip(paths, names, strict=True))


def _parse(record: JsonRecord | Broken, where: str) -> Question:
    if isinstance(record, Broken):
        what = "not a line of JSON in UTF-8" if record.reason.startswith("invalid") else "the questions cannot be read"
        raise EvaluationError(what, where=where, got=record.reason, do=FORM)
    row = record.value
    try:
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair passes json, but no tokenizer
    except (ValueError, RecursionError) as error:
        raise EvaluationError("not a line of JSON in UTF-8", where=where, got=excerpt(str(error))) from error
    problem = _problem(row)
    if problem:
        raise EvaluationError(problem, where=where, do=FORM)
    return Question(row["question"], tuple(row["choices"]), row["answer"])


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "a row that is not an object"
    missing = [field for field in ("question", "choices", "answer") if field not in row]
    if missing:
        return f"a row without {', '.join(missing)}"
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not _is_text(question):
        return "question is not a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return "choices is not a list of two or more texts"
    if type(answer) is not int or not 0 <= answer < len(choices):  # True is an int too, but no index
        return f"answer is not an index into the {len(choices)} choices, counted from 0"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
