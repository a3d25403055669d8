"""`evaluate: race`: measure the models still in the race for the next look, and report which have left."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from prefect import task

from crosscal.mixtures import GENERAL
from crosscal.progress import Report, silent
from crosscal.stages.compress import discard_model
from crosscal.stages.made_variants import made_before, unmeasured
from crosscal.stages.race import Race, RaceExit, RaceState, replayed
from crosscal.statistics import Mixture
from crosscal.tasks.evaluation import evaluation_set_of, measure_made, models_spared, place_of, rows_of, variant_of
from crosscal.tasks.options import RETRIED
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import Variant


def models_to_make(spec: RunSpec, stored: dict[str, str]) -> list[str]:
    """Return the variants whose models are needed: all, or, unless models are kept, those that no earlier run measured
    or ruled out."""
    variants, context = spec.variants(), spec.run_context()
    if not spec.parsed.execution.keep_models and any(made_before(context, variant) for variant in variants):
        out = _ruled_out_before(spec, stored)
        variants = [v for v in unmeasured(context, variants, evaluation_set_of(spec, stored)) if v.name not in out]
    return [variant.name for variant in variants]


def _ruled_out_before(spec: RunSpec, stored: dict[str, str]) -> Collection[str]:
    """Return the variants that an earlier run spared or that left its race; none if some variant was not made yet."""
    made = {variant.name: made_before(spec.run_context(), variant) for variant in spec.variants()}
    known = {name: each for name, each in made.items() if each is not None}
    if len(known) < len(made):
        return ()
    rows, weights = ({n: each.rows for n, each in known.items()}, {n: each.weights for n, each in known.items()})
    spared = models_spared(spec, rows)
    if not spec.parsed.evaluate.race:
        return spared
    racing = [variant for variant in spec.variants() if variant.name not in spared]
    return spared | replayed(Race(evaluation_set_of(spec, stored)), racing, rows, weights, baselines(spec)).left


@task(name="race", task_run_name="race {name}, look {look}", **RETRIED)
def race_model(spec: RunSpec, stored: dict[str, str], name: str, look: int, report: Report = silent) -> dict[str, Any]:
    """Measure a variant on the validation windows up to a look of the race; return as `evaluate_model`."""
    eval_set = evaluation_set_of(spec, stored, report)
    return measure_made(spec, eval_set, variant_of(spec, name), place_of(spec, name), report, look)


def standing(
    spec: RunSpec, stored: dict[str, str], known: Mapping[str, Mapping[str, Any]], spared: Collection[str]
) -> RaceState:
    """Return the state of the race; `known`: model → what `race_model` returned last. `spared` take no part."""
    racing = [v for v in spec.variants() if v.name not in spared and not known.get(v.name, {}).get("failed")]
    weights = {name: each["weights"] for name, each in known.items()}
    made_now = {variant.name for variant in spec.variants_to_make()}
    for variant in (variant for variant in racing if variant.name not in made_now):
        if made := made_before(spec.run_context(), variant):
            weights[variant.name] = made.weights
    rows = {variant.name: rows_of(spec, variant) for variant in racing}
    return replayed(Race(evaluation_set_of(spec, stored)), racing, rows, weights, baselines(spec))


def leave_race(spec: RunSpec, name: str, left: RaceExit, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `evaluate_model` would for a variant that left: `spared` states why, `windows` what was measured."""
    if not spec.parsed.execution.keep_models:
        discard_model(spec.run_context(), variant_of(spec, name))
    measured = known or {"weights": "", "size_bytes": None, "failed": None}
    return {**measured, "spared": left.why, "windows": left.windows}


def baselines(spec: RunSpec) -> list[str]:
    """Return the variants that always remain in the race: the one that the plan publishes, and calibration on general
    text alone, which reports compare with."""
    publish = spec.parsed.publish
    return [v.name for v in spec.variants() if _is_general(v) or (publish and v.name == publish.variant)]


def _is_general(variant: Variant) -> bool:
    return variant.mixture == Mixture.of({GENERAL: 1.0})
