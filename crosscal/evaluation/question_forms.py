"""Detect which fields of a record are the question, its choices, the answer and the context.

Files of exam and knowledge questions vary: choices are a list, a mapping by letter, texts with labels, or one column
each; answers are letters, numbers or words; a context is a text or a list of texts. Fields that the plan does not name
are detected by common names and shapes in the first record; the result then holds for the whole file.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# In order of preference; only letters and digits count, without case: `answerKey` and `answer_key` are equal.
QUESTION = ("question", "questionstem", "stem", "query", "prompt", "input", "goal", "qtext", "ctx", "citingprompt")
CHOICES = ("choices", "options", "endings", "candidates", "answers")
ANSWER = (
    *("answeridx", "answerindex", "answerkey", "correctoption", "correctindex", "cop", "finaldecision", "label"),
    *("gold", "target", "correctanswer", "correct", "ra", "answer"),
)
CONTEXT = ("contexts", "context", "passage", "abstract", "article", "support")
COLUMN = re.compile(r"(option|choice|op|opt|answer|sol|ending|holding|)([a-z]|\d)")
TEXTS, LABELS = ("text", "texts", "content"), ("label", "labels", "key")
WORDS = (("yes", "no"), ("yes", "no", "maybe"), ("true", "false"))
"""Choices of records that list none."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
MISSING = object()


@dataclass(frozen=True)
class Fields:
    """The fields of a file as the plan names them; None: detect."""

    question: str | None = None
    """Name of a field, or a template with {fields} in braces; `a.b` is field b of the mapping in field a."""
    choices: str | tuple[str, ...] | None = None
    """The field that holds all; or for each choice a field, a template with {fields}, or its text itself."""
    answer: str | None = None
    context: str | None = None
    answer_is: str | None = None
    """`letter`, `text`, `number_from_0` or `number_from_1`."""


@dataclass(frozen=True)
class RecordForm:
    """Which fields of a file's records are read as what."""

    question: str
    choices: str | tuple[str, ...]
    answer: str
    context: str | None = None
    are_words: bool = False
    """Whether `choices` are the texts of the choices, the same in every record."""

    @property
    def is_native(self) -> bool:
        """Whether this is the native form, in which an answer is an index from 0."""
        return (self.question, self.choices, self.answer) == ("question", "choices", "answer")

    def __str__(self) -> str:
        shown = self.choices if isinstance(self.choices, str) else ", ".join(self.choices)
        said = f"question from {self.question}, choices {'are the words' if self.are_words else 'from'} {shown}"
        return f"{said}{f', context from {self.context}' if self.context else ''}, answer from {self.answer}"


