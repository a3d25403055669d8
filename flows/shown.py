"""Name and tags of a plan's run in the Prefect UI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext

from crosscal.corpora import load_corpus
from crosscal.errors import CorpusError, CrosscalError
from crosscal.flows.outcome import MOST_LETTERS, NEWS, change_run
from crosscal.plan import CompressionPlan, load_plan
from crosscal.plan.search import AUTO
from crosscal.report.groups import level_of
from crosscal.store import Store
from crosscal.variants import GENERAL, Variant, variants


def run_name() -> str:
    """Return a run's name, e.g. "biomedical v7 · sparsegpt 50 % · alpha 0.5" or "demo · 32 variants".

    For a plan that cannot be read, the domain or the file's name: the run itself reports the error.
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
    """Tag the flow run with domain, model and methods, and with `NEWS`."""
    methods = dict.fromkeys(variant.method for variant in variants(plan))
    change_run([NEWS, *([f"domain:{domain}"] * bool(domain)), f"model:{Path(plan.model).name[:60]}", *methods])


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
