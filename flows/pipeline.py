"""The steps of a run in order: from documents to compressed and measured models and a report.

Whatever is already complete (corpora, windows, moments, blocks, measurements) is found in the store or the run
directory and not computed again: a killed run is resumed by running it again.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.task_runners import TaskRunner

from crosscal.compressors import takes_two_streams
from crosscal.flows.cluster import cluster
from crosscal.flows.mixtures import find_mixtures
from crosscal.flows.run_directory import open_run_directory, write_run_record
from crosscal.flows.steps import Stopwatch, step, step_each, step_report
from crosscal.plan import CompressionPlan
from crosscal.progress import Report
from crosscal.tasks.corpora import bring_in, draw_sample
from crosscal.tasks.evaluation import evaluate_model, models_spared, models_to_measure, spare_model
from crosscal.tasks.mixtures import discard_candidates
from crosscal.tasks.model import (
    blocks_side_by_side,
    identify_model,
    parts_to_read,
    publish_models,
    read_gradients,
    read_moments,
    read_part,
    reuse_blocks,
    solve_block,
    solve_sequential,
    summarise_block,
    take_block,
    unsolved_blocks,
    unsummarised_blocks,
)
from crosscal.tasks.race import leave_race, models_to_make, race_model, standing
from crosscal.tasks.results import after_reading, describe_samples, make_report, write_results
from crosscal.tasks.run_spec import RunSpec
from crosscal.tasks.sufficiency import measure_sufficiency
from crosscal.variants import samples_needed

NO_LOSSES = "layer losses were not measured: no method of this plan needs H, so it was not summed"
OF_DENSE_OUTPUTS = (
    "layer losses of {} are against the dense model's outputs: the errors of earlier blocks count as well"
)


@dataclass(frozen=True)
class PreparedRun:
    """A run after ingest: model and corpora are known, independent of the variants made from them."""

    spec: RunSpec
    corpora: dict[str, Any]
    notes: list[str]

    @property
    def stored(self) -> dict[str, str]:
        """Corpus → its name in the store."""
        return {name: corpus["stored"] for name, corpus in self.corpora.items()}


def carry_out(
    plan: CompressionPlan,
    home: str,
    out: str | None,
    mark: Callable[[str], None] = lambda state: None,
    check: Callable[[RunSpec, Mapping[str, str]], None] = lambda spec, stored: None,
) -> dict[str, Any]:
    """Run all steps of a plan; return the record. Inside a Prefect flow run, each step is shown as a task run.

    `mark` is called with "recompressed" once the models exist and "evaluated" once they are measured. `check` is called
    after sampling, before the calibration pass, with the run spec and corpus → its name in the store; it may end the
    run by raising.
    """
    watch = Stopwatch()
    with watch.stage("ingest"):
        begun = begin(plan, home)
    record = make_and_measure(begun, out, watch, mark, check)
    with watch.stage("report"):
        step(make_report, record["run_dir"])
    record["stages"] = watch.seconds
    write_run_record(Path(record["run_dir"]), record)
    return record


def begin(plan: CompressionPlan, home: str) -> PreparedRun:
    """Identify the model and ingest the corpora of a plan."""
    spec = RunSpec(plan.model_dump(mode="json"), home if "://" in home else str(Path(home).absolute()))
    known = step(identify_model, spec)
    spec = dataclasses.replace(spec, model=known["model"], device=known["device"], dtype=known["dtype"])
    corpora = bring_in(spec, step)
    return PreparedRun(dataclasses.replace(spec, versions=versions_of(corpora)), corpora, known["notes"])


def make_and_measure(
    begun: PreparedRun,
    out: str | None,
    watch: Stopwatch,
    mark: Callable[[str], None] = lambda state: None,
    check: Callable[[RunSpec, Mapping[str, str]], None] = lambda spec, stored: None,
) -> dict[str, Any]:
    """Run the steps from sampling to measured models, that is, `carry_out` after ingest and without the report."""
    spec, stored, plan = begun.spec, begun.stored, begun.spec.parsed
    with watch.stage("sample"):
        needed = samples_needed(plan, spec.variants())
        samples = [step(draw_sample, spec, name, stored.get(name, name), seed) for name, seed in needed]
        spec = dataclasses.replace(spec, samples=samples)
        check(spec, stored)
        run_dir = open_run_directory(spec, plan, out)
        spec = dataclasses.replace(spec, run_dir=str(run_dir))
        described = step(describe_samples, spec)
    with cluster(plan.execution) as workers:
        with watch.stage("moments"):
            readings = list(read_model(workers, spec))
            described |= after_reading(spec, described["calibration_quality"])
            if plan.calibration.sufficiency:
                described["sufficiency"] = step(measure_sufficiency, spec)
        choices: list[dict[str, Any]] = []
        if any(variant.search for variant in spec.variants()):
            with watch.stage("mixtures"):
                spec, choices = find_mixtures(workers, spec, stored)
        with watch.stage("solve"):
            spec = dataclasses.replace(spec, to_make=models_to_make(spec, stored))
            step(reuse_blocks, spec)
            discard_candidates(spec)
            summarise_blocks(workers, spec)
            solve_blocks(workers, spec)
            sequential = spec.variants_to_make("sequential")
            readings += [step(solve_sequential, spec, variant.name) for variant in sequential]
            step(publish_models, spec)
    mark("recompressed")
    with watch.stage("evaluate"):
        judged = step(write_results, spec, stored, evaluate_models(spec, stored))
    mark("evaluated")
    record = _record(spec, watch, begun.corpora, readings, [*begun.notes, *judged["notes"]])
    record |= {**described, "failed": judged["failed"], "choices": choices}
    write_run_record(run_dir, record)
    return record


def versions_of(corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return corpus name in the store → the version that ingest found or made."""
    return {corpus["stored"]: corpus["version"] for corpus in corpora.values()}


