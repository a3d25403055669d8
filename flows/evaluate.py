"""Measure one model directory on a plan's held-out windows and tasks: `crosscal evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crosscal.calibration import tokenizer_digest
from crosscal.errors import ModelError, UsageError
from crosscal.evaluation import Measurement
from crosscal.flows.quiet import quiet_libraries
from crosscal.plan import CompressionPlan
from crosscal.plan.tasks import continued_corpora
from crosscal.progress import reporting
from crosscal.report import ResultRow
from crosscal.stages.evaluate import measure
from crosscal.stages.preflight import block_shapes
from crosscal.tasks.corpora import bring_in
from crosscal.tasks.evaluating_memory import unanswerable
from crosscal.tasks.evaluation import evaluation_set_of
from crosscal.tasks.model import identify
from crosscal.tasks.results import result_row
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import variants

GIVEN = "given"
"""Method of a model that is neither the plan's own nor named like one of its variants."""


def evaluate_model(model: Path, plan: CompressionPlan, home: str) -> list[dict[str, Any]]:
    """Measure a model directory; return rows as in `results.jsonl`.

    A folder named like a variant of the plan is taken to be that variant. Raises `ModelError` when it is no model
    directory, `PlanError` for tasks when the model does not fit in memory, and `UsageError` when its tokenizer is not
    the plan's: perplexities over different tokens are not comparable.
    """
    quiet_libraries()
    if not (model / "config.json").is_file():
        raise ModelError("this is not a model directory", where=str(model), got="no config.json")
    spec = RunSpec(plan.model_dump(mode="json"), home)
    known = identify(spec)
    spec = dataclasses.replace(spec, model=known["model"], device=known["device"], dtype=known["dtype"])
    if tokenizer_digest(model) != tokenizer_digest(spec.source().path):
        raise UsageError(
            "the model's tokenizer is not that of the plan's model",
            where=str(model),
            do=f"Measure it on windows of its own: --set model={model.absolute()}.",
        )
    for error in unanswerable(plan, spec.source(), block_shapes(spec.source(), spec.cached)):
        raise error
    needed = list(dict.fromkeys([*plan.perplexity_corpora, *continued_corpora(plan.evaluate.tasks)]))
    found = bring_in(spec, lambda task, *given: task.fn(*given), needed)
    stored = {name: corpus["stored"] for name, corpus in found.items()}
    with reporting() as report:
        found = measure(evaluation_set_of(spec, stored, report), model, name=model.name, report=report)
    return [dataclasses.asdict(_row(spec, plan, model, measurement)) for measurement in found]


def _row(spec: RunSpec, plan: CompressionPlan, model: Path, found: Measurement) -> ResultRow:
    variant = next((variant for variant in variants(plan) if variant.name == model.absolute().name), None)
    row = result_row(spec, variant, found)
    if variant is not None or model.resolve() == Path(plan.model).resolve():
        return row
    return dataclasses.replace(row, variant=model.absolute().name, method=GIVEN, upstream=GIVEN)
