"""Write the files of a run that users read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task

from crosscal.errors import MissingArtifact
from crosscal.evaluation import PERPLEXITY, VALIDATION, Measurement
from crosscal.evaluation.mcnemar import change
from crosscal.evaluation.measurement import ITEMS
from crosscal.evaluation.summarise import risk_ratios
from crosscal.files import write_whole
from crosscal.report import ResultRow, WindowRow, write_report, write_rows
from crosscal.report.packed import dense_notes, dense_text
from crosscal.report.rows import DocumentRow, LayerRow, QuestionRow
from crosscal.stages.describe import readable_samples, sample_quality, starved_experts, with_perplexities
from crosscal.stages.evaluate import EvaluationSet
from crosscal.stages.heldout_text import HeldOutText
from crosscal.tasks.artifacts import show_run
from crosscal.tasks.evaluation import AGAIN, DENSE, evaluation_set_of, rows_of
from crosscal.tasks.options import PLAIN
from crosscal.tasks.overlap import overlap_of
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import Variant


@dataclass(frozen=True)
class _Judged:
    """The final results of one model."""

    measured: list[Measurement]
    layers: list[LayerRow]
    size_bytes: int | None
    failed: str | None


@task(name="results", task_run_name="write results", **PLAIN)
def write_results(spec: RunSpec, stored: dict[str, str], measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write `results.jsonl`, `layers.jsonl`, and the values that perplexities, accuracies and summary scores average:
    `windows.jsonl`, `questions.jsonl` and `summaries.jsonl`.

    `measured`: model → what `evaluate_model` returned. Returns `failed`, variant → why it cannot be loaded or measured,
    and `notes` on what was not measured and on what is stored dense.
    """
    eval_set, run_dir = evaluation_set_of(spec, stored), Path(spec.run_dir)
    models: list[Variant | None] = [None, *spec.variants()]
    found = {variant: _judged(spec, eval_set, variant, measured[_name(variant)]) for variant in models}
    dense = found[None].measured
    pairs = [(variant, one) for variant, judged in found.items() for one in judged.measured]
    pairs += [(variant, one) for variant in spec.variants() for one in risk_ratios(dense, found[variant].measured)]
    write_rows(run_dir / "windows.jsonl", [row for variant, one in pairs for row in _window_rows(variant, one)])
    write_rows(run_dir / "questions.jsonl", [row for variant, one in pairs for row in _question_rows(variant, one)])
    if scores := [row for variant, one in pairs for row in _document_rows(variant, one)]:
        write_rows(run_dir / "summaries.jsonl", scores)
    else:
        (run_dir / "summaries.jsonl").unlink(missing_ok=True)  # of an earlier plan
    rows = [against_dense(result_row(spec, variant, one), one, dense) for variant, one in pairs]
    write_rows(run_dir / "results.jsonl", rows)
    write_rows(run_dir / "layers.jsonl", [row for judged in found.values() for row in judged.layers])
    dtype = str(spec.source().dtype).removeprefix("torch.")
    judged = {_name(variant): one for variant, one in found.items() if variant is not None}
    texts = {name: dense_text(one.layers, dtype) for name, one in judged.items()}
    sizes = {name: one.size_bytes for name, one in judged.items() if one.size_bytes is not None}
    failed = {name: one.failed for name, one in judged.items() if one.failed}
    spared = [name for name, known in measured.items() if known.get("spared")]
    notes = [
        *eval_set.notes,
        *_error_context(spared),
        *(f"{n} could not be written as a loadable model: {why}" for n, why in failed.items()),
    ]
    return {"failed": failed, "notes": [*notes, *dense_notes(texts, sizes), *eval_set.suite.told]}


def _judged(spec: RunSpec, eval_set: EvaluationSet, variant: Variant | None, known: dict[str, Any]) -> _Judged:
    layers = rows_of(spec, variant) if variant else []
    if why := known.get("spared") or known["failed"]:
        got = known.get("windows", {})
        skipped = [_not_measured(text, why, got if text.split == VALIDATION else {}) for text in eval_set.texts]
        return _Judged(skipped, layers, known["size_bytes"], known["failed"])
    measured = eval_set.find(known["weights"])
    if measured is None:
        raise MissingArtifact("a model's numbers are not in the store any more", where=_name(variant), do=AGAIN)
    return _Judged(measured, layers, known["size_bytes"], None)


