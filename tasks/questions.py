"""Turn the entries of `evaluate.tasks` into the tasks and questions that a model is measured on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosscal.corpora import load_corpus
from crosscal.errors import CrosscalError, EvaluationError, PlanError
from crosscal.evaluation import tasks as asked
from crosscal.evaluation.continuation import ContinuationSettings
from crosscal.evaluation.faithfulness import Judge
from crosscal.evaluation.question_files import Fields, is_question_file, read_question_file
from crosscal.evaluation.summarise import SummaryTask
from crosscal.evaluation.tasks import CLOSED, IN_CONTEXT, LocalTask, read_fields, read_texts, version_name
from crosscal.plan import CompressionPlan, ContinuationTask, FileTask, SummariesTask, Task, TextTask, names_of
from crosscal.stages.continuation import continuation
from crosscal.store import digest_file, digest_of
from crosscal.tasks.run_spec import RunSpec

OUR_FORM = "question, choices, answer"
IN_FRONT = "; the context stands in front of the question"


def tasks_of(spec: RunSpec, stored: Mapping[str, str]) -> list[asked.Task]:
    """Return all tasks of the plan; `stored` maps a corpus that questions are made from to its name in the store.

    Raises `EvaluationError` for an unreadable file, naming file and line, `PlanError` for two tasks of one name.
    """
    made = [
        each
        for task, name in _named(spec.parsed)
        if isinstance(task, ContinuationTask)
        for each in _continued(spec, task, name, stored[task.continuation])
    ]
    return [*ready_tasks(spec.parsed), *made]


def ready_tasks(plan: CompressionPlan) -> list[asked.Task]:
    """Return the tasks that need no corpus: files on this machine, and lm-eval's own. Raises as `tasks_of`."""
    continued = [name for task, name in _named(plan) if isinstance(task, ContinuationTask)]
    named = [task for task in plan.evaluate.tasks if isinstance(task, str) and not is_question_file(task)]
    local = list(local_tasks(plan))
    names = [*continued, *named, *(task.name for task in local)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        do = "Give one of them a `name`."
        raise PlanError("two tasks of one name", where="evaluate.tasks", got=", ".join(repeated), do=do)
    return [*local, *named]


def identities_of(plan: CompressionPlan) -> list[list[str]]:
    """Return what the tasks of `ready_tasks` measure, as stored measurements are identified: the content of files, and
    the version of lm-eval where it does the measuring."""
    lm_eval = importlib.metadata.version("lm-eval")
    return [
        [task if isinstance(task, str) else task.digest, *([lm_eval] if isinstance(task, str | asked.TextTask) else [])]
        for task in ready_tasks(plan)
    ]


def local_tasks(plan: CompressionPlan) -> Iterator[LocalTask | asked.TextTask | SummaryTask]:
    """Yield the tasks of files on this machine."""
    for task, name in _named(plan):
        if isinstance(task, TextTask):
            texts = read_texts(task.perplexity, task.text)[: task.limit or plan.evaluate.limit]
            yield asked.TextTask(name, texts)
        elif isinstance(task, SummariesTask):
            yield _summaries(task, name, task.limit or plan.evaluate.limit)
        elif file := _as_file(task):
            yield from _of_file(file, name, file.limit or plan.evaluate.limit)


def task_files(plan: CompressionPlan) -> list[str]:
    """Return the files on this machine that tasks are read from."""
    found = []
    for task in plan.evaluate.tasks:
        if isinstance(task, TextTask):
            found.append(task.perplexity)
        elif isinstance(task, SummariesTask):
            found.append(task.summaries)
        elif file := _as_file(task):
            found.append(file.file)
    return found


def looked_at(plan: CompressionPlan) -> list[dict[str, Any]]:
    """Describe files of questions: their number, and how they are read. Empty if one cannot be (see `refusals`)."""
    try:
        found = [task for task in local_tasks(plan) if isinstance(task, LocalTask)]
    except CrosscalError:
        return []
    return [{"task": task.name, "questions": len(task.questions), "read_as": task.told or OUR_FORM} for task in found]


def _as_file(task: Task) -> FileTask | None:
    if isinstance(task, str) and is_question_file(task):
        return FileTask.model_validate({"file": task})
    return task if isinstance(task, FileTask) else None


def _of_file(task: FileTask, name: str, limit: int | None) -> Iterator[LocalTask]:
    said = task.fields
    choices = said.choices if isinstance(said.choices, str | None) else tuple(said.choices)
    read = read_question_file(task.file, Fields(said.question, choices, said.answer, said.context, said.answer_is))
    if task.versions and (read.holds_context or not read.has_context):
        raise PlanError(
            "questions that hold their context have one version"
            if read.holds_context
            else "questions without a context have one version",
            where=task.file,
            got=", ".join(task.versions),
            do="Say which fields question and context are (`fields: {context: …}`), or leave out `versions`.",
        )
    is_whole = read.holds_context or not read.has_context or (read.is_native and said.context is None)
    versions = task.versions or [CLOSED if is_whole else IN_CONTEXT]
    told = "" if read.is_native and is_whole else read.read_as + (IN_FRONT if versions == [IN_CONTEXT] else "")
    for version in versions:
        asked_so = [q.closed_book if version == CLOSED else q.in_context for q in read.questions[:limit]]
        called = version_name(name, version) if task.versions else name
        yield LocalTask(called, tuple(asked_so), told=told)


def _summaries(task: SummariesTask, name: str, limit: int | None) -> SummaryTask:
    pairs = tuple(read_fields(task.summaries, task.document, task.reference))[:limit]
    if not pairs or not all(text.strip() for pair in pairs for text in pair):
        where = task.summaries
        raise EvaluationError("no documents with references", where=where, do="Leave out what has an empty field.")
    judge_digest = ""
    if task.judge is not None:
        Judge.open(task.judge)
        judge_digest = digest_of({file.name: digest_file(file) for file in sorted(Path(task.judge).glob("*.*"))})
    documents = tuple((document, reference) for document, reference in pairs)
    return SummaryTask(name, documents, task.prompt, task.new_tokens, task.judge, judge_digest)


def _named(plan: CompressionPlan) -> Iterator[tuple[Task, str]]:
    return zip(plan.evaluate.tasks, names_of(plan.evaluate.tasks), strict=True)


def _continued(spec: RunSpec, task: ContinuationTask, name: str, stored: str) -> Iterator[LocalTask]:
    corpus = load_corpus(spec.store, stored, spec.versions.get(stored))
    named = dataclasses.replace(corpus, name=task.continuation)
    settings = ContinuationSettings(task.questions, task.choices, task.words, task.context_words, task.seed)
    for split in task.splits:
        made = continuation(spec.store, named, split, settings)
        few = f"; {task.questions} were asked for" if len(made) < task.questions else ""
        told = f"{len(made)} questions from {split} documents{few}"
        yield LocalTask(name, tuple(made), split, told)
