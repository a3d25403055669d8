"""Mistakes of a plan whose fields are all valid: names of nothing in the plan, and corpora without a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from crosscal.files import format_of, stem_of
from crosscal.plan.sections import CompressionPlan
from crosscal.plan.tasks import ContinuationTask, FileTask, Task, TextTask

MEASURED = ("validation", "test")


def mistakes(plan: CompressionPlan) -> Iterator[str]:
    """Yield each mistake of a plan that was read from a file, beginning with the field."""
    for name, documents in plan.document_corpora.items():
        if documents.path == []:
            why = "an empty list of sources; name a file or folder, or leave `path` out for the corpus in the store"
            yield f"corpora.{name}.path: {why}"
    allowed, tasks = plan.evaluate.allow_leaks, list(task_names(plan))
    sets = [*tasks, *(f"{name} ({split})" for name in plan.document_corpora for split in MEASURED)]
    # A leak is also allowed by the part of its set's name in front of " (" (see `crosscal.stages.leaks`).
    known = {*plan.corpora, *sets, *(name.rpartition(" (")[0] for name in sets if " (" in name)}
    for name in allowed if isinstance(allowed, list) else ():
        if name not in known:
            listed = ", ".join(dict.fromkeys([*plan.corpora, *tasks]))
            yield f"evaluate.allow_leaks: {name!r} is no corpus and no task of this plan; those are: {listed}"


def task_names(plan: CompressionPlan) -> Iterator[str]:
    """Yield the names of all tasks, the same as those of `crosscal.tasks.questions`, without reading any file."""
    stems = [stem_of(path) for path in map(_unnamed_file, plan.evaluate.tasks) if path is not None]
    for task in plan.evaluate.tasks:
        name = _name(task, stems)
        versions = task.versions if isinstance(task, FileTask) else None
        yield from [f"{name}-{version}" for version in versions] if versions else [name]


def _name(task: Task, stems: Sequence[str]) -> str:
    """`stems`: of all files of questions without a name; if two share one, the parent folder stands in front."""
    if (path := _unnamed_file(task)) is not None:
        stem = stem_of(path)
        return stem if stems.count(stem) == 1 else f"{Path(path).resolve().parent.name}_{stem}"
    if isinstance(task, str):
        return task
    if isinstance(task, ContinuationTask):
        return task.name or f"{task.continuation}-continuation"
    if isinstance(task, FileTask):
        return task.name or stem_of(task.file)
    return task.name or stem_of(task.perplexity if isinstance(task, TextTask) else task.summaries)


def _unnamed_file(task: Task) -> str | None:
    """Return the path of a file of questions whose task is named after it."""
    if isinstance(task, FileTask):
        return task.file if task.name is None else None
    return task if isinstance(task, str) and format_of(task) else None