def read_model(workers: TaskRunner | None, spec: RunSpec) -> Iterator[dict[str, Any]]:
    """Ensure that the store has all moments: workers run the model over parts of the windows, whose moments are added.
    Then the gradients of the loss, if some step needs them: one worker per corpus. Yields a report of each pass."""
    parts = [{"spec": spec, "number": n, "load": load} for n, load in enumerate(parts_to_read(spec), start=1)]
    yield from step_each(workers, read_part, parts)
    yield from step_each(workers, read_moments, [{"spec": spec, "sample": sample} for sample in spec.samples])
    over = [sample for sample in spec.samples if (sample["corpus"], sample["seed"]) in spec.over_gradients]
    yield from step_each(workers, read_gradients, [{"spec": spec, "sample": sample} for sample in over])


def summarise_blocks(workers: TaskRunner | None, spec: RunSpec) -> None:
    """Summarise every block for the allocators. They decide from all blocks, so this precedes every solve."""
    unread = unsummarised_blocks(spec)
    if not unread:
        return
    with step_report() as report:
        calls = [{"spec": spec, "block": block} for block in unread]
        looked_at = step_each(workers, summarise_block, calls, at_once=blocks_side_by_side(spec, None))
        for done, _ in enumerate(looked_at, start=1):
            report("allocating", done, len(unread))


def solve_blocks(workers: TaskRunner | None, spec: RunSpec) -> None:
    """Ensure that the run directory has every block of every variant with dense inputs."""
    unsolved = unsolved_blocks(spec)
    with step_report() as report:
        calls = [{"spec": spec, "block": block} for block in unsolved]
        solved = step_each(workers, solve_block, calls, at_once=blocks_side_by_side(spec))
        for done, block in enumerate(solved, start=1):
            take_block(spec, block)
            report("solving blocks", done, len(unsolved))


