"""Mistakes of a plan whose fields are all valid: names of nothing in the plan, and corpora without a source."""

from __future__ import annotations

from collections.abc import Iterator

from crosscal.plan.sections import CompressionPlan
from crosscal.plan.tasks import FileTask, names_of

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
    for task, name in zip(plan.evaluate.tasks, names_of(plan.evaluate.tasks), strict=True):
        versions = task.versions if isinstance(task, FileTask) else None
        yield from [f"{name}-{version}" for version in versions] if versions else [name]
