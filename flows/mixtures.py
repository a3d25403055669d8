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
from crosscal.tasks.ticket import Ticket


def find_mixtures(
    workers: TaskRunner | None, ticket: Ticket, stored: dict[str, str]
) -> tuple[Ticket, list[dict[str, Any]]]:
    """Return the ticket with every mixture known, and the result of each search.

    A round solves the next candidates of all searches, block by block, concurrently or on workers. Then, for rules on
    perplexity, candidates are evaluated one after another: the next one depends on the last result.
    """
    while wanted := wanted_candidates(ticket):
        _measure(workers, ticket, wanted)
    dense: dict[str, dict[str, float]] = {}
    for name in ruled_variants(ticket):
        dense[name] = step(measure_dense, ticket, stored, name)
        while (weights := wanted_model(ticket, stored, name, dense[name])) is not None:
            step(evaluate_candidate, ticket, stored, name, weights)
    choices = step(choose_mixtures, ticket, stored, dense)
    return dataclasses.replace(ticket, mixtures={one["variant"]: one["weights"] for one in choices}), choices


def _measure(workers: TaskRunner | None, ticket: Ticket, wanted: Wanted) -> None:
    unmeasured = unmeasured_blocks(ticket, wanted)
    with step_report() as report:
        calls = [{"ticket": ticket, "block": block, "wanted": wanted} for block in unmeasured]
        measured = step_each(workers, measure_candidates, calls, at_once=blocks_side_by_side(ticket))
        for done, _ in enumerate(measured, start=1):
            report(f"measuring {len(wanted)} mixtures", done, len(unmeasured))
