"""The whole way: documents in, compressed and measured models and a report out.

Run it with `crosscal run`, or deploy it (`deployment.yaml`). Whatever is complete already (corpora, windows, moments, blocks,
measurements) is found in the store or the run directory and not made again, so a killed run is resumed by running it again.
"""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path
from typing import Any

from prefect import flow

from crosscal.plan import CompressionPlan, load_plan
from flows.run_directory import open_run_directory, write_run_record
from flows.steps import Stopwatch, step
from tasks.corpora import draw_sample, ingest_corpus
from tasks.model import identify_model, publish_models, read_moments, solve_block, solve_sequential
from tasks.results import discard_models, evaluate_models, make_report
from tasks.ticket import Ticket


@flow(name="recompress", log_prints=True)
def recompress(
    plan_path: str, overrides: list[str] | None = None, home: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Carry out a plan; returns the run's record, as in `run.json`.

    `home` is the store (CROSSCAL_HOME, `.crosscal`), `out` the run directory (`runs/<model>-<digest>`).
    """
    plan = load_plan(Path(plan_path), tuple(overrides or ()))
    return carry_out(plan, home or os.environ.get("CROSSCAL_HOME", ".crosscal"), out)


def carry_out(plan: CompressionPlan, home: str, out: str | None) -> dict[str, Any]:
    """The steps in their order. A call of this function inside a Prefect flow run shows each step as a task run."""
    watch = Stopwatch()
    ticket = Ticket(plan.model_dump(mode="json"), home)
    with watch.stage("ingest"):
        known = step(identify_model, ticket)
        ticket = dataclasses.replace(ticket, model=known["model"], device=known["device"], dtype=known["dtype"])
        corpora = {name: step(ingest_corpus, ticket, name) for name in plan.document_corpora}
    stored = {name: corpus["stored"] for name, corpus in corpora.items()}
    with watch.stage("sample"):
        needed = _needed(ticket, plan)
        samples = [step(draw_sample, ticket, name, stored.get(name, name), seed) for name, seed in needed]
        ticket = dataclasses.replace(ticket, samples=samples)
        run_dir = open_run_directory(ticket, plan, out)
        ticket = dataclasses.replace(ticket, run_dir=str(run_dir))
    with watch.stage("moments"):
        readings = [step(read_moments, ticket, sample) for sample in samples]
    with watch.stage("solve"):
        if ticket.variants("dense"):
            for block in range(known["blocks"]):
                step(solve_block, ticket, block)
        readings += [step(solve_sequential, ticket, variant.name) for variant in ticket.variants("sequential")]
        step(publish_models, ticket)
    with watch.stage("evaluate"):
        step(evaluate_models, ticket, stored)
    record = _record(ticket, watch, corpora, readings)
    write_run_record(run_dir, record)
    with watch.stage("report"):
        step(make_report, str(run_dir))
    if not plan.execution.keep_models:
        step(discard_models, str(run_dir))
    record["stages"] = watch.seconds
    write_run_record(run_dir, record)
    return record


def _needed(ticket: Ticket, plan: CompressionPlan) -> list[tuple[str, int]]:
    """The (corpus, seed) pairs that some variant's mixture uses; one at least, to measure layer losses on."""
    used = {(name, v.seed) for v in ticket.variants() if v.mixture for name in v.mixture.corpora}
    reference = "general" if "general" in plan.corpora else next(iter(plan.corpora))
    used |= {(reference, variant.seed) for variant in ticket.variants() if variant.mixture is None}
    return [(name, seed) for seed in plan.seeds for name in plan.corpora if (name, seed) in used]


def _record(
    ticket: Ticket, watch: Stopwatch, corpora: dict[str, Any], readings: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "run_dir": ticket.run_dir,
        "model": ticket.model,
        "device": ticket.device,
        "dtype": ticket.dtype,
        "stages": dict(watch.seconds),
        "cache": {"hits": sum(r["hits"] for r in readings), "misses": sum(r["misses"] for r in readings)},
        "calibration_tokens_read": sum(r["tokens_read"] for r in readings),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "corpora": corpora,
        "notes": [note for sample in ticket.samples for note in sample["notes"]],
        "variants": len(ticket.variants()),
    }
