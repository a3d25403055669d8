"""What a model is asked, whatever it came from: questions of this machine, texts for lm-eval, lm-eval's own names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import Question
from crosscal.evaluation.question_rows import read_rows
from crosscal.files import Broken, format_of, lines

CLOSED, IN_CONTEXT = "closed", "in_context"
"""Versions of one task, over the same questions without and with their contexts."""


@dataclass(frozen=True)
class QuestionTask:
    """Multiple-choice questions under a name, scored by us."""

    name: str
    questions: tuple[Question, ...]
    split: str = "test"
    told: str = ""
    """Where they are from and as what they were read, in words."""

    @cached_property
    def digest(self) -> str:
        """Of all that is asked, not of what it is called."""
        return _digest([astuple(question) for question in self.questions])


@dataclass(frozen=True)
class TextTask:
    """Documents under a name, whose perplexity by word and byte lm-eval computes."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        return _digest(self.documents)


Task = str | QuestionTask | TextTask
"""A text is lm-eval's name of one of its own tasks, or the path of a file of questions in any form that is found."""


def version_name(name: str, version: str) -> str:
    return f"{name}-{version}"


def read_texts(path: str | Path, field: str) -> tuple[str, ...]:
    """The documents of a file: all of a `.txt` or `.md`, or a field of each record of any other format.

    Raises `EvaluationError` naming file and line.
    """
    path = Path(path)
    texts = (_whole(path),) if format_of(path) in (".txt", ".md") else tuple(_texts(path, field))
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise EvaluationError("no text in the file", where=str(path))
    return texts


def _texts(path: Path, field: str) -> Iterator[str]:
    found = read_rows(path)
    for row in found if isinstance(found, tuple) else found.with_header:
        text = row.value.get(field)
        if not isinstance(text, str):
            got, do = f"fields {', '.join(row.value)}", "Name the field that holds the text (`text:`)."
            raise EvaluationError(f"{field} is not a text", where=row.where, got=got, do=do)
        yield text


def _whole(path: Path) -> str:
    parts = []
    for line in lines(path):
        if isinstance(line, Broken):
            where = f"{path}, line {line.number}"
            raise EvaluationError("the text cannot be read", where=where, got=line.reason)
        parts.append(line.data)
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError("not a text in UTF-8", where=str(path), got=str(error)) from error


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
