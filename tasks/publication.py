"""Compare a run's best model with the published one of its domain, and move the pointer or say why not."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

from prefect import task

from crosscal.calibration import tokenizer_digest
from crosscal.errors import MissingArtifact, PlanError
from crosscal.evaluation import PERPLEXITY, TEST
from crosscal.landing.records import again_on_conflict, now
from crosscal.plan import BEST, Publish
from crosscal.publication import Decision, Pointer, Published, Rule, decide, model_folder, publish_model
from crosscal.report import LayerRow, ResultRow
from crosscal.report.left_dense import left_dense_of
from crosscal.report.rows import read_rows
from crosscal.stages.evaluate import Examination, measure
from crosscal.store import Store, digest_of
from crosscal.tasks.artifacts import show_decision
from crosscal.tasks.options import PLAIN
from crosscal.tasks.results import DENSE, examination_of
from crosscal.tasks.ticket import Ticket, task_report


@task(name="decide", task_run_name="decide about {domain} v{version}", **PLAIN)
def decide_publication(
    ticket: Ticket, stored: dict[str, str], domain: str, version: int, run_id: str
) -> dict[str, Any]:
    """Publish the run's candidate for a landed domain, or keep it: `outcome`, `reason` and the numbers."""
    rule = ticket.parsed.publish
    assert rule is not None
    store = ticket.store
    variant = candidate_of(rule, Path(ticket.run_dir))
    folder = Path(ticket.run_dir) / "models" / variant
    exam = examination_of(ticket, stored)
    perplexity = _perplexities(exam, folder)
    layers = [row for row in read_rows(Path(ticket.run_dir) / "layers.jsonl", LayerRow) if row.variant == variant]
    stays_dense = left_dense_of(layers).text
    with task_report() as report:
        report(f"putting {variant} into the store", 0, None)
        key = publish_model(store, folder, {"domain": domain, "variant": variant, "corpus_version": version})

    def attempt() -> dict[str, Any]:
        current = Published(store).current(domain)
        decision, earlier = _decide(store, exam, rule, perplexity, current, folder, version)
        facts = {
            "model": key,
            "variant": variant,
            "corpus_version": version,
            "perplexity": {"candidate": perplexity, "published": earlier},
            "run_id": run_id,
            "run_dir": ticket.run_dir,
            "plan": digest_of(ticket.plan),
            "left_dense": stays_dense,
        }
        already = any((move.model, move.corpus_version) == (key, version) for move in Published(store).history(domain))
        if decision.is_published and not already:
            Published(store).move(domain, current, {**facts, "reason": decision.reason, "at": now()})
        outcome = "published" if decision.is_published or already else "kept"
        return {"outcome": outcome, "reason": decision.reason, **facts}

    decided = again_on_conflict(attempt)
    show_decision(domain, version, decided)
    return decided


def candidate_of(rule: Publish, run_dir: Path) -> str:
    """The variant a plan names, or the one of lowest perplexity on its domain."""
    if rule.variant != BEST:
        return rule.variant
    rows = read_rows(run_dir / "results.jsonl", ResultRow)
    wanted = (PERPLEXITY, rule.domain, TEST)
    measured = [row for row in rows if (row.metric, row.corpus_or_task, row.split) == wanted]
    found = {row.variant: math.inf if row.value is None else row.value for row in measured if row.variant != DENSE}
    if not found:
        raise PlanError("there is no model to publish", where="compress", do="Add an entry to `compress`.")
    return min(found, key=lambda name: found[name])


def _decide(
    store: Store,
    exam: Examination,
    rule: Publish,
    perplexity: dict[str, float],
    current: Pointer | None,
    candidate: Path,
    version: int,
) -> tuple[Decision, dict[str, float] | None]:
    """The decision, and what the published model has on the same windows."""
    plain = Rule(rule.domain, rule.tolerance, dict(rule.guard))
    if current is None:
        return decide(plain, perplexity, None), None
    if current.corpus_version > version:
        return Decision(False, f"a model of the newer version {current.corpus_version} is published"), None
    with tempfile.TemporaryDirectory(prefix="crosscal-published-") as aside:
        try:
            folder = model_folder(store, current.model, Path(aside))
        except MissingArtifact:
            decision = decide(plain, perplexity, None)
            return dataclasses.replace(
                decision, reason=f"the published model is gone from the store; {decision.reason}"
            ), None
        if tokenizer_digest(folder) != tokenizer_digest(candidate):
            return Decision(False, "the published model has another tokenizer: perplexities do not compare"), None
        earlier = _perplexities(exam, folder)
    return decide(plain, perplexity, earlier), earlier


def _perplexities(exam: Examination, folder: Path) -> dict[str, float]:
    """Corpus → perplexity; what was measured before is found again."""
    with task_report() as report:
        measured = measure(exam, folder, name=folder.name, report=report)
    found = (one for one in measured if (one.metric, one.split) == (PERPLEXITY, TEST))
    return {one.corpus_or_task: one.value for one in found if one.value is not None}
