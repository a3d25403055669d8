"""Find the mixtures that a plan leaves open: solve and measure candidates block by block, then choose one.

For a rule on perplexity, some candidates become models, in `candidates/` of the run directory, and are evaluated on
validation windows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prefect import task

from crosscal.evaluation import VALIDATION
from crosscal.files import write_whole
from crosscal.lanes import side_by_side
from crosscal.mixtures import GENERAL
from crosscal.report.rows import LayerRow
from crosscal.stages.allocate import allocated
from crosscal.stages.candidates import Candidate, keep_losses, measure_block, unmeasured
from crosscal.stages.choose_by_rule import model_wanted, perplexities_of, ruled_choice
from crosscal.stages.choose_mixture import candidate, candidates_wanted, choice, search_of
from crosscal.stages.compress import RunContext, blocks_at_once, compress_block, layer_rows, publish_variant
from crosscal.stages.evaluate import EvaluationSet, checkpoint_files, evaluation_set, measure
from crosscal.stages.heldout_text import HeldOutText, windows_for
from crosscal.stages.made_variants import made_before, note_made
from crosscal.tasks.corpora import corpus_of
from crosscal.tasks.evaluation import DENSE, cutting_of
from crosscal.tasks.options import PLAIN, RETRIED
from crosscal.tasks.run_spec import RunSpec, task_report
from crosscal.variants import Variant

CHOICES, CANDIDATES = "choices.json", "candidates"
Wanted = list[tuple[str, list[float]]]
"""(variant, weights) of candidates, the weights in the order of the search's corpora."""
Dense = Mapping[str, Mapping[str, float]]
"""Variant with a rule -> corpus -> perplexity of the dense model on validation windows."""


def wanted_candidates(spec: RunSpec) -> Wanted:
    """Return the candidates to solve next for the mixtures that are open; empty once all searches are over."""
    found = candidates_wanted(spec.run_context(), open_variants(spec))
    return [(variant.name, list(weights)) for variant, weights in found]


def unmeasured_blocks(spec: RunSpec, wanted: Wanted) -> list[int]:
    return unmeasured(spec.run_context(), _candidates(spec, wanted))


@task(name="measure-candidates", task_run_name="candidates, block {block}", **RETRIED)
def measure_candidates(spec: RunSpec, block: int, wanted: Wanted) -> int:
    """Solve a block for some mixtures, and store the losses of each on every corpus. Returns the block."""
    source = spec.source_on_worker() if spec.has_workers else spec.source()
    measure_block(dataclasses.replace(spec.run_context(), source=source), block, _candidates(spec, wanted))
    return block


@task(name="measure-dense", task_run_name="dense model for {name}", **PLAIN)
def measure_dense(spec: RunSpec, stored: dict[str, str], name: str) -> dict[str, float]:
    """Return corpus -> perplexity of the dense model on the validation windows of a variant's rule."""
    with task_report() as report:
        eval_set = _rule_exam(spec, stored, _variant(spec, name))
        return perplexities_of(measure(eval_set, spec.source().path, name=DENSE, report=report))


def wanted_model(spec: RunSpec, stored: dict[str, str], name: str, dense: Mapping[str, float]) -> list[float] | None:
    """Return the weights to evaluate next for a variant with a rule; None once it is settled."""
    variant = _variant(spec, name)
    wanted = model_wanted(spec.run_context(), variant, _rule_exam(spec, stored, variant), dense)
    return None if wanted is None else list(wanted)


@task(name="evaluate-candidate", task_run_name="evaluate {name} at {weights}", **PLAIN)
def evaluate_candidate(spec: RunSpec, stored: dict[str, str], name: str, weights: list[float]) -> None:
    """Write a candidate's model, and measure it on validation windows of general text and the domain."""
    variant = _variant(spec, name)
    one, eval_set = candidate(variant, tuple(weights)), _rule_exam(spec, stored, variant)
    context = dataclasses.replace(spec.run_context(), folder=Path(spec.run_dir) / CANDIDATES)
    made, blocks = made_before(context, one.variant), context.source.blocks
    with task_report() as report:
        if made is not None and (eval_set.find(made.weights) or made.is_whole(blocks)):
            measure(eval_set, Path(made.folder), files=made.files, name=one.variant.name, report=report)
            for block in unmeasured(context, [one]):
                measure_block(context, block, [one])
            return
        folder, rows = _model_of(spec, context, one)
        files = checkpoint_files(folder, one.variant.name, report)
        measure(eval_set, folder, files=files, name=one.variant.name, report=report)
    note_made(context, one.variant, files, rows, keep_earlier=False)


