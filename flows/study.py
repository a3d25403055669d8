"""A study: the plan's sweep for several draws of the calibration windows, in parts that fit on one disk.

    study directory/   parts/s1-1f0c83d2/   a run of some variants of one draw, its models discarded once measured;
                                            its run.json marks it as complete
                       results.jsonl, windows.jsonl, layers.jsonl, run.json, …   all complete parts together
                       study.jsonl, report.html                                  their comparison over the draws

Statistics and measurements of a part stay in the store, and a complete part is not run again: a killed study resumes
where it stopped, and one more draw costs only that draw.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow

from crosscal.errors import PlanError
from crosscal.flows.outcome import shown
from crosscal.flows.shown import run_name, tag_run
from crosscal.flows.stuck_runs import note_process
from crosscal.plan import CompressionPlan, load_plan

if TYPE_CHECKING:
    from crosscal.flows.pipeline import PreparedRun


@flow(name="study", flow_run_name=run_name, on_running=[note_process], persist_result=False, result_serializer="json")
def study(
    plan_path: str,
    overrides: list[str] | None = None,
    home: str | None = None,
    out: str | None = None,
    parts: int | None = None,
    domain: str | None = None,
) -> dict[str, Any]:
    """Carry out a study, a plan's sweep over several draws of the calibration windows; return its record.

    The record is as in `run.json`, with `parts`: how many there are and how many are complete. `home` is the store,
    `out` the study's directory (default `runs/<model>-study-<digest>`, the same for any number of draws). `parts`
    limits how many parts this call carries out; complete parts are written up in any case. `domain` fills in the
    plan's `$domain`.
    """
    from crosscal.flows.quiet import quiet_libraries

    quiet_libraries()
    home = home or os.environ.get("CROSSCAL_HOME", ".crosscal")
    return shown(lambda: _study(Path(plan_path), tuple(overrides or ()), domain, home, out, parts))


def _study(
    plan_path: Path, overrides: tuple[str, ...], domain: str | None, home: str, out: str | None, most: int | None
) -> dict[str, Any]:
    plan = load_plan(plan_path, overrides, domain)
    check_study(plan)
    tag_run(plan, domain)
    return carry_out_study(plan, home, out, most)


def carry_out_study(plan: CompressionPlan, home: str, out: str | None, most: int | None = None) -> dict[str, Any]:
    """Carry out at most `most` incomplete parts (None: all), and write up all complete ones."""
    from crosscal.flows.pipeline import begin, make_and_measure
    from crosscal.flows.steps import Stopwatch
    from crosscal.flows.study_files import write_up
    from crosscal.flows.study_parts import folder_of, parts_of

    watch, log = Stopwatch(), logging.getLogger("crosscal")
    with watch.stage("ingest"):
        begun = begin(plan, home)
    folder = Path(out).absolute() if out else folder_of(plan)
    parts = parts_of(plan, folder, _inputs(begun))
    unmade = [part for part in parts if not part.is_complete]
    for part in unmade[:most]:
        log.info(
            "part %d of %d: %d variants, seed %d", parts.index(part) + 1, len(parts), len(part.variants), part.seed
        )
        spec = dataclasses.replace(begun.spec, only=list(part.variants))
        make_and_measure(dataclasses.replace(begun, spec=spec), str(part.folder), Stopwatch())
    return write_up(folder, plan, parts, watch)


def _inputs(begun: PreparedRun) -> list[Any]:
    """Return the identities of all that a part's numbers depend on besides the plan: model, corpora and tasks."""
    from crosscal.corpora import load_corpus
    from crosscal.tasks.questions import identities_of

    spec = begun.spec
    corpora = {stored: load_corpus(spec.store, stored, version).digest for stored, version in spec.versions.items()}
    return [spec.model, spec.dtype, corpora, identities_of(spec.parsed)]


def check_study(plan: CompressionPlan) -> None:
    """Raise `PlanError` for a plan without a study, with a race or a screen, or with an unknown baseline."""
    from crosscal.compressors import COMPRESSORS
    from crosscal.report.counterparts import DOMAIN
    from crosscal.report.groups import DENSE
    from crosscal.variants import variants

    if plan.study is None:
        raise PlanError("the plan has no study", where="study", do="Add `study: {draws: 5}`, or --set study.draws=5.")
    for name in ("race", "screen"):
        if getattr(plan.evaluate, name):
            do = f"Leave out `{name}`: variants that it rules out have no numbers to be compared over draws."
            raise PlanError("a study measures every variant on every window", where=f"evaluate.{name}", do=do)
    names = {variant.name.removesuffix(f"-s{variant.seed}") for variant in variants(plan)}
    methods = {variant.method for variant in variants(plan)} | set(COMPRESSORS)
    unknown = [name for name in plan.study.baseline if name not in {DENSE, DOMAIN, *plan.corpora, *methods, *names}]
    if unknown and "baseline" in plan.study.model_fields_set:
        known = f"{DENSE}, {DOMAIN}, a corpus ({', '.join(plan.corpora)}), a method or a variant, without its draw"
        raise PlanError("nothing to compare with", where="study.baseline", got=", ".join(unknown), do=f"Name {known}.")
