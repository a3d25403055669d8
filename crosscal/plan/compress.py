"""The entries of the section `compress` of a plan. Any list in one is an axis of a sweep, which `crosscal.variants`
expands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from crosscal.plan.search import Alpha, Weights, as_mixtures
from crosscal.plan.settings import EMPTY, OF_A_MIXTURE, as_axis, checked_axes
from crosscal.plan.sources import Name


class Compress(BaseModel):
    """One entry of the sweep: a method, or `steps`, each a method; every field but `trace_normalised` may be a list.

    All further fields are settings of the method (`crosscal methods` lists them).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: Annotated[list[str] | None, BeforeValidator(lambda v: v if v is None else as_axis(v))] = None
    steps: list[dict[str, Any]] | None = None
    """Methods in order, with their settings; a step may have a `domain`, `alpha` or `mixture` of its own."""
    domain: Annotated[list[Name] | None, BeforeValidator(lambda v: v if v is None else as_axis(v))] = None
    alpha: Annotated[list[Alpha], BeforeValidator(as_axis)] = [0.5]
    """Weight of the domain; 1 - alpha is that of the general corpus. A tenth costs general text almost nothing. `auto`
    finds the weight that balances the two by layer losses on held-out text; {auto: {general_within: 0.02}} finds the
    best one for the domain that raises general perplexity by at most 2 %."""
    mixture: Annotated[list[Weights] | None, BeforeValidator(as_mixtures)] = None
    """Weights over any corpora, instead of `domain` and `alpha`; `auto` balances all corpora of the plan,
    {auto: {general: 1, legal: 2}} those named, legal counting twice."""
    upstream: Annotated[list[Literal["dense", "sequential"]], BeforeValidator(as_axis)] = ["dense"]
    """Layer inputs: the dense model's (cached), or recomputed after each compressed block as the published loops do."""
    trace_normalised: bool = False
    """Scale the Hessians of all corpora to the same trace, per site, before mixing."""
    fallback: Literal["keep-dense"] | None = None
    """Treatment of a matrix whose statistics cannot be solved; by default the run stops with the reason."""

    @model_validator(mode="before")
    @classmethod
    def _settings_are_axes(cls, data: Any) -> Any:
        """Turn settings into lists of validated values, with defaults; likewise those of each step."""
        if not isinstance(data, dict):
            return data
        if (data.get("method") is None) == (data.get("steps") is None):
            what = "this field is needed, or `steps`" if data.get("method") is None else "not beside `steps`"
            raise PydanticCustomError("method", "{setting}: {why}", {"setting": "method", "why": what})
        for name in ("method", "steps"):
            if data.get(name) == []:
                raise PydanticCustomError("setting", "{setting}: {why}", {"setting": name, "why": EMPTY})
        _check_weights(data, data.get("domain"))
        own = {name: value for name, value in data.items() if name in cls.model_fields}
        settings = {name: value for name, value in data.items() if name not in cls.model_fields}
        if data.get("steps") is None:
            return own | checked_axes(as_axis(data["method"]), settings)
        if settings:
            why = "a setting of a method stands in its step"
            raise PydanticCustomError("setting", "{setting}: {why}", {"setting": next(iter(settings)), "why": why})
        steps = enumerate(as_axis(data["steps"]))
        return own | {"steps": [_checked_step(number, step, data.get("domain")) for number, step in steps]}


def _check_weights(part: Mapping[str, Any], domain: Any) -> None:
    """Raise `PydanticCustomError` where `alpha` or `domain` would have no effect: beside a mixture, or alpha alone."""
    alpha, setting = part.get("alpha"), None
    is_given = alpha not in (None, [], [0.5])  # [0.5] stands in every entry of a plan that crosscal wrote
    if part.get("mixture") is not None:
        setting = "domain" if part.get("domain") is not None else "alpha" if is_given else None
        why = "not beside `mixture`, which has the weights of all corpora"
    elif is_given and domain is None and any(as_axis(alpha)):
        setting, why = "alpha", "the weight of a domain; add `domain`, the corpus that it weighs"
    if setting:
        raise PydanticCustomError("setting", "{setting}: {why}", {"setting": setting, "why": why})


def _checked_step(number: int, step: Any, domain: Any) -> dict[str, Any]:
    where = f"steps.{number}"
    if not isinstance(step, dict) or "method" not in step:
        why = "a step is a mapping with a `method`"
        raise PydanticCustomError("step", "{setting}: {why}", {"setting": where, "why": why})
    own = {name: value for name, value in step.items() if name in ("method", *OF_A_MIXTURE)}
    own["method"] = as_axis(step["method"])
    try:
        _check_weights(step, step.get("domain") or domain)
        return own | checked_axes(own["method"], {name: v for name, v in step.items() if name not in own})
    except PydanticCustomError as error:
        context = error.context or {}
        context = {"setting": f"{where}.{context['setting']}", "why": context["why"]}
        raise PydanticCustomError("step", "{setting}: {why}", context) from error
