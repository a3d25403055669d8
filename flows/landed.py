"""Recompress a landed domain: while a version is pending, claim it, carry out the plan, decide about publishing.

The ledger decides, not the event: however often and in whatever order a domain is announced, each newest version is
carried out once. Versions that land during a run cause one more turn of the loop, on the newest.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from crosscal.corpora.corpus import load_corpus, ref_name
from crosscal.errors import CrosscalError, StoreError, TooLittleText, UsageError
from crosscal.flows.cancelled import is_cancelled
from crosscal.flows.news import News, NothingNew
from crosscal.flows.pipeline import carry_out, versions_of
from crosscal.flows.shown import tag_run
from crosscal.flows.steps import step
from crosscal.landing import Ledger, Run
from crosscal.landing.status import check_known, reason_of, why_nothing
from crosscal.plan import CompressionPlan, load_plan
from crosscal.store import Store
from crosscal.tasks.announce import GIVEN_UP, KEPT, PUBLISHED, emit
from crosscal.tasks.options import TRANSIENT, chain
from crosscal.tasks.publication import decide_publication
from crosscal.tasks.run_spec import RunSpec

REASON_CHARACTERS = 1000
AGAIN = "asked for again"
PASSING = (OSError, StoreError, MemoryError, *TRANSIENT)
"""Causes that the next attempt may not meet. The same is assumed of errors that are no `CrosscalError`."""


def recompress_domain(
    plan_path: Path, overrides: tuple[str, ...], home: str, out: str | None, domain: str, *, again: bool = False
) -> dict[str, Any]:
    """Carry out what is pending for a domain; return `runs`, one for each turn, and a `message`.

    `domain` may come from an event, so it is validated. Raises `UsageError` for a domain of which nothing has landed.
    """
    ref_name(domain)
    ledger, runs = Ledger(Store(home)), []
    check_known(ledger, domain)
    if again and (version := ledger.requested(domain)) is not None:
        ledger.request(domain, version, anew=AGAIN)
    with _telling_of_giving_up(ledger, domain):
        while (run := ledger.claim(domain, _run_id())) is not None:
            runs.append(_carry_out(ledger, run, plan_path, overrides, home, out))
    message = "; ".join(run["message"] for run in runs) or why_nothing(ledger.look(), domain)
    _log().info(message)
    return {"domain": domain, "message": message, "runs": runs}


@contextmanager
def _telling_of_giving_up(ledger: Ledger, domain: str) -> Iterator[None]:
    """Emit an event if the ledger gave up a version meanwhile, because it failed too often."""
    before = ledger.given_up(domain)
    try:
        yield
    finally:
        view = ledger.look()
        version, last = view.given_up(domain), view.last_run(domain)
        if version is not None and version != before and last is not None:
            facts = {"domain": domain, "version": version, "reason": reason_of(last)}
            emit(GIVEN_UP, f"crosscal.domain.{domain}", facts)


def _carry_out(
    ledger: Ledger, run: Run, plan_path: Path, overrides: tuple[str, ...], home: str, out: str | None
) -> dict[str, Any]:
    """Carry out one claimed run; record any end in the ledger, where more interruptions than failures are allowed."""
    news = News(ledger, run.domain, is_asked=run.request.get("why") == AGAIN)
    try:
        plan = load_plan(plan_path, overrides, run.domain)
        tag_run(plan, run.domain)
        newest = load_corpus(ledger.store, run.domain).version
        folder = str(Path(out) / _folder_name(run, newest)) if out else None
        try:
            record = carry_out(plan, home, folder, lambda name: ledger.mark(run, name) and None, news.check)
        except (NothingNew, TooLittleText) as error:
            return _unchanged(ledger, run, news.explained(error), newest)
        decision = _decide(plan, home, record, run)
        used = record["corpora"][run.domain]["landed"]
        facts = {name: decision[name] for name in ("reason", "model", "variant", "perplexity") if name in decision}
        ledger.mark(run, decision["outcome"], version=used, run_dir=record["run_dir"], inputs=news.inputs, **facts)
    except Exception as error:
        _close(ledger, run, "failed", str(error) or type(error).__name__, repeats=repeats_itself(error) or None)
        raise
    except BaseException:
        is_over = is_cancelled(run.run_id)
        _close(ledger, run, "cancelled" if is_over else "abandoned", "by a user" if is_over else "interrupted")
        raise
    message = _summary(run.domain, used, record, decision)
    _log().info(message)
    event = PUBLISHED if decision["outcome"] == "published" else KEPT
    emit(event, f"crosscal.model.{run.domain}", {"domain": run.domain, "version": used, **facts})
    return {"version": used, "message": message, "run_dir": record["run_dir"], **decision, "record": record}


def _folder_name(run: Run, version: int) -> str:
    """Name a version's run directory. A repeated version gets a new one, since plan or model may have changed."""
    first = run.request.get("after_run", 0) + 1
    is_anew = run.request.get("anew_after") == first - 1 > 0
    return f"{run.domain}-v{version}" + (f"-run{first}" if is_anew else "")


def _unchanged(ledger: Ledger, run: Run, nothing: NothingNew, newest: int) -> dict[str, Any]:
    version = nothing.version or newest
    ledger.mark(run, "unchanged", version=version, reason=nothing.reason, inputs=nothing.inputs)
    message = f"{run.domain} v{version}: nothing new: {nothing.reason}"
    _log().info(message)
    return {"version": version, "message": message, "outcome": "unchanged", "reason": nothing.reason}


def _decide(plan: CompressionPlan, home: str, record: dict[str, Any], run: Run) -> dict[str, Any]:
    if plan.publish is None:
        return {"outcome": "kept", "reason": "the plan has no section `publish`"}
    known = {name: record[name] for name in ("model", "device", "dtype", "run_dir")}
    spec = RunSpec(plan.model_dump(mode="json"), home, versions=versions_of(record["corpora"]), **known)
    stored = {name: corpus["stored"] for name, corpus in record["corpora"].items()}
    used = record["corpora"][run.domain]["landed"]
    return step(decide_publication, spec, stored, run.domain, used, run.run_id, run.request.get("at"))


def _summary(domain: str, version: int, record: dict[str, Any], decision: dict[str, Any]) -> str:
    read, total = record["calibration_tokens_read"], record["calibration_tokens"]
    return (
        f"{domain} v{version}: {read:,} calibration tokens read of {total:,} in the mixture; "
        f"{decision['outcome']}: {decision['reason']}"
    )


def repeats_itself(error: Exception) -> bool:
    """Return whether the next attempt would fail too: the request is wrong; it is not disk, network or memory."""
    is_passing = any(isinstance(each, PASSING) for each in chain(error))
    return isinstance(error, UsageError) or (isinstance(error, CrosscalError) and not is_passing)


def _close(ledger: Ledger, run: Run, outcome: str, reason: str, **facts: Any) -> None:
    """Record the outcome of a run, unless another process has taken it over and closed it."""
    with suppress(StoreError):
        ledger.mark(run, outcome, reason=reason[:REASON_CHARACTERS], **facts)


def _run_id() -> str:
    context = FlowRunContext.get()
    is_known = context is not None and context.flow_run is not None
    return str(context.flow_run.id) if is_known else f"local-{secrets.token_hex(6)}"


def _log() -> Any:
    return get_run_logger() if FlowRunContext.get() is not None else logging.getLogger("crosscal")
