"""Run the flows from the command line, and summarise their results there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import Flow

from crosscal.flows.changes import notice_changes
from crosscal.flows.cluster import needs_server, temporary_server
from crosscal.flows.health import check_access, probe
from crosscal.flows.outcome import counted
from crosscal.flows.recompress import recompress
from crosscal.flows.study import check_study, study
from crosscal.landing import Ledger
from crosscal.landing.status import check_known
from crosscal.plan import CompressionPlan, load_plan
from crosscal.store import Store

MOST_SENTENCES = 3
"""Sentences to print, e.g. on what to take; the report has all."""


def drive(
    plan: Path, overrides: list[str], home: str, out: str | None, domain: str | None = None, *, again: bool = False
) -> dict[str, Any]:
    """Carry out a plan, for a landed domain if one is named.

    It is a Prefect flow run when `PREFECT_API_URL` names a server, and a plain call otherwise: Prefect's serverless
    mode would start a temporary server in every process (7 to 10 seconds) that no one uses.
    Only a plan for a Dask cluster needs one, because workers report task states to a server.
    """
    asked = load_plan(plan, tuple(overrides), domain)  # validate first: a typo is no failed attempt in the ledger
    if domain is not None:
        ledger = Ledger(Store(home))
        check_known(ledger, domain)
        notice_changes(ledger, plan, tuple(overrides), [domain])
    return _driven(recompress, asked, str(plan), overrides, home, out, domain, again)


def drive_study(
    plan: Path, overrides: list[str], home: str, out: str | None, parts: int | None, domain: str | None = None
) -> dict[str, Any]:
    """Carry out a study; as `drive`, but the ledger is neither read nor written."""
    asked = load_plan(plan, tuple(overrides), domain)
    check_study(asked)
    return _driven(study, asked, str(plan), overrides, home, out, parts, domain)


def _driven(flow: Flow[..., dict[str, Any]], asked: CompressionPlan, *arguments: Any) -> dict[str, Any]:
    if not os.environ.get("PREFECT_API_URL"):
        if not needs_server(asked.execution):
            return flow.fn(*arguments)
        with temporary_server():
            return flow(*arguments)
    for check in (probe, check_access):  # before a flow run is created
        check(os.environ["PREFECT_API_URL"])
    return flow(*arguments)


def summary(record: dict[str, Any]) -> Iterator[Any]:
    """Yield what a run prints at its end: the table, what to take, what the cache saved, where the report is."""
    from crosscal.report.calibration import verdicts, warnings
    from crosscal.report.found_mixtures import sentence_of
    from crosscal.report.groups import columns_of
    from crosscal.report.headline import sentences
    from crosscal.report.run_files import read_run
    from crosscal.report.terminal import TerminalTable

    run_dir = Path(record["run_dir"])
    files = read_run(run_dir)
    yield TerminalTable(files.groups, columns_of(files.results))
    found = sentences(files.groups, files.models, str(run_dir / "models"))
    yield from found[:MOST_SENTENCES]
    if len(found) > MOST_SENTENCES:
        yield f"what to take for other levels and domains: {len(found) - MOST_SENTENCES} more in the report"
    yield from (f"warning: {each}" for each in warnings(record))
    yield from verdicts(record)
    yield from map(sentence_of, record.get("choices", []))
    for note in record["notes"]:
        yield f"note: {note}"
    hits, misses = record["cache"]["hits"], record["cache"]["misses"]
    read = record["calibration_tokens_read"]
    seconds = sum(record["stages"].values())
    cost = f"{read:,} calibration tokens read" if read else "no forward pass for calibration"
    variants = counted(record["variants"], "variant")
    yield f"{variants} in {seconds:.0f} s; moments: {hits} from the cache, {misses} made; {cost}"
    yield f"report: {run_dir / 'report.html'}"


def study_summary(record: dict[str, Any]) -> Iterator[Any]:
    """Yield what a study prints at its end: numbers, differences, what validation text chose, remaining parts."""
    from crosscal.report.groups import columns_of
    from crosscal.report.run_files import read_run
    from crosscal.report.study_table import DifferenceTable, sentences
    from crosscal.report.terminal import TerminalTable

    run_dir, parts = Path(record["run_dir"]), record["parts"]
    files = read_run(run_dir)
    yield TerminalTable(files.groups, columns_of(files.results))
    yield DifferenceTable(files.study)
    found = sentences(files.study)
    yield from found[:MOST_SENTENCES]
    if len(found) > MOST_SENTENCES:
        yield f"what else validation text chose: {len(found) - MOST_SENTENCES} more in the report"
    for note in record["notes"]:
        yield f"note: {note}"
    more = "" if parts["complete"] == parts["of"] else "; the same command goes on"
    draws, variants = counted(record["draws"], "draw"), counted(record["variants"], "variant")
    yield f"{draws}, {variants}: {parts['complete']} of {parts['of']} parts are complete{more}"
    yield f"numbers: {run_dir / 'study.jsonl'}; report: {run_dir / 'report.html'}"