def _model_of(spec: RunSpec, context: RunContext, one: Candidate) -> tuple[Path, list[LayerRow]]:
    """Solve and write a candidate's model, storing its losses; return its folder and layer rows."""
    context, blocks = allocated(context, [one.variant]), range(context.source.blocks)
    measured = dataclasses.replace(context, measured_on=one.corpora)
    jobs = [functools.partial(compress_block, measured, block, [one.variant]) for block in blocks]
    side_by_side(jobs, spec.device, most=blocks_at_once(context, [one.variant]) if spec.device == "cpu" else 1)
    rows = layer_rows(context, [one.variant])
    for block in blocks:
        keep_losses(context, block, one, [row for row in rows if row.block == block])
    return publish_variant(context, one.variant), rows


@task(name="choose", task_run_name="choose mixtures", **PLAIN)
def choose_mixtures(spec: RunSpec, stored: dict[str, str], dense: Dense) -> list[dict[str, Any]]:
    """Choose the mixture of every search and write `choices.json`; remove models of an earlier, different choice."""
    context, file = spec.run_context(), Path(spec.run_dir) / CHOICES
    found = [
        ruled_choice(context, variant, _rule_exam(spec, stored, variant), dense[variant.name])
        if variant.name in dense
        else choice(context, variant)
        for variant in open_variants(spec)
    ]
    before = {one["variant"]: one["weights"] for one in json.loads(file.read_text())} if file.is_file() else {}
    for one in found:
        if before.get(one.variant, one.weights) != one.weights:
            for folder in ("models", "layers"):
                shutil.rmtree(Path(spec.run_dir) / folder / one.variant, ignore_errors=True)
    write_whole(file, json.dumps([one.as_json() for one in found], indent=1, allow_nan=False))
    return [one.as_json() for one in found]


def open_variants(spec: RunSpec) -> list[Variant]:
    """Return the variants whose mixture is to be found by a search."""
    return [variant for variant in spec.variants() if variant.search is not None]


def ruled_variants(spec: RunSpec) -> list[str]:
    """Return the names of variants whose search has a rule on perplexity."""
    return [v.name for v in open_variants(spec) if v.search and v.search.general_within is not None]


def discard_candidates(spec: RunSpec) -> None:
    """Remove the candidates' models, once the blocks of the chosen one have been taken over."""
    shutil.rmtree(Path(spec.run_dir) / CANDIDATES, ignore_errors=True)


def _variant(spec: RunSpec, name: str) -> Variant:
    return next(variant for variant in open_variants(spec) if variant.name == name)


def _candidates(spec: RunSpec, wanted: Wanted) -> list[Candidate]:
    return [candidate(_variant(spec, name), tuple(weights)) for name, weights in wanted]


def rule_texts(spec: RunSpec, stored: Mapping[str, str], variant: Variant) -> tuple[HeldOutText, ...]:
    """Return the validation windows of general text and the domain, as the run measures them."""
    source, cutting, names = spec.source(), cutting_of(spec.parsed), (GENERAL, search_of(variant).domain)
    corpora = [corpus_of(spec, name, stored[name]) for name in names]
    windows = [windows_for(spec.store, corpus, VALIDATION, source, cutting) for corpus in corpora]
    return tuple(HeldOutText(name, VALIDATION, each) for name, each in zip(names, windows, strict=True))


def _rule_exam(spec: RunSpec, stored: Mapping[str, str], variant: Variant) -> EvaluationSet:
    """Return an evaluation set of the rule's validation windows; no test text, no questions."""
    plan = spec.parsed
    empty = evaluation_set(
        spec.store,
        [],
        spec.source(),
        cutting_of(plan),
        tasks=[],
        limit=None,
        batch_tokens=plan.evaluate.batch_tokens,
        device=spec.device,
        dtype=getattr(torch, spec.dtype),
    )
    return dataclasses.replace(empty, texts=rule_texts(spec, stored, variant))
