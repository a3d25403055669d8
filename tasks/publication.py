"""Compare a run's models with the dense and the published one of a domain; move the pointer or state why not."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task

from crosscal.calibration import tokenizer_digest
from crosscal.errors import MissingArtifact
from crosscal.evaluation import PERPLEXITY, TEST, VALIDATION, Measurement
from crosscal.landing.records import now
from crosscal.plan import BEST, Publish
from crosscal.publication import Pointer, Published, model_folder, publish_model
from crosscal.publication.policy import DENSE, Decision, PublishRule, Windows, decide
from crosscal.report import LayerRow, ResultRow, WindowRow
from crosscal.report.groups import GENERAL
from crosscal.report.left_dense import left_dense_of
from crosscal.report.rows import read_rows
from crosscal.stages.evaluate import EvaluationSet, measure
from crosscal.store import Store, digest_of
from crosscal.store.refs import again_on_conflict
from crosscal.tasks.artifacts import show_decision
from crosscal.tasks.evaluation import evaluation_set_of
from crosscal.tasks.options import PLAIN
from crosscal.tasks.run_spec import RunSpec, task_report

OTHER_TOKENIZER = (
    "the published model has another tokenizer, perplexities do not compare; "
    "`crosscal publish DOMAIN --variant NAME --run DIR` publishes one by hand"
)


@task(name="decide", task_run_name="decide about {domain} v{version}", **PLAIN)
def decide_publication(
    spec: RunSpec, stored: dict[str, str], domain: str, version: int, run_id: str, asked: str | None = None
) -> dict[str, Any]:
    """Publish one of the run's models for a landed domain, or none; return `outcome`, `reason` and the numbers.

    Validation windows decide; `perplexity` is that of the candidate and the published model on test windows. `asked`,
    the time of the run's request, distinguishes an interrupted decision from one that is to be made again.
    """
    rule, store, run_dir = spec.parsed.publish, spec.store, Path(spec.run_dir)
    assert rule is not None
    eval_set, windows = evaluation_set_of(spec, stored), chosen_by(run_dir)
    same_run = {"corpus_version": version, "run_dir": spec.run_dir, "plan": digest_of(spec.plan)}
    same_run |= {} if asked is None else {"asked": asked}

    def attempt() -> dict[str, Any]:
        published = Published(store)
        moved = [move for move in published.history(domain) if same_run.items() <= move.facts.items()]
        if moved:  # by an attempt that was interrupted afterwards
            return {"outcome": "published", **moved[-1].facts}
        current = published.current(domain)
        decision, earlier = _decide(store, eval_set, rule, windows, current, version)
        facts = {**same_run, "run_id": run_id, "reason": decision.reason, **_about(decision, run_dir, earlier)}
        if decision.variant is not None:
            about = {"domain": domain, "variant": decision.variant, "corpus_version": version}
            with task_report() as report:
                report(f"putting {decision.variant} into the store", 0, None)
                facts["model"] = publish_model(store, run_dir / "models" / decision.variant, about)
        if decision.is_published:
            published.move(domain, current, {**facts, "at": now()})
        return {"outcome": "published" if decision.is_published else "kept", **facts}

    decided = again_on_conflict(attempt)
    show_decision(domain, version, decided)
    return decided


def chosen_by(run_dir: Path) -> dict[str, Windows]:
    """Return variant → corpus → log perplexity of each validation window: all that a decision may use of a run."""
    found: dict[str, dict[str, Sequence[float]]] = defaultdict(dict)
    for row in read_rows(run_dir / "windows.jsonl", WindowRow):
        if row.split == VALIDATION:
            found[row.variant][row.corpus] = row.nll
    return dict(found)


def _decide(
    store: Store,
    eval_set: EvaluationSet,
    asked: Publish,
    windows: Mapping[str, Windows],
    current: Pointer | None,
    version: int,
) -> tuple[Decision, list[Measurement] | None]:
    """Return the decision, and the measurements of the published model if it could be compared."""
    rule = PublishRule(asked.domain, asked.tolerance, dict(asked.guard), asked.min_gain, GENERAL)
    named = [name for name in windows if name != DENSE] if asked.variant == BEST else [asked.variant]
    candidates, dense = {name: windows.get(name, {}) for name in named}, windows.get(DENSE, {})
    if current is None:
        return decide(rule, candidates, dense, None), None
    if current.corpus_version > version:
        return Decision(False, f"a model of the newer version {current.corpus_version} is published"), None
    with tempfile.TemporaryDirectory(prefix="crosscal-published-") as aside:
        try:
            folder = model_folder(store, current.model, Path(aside))
        except MissingArtifact:
            decision = decide(rule, candidates, dense, None)
            gone = f"the published model is gone from the store; {decision.reason}"
            return dataclasses.replace(decision, reason=gone), None
        if tokenizer_digest(folder) != eval_set.tokenizer_digest:
            return Decision(False, OTHER_TOKENIZER), None
        with task_report() as report:
            earlier = measure(eval_set, folder, name=folder.name, report=report)
    seen = {one.corpus_or_task: one.window_nll for one in earlier if one.split == VALIDATION and one.window_nll}
    return decide(rule, candidates, dense, seen), earlier


def _about(decision: Decision, run_dir: Path, earlier: Sequence[Measurement] | None) -> dict[str, Any]:
    """Return the variant of a decision, the changes it rests on and, for reports, its perplexities on test windows."""
    changes = {
        corpus: {name: dataclasses.asdict(each) for name, each in others.items()}
        for corpus, others in decision.changes.items()
    }
    layers = [row for row in read_rows(run_dir / "layers.jsonl", LayerRow) if row.variant == decision.variant]
    results = [row for row in read_rows(run_dir / "results.jsonl", ResultRow) if row.variant == decision.variant]
    return {
        "variant": decision.variant,
        "changes": changes,
        "perplexity": {
            "candidate": reported(results),
            "published": None if earlier is None else reported(earlier),
        },
        "left_dense": left_dense_of(layers).text,
    }


def reported(measured: Sequence[Measurement] | Sequence[ResultRow]) -> dict[str, float]:
    """Return corpus → perplexity on test windows."""
    found = [one for one in measured if (one.split, one.metric) == (TEST, PERPLEXITY)]
    return {one.corpus_or_task: one.value for one in found if one.value is not None}
