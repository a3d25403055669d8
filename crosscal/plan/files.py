"""Plan files: read, override, validate, write."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from crosscal.errors import PlanError
from crosscal.files import format_of
from crosscal.plan.domain import with_domain
from crosscal.plan.mistakes import mistakes
from crosscal.plan.search import MixtureRule, RuledAlpha, WeighedMixture
from crosscal.plan.sections import (
    Calibration,
    Compress,
    CompressionPlan,
    Documents,
    Evaluate,
    Execution,
    Publish,
    RandomTokens,
    SelfGenerated,
)
from crosscal.plan.sources import Select
from crosscal.plan.study import Study
from crosscal.plan.tasks import KINDS as TASK_KINDS
from crosscal.plan.tasks import QuestionFields, with_paths
from crosscal.resources import plan_file


def load_plan(path: Path, overrides: tuple[str, ...] = (), domain: str | None = None) -> CompressionPlan:
    """Read a plan, apply `key.path=value` overrides, fill in the domain. Raises `PlanError` naming field and remedy."""
    path = plan_file(path)
    data = with_domain(read_plan(path, overrides), domain, str(path))
    plan = parse_plan(data, str(path), path.absolute().parent)
    if found := list(mistakes(plan)):
        raise PlanError("; ".join(found), where=str(path))
    return plan


def read_plan(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the mapping of a plan file with overrides applied, without validating it. Raises `PlanError`."""
    try:
        content = plan_file(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            "the plan cannot be read", where=str(path), got=str(error), do="Give the path of a YAML file."
        ) from error
    try:
        data = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError) as error:
        raise PlanError("the plan is not valid YAML", where=str(path), got=str(error).replace("\n", " ")) from error
    if not isinstance(data, dict):
        raise PlanError(
            "a plan is a mapping of fields",
            where=str(path),
            got=type(data).__name__,
            do="Start with `model:` and `corpora:`.",
        )
    for override in overrides:
        _apply(data, override)
    return data


def parse_plan(data: dict[str, Any], where: str = "plan", base: Path | None = None) -> CompressionPlan:
    """Validate a mapping and resolve relative paths against `base`. Raises `PlanError`."""
    try:
        plan = CompressionPlan.model_validate(data)
    except ValidationError as error:
        raise PlanError(_explain(error), where=where) from error
    return _resolve(plan, base) if base else plan


def dump_plan(plan: CompressionPlan) -> str:
    """Return the plan with every default as YAML, which `load_plan` reads back to an equal plan."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, width=120)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise PlanError("--set needs key=value", got=override, do="For example --set calibration.windows=64.")
    *parents, last = parts = key.split(".")
    node: Any = data
    try:
        for number, part in enumerate(parents):
            below = _below(node, part)
            if number == 1 and parts[0] == "corpora":
                below = node[part] = _in_full(below, parts[2])
            node = below
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(value)
    except (IndexError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise PlanError(
            "--set names no field of the plan", got=override, do="Lists are counted from 0: compress.0.alpha=[0,1]."
        ) from error


def _below(node: Any, part: str) -> Any:
    """Return the entry of a list, or the field of a mapping; one that is missing or null becomes an empty section."""
    if isinstance(node, list):
        return node[int(part)]
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _in_full(corpus: Any, field: str) -> Any:
    """Return a corpus in short form (`legal: folder`) as a mapping that has room for `field`; another one unchanged.

    A number as `field` is the place in a list of sources.
    """
    if isinstance(corpus, str):
        return {"source" if corpus in ("self", "random") else "path": corpus}
    return {"path": corpus} if isinstance(corpus, list) and not field.isdecimal() else corpus


TASKS = ("evaluate", "tasks")
ANY = None
TAGGED: tuple[tuple[str | None, ...], ...] = (
    ("corpora", ANY),
    ("corpora", ANY, "documents", "path"),
    ("calibration", "seed"),
    ("compress", ANY, "alpha", ANY),
    ("compress", ANY, "mixture", ANY),
    ("evaluate", "allow_leaks"),
    (*TASKS, ANY),
    (*TASKS, ANY, "file", "fields", "choices"),
)
"""Places of unions: in the location of an error, pydantic adds the kind of the value behind each of them."""
KEY = "[key]"
"""Pydantic's last part of the location of an error in the key of a mapping."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def _resolve(plan: CompressionPlan, base: Path) -> CompressionPlan:
    def absolute(path: str) -> str:
        if "://" in path:
            return path
        here = base / Path(path).expanduser()  # an absolute path stays unchanged
        if here.exists():
            return str(here.resolve())
        return path if _HUB_ID.fullmatch(path) and not format_of(path) else str(here)

    corpora = dict(plan.corpora)
    for name, source in plan.document_corpora.items():
        if source.path is not None:
            paths = [source.path] if isinstance(source.path, str) else source.path
            source = source.model_copy(update={"path": [absolute(path) for path in paths]})
        if source.select and source.select.towards and source.select.towards not in plan.corpora:
            chosen = source.select.model_copy(update={"towards": absolute(source.select.towards)})
            source = source.model_copy(update={"select": chosen})
        corpora[name] = source
    tasks = [with_paths(task, absolute) for task in plan.evaluate.tasks]
    evaluate = plan.evaluate.model_copy(update={"tasks": tasks})
    return plan.model_copy(update={"model": absolute(plan.model), "corpora": corpora, "evaluate": evaluate})


def _fields(location: Sequence[Any]) -> list[str]:
    """Return the field names of the section that a location points into, for suggestions."""
    sections: dict[str, type[BaseModel]] = {
        "calibration": Calibration,
        "compress": Compress,
        "evaluate": Evaluate,
        "execution": Execution,
        "publish": Publish,
        "study": Study,
    }
    if len(location) == 1:
        return list(CompressionPlan.model_fields)
    section = sections.get(str(location[0]))
    if tuple(location[:2]) == TASKS:
        section = QuestionFields if location[4] == "fields" and len(location) > 5 else TASK_KINDS[location[3]]
    if location[0] == "corpora":
        kinds = {"self": SelfGenerated, "random": RandomTokens}
        section = kinds.get(str(location[2]) if len(location) > 2 else "", Documents)
        section = Select if "select" in location[3:-1] else section
    if location[0] == "compress" and len(location) > 5:  # behind a kind of `alpha` or `mixture`
        searched = WeighedMixture if location[2] == "mixture" else RuledAlpha
        section = MixtureRule if len(location) > 6 else searched
    return list(section.model_fields) if section else []


def _without_tags(location: Sequence[Any]) -> list[Any]:
    """Drop what pydantic adds to an error location and no plan contains: the kinds of unions, and "[key]".

    Kinds are dropped by their places, since corpora and fields may have the same names.
    """
    named = location[:-1] if location and location[-1] == KEY else location
    return [part for number, part in enumerate(named) if not _is_tagged(named[:number])]


def _is_tagged(location: Sequence[Any]) -> bool:
    return any(
        len(place) == len(location) and all(part in (ANY, found) for part, found in zip(place, location, strict=True))
        for place in TAGGED
    )


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        field = ".".join(map(str, _without_tags(location))) or "plan"
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(location[-1]), _fields(location), n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(_fields(location))}"
            lines.append(f"{field}: unknown field; {remedy}")
        elif "setting" in problem.get("ctx", {}):
            lines.append(f"{field}.{problem['msg']}")
        elif problem["type"] == "missing":
            lines.append(f"{field}: this field is needed")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = f" (got {problem['input']!r:.80})" if location else ""
            lines.append(f"{field}: {message}{got}" if location else message)
    return "; ".join(dict.fromkeys(lines))
