"""Find the mixtures that a plan leaves open, between the calibration pass and the solves."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect.task_runners import TaskRunner

from crosscal.flows.steps import step, step_each, step_report
from crosscal.tasks.mixtures import (
    Wanted,
    choose_mixtures,
    evaluate_candidate,
    measure_candidates,
    measure_dense,
    ruled_variants,
    unmeasured_blocks,
    wanted_candidates,
    wanted_model,
)
from crosscal.tasks.model import blocks_side_by_side
from crosscal.tasks.run_spec import RunSpec


def find_mixtures(
    workers: TaskRunner | None, spec: RunSpec, stored: dict[str, str]
) -> tuple[RunSpec, list[dict[str, Any]]]:
    """Return the run spec with every mixture known, and the result of each search.

    A round solves the next candidates of all searches, block by block, concurrently or on workers. Then, for rules on
    perplexity, candidates are evaluated one after another: the next one depends on the last result.
    """
    while wanted := wanted_candidates(spec):
        _measure(workers, spec, wanted)
    dense: dict[str, dict[str, float]] = {}
    for name in ruled_variants(spec):
        dense[name] = step(measure_dense, spec, stored, name)
        while (weights := wanted_model(spec, stored, name, dense[name])) is not None:
            step(evaluate_candidate, spec, stored, name, weights)
    choices = step(choose_mixtures, spec, stored, dense)
    return dataclasses.replace(spec, mixtures={one["variant"]: one["weights"] for one in choices}), choices


def _measure(workers: TaskRunner | None, spec: RunSpec, wanted: Wanted) -> None:
    unmeasured = unmeasured_blocks(spec, wanted)
    with step_report() as report:
        calls = [{"spec": spec, "block": block, "wanted": wanted} for block in unmeasured]
        measured = step_each(workers, measure_candidates, calls, at_once=blocks_side_by_side(spec))
        for done, _ in enumerate(measured, start=1):
            report(f"measuring {len(wanted)} mixtures", done, len(unmeasured))
