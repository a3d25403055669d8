"""How a run is called in the Prefect UI: its name, its tags, and the message of its last state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Completed, Failed

from crosscal.corpora import load_corpus
from crosscal.errors import CorpusError, CrosscalError
from crosscal.plan import CompressionPlan, load_plan
from crosscal.plan.search import AUTO
from crosscal.report.groups import level_of
from crosscal.store import Store
from crosscal.variants import GENERAL, Variant, variants

MOST_LETTERS = 120
MOST_TAGS = 12


def run_name() -> str:
    """As in "biomedical v7 · sparsegpt 50 % · alpha 0.5" or "demo · 32 variants".

    A plan that cannot be read gives its file's name: the run itself says what is wrong with it.
    """
    context = FlowRunContext.get()
    parameters: dict[str, Any] = (context.parameters if context else None) or {}
    path, domain = Path(str(parameters.get("plan_path"))), parameters.get("domain")
    subject = str(domain or path.stem)
    try:
        plan = load_plan(path, tuple(parameters.get("overrides") or ()), domain)
        if domain:
            subject += _version(parameters.get("home"), domain)
        return f"{subject} · {_what(variants(plan))}"[:MOST_LETTERS]
    except CrosscalError:
        return subject[:MOST_LETTERS]


def tag_run(plan: CompressionPlan, domain: str | None) -> None:
    """Tag the flow run with domain, model and methods; nothing without one, and nothing fails for lack of a tag."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    methods = dict.fromkeys(variant.method for variant in variants(plan))
    wanted = [f"domain:{domain}"] * bool(domain) + [f"model:{Path(plan.model).name[:60]}", *methods]
    tags = list(dict.fromkeys([*context.flow_run.tags, *wanted]))[:MOST_TAGS]
    try:
        context.client.update_flow_run(context.flow_run.id, tags=tags)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        logging.getLogger("crosscal").warning("the run has no tags: %s", error)


def shown(work: Callable[[], dict[str, Any]]) -> Any:
    """Do the work; inside a flow run the outcome is a state with a message, outside the record or the error itself.

    An expected error is its message alone: a traceback would say nothing more to whoever reads the page.
    """
    if FlowRunContext.get() is None:
        return work()
    try:
        record = work()
    except CrosscalError as error:
        return Failed(message=str(error), data=error)
    return Completed(name=_state_name(record), message=record.get("message") or cost_message(record), data=record)


def cost_message(record: dict[str, Any]) -> str:
    """What a run computed, in one line."""
    cache, read = record["cache"], record["calibration_tokens_read"]
    seconds = sum(record["stages"].values())
    new = f"{read:,} calibration tokens read" if read or cache["misses"] else "nothing new to read"
    return f"{counted(record['variants'], 'variant')} in {seconds:.0f} s; {new}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _state_name(record: dict[str, Any]) -> str:
    """What the page's badge says of a completed run: what became of a landed domain's model."""
    if "runs" not in record:
        return "Completed"
    outcomes = {run["outcome"] for run in record["runs"]}
    return "Published" if "published" in outcomes else "Kept" if "kept" in outcomes else "Nothing new"


def _version(home: str | None, domain: str) -> str:
    try:
        return f" v{load_corpus(Store(home or os.environ.get('CROSSCAL_HOME', '.crosscal')), domain).version}"
    except CorpusError:
        return ""


def _what(asked: Sequence[Variant]) -> str:
    if not asked:
        return "the dense model"
    levels = dict.fromkeys(
        (variant.method, level_of([each.text for each in variant.amounts], variant.setting)) for variant in asked
    )
    if len(levels) > 1:
        return f"{len(asked)} variants"
    ((method, level),) = levels
    alphas = dict.fromkeys(
        AUTO if each.search else f"{1 - each.mixture.as_dict().get(GENERAL, 0):g}" for each in asked if each.mixture
    )
    return f"{method} {level.removesuffix(' sparsity')}" + (f" · alpha {', '.join(alphas)}" if alphas else "")
