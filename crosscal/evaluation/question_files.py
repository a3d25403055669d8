"""Local files of multiple-choice questions.

JSON objects (one per line, an array, or an object that maps ids to them), CSV and TSV with or without a header,
Parquet; all but the last plain or compressed. The native form is
`{"question": str, "choices": [str, …], "answer": index}`; other common forms are detected (see `question_forms`), and
the plan can describe any other by its fields. A damaged row, or a file that cannot be read to its end, is an error and
is never skipped: an accuracy over fewer questions would look the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crosscal.errors import EvaluationError
from crosscal.evaluation.answers import TEXT, TOLD, AnswerRow, read_answers
from crosscal.evaluation.question_forms import Fields, FormMismatch, RecordForm, form_of, parts_of
from crosscal.evaluation.question_rows import FORM, FORMATS, FORMS, CsvTable, Row, read_rows
from crosscal.files import distinct_stems, excerpt, format_of

__all__ = [
    "FORMS",
    "Fields",
    "Question",
    "QuestionFile",
    "is_question_file",
    "read_question_file",
    "read_questions",
]

NOTHING_SAID = Fields()


@dataclass(frozen=True)
class Question:
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index into `choices`."""
    context: str | None = None
    """Text that belongs to the question and is not part of it yet; None if the file has none."""

    @property
    def closed_book(self) -> Question:
        """The question without its context: tests what the model knows."""
        return replace(self, context=None)

    @property
    def in_context(self) -> Question:
        """The question after its context and a blank line: tests what the model finds there."""
        return replace(self, question="\n\n".join(part for part in (self.context, self.question) if part), context=None)


@dataclass(frozen=True)
class QuestionFile:
    questions: tuple[Question, ...]
    read_as: str
    """Which fields were used as what, in words."""
    is_native: bool
    """Whether the file has the native form: its questions are complete, other fields are ignored."""

    @property
    def has_context(self) -> bool:
        return any(question.context is not None for question in self.questions)

    @property
    def holds_context(self) -> bool:
        """Whether some question repeats its context, so that it cannot be asked without it."""
        return any(question.context and question.context.strip() in question.question for question in self.questions)


def is_question_file(task: str) -> bool:
    """Return whether a task of the plan is the path of a local question file, not an lm-eval name."""
    return format_of(task) in FORMATS


def read_questions(path: str | Path) -> list[Question]:
    """Return all questions of a file. Raises `EvaluationError` naming file, line and what is wrong."""
    return list(read_question_file(path).questions)


def read_question_file(path: str | Path, fields: Fields = NOTHING_SAID) -> QuestionFile:
    """Return all questions of a file and how its fields were read; fields missing in `fields` are detected.

    Raises `EvaluationError` naming file, line, what was found there and what to write in the plan.
    """
    path = Path(path)
    found = read_rows(path)
    if not found:
        raise EvaluationError("no questions in the file", where=str(path), do=FORM)
    rows, form = _with_form(path, found, fields)
    answered, contexts, questions = [], [], []
    for row in rows:
        try:
            parts = parts_of(row.value, form)
        except FormMismatch as problem:
            raise EvaluationError(str(problem), where=row.where, do=_remedy(path, row, form)) from problem
        answered.append(AnswerRow(parts.choices, parts.labels, parts.answer, row.where))
        contexts.append(parts.context)
        questions.append(parts.question)
    answer_is = fields.answer_is or (TEXT if form.are_words else None)
    try:
        indices, way = read_answers(answered, form.answer, answer_is, native=form.is_native)
    except EvaluationError as error:
        do = error.do if form.is_native else f"{error.do} {_read_so(form, found)}"
        raise EvaluationError(error.what, where=error.where, got=error.got, do=do) from error
    read = [
        Question(question, row.choices, index, context)
        for question, row, index, context in zip(questions, answered, indices, contexts, strict=True)
    ]
    return QuestionFile(tuple(read), f"{form} {TOLD[way]}", form.is_native)


def task_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a distinct name for each file (see `distinct_stems`). Raises `EvaluationError` if two have the same."""
    names = distinct_stems(paths)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise EvaluationError(
            "two files of questions have the same name",
            where=", ".join(paths),
            got=repeated[0],
            do="Rename one of them.",
        )
    return dict(zip(paths, names, strict=True))


def _with_form(path: Path, found: tuple[Row, ...] | CsvTable, fields: Fields) -> tuple[tuple[Row, ...], RecordForm]:
    """Rows, with the names of their columns if they have any, and their form."""
    rows = found.with_header if isinstance(found, CsvTable) else found
    try:
        if rows:
            return rows, form_of([row.value for row in rows], fields)
        raise FormMismatch("nothing behind the first line")
    except FormMismatch as problem:
        unnamed = _without_header(found, fields) if isinstance(found, CsvTable) else None
        if unnamed is not None:
            return unnamed
        row = rows[0] if rows else Row({}, str(path))
        raise EvaluationError(f"{problem}", where=row.where, do=_remedy(path, row, None)) from problem


def _without_header(table: CsvTable, fields: Fields) -> tuple[tuple[Row, ...], RecordForm] | None:
    """Take the columns as question, choices and answer, unless the plan names columns by number; None for too few
    columns."""
    rows = table.without_header
    first, *choices, last = rows[0].value
    if len(choices) < 2 and fields == NOTHING_SAID:
        return None
    said = Fields(
        fields.question or first, fields.choices or tuple(choices), fields.answer or last, fields.context,
        fields.answer_is,
    )  # fmt: skip
    try:
        return rows, form_of([row.value for row in rows], said)
    except FormMismatch:
        return None


def _remedy(path: Path, row: Row, form: RecordForm | None) -> str:
    """Return what to write in the plan for a row that no form fits."""
    if form is not None and form.is_native:
        return FORM
    shown = ", ".join(f"{name}: {excerpt(repr(value))[:30]}" for name, value in row.value.items())
    was = f"{_read_so(form)} " if form else ""
    there = f"Its fields are {excerpt(shown)}. " if shown else ""
    said = f"{{file: {path.name}, fields: {{question: …, choices: …, answer: …}}}}"
    return f"{was}{there}Say which is which in the plan: {said}. Or write our form: {FORM}"


def _read_so(form: RecordForm, found: tuple[Row, ...] | CsvTable = ()) -> str:
    is_unnamed = isinstance(found, CsvTable) and form.question in found.without_header[0].value
    header = "The first line names no question and no answer, so it was read as a row. " if is_unnamed else ""
    return f"{header}Read here: {form}."