@dataclass(frozen=True)
class ParsedRecord:
    """The content of a record under a form."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...] | None
    """Labels of the choices in the file."""
    answer: Any
    context: str | None


class FormMismatch(Exception):
    """A record does not fit a form, or no form was found; the message gives the reason."""


def form_of(records: Sequence[Mapping[str, Any]], given: Fields) -> RecordForm:
    """Return the form: fields that the plan does not give are detected in the first record. Raises `FormMismatch`
    naming what is missing.

    If records hold no choices, these are inferred from the answers of all records (see `WORDS`).
    """
    first = records[0]
    names = list(_names(first))
    question, answer = given.question or _first(names, QUESTION), given.answer or _first(names, ANSWER)
    missing = [what for what, found in (("question", question), ("answer", answer)) if found is None]
    if question is None or answer is None:
        raise FormMismatch(f"no field that is the {' or the '.join(missing)}")
    choices = given.choices or _choices(first, names)
    are_words = isinstance(choices, tuple) and not any(map(partial(_is_there, first), choices))
    if choices is None:
        choices, are_words = _words([value_of(record, answer) for record in records]), True
    if choices is None:
        raise FormMismatch("no field that holds the choices")
    context = given.context or _context(first, names)
    used = [question, answer, *[context] * (context is not None)]
    used += [] if are_words else [choices] if isinstance(choices, str) else choices
    for name in used:
        if not _is_there(first, name):
            raise FormMismatch(f"no field {name}")
    return RecordForm(question, choices, answer, context, are_words)


def parts_of(record: Mapping[str, Any], form: RecordForm) -> ParsedRecord:
    """Return the content of a record. Raises `FormMismatch` with what is wrong with it."""
    used = [form.question, *([form.choices] if isinstance(form.choices, str) else []), form.answer]
    missing = [name for name in used if not _is_there(record, name)]
    if missing:
        raise FormMismatch(f"a row without {', '.join(missing)}")
    question = _text(record, form.question)
    if not is_text(question):
        raise FormMismatch(f"{form.question} is not a text")
    choices, labels = _labelled(record, form)
    context = _text(record, form.context) if form.context else None
    return ParsedRecord(question, choices, labels, value_of(record, form.answer), context)


def _labelled(record: Mapping[str, Any], form: RecordForm) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    if isinstance(form.choices, tuple):
        texts = list(form.choices) if form.are_words else [_text(record, name) for name in form.choices]
        texts, labels = _without_blank_end(texts, None)
        name = "choices" if form.are_words else ", ".join(form.choices)
    else:
        name = form.choices
        texts, labels = _listed(value_of(record, name)) or ([], None)
    if len(texts) < 2 or not all(map(is_text, texts)):
        raise FormMismatch(f"{name} is not a list of two or more texts")
    return tuple(texts), labels


def _listed(value: Any) -> tuple[list[Any], tuple[str, ...] | None] | None:
    """(texts, labels) of the choices in one field; None if the value does not have that shape."""
    if isinstance(value, Mapping):
        texts, labels = _under(value, TEXTS), _under(value, LABELS)
        if isinstance(texts, list) and isinstance(labels, list):
            return (texts, tuple(map(str, labels))) if len(texts) == len(labels) else None
        is_lettered = len(value) > 1 and all(len(str(key).strip(" ().:")) == 1 for key in value)
        return _without_blank_end(list(value.values()), tuple(map(str, value))) if is_lettered else None
    if not isinstance(value, list):
        return None
    if value and all(isinstance(one, Mapping) for one in value):
        texts, labels = ([_under(one, names) for one in value] for names in (TEXTS, LABELS))
        return texts, tuple(map(str, labels))
    return value, None


def _under(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in value if _plain(name) in names), None)


def _without_blank_end(texts: list[Any], labels: tuple[str, ...] | None) -> tuple[list[Any], tuple[str, ...] | None]:
    """Drop blank choices at the end: records with fewer choices leave the last columns, or letters, blank."""
    while texts and (texts[-1] is None or texts[-1] == ""):
        texts, labels = texts[:-1], labels and labels[:-1]
    return texts, labels


def _names(record: Mapping[str, Any]) -> Iterator[str]:
    """Field names, and `question.inner` for the fields of a question that is a mapping."""
    for name, value in record.items():
        if isinstance(value, Mapping) and _plain(name) in QUESTION:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_plain = {_plain(name.rpartition(".")[2]): name for name in reversed(names)}
    return next((by_plain[one] for one in wanted if one in by_plain), None)


def _choices(record: Mapping[str, Any], names: Sequence[str]) -> str | tuple[str, ...] | None:
    """One field whose value has the shape of choices, or columns numbered from a, 0 or 1."""
    for wanted in CHOICES:
        name = _first(names, [wanted])
        if name is not None and _listed(value_of(record, name)) is not None:
            return name
    columns: dict[str, dict[str, str]] = {}
    for name in names:
        match = COLUMN.fullmatch(_plain(name))
        if match and not (match[1] == "" and match[2].isdigit()):
            columns.setdefault(match[1], {})[match[2]] = name
    for found in columns.values():
        for order in (string.ascii_lowercase, string.digits, string.digits[1:]):
            run = list(itertools.takewhile(found.__contains__, order))
            if len(run) > 1:
                return tuple(found[suffix] for suffix in run)
    return None


def _words(answers: Sequence[Any]) -> tuple[str, ...] | None:
    """The first of WORDS that contains every answer; None if none does."""
    told = {("yes" if each else "no") if isinstance(each, bool) else each for each in answers if is_told(each)}
    plain = {each.strip().casefold() for each in told}
    return next((words for words in WORDS if plain <= set(words)), None) if len(told) else None


def is_told(value: Any) -> bool:
    return isinstance(value, bool | str)


def _context(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    name = _first(names, CONTEXT)
    inner = value_of(record, name) if name else None
    if isinstance(inner, Mapping):  # e.g. texts with their headings
        within = _first(list(inner), CONTEXT)
        return f"{name}.{within}" if within else None
    return name


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or of field b in the mapping of field a (`a.b`); MISSING if there is none."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inner = record.get(head)
    return value_of(inner, rest) if dot and isinstance(inner, Mapping) else MISSING


def _is_there(record: Mapping[str, Any], name: str) -> bool:
    inner = _FIELD.findall(name)
    return all(value_of(record, each) is not MISSING for each in ([one for one in inner if one] if inner else [name]))


def _text(record: Mapping[str, Any], name: str) -> Any:
    """Text of a field, with one paragraph per item of a list, or of a template with {fields}; None if it is no text."""
    if not _FIELD.search(name):
        value = value_of(record, name)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return "\n".join(value)
        return value if isinstance(value, str) else None
    parts = {one: _text(record, one) for one in _FIELD.findall(name) if one}
    if None in parts.values():
        return None
    return _FIELD.sub(lambda match: parts[match[1]] if match[1] else match[0][0], name)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).casefold())