def evaluate_models(spec: RunSpec, stored: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Measure every model, each in its own step, so that a transient failure repeats only that model."""
    names, spared = models_to_measure(spec), models_spared(spec)
    with step_report("evaluate") as report:
        found = race_models(spec, stored, spared, report) if spec.parsed.evaluate.race else {}
        for name in (name for name in names if name not in found):
            report("measuring models", len(found), len(names))
            if name in spared:
                found[name] = spare_model(spec, name, spared[name])
            else:
                found[name] = step(evaluate_model, spec, stored, name, report)
        report("measuring models", len(names), len(names))
    return found


def race_models(
    spec: RunSpec, stored: dict[str, str], spared: Collection[str], report: Report
) -> dict[str, dict[str, Any]]:
    """Measure models on a few validation windows, and on more as long as they are not clearly worse.

    Returns what `evaluate_model` would for the models that left the race and for those that failed.
    """
    known: dict[str, dict[str, Any]] = {}
    while wanting := (now := standing(spec, stored, known, spared)).wanting:
        for done, (name, look) in enumerate(wanting.items()):
            report("racing", done, len(wanting))
            known[name] = step(race_model, spec, stored, name, look, report)
    failed = {name: each for name, each in known.items() if each["failed"]}
    return failed | {name: leave_race(spec, name, left, known.get(name)) for name, left in now.left.items()}


def _record(
    spec: RunSpec, watch: Stopwatch, corpora: dict[str, Any], readings: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    said = [] if spec.cached.measures_losses else [NO_LOSSES]
    if paired := [each.name for each in spec.variants() if takes_two_streams(p.step for p in each.steps)]:
        said.append(OF_DENSE_OUTPUTS.format(", ".join(paired)))
    return {
        "run_dir": spec.run_dir,
        "model": spec.model,
        "device": spec.device,
        "dtype": spec.dtype,
        "stages": dict(watch.seconds),
        "cache": {"hits": sum(r["hits"] for r in readings), "misses": sum(r["misses"] for r in readings)},
        "calibration_tokens": sum(sample.tokens for sample in spec.sampled),
        "calibration_draws": [{"corpus": s.corpus, "seed": s.seed, "tokens": s.tokens} for s in spec.sampled],
        "calibration_tokens_read": sum(r["tokens_read"] for r in readings),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "corpora": corpora,
        "notes": [
            *notes,
            *said,
            *_forms(corpora),
            *_rejections(corpora),
            *_choices(spec.parsed, corpora),
            *(note for sample in spec.samples for note in sample["notes"]),
        ],
        "variants": len(spec.variants()),
    }


def _forms(corpora: dict[str, Any]) -> Iterator[str]:
    """Sentences on the columns that held documents, for corpora with others than `text`."""
    for name, corpus in corpora.items():
        if corpus["forms"].keys() - {"text"}:
            found = ", ".join(f"{number} in `{form}`" for form, number in corpus["forms"].items())
            yield f"{name}: documents found: {found}."


def _rejections(corpora: dict[str, Any]) -> Iterator[str]:
    """Sentences on the documents that ingest rejected, one for each corpus."""
    for name, corpus in corpora.items():
        count = sum(corpus["rejected"].values())
        if count:
            reasons = ", ".join(f"{number} {reason}" for reason, number in corpus["rejected"].items())
            lines = f"objects/rejects/{corpus['rejects_key']}/rejects.jsonl"
            yield f"{name}: {count} documents rejected ({reasons}); one by one in the store's {lines}."


def _choices(plan: CompressionPlan, corpora: dict[str, Any]) -> Iterator[str]:
    """Sentences on the documents that were selected, one for each corpus."""
    for name, corpus in corpora.items():
        counts, select = corpus.get("selection"), plan.document_corpora[name].select
        if counts is None or select is None:
            continue
        how = f" by {select.method} towards {counts['sample']:,} of {select.towards}" if select.method else ""
        left_out = [
            f"{counts[reason]:,} {what}"
            for reason, what in (
                ("too_short", "too short"),
                ("held_out", "equal or nearly equal to validation or test documents"),
                ("near_duplicates", "near-duplicates"),
            )
            if counts[reason]
        ]
        fewer = f" instead of {select.documents:,}" if counts["chosen"] < (select.documents or 0) else ""
        passed_by = f"; left out: {', '.join(left_out)}" if left_out else ""
        yield f"{name}: {counts['chosen']:,}{fewer} of {counts['pool']:,} documents chosen{how}{passed_by}."
