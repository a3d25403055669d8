"""Evaluation tasks of any origin: local questions, local texts for lm-eval, lm-eval's own names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.evaluation.choices import Choices
from crosscal.evaluation.encoded import encoded
from crosscal.evaluation.measurement import TEST
from crosscal.evaluation.question_files import Question
from crosscal.evaluation.question_rows import read_rows
from crosscal.evaluation.summarise import SummaryTask
from crosscal.files import Broken, format_of, lines

CLOSED, IN_CONTEXT = "closed", "in_context"
"""Versions of one task: the same questions without and with their contexts."""


@dataclass(frozen=True, eq=False)
class LocalTask:
    """Multiple-choice questions under a name, scored here."""

    name: str
    questions: tuple[Question, ...]
    split: str = TEST
    told: str = ""
    """Where the questions come from and how they were read, in words."""

    @cached_property
    def digest(self) -> str:
        """Digest of the questions, independent of the task's name."""
        return _digest([astuple(question) for question in self.questions])

    def choices(self, tokenizer: Any, max_length: int) -> Choices:
        """Return the questions encoded for a model."""
        return Choices(self.name, encoded(self.questions, tokenizer, name=self.name, max_length=max_length))


@dataclass(frozen=True)
class TextTask:
    """Documents under a name, for which lm-eval computes perplexity per word and per byte."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        return _digest(self.documents)


Task = str | LocalTask | TextTask | SummaryTask
"""A string is the name of an lm-eval task, or the path of a question file in any form that is detected."""


def version_name(name: str, version: str) -> str:
    return f"{name}-{version}"


def read_texts(path: str | Path, field: str) -> tuple[str, ...]:
    """Return the documents of a file: all of a `.txt` or `.md`, or one field of each record of any other format.

    Raises `EvaluationError` naming file and line.
    """
    path = Path(path)
    is_whole = format_of(path) in (".txt", ".md")
    texts = (_whole(path),) if is_whole else tuple(text for (text,) in read_fields(path, field))
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise EvaluationError("no text in the file", where=str(path))
    return texts


def read_fields(path: str | Path, *names: str) -> Iterator[tuple[str, ...]]:
    """Yield these fields of every record, each a text. Raises `EvaluationError` naming file and line."""
    found = read_rows(Path(path))
    for row in found if isinstance(found, tuple) else found.with_header:
        texts = tuple(row.value.get(name) for name in names)
        for name, text in zip(names, texts, strict=True):
            if not isinstance(text, str):
                got, do = f"fields {', '.join(row.value)}", "Say in the plan which field it is."
                raise EvaluationError(f"{name} is not a text", where=row.where, got=got, do=do)
        yield tuple(map(str, texts))


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
