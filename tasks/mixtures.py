"""Finding the mixtures that a plan leaves open: candidates solved and measured block by block, then a choice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from prefect import task

from crosscal.files import write_whole
from crosscal.stages.candidates import Candidate, measure_block, unmeasured
from crosscal.stages.choose_mixture import candidate, candidates_wanted, choice
from crosscal.tasks.options import PLAIN, RETRIED
from crosscal.tasks.ticket import Ticket
from crosscal.variants import Variant

CHOICES = "choices.json"


Wanted = list[tuple[str, list[float]]]
"""(variant, weights) of candidates, the weights in the order of the search's corpora."""


def wanted_candidates(ticket: Ticket) -> Wanted:
    """What is to be solved next to find the mixtures that are open."""
    found = candidates_wanted(ticket.workshop(), _open_variants(ticket))
    return [(variant.name, list(weights)) for variant, weights in found]


def unmeasured_blocks(ticket: Ticket, wanted: Wanted) -> list[int]:
    return unmeasured(ticket.workshop(), _candidates(ticket, wanted))


@task(name="measure-candidates", task_run_name="candidates, block {block}", **RETRIED)
def measure_candidates(ticket: Ticket, block: int, wanted: Wanted) -> int:
    """Solve a block for some mixtures, and keep what each loses on every corpus. Returns the block."""
    source = ticket.source_on_worker() if ticket.has_workers else ticket.source()
    measure_block(dataclasses.replace(ticket.workshop(), source=source), block, _candidates(ticket, wanted))
    return block


@task(name="choose", task_run_name="choose mixtures", **PLAIN)
def choose_mixtures(ticket: Ticket) -> list[dict[str, Any]]:
    """What every search came to, also in `choices.json`. What the run directory holds of another choice is removed."""
    shop, file = ticket.workshop(), Path(ticket.run_dir) / CHOICES
    found = [choice(shop, variant).as_json() for variant in _open_variants(ticket)]
    before = {one["variant"]: one["weights"] for one in json.loads(file.read_text())} if file.is_file() else {}
    for one in found:
        if before.get(one["variant"], one["weights"]) != one["weights"]:
            for folder in ("models", "layers"):
                shutil.rmtree(Path(ticket.run_dir) / folder / one["variant"], ignore_errors=True)
    write_whole(file, json.dumps(found, indent=1, allow_nan=False))
    return found


def _open_variants(ticket: Ticket) -> list[Variant]:
    return [variant for variant in ticket.variants() if variant.search is not None]


def _candidates(ticket: Ticket, wanted: Wanted) -> list[Candidate]:
    by_name = {variant.name: variant for variant in _open_variants(ticket)}
    return [candidate(by_name[name], tuple(weights)) for name, weights in wanted]
