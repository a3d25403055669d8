"""Local files of multiple-choice questions.

One JSON object a line, plain or compressed (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`):
`{"question": str, "choices": [str, …], "answer": index}`. Other fields are left alone. A damaged row is an error and
never skipped: an accuracy over fewer questions would look the same.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from crosscal.errors import EvaluationError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FORM = 'Each line is {"question": "…", "choices": ["…", "…"], "answer": index of the right choice}.'


@dataclass(frozen=True)
class Question:
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index into `choices`."""


def is_question_file(task: str) -> bool:
    """Whether a task of the plan is a path to a local file of questions rather than an lm-eval name."""
    return task.endswith(SUFFIXES)


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file; `EvaluationError` names file, line and what is wrong."""
    try:
        with _open_lines(Path(path)) as lines:
            questions = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise EvaluationError("the questions cannot be read", where=str(path), got=str(error)) from error
    if not questions:
        raise EvaluationError("no questions in the file", where=str(path), do=FORM)
    return questions


def task_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each file: its stem, with the parent folder in front where two files share a stem."""
    stems = [_stem(Path(path)) for path in paths]
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


def _stem(path: Path) -> str:
    return next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterable[bytes]]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=file)
        elif path.suffix == ".zst":
            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            yield file


def _parse(line: bytes, where: str) -> Question:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair passes json, but no tokenizer
    except ValueError as error:
        raise EvaluationError("not a line of JSON in UTF-8", where=where, got=str(error)) from error
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