def _not_measured(text: HeldOutText, why: str, got: Mapping[str, Sequence[float]]) -> Measurement:
    """Return a measurement without a value, with the windows that were measured nevertheless."""
    nll = tuple(got.get(text.corpus, ()))
    tokens = len(nll) * text.tokens_SL.shape[1]
    return Measurement(text.corpus, text.split, PERPLEXITY, None, None, tokens, 0.0, why, window_nll=nll)


def _error_context(spared: Sequence[str]) -> list[str]:
    return [f"not evaluated, for the reasons in the report: {', '.join(spared)}"] if spared else []


def _name(variant: Variant | None) -> str:
    return variant.name if variant else DENSE


def _window_rows(variant: Variant | None, one: Measurement) -> Iterator[WindowRow]:
    if one.window_nll:
        yield WindowRow(_name(variant), one.corpus_or_task, one.split, list(one.window_nll))


def _question_rows(variant: Variant | None, one: Measurement) -> Iterator[QuestionRow]:
    if one.question_correct is not None:
        yield QuestionRow(_name(variant), one.corpus_or_task, one.split, one.metric, list(one.question_correct))


def _document_rows(variant: Variant | None, one: Measurement) -> Iterator[DocumentRow]:
    if one.document_score is not None:
        yield DocumentRow(_name(variant), one.corpus_or_task, one.split, one.metric, list(one.document_score))


def against_dense(row: ResultRow, one: Measurement, dense: Sequence[Measurement]) -> ResultRow:
    """Return the row with the changes against the dense model's answers to the same questions."""
    place = (one.corpus_or_task, one.split, one.metric)
    before = next((d.question_correct for d in dense if (d.corpus_or_task, d.split, d.metric) == place), None)
    if row.variant == DENSE or not before or not one.question_correct:
        return row
    found = change(before, one.question_correct)
    return dataclasses.replace(row, lost=found.lost, won=found.won, p=found.p)


def result_row(spec: RunSpec, variant: Variant | None, found: Measurement) -> ResultRow:
    """Return a measurement with its settings; `variant` None is the dense model."""
    return ResultRow(
        variant=_name(variant),
        method=variant.method if variant else DENSE,
        setting=variant.setting if variant else {},
        amounts=[amount.as_row() for amount in variant.amounts] if variant else [],
        upstream=variant.upstream if variant else DENSE,
        mixture=variant.mixture.as_dict() if variant and variant.mixture and not variant.search else {},
        found_by=variant.found_by if variant else None,
        trace_normalised=bool(variant and variant.trace_normalised),
        seed=variant.seed if variant else spec.parsed.seeds[0],
        model=Path(spec.parsed.model).name,
        device=spec.device,
        windows=None if found.window_nll is None else len(found.window_nll),
        **{name: value for name, value in dataclasses.asdict(found).items() if name not in ITEMS},
    )


@task(name="describe", task_run_name="describe calibration", **PLAIN)
def describe_samples(spec: RunSpec) -> dict[str, Any]:
    """Write `samples.json` with some of each corpus's calibration text; return `calibration_quality` of all of it, and
    its `overlap` with evaluation text, for the run's record.

    Raises `EvaluationError` for evaluation text in the calibration text, unless the plan allows it.
    """
    samples, plan = spec.sampled, spec.parsed
    kinds = {name: corpus.source for name, corpus in plan.corpora.items()}
    described = {name: corpus.described for name, corpus in plan.corpora.items()}
    shown = readable_samples(spec.store, spec.source(), samples, described, per_corpus=2)
    write_whole(Path(spec.run_dir) / "samples.json", json.dumps(shown, ensure_ascii=False, indent=1))
    quality = sample_quality(spec.store, spec.source(), samples, kinds, plan.calibration.begin_token)
    overlap, error = overlap_of(spec)
    if error:
        raise error
    return {"calibration_quality": quality, "overlap": overlap}


def after_reading(spec: RunSpec, quality: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the calibration pass adds: `calibration_quality` with perplexities, and `starved_experts`."""
    source, cached = spec.source(), spec.cached
    vocabulary = source.config.get_text_config().vocab_size
    known = with_perplexities(quality, cached, spec.sampled, vocabulary)
    return {"calibration_quality": known, "starved_experts": starved_experts(cached, source.blocks, spec.sampled)}


@task(name="report", task_run_name="write report", **PLAIN)
def make_report(run_dir: str) -> str:
    """Write `report.html`, and show its main results as artifacts of the run; return the report's path."""
    path = write_report(Path(run_dir))
    show_run(Path(run_dir))
    return str(path)
