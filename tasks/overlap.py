"""Check whether a run's calibration text contains the text that its models are measured on."""

from __future__ import annotations

from typing import Any

from crosscal.corpora import load_corpus
from crosscal.errors import CorpusError, CrosscalError
from crosscal.evaluation.tasks import LocalTask
from crosscal.plan import CompressionPlan, SelfGenerated
from crosscal.progress import Report, silent
from crosscal.stages.leaks import ComparedTexts, as_json, compared, leak
from crosscal.tasks.corpora import stored_name
from crosscal.tasks.questions import local_tasks
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import samples_needed


def _questions(plan: CompressionPlan, *, keep: bool) -> list[LocalTask]:
    """Return tasks of local files; before a run none if some file cannot be read, which `refusals` reports."""
    try:
        return [task for task in local_tasks(plan) if isinstance(task, LocalTask)]
    except CrosscalError:
        if keep:
            raise
        return []


def _calibrated(plan: CompressionPlan) -> set[str]:
    """Return the corpora whose training text is calibrated on, those included whose documents' beginnings the model
    continues."""
    drawn = {name for name, _ in samples_needed(plan)}
    sources = [plan.corpora[name] for name in drawn]
    return drawn | {each.seeds for each in sources if isinstance(each, SelfGenerated) and each.seeds is not None}


def overlap_of(spec: RunSpec, *, keep: bool = True, report: Report = silent) -> tuple[dict[str, Any], Exception | None]:
    """Return how much of the evaluation sets calibration text contains, and the error that stops a run because of it.

    `keep`: store the findings, and raise for a corpus that is not ingested; else such corpora are left out.
    """
    corpora, plan = {}, spec.parsed
    for name, origin in plan.document_corpora.items():
        stored = stored_name(name, origin)
        try:
            corpora[name] = load_corpus(spec.store, stored, spec.versions.get(stored))
        except CorpusError:
            if keep:  # a run has ingested them all
                raise
    texts = ComparedTexts.of(spec.store, corpora, _calibrated(plan), _questions(plan, keep=keep))
    found = compared(texts, keep=keep, report=report)
    allowed = plan.evaluate.allow_leaks
    return as_json(found, allowed), leak(found, allowed)
