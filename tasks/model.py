"""Read the model, solve its blocks, publish the variants."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect import task

from crosscal.stages.compress import compress_block, compress_sequential, publish_variant
from crosscal.stages.moments import collect_moments
from crosscal.stages.preflight import block_shapes
from crosscal.stages.sample import Sample
from tasks.options import PLAIN, RETRIED
from tasks.refusals import check_request
from tasks.ticket import Ticket, resolve_device, task_report


def identify(ticket: Ticket) -> dict[str, Any]:
    """Digest, device and dtype: what every key of the run depends on."""
    device = resolve_device(ticket.parsed.execution.device)
    source = ticket.source()
    dtype = "float32" if device == "cpu" else str(source.dtype).removeprefix("torch.")
    return {"model": source.digest, "device": device, "dtype": dtype, "blocks": source.blocks}


@task(name="identify", task_run_name="identify model", **RETRIED)
def identify_model(ticket: Ticket) -> dict[str, Any]:
    """As `identify`; before anything is read, raises what would fail hours later."""
    known = identify(ticket)
    source = ticket.source()
    cached = dataclasses.replace(ticket.cached, model=known["model"])
    check_request(ticket.parsed, source, block_shapes(source, cached))
    return known


@task(name="moments", task_run_name="read {sample[corpus]}, seed {sample[seed]}", **RETRIED)
def read_moments(ticket: Ticket, sample: dict[str, Any]) -> dict[str, Any]:
    """Read the model over one corpus's windows, unless the store has all of it."""
    with task_report() as report:
        done = collect_moments(
            ticket.cached,
            ticket.source(),
            Sample.from_json(sample).sets,
            device=ticket.device,
            batch_tokens=ticket.parsed.calibration.batch_tokens,
            report=lambda what, count, total: report(f"{sample['corpus']}: reading", count, total),
        )
    return dataclasses.asdict(done)


@task(name="solve-block", task_run_name="solve block {block}", **PLAIN)
def solve_block(ticket: Ticket, block: int) -> int:
    """Solve one block for every variant with dense inputs."""
    return compress_block(ticket.workshop(), block, ticket.variants("dense"))


@task(name="solve-sequential", task_run_name="solve {name}", **PLAIN)
def solve_sequential(ticket: Ticket, name: str) -> dict[str, Any]:
    """Solve one variant whose inputs come through its own compressed blocks."""
    variant = next(variant for variant in ticket.variants("sequential") if variant.name == name)
    with task_report() as report:
        done = compress_sequential(
            ticket.workshop(),
            variant,
            batch_tokens=ticket.parsed.calibration.batch_tokens,
            report=lambda what, count, total: report(name, count, total),
        )
    return dataclasses.asdict(done)


@task(name="publish", task_run_name="publish models", **PLAIN)
def publish_models(ticket: Ticket) -> int:
    """Write the index of every variant: from now on they are models."""
    shop = ticket.workshop()
    for variant in ticket.variants():
        publish_variant(shop, variant)
    return len(ticket.variants())
