"""Entries of `evaluate.tasks`: a name or a file, or a mapping that says more; its first word says which kind it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from crosscal.files import format_of
from crosscal.plan.sources import Name

TaskName = Annotated[str, Field(pattern=r"^[\w][\w.-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuestionFields(_Section):
    """Which fields of a file's records are what; those left out are found by the names that are common."""

    question: str | None = None
    """A field, or text with {fields} in braces; `a.b` is field b of the mapping in field a."""
    choices: str | Annotated[list[str], Field(min_length=2)] | None = None
    """The field that holds them all; or a field for each; or the words that all questions are answered with."""
    answer: str | None = None
    context: str | None = None
    answer_is: Literal["letter", "text", "number_from_0", "number_from_1"] | None = None


class FileTask(_Section):
    """A file of multiple-choice questions."""

    file: str
    fields: QuestionFields = QuestionFields()
    versions: Annotated[list[Literal["closed", "in_context"]], Field(min_length=1)] | None = None
    """`closed`: without the context; `in_context`: with it in front. Both are two tasks over the same questions. Left
    out, a context is put in front where there is one."""
    limit: int | None = Field(None, ge=1)
    """The first so many; left out, `evaluate.limit`."""
    name: TaskName | None = None
    """Left out, the file's."""


class ContinuationTask(_Section):
    """Which words come next in test documents of a corpus: the true ones among those of other documents."""

    continuation: Name
    """The corpus."""
    questions: int = Field(200, ge=1, le=100_000)
    choices: int = Field(4, ge=2, le=26)
    words: int = Field(20, ge=1, le=1000)
    context_words: int = Field(64, ge=1, le=10_000)
    seed: int = 0
    splits: Annotated[list[Literal["test", "validation"]], Field(min_length=1)] = ["test"]
    """Of which documents; what chooses may read no `test`."""
    name: TaskName | None = None
    """Left out, the corpus's and "continuation"."""


class TextTask(_Section):
    """Perplexity of a file of documents as lm-eval defines it: by word, and by byte, whatever the tokenizer."""

    perplexity: str
    """The file."""
    text: str = "text"
    """Field that holds the text."""
    limit: int | None = Field(None, ge=1)
    name: TaskName | None = None


class SummariesTask(_Section):
    """Summaries that the model writes of documents: ROUGE against references, overlap with the documents, and, with a
    judge, faithfulness."""

    summaries: str
    """The file."""
    document: str = "document"
    """Field that holds what is to be summarised."""
    reference: str = "summary"
    """Field that holds a summary to compare with."""
    prompt: str = Field("{document}\n\nTL;DR:", pattern=r"\{document\}")
    new_tokens: int = Field(64, ge=1, le=4096)
    judge: str | None = None
    """Folder of a local model of natural language inference."""
    limit: int | None = Field(None, ge=1)
    name: TaskName | None = None


NAMED = "name"
KINDS: dict[str, type[_Section]] = {
    "file": FileTask,
    "continuation": ContinuationTask,
    "perplexity": TextTask,
    "summaries": SummariesTask,
}


def _kind(entry: Any) -> str | None:
    if isinstance(entry, BaseModel):
        return next(kind for kind, section in KINDS.items() if isinstance(entry, section))
    if isinstance(entry, dict):
        return next((kind for kind in KINDS if kind in entry), None)
    return NAMED


Task = Annotated[
    Annotated[str, Tag(NAMED)]
    | Annotated[FileTask, Tag("file")]
    | Annotated[ContinuationTask, Tag("continuation")]
    | Annotated[TextTask, Tag("perplexity")]
    | Annotated[SummariesTask, Tag("summaries")],
    Discriminator(
        _kind,
        custom_error_type="task",
        custom_error_message=f"a task is a name, a file of questions, or a mapping with {', '.join(KINDS)}",
    ),
]


def with_paths(task: Task, absolute: Callable[[str], str]) -> Task:
    """Files as `absolute` calls them; anything else as it is."""
    if isinstance(task, FileTask):
        return task.model_copy(update={"file": absolute(task.file)})
    if isinstance(task, TextTask):
        return task.model_copy(update={"perplexity": absolute(task.perplexity)})
    if isinstance(task, SummariesTask):
        judge = None if task.judge is None else absolute(task.judge)
        return task.model_copy(update={"summaries": absolute(task.summaries), "judge": judge})
    return absolute(task) if isinstance(task, str) and format_of(task) else task


def continued_corpora(tasks: Sequence[Task]) -> list[str]:
    """Those that questions on what comes next are made of."""
    return list(dict.fromkeys(task.continuation for task in tasks if isinstance(task, ContinuationTask)))
