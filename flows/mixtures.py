"""The mixtures that a plan leaves open, found between the reading of the model and its solves."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect.task_runners import TaskRunner

from crosscal.flows.steps import step, step_each, step_report
from crosscal.tasks.mixtures import (
    Wanted,
    choose_mixtures,
    measure_candidates,
    unmeasured_blocks,
    wanted_candidates,
)
from crosscal.tasks.model import blocks_side_by_side
from crosscal.tasks.ticket import Ticket


def find_mixtures(workers: TaskRunner | None, ticket: Ticket) -> tuple[Ticket, list[dict[str, Any]]]:
    """The ticket with every mixture known, and what each search came to.

    A round solves what all searches want next, block by block, side by side or on workers.
    """
    while wanted := wanted_candidates(ticket):
        _measure(workers, ticket, wanted)
    choices = step(choose_mixtures, ticket)
    return dataclasses.replace(ticket, mixtures={one["variant"]: one["weights"] for one in choices}), choices


def _measure(workers: TaskRunner | None, ticket: Ticket, wanted: Wanted) -> None:
    unmeasured = unmeasured_blocks(ticket, wanted)
    with step_report() as report:
        calls = [{"ticket": ticket, "block": block, "wanted": wanted} for block in unmeasured]
        measured = step_each(workers, measure_candidates, calls, at_once=blocks_side_by_side(ticket))
        for done, _ in enumerate(measured, start=1):
            report(f"measuring {len(wanted)} mixtures", done, len(unmeasured))
